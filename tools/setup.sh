#!/bin/sh
# Sets up what a make target needs. What is there already costs a fraction of a second.
#
#   tools/setup.sh PART...
#
#   python    build/venv with the packages of requirements.txt
#   cc        a C compiler                   sleef   the SLEEF vector maths library
#   cxx       a C++ compiler                 arm64   cross compiler and emulator for AArch64 (NEON)
#   lint      clang, clang-tidy, cppcheck    arm     the same for Cortex-M
#   wide      the same for 32-bit x86 and Arm, and for s390x, which is big-endian
#   compilers a newer Clang, to compare bits
#   fuzz      clang with libFuzzer
#   analyse   valgrind, scan-build, clang's sanitizers
#   coverage  clang-19 and its llvm-cov
#
# Missing system packages come through apt-get: as root, else with sudo. Where neither is allowed
# the exact command is printed and the status is 1.
set -eu
cd "$(dirname "$0")/.."

venv=build/venv
missing=

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

have() {
    command -v "$1" >/dev/null 2>&1
}

# includes HEADER COMPILER [FLAG...]: does that compiler find this header?
includes() {
    header=$1
    shift
    printf '#include <%s>\n' "$header" | "$@" -E -x c - >/dev/null 2>&1
}

# Does clang have libFuzzer and the sanitizers' libraries?
fuzzes() {
    printf 'int LLVMFuzzerTestOneInput(const void *, unsigned long);\nint LLVMFuzzerTestOneInput(%s)%s\n' \
        'const void *data, unsigned long size' '{ (void)data; (void)size; return 0; }' |
        clang -fsanitize=fuzzer,address,undefined -x c - -o /dev/null 2>/dev/null
}

# want PACKAGE...: adds them to what is missing, once each.
want() {
    for package; do
        case " $missing " in
            *" $package "*) ;;
            *) missing="$missing $package" ;;
        esac
    done
}

# The first Python that is new enough.
find_python() {
    for python in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            return 0
        fi
    done
    return 1
}

venv_is_current() {
    cmp -s requirements.txt "$venv/requirements.txt" && "$venv/bin/python" -c '' 2>/dev/null
}

# check PART: names the packages that it lacks. Tools are looked for, not packages, so that any
# compiler on the PATH will do.
check() {
    case $1 in
        python)
            if venv_is_current; then
                return 0
            elif ! find_python; then
                want python3 python3-venv
            elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
                want python3-venv
            fi ;;
        cc)
            have cc && includes stdio.h cc || want gcc libc6-dev ;;
        cxx)
            have g++ || want g++ ;;
        sleef)
            includes sleef.h cc || want libsleef-dev ;;
        arm64)
            have aarch64-linux-gnu-gcc || want gcc-aarch64-linux-gnu libc6-dev-arm64-cross
            includes stdio.h aarch64-linux-gnu-gcc || want libc6-dev-arm64-cross
            have qemu-aarch64 || want qemu-user ;;
        arm)
            have arm-none-eabi-gcc || want gcc-arm-none-eabi picolibc-arm-none-eabi
            includes stdio.h arm-none-eabi-gcc --specs=picolibc.specs ||
                want picolibc-arm-none-eabi
            have qemu-system-arm || want qemu-system-arm ;;
        wide)
            for target in i686-linux-gnu:i386 arm-linux-gnueabihf:armhf s390x-linux-gnu:s390x; do
                tool=${target%:*}
                library=libc6-dev-${target#*:}-cross
                have "$tool-gcc" || want "gcc-$tool" "$library"
                includes stdio.h "$tool-gcc" || want "$library"
            done
            have qemu-arm && have qemu-s390x || want qemu-user ;;
        lint)
            have clang && have clang++ || want clang
            have clang-tidy || want clang-tidy
            have cppcheck || want cppcheck
            includes omp.h clang -fopenmp || want libomp-dev ;;
        compilers)
            have clang-19 || want clang-19 ;;
        fuzz)
            fuzzes || want clang libclang-rt-14-dev ;;
        analyse)
            have valgrind || want valgrind
            have scan-build || want clang-tools
            printf 'int main(void){return 0;}' | clang -fsanitize=memory -x c - -o /dev/null \
                2>/dev/null || want clang libclang-rt-14-dev ;;
        coverage)
            have clang-19 || want clang-19
            have llvm-cov-19 || want llvm-19
            printf 'int main(void){return 0;}' | clang-19 -fprofile-instr-generate -x c - \
                -o /dev/null 2>/dev/null || want libclang-rt-19-dev ;;
        *)
            fail "no part '$1'; fix: one of python cc cxx sleef arm64 arm wide lint compilers fuzz" \
                "analyse coverage" ;;
    esac
}

check_all() {
    missing=
    for part; do
        check "$part"
    done
}

install_missing() {
    install="apt-get install -y --no-install-recommends$missing"
    have apt-get || fail "these tools are missing (as Debian names them):$missing;" \
        "there is no apt-get here. fix: install them with this system's own package manager"
    root=
    if [ "$(id -u)" != 0 ]; then
        root=sudo
        have sudo && { sudo -n true 2>/dev/null || [ -t 0 ]; } ||
            fail "system packages are missing and may not be installed from here." \
                "fix: sudo apt-get update && sudo $install"
    fi
    echo "setup: installing$missing"
    $root apt-get -qq update || echo "setup: apt-get update failed; trying with the old lists" >&2
    $root env DEBIAN_FRONTEND=noninteractive $install ||
        fail "apt-get could not install$missing (its reason is above)." \
            "fix: ${root:+$root }apt-get update && ${root:+$root }$install"
}

make_venv() {
    if venv_is_current; then
        return 0
    fi
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        find_python || fail "python3 >= 3.11 is needed and was not found." \
            "fix: install it and run again with PYTHON=/its/path"
        echo "setup: making $venv with $("$python" --version)"
        mkdir -p build
        "$python" -m venv --clear "$venv" ||
            fail "$python cannot make a virtual environment. fix: apt-get install python3-venv"
    fi
    echo "setup: installing the packages of requirements.txt into $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -r requirements.txt </dev/null ||
        fail "pip could not install the packages of requirements.txt (its reason is above)." \
            "fix: mend the network or the disk, then run the same target again"
    cp requirements.txt "$venv/requirements.txt"
}

check_all "$@"
if [ -n "$missing" ]; then
    install_missing
    check_all "$@"
    [ -z "$missing" ] || fail "installed, but still not found:$missing." \
        "fix: put them on the PATH (python3 has to be >= 3.11)"
fi
for part; do
    case $part in
        python) make_venv ;;
    esac
done
