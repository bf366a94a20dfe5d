"""The house itself: make targets, setup, what CI counts, and that rules of check.py can fail."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import check  # noqa: E402

TARGETS = ["demo", "demo-embedded", "test", "guard", "check", "bench", "bench-peers", "examples"]
TARGETS += ["headers", "wide"]
TARGETS += ["clean"]


def run(*command, **options):
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )


# ---- make ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["help"]], ids=["bare", "help"])
def test_make_lists_every_target(arguments):
    listed = run("make", *arguments, cwd=ROOT)
    assert listed.returncode == 0
    for target in TARGETS:
        assert re.search(rf"^ +make {target} +\w", listed.stdout, re.MULTILINE), target


def test_every_target_sets_up_before_it_runs():
    for target in set(TARGETS) - {"clean"}:
        lines = run("make", "--no-print-directory", "-n", target, cwd=ROOT).stdout.splitlines()
        assert lines[0].startswith("sh tools/setup.sh "), target


# ---- setup ---------------------------------------------------------------------------------------


class Machine:
    """A PATH of its own: some real tools, and stubs that write down how they were called."""

    def __init__(self, folder):
        self.root = folder / "checkout"
        self.bin = folder / "bin"
        self.log = folder / "log"
        self.bin.mkdir()
        (self.root / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "tools" / "setup.sh", self.root / "tools")
        (self.root / "requirements.txt").write_text("some==1.0\n")
        for tool in ("sh", "dirname", "cmp", "cp", "mkdir", "env"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.stub("id", "echo 1000")

    def stub(self, name, body="", path=None):
        file = (path or self.bin) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'#!/bin/sh\necho "{name} $*" >>"{self.log}"\n{body}\n')
        file.chmod(0o755)

    def stub_tools(self, *names):
        for name in names:
            self.stub(name)

    def setup(self, *parts):
        environment = {"PATH": str(self.bin)}
        return run("sh", "tools/setup.sh", *parts, cwd=self.root, env=environment)

    def calls(self):
        """What was called, but for `id`, which every question about root asks."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if not line.startswith("id ")]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


ARM = "gcc-arm-none-eabi picolibc-arm-none-eabi qemu-system-arm"


def test_setup_without_permission_prints_the_exact_command(machine):
    machine.stub("apt-get")
    refused = machine.setup("arm")
    assert refused.returncode == 1
    install = f"apt-get install -y --no-install-recommends {ARM}"
    assert f"fix: sudo apt-get update && sudo {install}\n" in refused.stdout
    assert machine.calls() == []


def test_setup_where_sudo_asks_for_a_password_prints_the_command_too(machine):
    machine.stub("apt-get")
    machine.stub("sudo", "exit 1")
    refused = machine.setup("arm")
    assert refused.returncode == 1
    assert "fix: sudo apt-get update && sudo apt-get install" in refused.stdout
    assert machine.calls() == ["sudo -n true"]


def install_stub(tools):
    """An apt-get whose install makes the tools appear."""
    lines = [f'printf "#!/bin/sh\\n" >"$BIN/{tool}"; chmod +x "$BIN/{tool}"' for tool in tools]
    return 'BIN=$(dirname "$0"); case "$*" in *install*)\n' + "\n".join(lines) + "\n;; esac"


ARM_TOOLS = ["arm-none-eabi-gcc", "qemu-system-arm"]


@pytest.mark.parametrize("root", [True, False], ids=["root", "sudo"])
def test_setup_installs_what_is_missing_and_only_that(machine, root):
    (machine.bin / "chmod").symlink_to(shutil.which("chmod"))
    machine.stub("apt-get", install_stub(ARM_TOOLS))
    if root:
        machine.stub("id", "echo 0")
    else:
        machine.stub("sudo", '[ "$1" = -n ] || "$@"')
    first = machine.setup("arm")
    assert first.returncode == 0, first.stdout
    apt = [call for call in machine.calls() if call.startswith("apt-get")]
    assert apt == ["apt-get -qq update", f"apt-get install -y --no-install-recommends {ARM}"]
    machine.log.unlink()
    second = machine.setup("arm")
    assert (second.returncode, second.stdout, machine.calls()) == (0, "", [])


def test_setup_says_so_when_apt_fails(machine):
    machine.stub("id", "echo 0")
    machine.stub("apt-get", "exit 100")
    failed = machine.setup("sleef")
    assert failed.returncode == 1
    assert "could not install libsleef-dev" in failed.stdout
    assert "fix: apt-get update && apt-get install -y" in failed.stdout


def test_setup_says_so_when_an_installed_tool_is_still_not_found(machine):
    machine.stub("id", "echo 0")
    machine.stub("apt-get")
    failed = machine.setup("lint")
    assert failed.returncode == 1
    assert "still not found: clang clang-tidy cppcheck libomp-dev" in failed.stdout


def test_setup_without_apt_names_what_is_missing(machine):
    failed = machine.setup("arm64")
    assert failed.returncode == 1
    assert "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user; there is no" in failed.stdout


def test_setup_refuses_a_part_it_does_not_have(machine):
    failed = machine.setup("fpga")
    assert failed.returncode == 1
    assert "no part 'fpga'; fix: one of python" in failed.stdout


def test_setup_asks_for_venv_where_debian_left_it_out(machine):
    machine.stub("apt-get")
    machine.stub("python3", 'case "$*" in *ensurepip*) exit 1 ;; esac')
    refused = machine.setup("python")
    assert refused.returncode == 1
    assert "--no-install-recommends python3-venv\n" in refused.stdout


def test_setup_keeps_a_virtual_environment_until_requirements_change(machine):
    pip = "python -m pip install --quiet --disable-pip-version-check -r requirements.txt"
    machine.stub("python3")
    machine.stub("python", path=machine.root / "build" / "venv" / "bin")
    assert machine.setup("python").returncode == 0
    assert pip in machine.calls()
    machine.log.unlink()
    assert machine.setup("python").stdout == ""
    assert pip not in machine.calls()
    (machine.root / "requirements.txt").write_text("some==1.1\n")
    assert machine.setup("python").returncode == 0
    assert pip in machine.calls()


def test_setup_tries_again_after_a_failed_pip(machine):
    machine.stub("python3")
    venv = machine.root / "build" / "venv"
    machine.stub("python", 'case "$*" in *"pip install"*) exit 1 ;; esac', path=venv / "bin")
    failed = machine.setup("python")
    assert failed.returncode == 1
    assert "pip could not install the packages of requirements.txt" in failed.stdout
    assert not (venv / "requirements.txt").exists()


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    packages = [line.split("#")[0].strip() for line in lines]
    packages = [package for package in packages if package]
    assert len(packages) > 5
    for package in packages:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", package), package


# ---- what CI counts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "check_", "line", "status"),
    [
        ("@echo '==== 3 passed in 0.10s ===='", "@echo '4 passed, 0 failed'", (7, 0), 0),
        ("@echo '= 1 failed, 2 passed in 3.00s ='; false", "@echo '4 passed, 0 failed'", (6, 1), 1),
        ("@echo '==== 3 passed in 0.10s ===='; false", "@echo '4 passed, 0 failed'", (7, 1), 1),
        ("@false", "@false", (0, 2), 1),
        ("@echo '= 3 passed, 2 errors in 1.0s ='; false", "@echo '1 passed, 5 failed'; false",
         (4, 7), 1),
    ],
    ids=["all well", "a failed test", "a failed example", "a crash", "errors"],
)  # fmt: skip
def test_ci_counts_every_failure(tmp_path, test, check_, line, status):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "Makefile").write_text(f"test:\n\t{test}\ncheck:\n\t{check_}\n")
    # Not under this make: its flags are not for the inner one.
    environment = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    done = run(".ci/run", cwd=tmp_path, env=environment)
    assert done.stdout.splitlines()[-1] == "{} passed, {} failed".format(*line)
    assert done.returncode == status


# ---- check.py: each rule can fail ----------------------------------------------------------------


def object_of(tmp_path, code):
    source = tmp_path / "a.c"
    source.write_text(code)
    target = tmp_path / "a.o"
    subprocess.run(["cc", "-O1", "-c", source, "-o", target], check=True)
    return target


CLEAN = """\
#include <string.h>
static const int hl_table[] = {1, 2, 3};
const char *hl_good(char *to, const char *from, int i);
const char *hl_good(char *to, const char *from, int i)
{
    static const char *const words[] = {"a", "b", "c"};
    memcpy(to, from, 1000);
    return words[hl_table[i]];
}
"""


def test_a_clean_object_has_no_faults(tmp_path):
    assert check.object_faults(object_of(tmp_path, CLEAN), check.MEMORY) == []


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("int good(void) { return 1; }", "defines good (T) without hl_"),
        (
            "static __attribute__((noinline)) int own(int i) { return i * i; }\n"
            "int hl_f(int i) { return own(i) + own(i + 1); }",
            "defines own (t) without hl_",
        ),
        ("int hl_count = 3;", "4 bytes of .data"),
        ("static int hl_n; int hl_f(void) { return hl_n++; }", "4 bytes of .bss"),
        ("int hl_f(void) { static int n; return n++; }", "4 bytes of .bss"),
        ("_Thread_local int hl_n;", "4 bytes of .tbss"),
        ("int puts(const char *); int hl_f(void) { return puts(\"\"); }", "wants puts"),
        (
            "extern int hl_n; __attribute__((constructor)) void hl_f(void) { hl_n = 1; }",
            "8 bytes of .init_array",
        ),
    ],
)  # fmt: skip
def test_object_faults_are_found(tmp_path, code, fault):
    assert fault in check.object_faults(object_of(tmp_path, code), check.MEMORY)


def test_run_time_choice_is_allowed_only_where_it_was_asked_for(tmp_path):
    code = 'int hl_f(void) { return __builtin_cpu_supports("avx2"); }'
    made = object_of(tmp_path, code)
    assert check.object_faults(made, check.RUN_TIME_CHOICE) == []
    assert "wants __cpu_model" in check.object_faults(made, check.MEMORY)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x" * 101 + "\n", "line 1: 101 columns"),
        ("a\nb \n", "line 2: trailing blanks"),
        ("\ta\n", "line 1: a tab"),
        ("a\n\n\nb\n", "two blank lines together"),
        ("a", "does not end with one line break"),
        ("a\n\n", "does not end with one line break"),
    ],
)
def test_layout_faults_are_found(text, fault):
    assert fault in check.layout_faults(text)


def test_a_tidy_text_has_no_layout_faults():
    assert check.layout_faults("x" * 100 + "\n\nb\n") == []


@pytest.mark.parametrize(
    "line",
    ["see /wo" + "rk/notes", "from py" + "pi.org", "files.python" + "hosted.org", "/ro" + "ot/x"],
)
def test_forbidden_words_are_found(line):
    assert check.forbidden_lines(f"fine\n{line}\n") == [f"2: {line}"]


def test_ordinary_words_are_not_forbidden():
    fine = "a workspace per worker; build/work/x; docs/work; crates of memory; the network"
    assert check.forbidden_lines(fine) == []


def test_the_words_rule_reads_this_project():
    names = {path.relative_to(ROOT).as_posix() for path in check.project_files()}
    assert {"Makefile", "tests/check.py", "gen/__init__.py", ".ci/run"} <= names
    assert not any(name.startswith("build/") for name in names)


README = (
    "# x\n```c\nold\n```\nA 20-line example\n\n```sh\ncc\n```\n```c\nint x;\n```\n```c\ny\n```\n"
)


def test_the_readme_example_is_the_block_that_is_announced():
    assert check.readme_example(README) == "int x;\n"


@pytest.mark.parametrize("text", ["", "A 20-line example\n", "```c\nint x;\n```\n"])
def test_a_readme_without_its_example_is_wrong(text):
    with pytest.raises(check.Wrong, match="no ```c block"):
        check.readme_example(text)


def test_the_deepest_frames_are_named():
    usage = "a.h:1:2:hl_a\t64\tstatic\na.h:2:2:hl_b_avx2\t4096\tdynamic,bounded\n"
    assert check.deepest_frame(usage) == "a function: avx2 4096, scalar 64"


@pytest.mark.parametrize(
    "usage",
    [
        "",
        "a.h:1:2:hl_a\t1025\tstatic\n",
        "a.h:1:2:hl_a_avx512.part.0\t4097\tstatic\n",
        "a.h:1:2:hl_a_amx\t8193\tstatic\n",
        "a.h:1:2:void hl_a_avx2(const hl_plan*)\t4097\tstatic\n",
        "a.h:1:2:_ZL6hl_b_aPK7hl_amx\t1025\tstatic\n",
        "a.h:1:2:hl_a\t16\tdynamic\n",
    ],
)
def test_deep_and_dynamic_frames_are_wrong(usage):
    with pytest.raises(check.Wrong):
        check.deepest_frame(usage)


GRAPH = """\
int hl_f(int i);
int hl_g(int i);
__attribute__((noinline)) static int hl_h(int i) { volatile int a[%d]; a[i] = i; return a[i]; }
int hl_g(int i) { %s return hl_h(i) + hl_h(i + 1); }
int hl_f(int i) { return hl_g(i) + hl_g(i + 1); }
"""


def graph_of(tmp_path, words, more=""):
    source = tmp_path / "a.c"
    source.write_text(GRAPH % (words, more))
    subprocess.run(
        ["gcc", "-O1", "-fno-inline", check.CALL_GRAPH, "-c", source, "-o", tmp_path / "a.o"],
        check=True,
    )
    return (tmp_path / "a.ci").read_text()


def test_the_deepest_call_is_the_sum_of_its_functions(tmp_path):
    said = check.deepest_calls(graph_of(tmp_path, 200))
    assert 800 < int(re.fullmatch(r"a call: scalar (\d+)", said)[1]) < 1024
    with pytest.raises(check.Wrong, match="the limit is 3072: hl_f > hl_g > hl_h"):
        check.deepest_calls(graph_of(tmp_path, 800))


@pytest.mark.parametrize("more", ["", "if (i > 9) return 1 + hl_f(i / 2);"])
def test_calls_are_found_in_code_too(tmp_path, more):
    source = tmp_path / "a.c"
    source.write_text(GRAPH % (200, more))
    made = [tmp_path / "a.o", tmp_path / "a.su"]
    flags = ["-O1", "-fno-inline", check.STACK_USAGE, check.CALL_GRAPH]
    subprocess.run(["gcc", *flags, "-c", source, "-o", made[0]], check=True)
    code = check.execute(["objdump", "-dr", "--no-show-raw-insn", str(made[0])])
    graph = (tmp_path / "a.ci").read_text()
    if more:
        with pytest.raises(check.Wrong, match="recursion: "):
            check.deepest_calls_in_code(code, made[1].read_text())
        return
    found, same = (
        int(re.fullmatch(r"a call: scalar (\d+)", said)[1])
        for said in (
            check.deepest_calls_in_code(code, made[1].read_text()),
            check.deepest_calls(graph),
        )
    )
    assert found == same + 3 * 8  # gcc counts return addresses by itself


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("if (i > 9) return 1 + hl_f(i / 2);", "recursion: "),
        ("if (i > 9) return 1 + hl_g(i / 2);", "recursion: hl_g > hl_g"),
        ("i += ((int (*)(int))(long)i)(1);", "hl_g calls what a pointer says"),
    ],
)
def test_recursion_and_calls_by_pointer_are_wrong(tmp_path, more, fault):
    with pytest.raises(check.Wrong, match=fault):
        check.deepest_calls(graph_of(tmp_path, 4, more))


def test_public_functions_are_those_declared_with_the_api_macro():
    text = "HL_API int hl_a(void);\nHL_API const char *hl_b(\n    int x);\nstatic int hl_c(void);\n"
    assert check.public_functions(text + text) == ["hl_a", "hl_b"]


def test_a_command_that_fails_is_wrong_and_shown():
    with pytest.raises(check.Wrong, match=r"\$ sh -c echo oops; exit 3\noops\nstatus 3"):
        check.execute(["sh", "-c", "echo oops; exit 3"])


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "CACHE", tmp_path)
    return tmp_path


def test_a_pass_is_remembered_until_what_it_depends_on_changes(memory):
    runs = []

    def attempt(*depends):
        def once():
            runs.append(depends)
            return "remark"

        one = check.Check("name", once, depends)
        assert check.attempt(one) == (one, None, "remark")

    attempt("a", "b")
    attempt("a", "b")
    assert len(runs) == 1
    attempt("a", "c")
    attempt("ab", "")
    assert len(runs) == 3


def test_a_failure_and_a_check_without_a_key_are_never_remembered(memory):
    runs = []

    def wrong():
        runs.append(1)
        raise check.Wrong("bad")

    failing = check.Check("name", wrong, ("a",))
    assert check.attempt(failing)[1] == "bad"
    assert check.attempt(failing)[1] == "bad"
    fresh = check.Check("name", lambda: str(runs.append(1) or ""), None)
    check.attempt(fresh)
    check.attempt(fresh)
    assert len(runs) == 4
    assert not list(memory.iterdir())


def test_the_closing_line_counts_failures(memory, monkeypatch, capsys):
    def good():
        yield check.Check("one", lambda: "", None)
        yield check.Check("two", lambda: "", None)

    def bad():
        def run_():
            raise check.Wrong("no")

        yield check.Check("three", run_, None)

    def broken():
        raise FileNotFoundError("gone")
        yield

    monkeypatch.setattr(check, "WORK", memory)
    monkeypatch.setattr(check, "RULES", [good])
    assert check.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 0 failed"
    monkeypatch.setattr(check, "RULES", [good, bad, broken])
    assert check.main([]) == 1
    out = capsys.readouterr().out
    assert "FAIL three" in out and "FAIL broken: FileNotFoundError: gone" in out
    assert out.splitlines()[-1] == "2 passed, 2 failed"


def test_the_rule_for_two_generator_versions_can_fail(tmp_path, monkeypatch):
    """A header that accepts any other version beside it."""
    careless = "#ifndef HL_COMMON\n#define HL_COMMON 1\n#elif HL_COMMON != 1\n#endif\n"
    (tmp_path / "a.h").write_text(careless)
    monkeypatch.setattr(check, "INCLUDE", tmp_path)
    monkeypatch.setattr(check, "WORK", tmp_path / "work")
    monkeypatch.setattr(check, "header_names", lambda: ["a", "a"])
    (rule,) = check.versions_apart()
    with pytest.raises(check.Wrong, match="were accepted"):
        rule.run()


# ---- the package ---------------------------------------------------------------------------------


def test_the_package_is_single_sourced_and_runs_as_headlight():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"headlight": "gen.__main__:main"}
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gen.__version__"}
    assert "version" not in project["project"]
