"""`make check`: what must hold of the product beyond right numbers. One function a rule.

A rule yields checks. A check that passed is remembered under build/cache by everything that its
verdict depends on, so that a second run tries only what changed. The last line is
"N passed, N failed".
"""

import argparse
import functools
import hashlib
import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "include"
WORK = ROOT / "build" / "check"
CACHE = ROOT / "build" / "cache" / "check"

STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wsign-conversion", "-Wshadow"]
STRICT += ["-Wundef", "-Wcast-qual", "-Wdouble-promotion", "-Wvla", "-Werror"]
STRICT_C = ["-Wstrict-prototypes", "-Wmissing-prototypes"]
STANDARDS_BETWEEN = ["c11", "c17", "c++11"]
LEVELS = ["-O0", "-O2", "-O3"]
CORTEX_M4F = ["-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"]

COLUMNS = 100
STACK_BYTES_UNOPTIMISED = 131072  # -O0 keeps every vector of an unrolled tile in memory
CALL_BYTES_UNOPTIMISED = 163840  # of a whole call; neither is promised to users
STACK_USAGE = "-fstack-usage"  # writes what inspect_export reads
CALL_GRAPH = "-fcallgraph-info=su"  # the same of gcc
RED_ZONE = 128  # below its stack a function of x86-64 may use so much that neither of them counts
COMPILE_SECONDS = 6.0
COMPILE_READINGS = 4

# What an object may want from others. A compiler makes the first two of loops and copies by itself.
MEMORY = "memcpy|memset"
RUN_TIME_CHOICE = f"{MEMORY}|__cpu_model|__cpu_indicator_init"
# In C++ an exception that would leave a parallel region ends the program: the last three.
OPENMP = r"GOMP_\w+|omp_\w+|__kmpc_\w+|__gxx_personality_v0|_ZSt9terminatev|__cxa_begin_catch"
CORTEX_M = rf"{MEMORY}|__aeabi_\w+"


class Wrong(Exception):
    """A check that failed, with what there is to say about it."""


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[], str]  # returns a remark, often empty; raises Wrong
    depends: tuple[str, ...] | None  # texts that decide the verdict; None: never remembered


# ---- tools ---------------------------------------------------------------------------------------


def execute(command: list[str], where: Path = ROOT) -> str:
    """Runs it; its output, or Wrong with the command and the start of what it said."""
    done = subprocess.run(
        command,
        cwd=where,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = "\n".join(done.stdout.splitlines()[:30])
        raise Wrong(f"$ {' '.join(command)}\n{said}\nstatus {done.returncode}")
    return done.stdout


@cache
def version(tool: str) -> str:
    return execute([tool, "--version"])


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def catalogue() -> dict:
    """The shipped headers by name, as the generator knows them."""
    sys.path.insert(0, str(ROOT))
    from gen.spec import load_catalogue

    return {header.name: header for header in load_catalogue()}


def header_names() -> list[str]:
    return list(catalogue())


def header_text(name: str) -> str:
    return text_of(INCLUDE / f"{name}.h")


def isas(name: str) -> set[str]:
    return {isa for kernel in catalogue()[name].kernels for isa in kernel.isa}


def operator_of(name: str) -> str:
    return catalogue()[name].kernels[0].op


def samples() -> set[str]:
    """The first header with the most instruction sets, the first for microcontrollers, the first
    of gradients, whose pages are not those of the others. All headers come from the same pages:
    these are compiled with every pair of standard and level, the others with each standard and each
    level once."""
    names = header_names()
    most = max(names, key=lambda name: len(isas(name)))
    plain = [name for name in names if isas(name) == {"scalar"}]
    gradients = [name for name in names if catalogue()[name].kernels[0].backward]
    return {most, *plain[:1], *gradients[:1]}


def write(name: str, text: str) -> Path:
    """A source file under build/check; untouched if it says that already."""
    path = WORK / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def compiler_for(compiler: str, standard: str) -> list[str]:
    plus = {"gcc": "g++", "clang": "clang++"}
    language = standard.startswith("c++")
    flags = STRICT if language else STRICT + STRICT_C
    return [plus[compiler] if language else compiler, f"-std={standard}", *flags]


def suffix(standard: str) -> str:
    return ".cc" if standard.startswith("c++") else ".c"


# ---- C that uses a header ------------------------------------------------------------------------

USER = """\
{include}

typedef void (*any_function)(void);

/* Not static: the compiler has to build every function that is named here. */
any_function all_of_them[] = {{
{functions}
}};

#ifndef __cplusplus
int main(void);
#endif

int main(void)
{{
    int wrong = 0;
{calls}
    return wrong;
}}
"""

# Without arguments plan has to refuse, and to say why.
CALL = """\
    {{
        static {plan} plan;
        static hl_error error;
        static char text[160];
        wrong += {kernel}_plan(&plan, NULL, &error) != HL_ERR_NULL;
        wrong += hl_error_text(&error, text, sizeof text) != text || text[0] == 0;
    }}
"""
PLAN = re.compile(r"^HL_API hl_status (\w+)_plan\(\s*(\w+) \*plan,", re.MULTILINE)


def public_functions(text: str) -> list[str]:
    """Every function that a header declares with HL_API."""
    return list(dict.fromkeys(re.findall(r"^HL_API [^;{(]*?(\w+)\(", text, re.MULTILINE)))


def user_source(name: str, start: str = "") -> str:
    """C and C++ that names every function of a header and calls what can be called."""
    text = header_text(name)
    plans = dict.fromkeys(PLAN.findall(text))
    calls = [CALL.format(kernel=kernel, plan=plan) for kernel, plan in plans]
    if not calls:
        raise Wrong(f"{name}.h declares no ..._plan")
    functions = [f"    (any_function){function}," for function in public_functions(text)]
    return USER.format(
        include=start + include_line(name),
        functions="\n".join(functions),
        calls="".join(calls).rstrip("\n"),
    )


def include_line(name: str) -> str:
    return f'#include "{name}.h"'


EXPORT = "#define HL_API extern\n#define HL_IMPLEMENTATION\n"
DECLARE = "#define HL_API extern\n"


def static_user(name: str, standard: str = "c99") -> Path:
    """The header as it is used by default, by a file that uses all of it."""
    return write(f"{name}_static{suffix(standard)}", user_source(name))


def exporter(name: str, standard: str = "c99") -> Path:
    """The one file of a program that holds the header's code."""
    return write(f"{name}_export{suffix(standard)}", f"{EXPORT}{include_line(name)}\n")


def declarer(name: str, standard: str = "c99") -> Path:
    """Another file of that program, which calls it."""
    return write(f"{name}_declare{suffix(standard)}", user_source(name, DECLARE))


# ---- what an object file contains ----------------------------------------------------------------


def symbols(path: Path, nm: str = "nm") -> list[tuple[str, str]]:
    """(name, type letter) of every symbol."""
    rows = (line.split() for line in execute([nm, "--format=posix", str(path)]).splitlines())
    return [(row[0], row[1]) for row in rows if len(row) > 1]


def sections(path: Path, size: str = "size") -> dict[str, int]:
    rows = (line.split() for line in execute([size, "-A", str(path)]).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 3 and row[1].isdigit()}


MADE_BY_COMPILER = re.compile(
    r"[.$].*"  # labels, outlined regions, Arm's mapping symbols
    r"|CSWTCH\..*|switch\.table\..*"  # tables of a switch
    r"|_GLOBAL_OFFSET_TABLE_|__clang_call_terminate"
    r"|GCC_except_table\d+|DW\.ref\.\w+"  # C++: around a parallel region
)


def is_ours(symbol: str, kind: str, prefix: str) -> bool:
    """With the prefix, as C or C++ spells it; or a static inside a function (r, d: "words.0")."""
    if kind in "rd" and re.fullmatch(r"\w+\.\d+", symbol):
        return True
    return re.match(rf"(_Z+L?\d+)?{prefix}_", symbol) is not None


def object_faults(path: Path, allowed: str, prefix: str = "hl", tools: str = "") -> list[str]:
    """Names without our prefix, what the object wants from others, data that can change."""
    faults = []
    for symbol, kind in symbols(path, f"{tools}nm"):
        if MADE_BY_COMPILER.fullmatch(symbol):
            continue
        if kind in "Uw":
            if not re.fullmatch(allowed, symbol):
                faults.append(f"wants {symbol}")
        elif not is_ours(symbol, kind, prefix):
            faults.append(f"defines {symbol} ({kind}) without {prefix}_")
    for section, size in sections(path, f"{tools}size").items():
        # .data.rel.ro: constants that hold addresses, fixed when the program is loaded.
        # .data.DW.ref.*: where clang's C++ keeps the address of its library's unwinder.
        constant = r"\.rel\.ro|\.DW\.ref\."
        changeable = re.match(rf"\.(data|bss|tdata|tbss|init_array|ctors)(?!{constant})", section)
        if changeable and size:
            faults.append(f"{size} bytes of {section}")
    return faults


def inspect(path: Path, allowed: str, prefix: str = "hl", tools: str = "") -> str:
    faults = object_faults(path, allowed, prefix, tools)
    if faults:
        raise Wrong("\n".join([f"{path.name}:", *faults[:20]]))
    return ""


def allowed_undefined(name: str) -> str:
    return RUN_TIME_CHOICE if len(isas(name)) > 1 else MEMORY


# ---- the rules -----------------------------------------------------------------------------------


def same_bytes() -> Iterator[Check]:
    """include/ is what the generator writes, to the byte."""

    def run() -> str:
        execute([sys.executable, "-m", "gen", "check"])
        return ""

    yield Check("python -m gen check", run, None)


def build(label: str, name: str, command: list[str], sources: list[Path], after=None) -> Check:
    """Compiles the sources with a header in silence, then hands the result to after(path)."""
    # With the process in its name, so that two runs of this file do not meet.
    result = WORK / re.sub(r"[^\w+]", "-", f"{os.getpid()} {label}")

    def run() -> str:
        execute([*command, f"-I{INCLUDE}", *map(str, sources), "-o", str(result)])
        try:
            return after(result) if after else ""
        finally:
            result.unlink()

    texts = (header_text(name), *map(text_of, sources))
    return Check(label, run, (*texts, " ".join(command), version(command[0])))


def strict_compiles() -> Iterator[Check]:
    """Silent as it is used by default, all static: warnings of a language come from its standard,
    those of optimisation from the level. The first and the last standard at -O0 are in linked,
    gcc's -O2 is in compile_time, clang's in exported."""
    for name, compiler in itertools.product(header_names(), ["gcc", "clang"]):
        for standard in STANDARDS_BETWEEN:
            source = static_user(name, standard)
            command = [*compiler_for(compiler, standard), "-fsyntax-only", f"-I{INCLUDE}"]
            label = f"{name} {compiler} {standard}"
            yield parse(label, (name,), [*command, str(source)], source)
        tried = [("c99", "-O3"), ("c++17", "-O2"), ("c++17", "-O3")] if name in samples() else []
        for standard, level in tried:
            command = [*compiler_for(compiler, standard), level, "-c"]
            label = f"{name} {compiler} {standard} {level}"
            yield build(label, name, command, [static_user(name, standard)])


def compile_time() -> Iterator[Check]:
    """A header costs its user less than 6 seconds of gcc -O2, which is silent about it. What else
    the machine does can only lengthen a reading, so that the least of a few counts."""
    for name in header_names():
        source = static_user(name)
        command = [*compiler_for("gcc", "c99"), "-O2", f"-I{INCLUDE}"]
        command += ["-c", str(source), "-o", os.devnull]

        def run(command=command) -> str:
            # Another process measures its child, so that this one's other children do not count.
            for _ in range(COMPILE_READINGS):
                seconds = float(execute([sys.executable, __file__, "--time", *command]))
                if seconds <= COMPILE_SECONDS:
                    break
            else:
                raise Wrong(f"{seconds:.1f} s of processor time, more than {COMPILE_SECONDS}")
            return f"{seconds:.1f} s of processor time"

        depends = (header_text(name), text_of(source), " ".join(command), version("gcc"))
        yield Check(f"{name} gcc -O2", run, depends)


def print_processor_time(command: list[str]) -> int:
    execute(command)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(used.ru_utime + used.ru_stime)
    return 0


def exported() -> Iterator[Check]:
    """The same with HL_API and HL_IMPLEMENTATION: silent, only our names in the object, and little
    stack, never an amount that depends on data. -O0 is in linked, -O3 in openmp."""
    for name in header_names():
        tried = [("gcc", "c99", "-O2"), ("clang", "c99", "-O2")]
        if name in samples():
            tried += [("gcc", "c99", level) for level in ("-O1", "-Os")] + [("clang", "c99", "-O3")]
            tried += itertools.product(["gcc", "clang"], ["c++17"], ["-O2", "-O3"])
        for compiler, standard, level in tried:
            yield export_check(name, standard, compiler, [level], allowed_undefined(name))


def openmp() -> Iterator[Check]:
    """-fopenmp brings no warning, and no name but those of OpenMP's own library; in C++ also what
    ends the program when an exception leaves a parallel region: clang takes assembly, of tiles for
    example, for something that may throw. A header that is no sample has one compiler, in turn."""
    for number, name in enumerate(header_names()):
        tried = [("gcc", "c99", "-O3"), ("clang", "c++17", "-O0")]
        if name not in samples():
            tried = tried[number % 2 :][:1]
        else:
            tried += itertools.product(["gcc", "clang"], ["c99", "c++17"], ["-O2"])
        for compiler, standard, level in tried:
            allowed = f"{allowed_undefined(name)}|{OPENMP}"
            yield export_check(name, standard, compiler, [level, "-fopenmp"], allowed)


def export_check(name: str, standard: str, compiler: str, flags: list[str], allowed: str) -> Check:
    command = [*compiler_for(compiler, standard), *flags, STACK_USAGE, "-c"]
    command += [CALL_GRAPH] if compiler == "gcc" else []
    label = f"{name} exported {compiler} {standard} {' '.join(flags)}"

    def after(made: Path) -> str:
        deepest = inspect_export(made, flags[0], allowed)
        return deepest if standard == "c99" and flags == ["-O2"] else ""

    return build(label, name, command, [exporter(name, standard)], after)


def inspect_export(made: Path, level: str, allowed: str, tools: str = "", only: str = "") -> str:
    """Names and stack of an object that was compiled with STACK_USAGE, and CALL_GRAPH if that was
    asked for; the deepest function and call. only: an instruction set that all of it may use."""
    usage = made.with_name(f"{made.name}.su")
    graph = made.with_name(f"{made.name}.ci")
    try:
        inspect(made, allowed, tools=tools)
        measured = usage.read_text(encoding="utf-8")
        said = deepest_frame(measured, level, only)
        if graph.exists():
            return f"{said}; {deepest_calls(graph.read_text(encoding='utf-8'), level, only)}"
        code = execute(["objdump", "-dr", "--no-show-raw-insn", str(made)]) if not tools else ""
        if "file format elf64-x86-64" not in code or "_Z" in measured:
            return said  # another processor, or C++, of which another compiler's graph says enough
        return f"{said}; {deepest_calls_in_code(code, measured, level, only)}"
    finally:
        usage.unlink()
        graph.unlink(missing_ok=True)


@cache
def known_isas() -> dict:
    """Instruction sets by name, as the generator knows them."""
    catalogue()
    from gen.isa import ISAS

    return ISAS


def stack_limit(promised: int, level: str, unoptimised: int = STACK_BYTES_UNOPTIMISED) -> int:
    """What a header promises is for -O1, -O2 and -Os."""
    return {"-O0": unoptimised, "-O3": 2 * promised}.get(level, promised)


OF_ISA = re.compile(r"_(neon|avx2|avx512|amx)(?=\.|$)")


def isa_of(function: str, only: str = "") -> str:
    """The instruction set that a function is compiled for, by its name; `only` where the whole
    file is compiled for that."""
    mangled = re.match(r"_ZL?(\d+)", function)
    if mangled:
        function = function[mangled.end() :][: int(mangled[1])]
    found = OF_ISA.search(function.split("(")[0])  # C++ may name parameters
    return found[1] if found else only or "scalar"


def deepest_frame(usage: str, level: str = "-O2", only: str = "") -> str:
    """Reads what -fstack-usage wrote; the deepest function of each instruction set, or Wrong."""
    rows = [line.split("\t") for line in usage.splitlines()]  # file:line:column:function, bytes
    frames = [(int(row[1]), re.sub(r"^[^:]*:\d+:(\d+:)?", "", row[0]), row[2]) for row in rows]
    if not frames:
        raise Wrong("no function was measured")
    # "bounded": the frame is realigned by a known amount and still has a largest size.
    faults = []
    deepest: dict[str, int] = {}
    for size, function, kind in frames:
        isa = isa_of(function, only)
        limit = stack_limit(known_isas()[isa].frame_bytes, level)
        deepest[isa] = max(deepest.get(isa, 0), size)
        if size > limit or kind not in ("static", "dynamic,bounded"):
            faults.append(f"{function}: {size} bytes, {kind}; the limit is {limit}, static")
    if faults:
        raise Wrong("\n".join(faults[:20]))
    return "a function: " + ", ".join(f"{isa} {deepest[isa]}" for isa in sorted(deepest))


NODE = re.compile(r'node: \{ title: "([^"]*)" label: "([^"]*)"')
EDGE = re.compile(r'edge: \{ sourcename: "([^"]*)" targetname: "([^"]*)"')


def deepest_calls(graph: str, level: str = "-O2", only: str = "") -> str:
    """Reads what -fcallgraph-info=su wrote; the stack of the deepest call on each instruction set,
    or Wrong: where it is past its limit, where a function calls itself, over others too, or one
    whose name is not known. What a function of another object takes (memcpy) is not in it."""
    labels = dict(NODE.findall(graph))
    size = {title: re.search(r"(\d+) bytes", label) for title, label in labels.items()}
    own = {title: int(found[1]) for title, found in size.items() if found}
    isas_ = {title: isa_of(labels[title].split("\\n")[0], only) for title in own}
    calls: dict[str, list[str]] = {}
    for source, target in EDGE.findall(graph):
        if target == "__indirect_call":
            raise Wrong(f"{source} calls what a pointer says")
        calls.setdefault(source, []).append(target)
    return deepest_of(own, isas_, calls, level, only)


IN_CODE = re.compile(
    r"^[0-9a-f]+ <(?P<start>[^>]+)>:$"
    r"|\s(?P<how>call|jmp)q?\s+(?:[0-9a-f]+ <(?P<near>[^>+]+)>|(?P<pointer>\*.*))$"
    r"|R_X86_64_(?:PLT|PC)32\s+(?P<far>\w+)-0x4$",
    re.MULTILINE,
)


def deepest_calls_in_code(code: str, usage: str, level: str = "-O2", only: str = "") -> str:
    """The same from what objdump -dr says of x86-64 code, for a compiler that writes no graph; its
    figures of a function are without the return address."""
    own = {}
    for line in usage.splitlines():
        place, size, _ = line.split("\t")
        own[re.sub(r"^[^:]*:\d+:(\d+:)?", "", place)] = int(size) + 8
    calls: dict[str, list[str]] = {}
    within = ""
    for found in IN_CODE.finditer(code):
        if found["start"]:
            within = found["start"]
        elif found["pointer"] and found["how"] == "call":
            raise Wrong(f"{within} calls what a pointer says")
        elif (target := found["near"] or found["far"]) in own and (
            target != within or found["how"] == "call"  # a jump to its own start is a loop
        ):
            calls.setdefault(within, []).append(target)
    isas_ = {function: isa_of(function, only) for function in own}
    return deepest_of(own, isas_, calls, level, only)


def deepest_of(
    own: dict[str, int], isas_: dict[str, str], calls: dict[str, list[str]], level: str, only: str
) -> str:
    """The deepest call on each instruction set, or Wrong."""
    if not own:
        raise Wrong("no function was measured")
    found = {}
    for isa in sorted(set(isas_.values())):
        words = {"scalar", isa, known_isas()[isa].words}
        reached = [title for title in own if only or isas_[title] in words]
        size_of, path = deepest_path(reached, own, calls)
        size_of += RED_ZONE
        limit = stack_limit(known_isas()[isa].stack_bytes, level, CALL_BYTES_UNOPTIMISED)
        if size_of > limit:
            raise Wrong(f"{isa}: {size_of} bytes, the limit is {limit}: {' > '.join(path)}")
        found[isa] = size_of
    return "a call: " + ", ".join(f"{isa} {size}" for isa, size in found.items())


def deepest_path(
    reached: list[str], own: dict[str, int], calls: dict[str, list[str]]
) -> tuple[int, list[str]]:
    """The largest sum of own[] along calls between functions of `reached`, and the way; Wrong if
    one calls itself."""
    inside = set(reached)
    known: dict[str, tuple[int, list[str]]] = {}

    def visit(title: str, above: list[str]) -> tuple[int, list[str]]:
        if title in above:
            circle = [*above[above.index(title) :], title]
            raise Wrong(f"recursion: {' > '.join(one.rsplit(':', 1)[-1] for one in circle)}")
        if title not in known:
            within = [one for one in calls.get(title, ()) if one in inside]
            best = max((visit(one, [*above, title]) for one in within), default=(0, []))
            known[title] = (own[title] + best[0], [title.rsplit(":", 1)[-1], *best[1]])
        return known[title]

    return max((visit(title, []) for title in reached), default=(0, []))


def linked() -> Iterator[Check]:
    """The plain static form, and one file that implements what another calls: silent at -O0, only
    our names in the second, and both run. Every compiler and standard has both forms of a sample;
    of other headers one of them, in turn."""
    kinds = list(itertools.product(["c99", "c++17"], ["gcc", "clang"]))
    for number, name in enumerate(header_names()):
        for i, (standard, compiler) in enumerate(kinds):
            command = [*compiler_for(compiler, standard), "-O0"]
            label = f"{name} run {compiler} {standard}"
            source = static_user(name, standard)
            # Each header has both forms with both compilers and in both languages.
            turn = (number + i // 2 + i) % 2
            if name in samples() or turn == 0:
                yield build(f"{label} static", name, command, [source], lambda x: execute([str(x)]))
            if name in samples() or turn == 1:
                yield two_files(f"{label} two files", name, standard, command)


def two_files(label: str, name: str, standard: str, command: list[str]) -> Check:
    user = declarer(name, standard)

    def after(implementation: Path) -> str:
        inspect_export(implementation, "-O0", allowed_undefined(name))
        program = implementation.with_name(f"{implementation.name}-program")
        files = [str(user), str(implementation)]
        execute([*command, f"-I{INCLUDE}", *files, "-o", str(program)])
        try:
            return execute([str(program)])
        finally:
            program.unlink()

    first = build(label, name, [*command, STACK_USAGE, "-c"], [exporter(name, standard)], after)
    return Check(label, first.run, (*first.depends, text_of(user)))


def fixed_isa() -> Iterator[Check]:
    """HL_ISA_ONLY_...: no choice at run time, so nothing of it is left in the object."""
    cross = "aarch64-linux-gnu-"
    compilers = {
        "scalar": ["gcc"],
        "avx2": ["gcc", "-mavx2", "-mfma", "-mf16c"],
        "avx512": ["gcc", "-march=skylake-avx512"],
        "amx": ["gcc", "-march=sapphirerapids"],
        "neon": [f"{cross}gcc"],
    }
    for name in header_names():
        for isa in sorted(isas(name)):
            text = f"#define HL_ISA_ONLY_{isa.upper()}\n{EXPORT}{include_line(name)}\n"
            source = write(f"{name}_only_{isa}.c", text)
            level = "-O2" if name in samples() else "-O0"  # which leaves no name out
            command = [*compilers[isa], "-std=c99", *STRICT, *STRICT_C, level]
            command += [STACK_USAGE, CALL_GRAPH, "-c"]
            tools = cross if isa == "neon" else ""

            def after(made: Path, tools=tools, level=level, isa=isa) -> str:
                inspect_export(made, level, MEMORY, tools, only=isa)
                return ""

            yield build(f"{name} only {isa}", name, command, [source], after)


def aarch64() -> Iterator[Check]:
    """The same header for AArch64: gcc's and clang's warnings, gcc's object, a run under qemu."""
    cross = "aarch64-linux-gnu-"
    sysroot = "/usr/aarch64-linux-gnu"
    gcc = [f"{cross}gcc"]
    clang = ["clang", "--target=aarch64-linux-gnu", "-isystem", f"{sysroot}/include"]

    def after_export(made: Path, level="-O2") -> str:
        return inspect_export(made, level, MEMORY, cross)

    def runs(made: Path) -> str:
        return execute(["qemu-aarch64", "-L", sysroot, str(made)])

    for name in header_names():
        tried = [(gcc, "-O2", True), (clang, "-O2", False)]
        if name in samples():
            tried = itertools.product([gcc, clang], LEVELS, [False, True])
        for tool, level, export in tried:
            command = [*tool, "-std=c99", *STRICT, *STRICT_C, level, "-c"]
            label = f"{name} aarch64 {tool[0]} {level}"
            if export:
                command += [STACK_USAGE] + [CALL_GRAPH] * (tool == gcc)
                after = functools.partial(after_export, level=level)
                yield build(f"{label} exported", name, command, [exporter(name)], after)
            else:
                yield build(label, name, command, [static_user(name)])
        command = [*gcc, "-std=c99", *STRICT, *STRICT_C]
        yield build(f"{name} aarch64 run", name, command, [static_user(name)], runs)


def freestanding() -> Iterator[Check]:
    """Without a C library: no header but the compiler's own, nothing wanted but memcpy, memset;
    little stack there too."""
    cross = "arm-none-eabi-"
    hosts = [
        (["gcc", "-O2"], "", MEMORY),
        (["clang", "-O2"], "", MEMORY),
        ([f"{cross}gcc", *CORTEX_M4F, "-Os"], cross, CORTEX_M),
    ]
    for name in [name for name in header_names() if isas(name) == {"scalar"}]:
        for tool, tools, allowed in hosts:
            own = execute([tool[0], "-print-file-name=include"]).strip()
            if tool[0] == "clang":
                own = execute(["clang", "-print-resource-dir"]).strip() + "/include"
            command = [*tool, "-std=c99", *STRICT, *STRICT_C, "-ffreestanding", "-nostdinc"]
            command += ["-isystem", own, STACK_USAGE, "-c"]
            command += [CALL_GRAPH] if tool[0] != "clang" else []

            def after(made: Path, tools=tools, allowed=allowed) -> str:
                return inspect_export(made, "-O2", allowed, tools)

            for form, start in (("", ""), (" HL_NO_TEXT", "#define HL_NO_TEXT\n")):
                text = f"{start}{EXPORT}{include_line(name)}\n"
                source = write(f"{name}_freestanding{form.replace(' ', '_')}.c", text)
                yield build(f"{name} freestanding {tool[0]}{form}", name, command, [source], after)


def pairs() -> Iterator[Check]:
    """Any two headers share one file; so does a header with itself. All of them come from the same
    pages, so not every two have to meet: each meets the next of the list, and the first of each
    operator those of the others, in both orders. What the first leaves to the second depends on
    neither compiler nor form: two meet with one of each, in turn."""
    tried = [("gcc", "c99", "static"), ("clang", "c++11", "exported")]
    alone = [*tried, ("gcc", "c99", "exported"), ("clang", "c++11", "static")]
    names = header_names()
    firsts = list({operator_of(name): name for name in reversed(names)}.values())
    met = [(name, names[(i + 1) % len(names)]) for i, name in enumerate(names)]
    met += itertools.permutations(firsts, 2)
    for i, (first, second) in enumerate([*((n, n) for n in names), *dict.fromkeys(met)]):
        lines = f"{include_line(first)}\n{include_line(second)}\nextern int used;\n"
        for compiler, standard, form in alone if first == second else [tried[i % 2]]:
            command = [*compiler_for(compiler, standard), "-fsyntax-only"]
            label = f"{first} + {second} {compiler} {standard} {form}"
            stem = f"pair/{first[3:]}+{second[3:]}_{form}"
            start = EXPORT if form == "exported" else ""
            source = write(stem + suffix(standard), start + lines)
            yield parse(label, (first, second), [*command, f"-I{INCLUDE}", str(source)], source)


def parse(label: str, names: tuple[str, ...], command: list[str], source: Path) -> Check:
    """A command that has to be silent about a source with these headers."""

    def run() -> str:
        execute(command)
        return ""

    texts = (*map(header_text, names), text_of(source))
    return Check(label, run, (*texts, " ".join(command), version(command[0])))


def versions_apart() -> Iterator[Check]:
    """Headers of two generator versions in one file are an error that says what to do."""
    name, other = header_names()[:2]
    newer, count = re.subn(r"(HL_COMMON (?:!= )?)(\w+)", r"\g<1>999999", header_text(other))
    write("versions/newer.h", newer)
    source = write("versions/both.c", f'{include_line(name)}\n#include "newer.h"\n')

    def run() -> str:
        if count < 2:
            raise Wrong("HL_COMMON was not found: nothing to tell two versions apart")
        command = ["gcc", "-fsyntax-only", "-fmax-errors=1", f"-I{INCLUDE}", "-I.", source.name]
        try:
            execute(command, source.parent)
        except Wrong as refusal:
            if "headers of two generator versions in one file" in str(refusal):
                return ""
            raise
        raise Wrong("two versions in one file were accepted")

    yield Check("two generator versions", run, (header_text(name), newer, version("gcc")))


def other_prefix() -> Iterator[Check]:
    """A header with another prefix says hl_ nowhere, and lives beside one of ours."""
    kernel = catalogue()[header_names()[0]].kernels[0]
    target = WORK / "prefix" / "acme.h"
    export = "#define ACME_API extern\n#define ACME_IMPLEMENTATION\n"
    ours = header_names()[0]
    source = write("prefix/acme.c", export + '#include "acme.h"\n')
    both = write("prefix/both.c", include_line(ours) + '\n#include "acme.h"\nextern int used;\n')

    def run() -> str:
        spec = ["--op", kernel.op, "--dtype", kernel.dtype, "--dk", "64", "--prefix", "acme"]
        execute([sys.executable, "-m", "gen", "header", *spec, "-o", str(target)])
        strict = [*compiler_for("gcc", "c99"), "-O2", f"-I{INCLUDE}"]
        execute([*strict, "-c", str(source), "-o", str(source.with_suffix(".o"))])
        execute([*strict, "-fsyntax-only", str(both)])
        code = re.sub(r"/\*.*?\*/", "", target.read_text(encoding="utf-8"), flags=re.S)
        left = re.findall(r"\bhl_\w+|\bHL_\w+", code)
        if left:
            raise Wrong(f"still named for hl: {' '.join(sorted(set(left))[:10])}")
        return inspect(source.with_suffix(".o"), RUN_TIME_CHOICE, prefix="acme")

    yield Check("--prefix acme", run, None)


def macros() -> Iterator[Check]:
    """Every macro carries the prefix."""
    for name in header_names():

        def run(name=name) -> str:
            defined = re.findall(r"^#\s*define\s+(\w+)", header_text(name), re.MULTILINE)
            foreign = sorted({macro for macro in defined if not macro.startswith("HL_")})
            if foreign or not defined:
                raise Wrong(f"{len(defined)} macros; without HL_: {' '.join(foreign)}")
            return f"{len(set(defined))} macros"

        yield Check(f"{name} macros", run, None)


def cppcheck() -> Iterator[Check]:
    """Each machine's regions are named, for cppcheck alone would try a dozen guesses at macros."""
    machines = {
        "AArch64": ["-D__GNUC__=12", "-D__aarch64__=1", "-D__ARM_NEON=1"],
        "x86-64, OpenMP": ["-D__GNUC__=12", "-D__x86_64__=1", "-D_OPENMP=201511"],
        "plain C": ["-D__STDC_VERSION__=199901L"],
    }
    command = ["cppcheck", "--std=c99", "--enable=warning,performance,portability"]
    command += ["--inline-suppr", "--error-exitcode=1", "--quiet", "--platform=unix64"]
    # The system's headers are not read: not knowing their names is no finding.
    command += ["--suppress=missingIncludeSystem", f"-I{INCLUDE}"]
    for name, (machine, macros_) in itertools.product(header_names(), machines.items()):
        source = static_user(name)
        line = [*command, *macros_, str(source)]
        yield parse(f"{name} cppcheck {machine}", (name,), line, source)


def clang_tidy() -> Iterator[Check]:
    rules = ROOT / ".clang-tidy"
    command = ["clang-tidy", "--quiet", f"--config-file={rules}"]
    arm = ["--target=aarch64-linux-gnu", "-isystem", "/usr/aarch64-linux-gnu/include"]
    for name, (machine, flags) in itertools.product(
        header_names(), [("x86-64", []), ("AArch64", arm)]
    ):
        source = static_user(name)
        line = [*command, str(source), "--", "-std=c99", *flags, f"-I{INCLUDE}"]
        check = parse(f"{name} clang-tidy {machine}", (name,), line, source)
        yield Check(check.name, check.run, (*check.depends, text_of(rules)))


def ruff() -> Iterator[Check]:
    def run() -> str:
        execute([sys.executable, "-m", "ruff", "check", "."])
        return ""

    yield Check("ruff check", run, None)


README_MARK = "A 20-line example"


def readme_example(readme: str) -> str:
    """The first C block after the line that announces it."""
    found = re.search(rf"^.*{README_MARK}.*\n(?s:.*?)^```c\n((?s:.*?))^```$", readme, re.MULTILINE)
    if not found:
        raise Wrong(f"README.md: no ```c block after a line with '{README_MARK}'")
    return found[1]


def readme() -> Iterator[Check]:
    """A stranger's first minute: one header in an empty folder, the README's lines, plain cc."""

    def run() -> str:
        code = readme_example((ROOT / "README.md").read_text(encoding="utf-8"))
        folder = WORK / "stranger"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for header in re.findall(r'#include "(\w+\.h)"', code):
            shutil.copy(INCLUDE / header, folder)
        (folder / "file.c").write_text(code, encoding="utf-8")
        execute(["cc", "-O2", "file.c"], folder)
        said = execute(["./a.out"], folder).strip()
        lines = len(code.strip().splitlines())
        return f"{lines} lines; it says: {said}"

    yield Check("the README's example", run, None)


def layout_faults(text: str) -> list[str]:
    """What makes a C file or template unfit to read."""
    faults = []
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > COLUMNS:
            faults.append(f"line {number}: {len(line)} columns")
        if line != line.rstrip():
            faults.append(f"line {number}: trailing blanks")
        if "\t" in line:
            faults.append(f"line {number}: a tab")
    if "\n\n\n" in text:
        faults.append("two blank lines together")
    if not text.endswith("\n") or text.endswith("\n\n"):
        faults.append("does not end with one line break")
    return faults


def layout() -> Iterator[Check]:
    """Generated headers and templates: at most 100 columns, no trailing blanks, no tabs. A template
    may end in a blank line: Jinja takes those away that stand behind an include."""
    files = sorted(INCLUDE.glob("*.h"))
    files += sorted(path for path in (ROOT / "templates").rglob("*") if path.is_file())
    for path in files:

        def run(path=path) -> str:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".j2" and text.endswith("\n\n"):
                text = text[:-1]
            faults = layout_faults(text)
            if faults:
                raise Wrong("\n".join(f"{path.relative_to(ROOT)}: {fault}" for fault in faults[:9]))
            return ""

        yield Check(f"layout of {path.relative_to(ROOT)}", run, None)


# Paths of one machine, hosts of registries, credits of tools: none of them is about the project.
# The brackets keep this file from finding itself.
FORBIDDEN = re.compile(
    r"(?<![\w.])/(?:w[o]rk|f[a]rm|h[o]me|r[o]ot|opt/w[h]eels)/"
    r"|p[y]pi\.|python[h]osted|cond[a]\.(?:org|com|io)|n[p]mjs|crate[s]\.io|dock[e]r\.io|g[h]cr\.io"
    r"|artifact[o]ry|sub-?[a]gent|Co-[A]uthored-By|\b[Cc]l[a]ude\b|\bC[h]atGPT\b",
)


def forbidden_lines(text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    return [f"{number}: {line.strip()[:80]}" for number, line in lines if FORBIDDEN.search(line)]


def project_files() -> list[Path]:
    """What is tracked or would be."""
    listed = execute(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    return [ROOT / name for name in sorted(set(listed.split("\0"))) if (ROOT / name).is_file()]


def installed() -> Iterator[Check]:
    """The generator installs with pip, and runs as `headlight` where there is no checkout."""

    def run() -> str:
        source = WORK / "install" / "source"
        target = WORK / "install" / "target"
        shutil.rmtree(source.parent, ignore_errors=True)
        # From a copy: building in place would leave folders in the checkout.
        for path in project_files():
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        execute([*pip, "--no-build-isolation", "--target", str(target), str(source)])
        shutil.rmtree(source)
        headlight = ["env", f"PYTHONPATH={target}", str(target / "bin" / "headlight")]
        listed = execute([*headlight, "list"], target)
        absent = [name for name in header_names() if name not in listed]
        if absent:
            raise Wrong(f"`headlight list` does not name {' '.join(absent)}")
        execute([*headlight, "check", "--folder", str(INCLUDE)], target)
        return ""

    yield Check("pip install, headlight", run, None)


def words() -> Iterator[Check]:
    """Nothing speaks of the machine that it was written on."""

    def run() -> str:
        faults = []
        files = project_files()
        for path in files:
            text = path.read_bytes().decode("utf-8", "replace")
            faults += [f"{path.relative_to(ROOT)}:{line}" for line in forbidden_lines(text)]
        if faults or not files:
            raise Wrong("\n".join(faults[:20]) or "no file was found")
        return f"{len(files)} files"

    yield Check("forbidden words", run, None)


RULES = [
    same_bytes,
    layout,
    words,
    ruff,
    installed,
    readme,
    macros,
    versions_apart,
    other_prefix,
    pairs,
    linked,
    compile_time,
    strict_compiles,
    exported,
    openmp,
    fixed_isa,
    aarch64,
    freestanding,
    cppcheck,
    clang_tidy,
]


# ---- running them --------------------------------------------------------------------------------


def remembered_at(check: Check) -> Path | None:
    """Where a pass is remembered: the name is a digest of all that decides the verdict."""
    if check.depends is None:
        return None
    digest = hashlib.sha256(text_of(Path(__file__)).encode())
    for part in (check.name, *check.depends):
        digest.update(hashlib.sha256(part.encode()).digest())
    return CACHE / digest.hexdigest()


def attempt(check: Check) -> tuple[Check, str | None, str]:
    """(check, what is wrong or None, remark)."""
    memory = remembered_at(check)
    if memory and memory.exists():
        return check, None, memory.read_text(encoding="utf-8")
    try:
        remark = check.run()
    except Wrong as wrong:
        return check, str(wrong), ""
    except Exception as error:
        return check, f"{type(error).__name__}: {error}", ""
    if memory:
        memory.write_text(remark, encoding="utf-8")
    return check, None, remark


def timed(check: Check) -> tuple[str, str | None, str, float]:
    """(name, what is wrong or None, remark, seconds)."""
    start = time.monotonic()
    _, wrong, remark = attempt(check)
    return check.name, wrong, remark, time.monotonic() - start


def begin(rule: Callable[[], Iterator[Check]], pool: ThreadPoolExecutor) -> list[Future] | str:
    """A rule's checks, begun or waiting; or why it cannot even start."""
    try:
        checks = list(rule())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [pool.submit(timed, check) for check in checks]


def finish(rule: Callable[[], Iterator[Check]], begun: list[Future] | str) -> tuple[int, int]:
    """(passed, failed) of one rule; one that could not start has failed."""
    if isinstance(begun, str):
        print(f"FAIL {rule.__name__}: {begun}", flush=True)
        return 0, 1
    passed = failed = 0
    seconds = 0.0
    remarks = []
    for name, wrong, remark, taken in (future.result() for future in begun):
        seconds += taken
        if wrong is None:
            passed += 1
            if remark:
                remarks.append(f"{name}: {remark}")
        else:
            failed += 1
            print(f"FAIL {name}\n    " + wrong.replace("\n", "\n    "), flush=True)
    print(f"{rule.__name__:16} {passed:4} passed {failed:4} failed {seconds:7.1f} s", flush=True)
    for remark in remarks:
        print(f"    {remark}")
    return passed, failed


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--time"]:
        return print_processor_time(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="compiles at a time")
    rules = {rule.__name__: rule for rule in RULES}
    parser.add_argument("rules", nargs="*", help="only these: " + " ".join(rules))
    options = parser.parse_args(arguments)
    unknown = set(options.rules) - set(rules)
    if unknown:
        parser.error(f"no rule {', '.join(sorted(unknown))}; fix: one of {' '.join(rules)}")
    return run_rules([rules[name] for name in options.rules or rules], options.jobs)


def run_rules(chosen: list[Callable[[], Iterator[Check]]], jobs: int) -> int:
    """Runs them, prints what they say; the exit status."""
    WORK.mkdir(parents=True, exist_ok=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        begun = [(rule, begin(rule, pool)) for rule in chosen]  # no rule waits for another's last
        results = [finish(*one) for one in begun]
    passed, failed = (sum(column) for column in zip(*results, strict=True))
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
