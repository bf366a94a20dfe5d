"""`make coverage`: which lines, branches and conditions of the shipped headers the tests reach.

Headers are compiled with clang-19's source-based coverage and run by the test files of TESTS; the
report counts, for each header, lines of everything that runs on this machine, and branches and
MC/DC (each condition is shown to decide by itself) of what plans and checks. What is not reached is
listed with its source line in build/coverage/; what cannot be is in EXPLAINED, with the reason.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / "build" / "coverage"
CC, COV, PROFDATA = "clang-19", "llvm-cov-19", "llvm-profdata-19"
FLAGS = ("-O1", "-fprofile-instr-generate", "-fcoverage-mapping", "-fcoverage-mcdc")
HOOK = HERE / "cover_hook.h"
TESTS = ("test_every_argument.py", "test_every_line.py")

# What has to be reached to the last branch and condition: whatever may refuse.
CHECKS = re.compile(
    r"_(check_\w+|plan|pack|refuse\w*|fits|extent|mul_cap|add_cap|overlap\w*|workspace_bytes"
    r"|append|convert|quantise_rows|dequantise_rows|merge_parts|error_text)$"
)

# (function, source line, what) that cannot be reached, and why; searched for, in this order.
EXPLAINED: tuple[tuple[str, str, str], ...] = (
    (r"_plan$", "a->isa == HL_ISA_BEST &&", "what the machine has is not the caller's to choose"),
    (r"append", "pages", "without the feature: refused by check_append_layout's first table"),
    (r"append", "by_slot", "without the feature there are no slots"),
    (r"check_memory$", "a->alibi_slopes ?", "refused by check_absent where the feature is missing"),
    (r"check_memory$", "a->sinks ?", "refused by check_absent where the feature is missing"),
    (r"check_memory$", "a->softmax_", "refused by check_absent where the feature is missing"),
)


def environment() -> dict[str, str]:
    """For processes that run tests under coverage."""
    return {
        **os.environ,
        "HEADLIGHT_CC": CC,
        "HEADLIGHT_CFLAGS": " ".join((*FLAGS, "-include", str(HOOK))),
        "HEADLIGHT_CACHE": str(WORK / "cache"),
        "LLVM_PROFILE_FILE": str(WORK / "raw" / "%m.profraw"),
    }


@dataclass
class Reached:
    """Of one header: counts, and what is missing as (line, function, what)."""

    lines: list[int] = field(default_factory=lambda: [0, 0])
    branches: list[int] = field(default_factory=lambda: [0, 0])
    conditions: list[int] = field(default_factory=lambda: [0, 0])
    missing: list[tuple[int, str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def tool(*command: object) -> str:
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True
    ).stdout


def library_of(name: str) -> Path:
    """The compiled header: what the tests of this environment load."""
    os.environ.update(environment(), LLVM_PROFILE_FILE=os.devnull)
    sys.path[:0] = [str(HERE), str(ROOT)]
    import helpers_every

    return Path(helpers_every.kernel(name).library._name)


def short(function: str) -> str:
    return function.rsplit(":", 1)[-1]


def called(source: list[str], spans: dict[str, tuple[int, int]]) -> set[str]:
    """Functions that a user of the header can get to: words are shared by all headers, and none
    has a caller for each of them."""
    bodies = {
        name: set(re.findall(r"\w+", "\n".join(source[first - 1 : last])))
        for name, (first, last) in spans.items()
    }
    text = "\n".join(source)
    left = list(dict.fromkeys(re.findall(r"^HL_API [^;{(]*?(\w+)\(", text, re.MULTILINE)))
    seen = set()
    while left:
        name = left.pop()
        if name in spans and name not in seen:
            seen.add(name)
            left += bodies[name] & set(spans)
    return seen


def sides(true: int, false: int) -> str:
    if true or false:
        return "never false" if true else "never true"
    return "neither"


def reached(text: str, library: Path, profile: Path) -> Reached:
    """What one header's functions have seen."""
    made, source = Reached(), text.split("\n")
    data = json.loads(tool(COV, "export", library, f"-instr-profile={profile}"))["data"][0]
    functions = [f for f in data["functions"] if f["filenames"][0].endswith("header.h")]
    spans = {short(f["name"]): (f["regions"][0][0], f["regions"][0][2]) for f in functions}
    used = called(source, spans)
    made.unused = sorted(set(spans) - used)
    for function in functions:
        named = short(function["name"])
        if named in used and CHECKS.search(named):
            count_branches(made, named, function["branches"], source)
            count_conditions(made, named, function["mcdc_records"])
    owner = {line: n for n in spans for line in range(spans[n][0], spans[n][1] + 1)}
    lcov = tool(COV, "export", "-format=lcov", library, f"-instr-profile={profile}")
    block = next(b for b in lcov.split("end_of_record") if re.search(r"^SF:.*header\.h$", b, re.M))
    for line, count in re.findall(r"^DA:(\d+),(\d+)", block, re.MULTILINE):
        named = owner.get(int(line), "?")
        if named not in used:
            continue
        made.lines[1] += 1
        made.lines[0] += count != "0"
        if count == "0":
            made.missing.append((int(line), named, "line"))
    return made


def count_branches(made: Reached, named: str, branches: list, source: list[str]) -> None:
    for line, column, _, until, true, false, *_ in branches:
        condition = source[line - 1][column - 1 : until - 1] or source[line - 1].strip()
        made.branches[1] += 2
        made.branches[0] += (true > 0) + (false > 0)
        if not (true and false):
            made.missing.append((line, named, f"branch {sides(true, false)}: {condition}"))


def count_conditions(made: Reached, named: str, records: list) -> None:
    for line, _, _, _, _, _, covered in records:
        made.conditions[1] += len(covered)
        made.conditions[0] += sum(covered)
        for number, well in enumerate(covered, 1):
            if not well:
                made.missing.append((line, named, f"condition {number} of {len(covered)}"))


def explained(function: str, source: str, what: str) -> str | None:
    for where, line, why in EXPLAINED:
        if re.search(where, function) and line in source:
            return why
    return None


def percent(pair: list[int]) -> str:
    return f"{100 * pair[0] / pair[1]:.2f}" if pair[1] else "-"


def report(names: list[str]) -> int:
    sys.path[:0] = [str(HERE), str(ROOT)]
    profile = WORK / "all.profdata"
    raw = sorted((WORK / "raw").glob("*.profraw"))
    tool(PROFDATA, "merge", "-o", profile, *raw)
    print(f"{'header':66} {'line %':>8} {'branch %':>9} {'MC/DC %':>8} {'unexplained':>12}")
    left = 0
    for name in names:
        text = (ROOT / "include" / f"{name}.h").read_text()
        made = reached(text, library_of(name), profile)
        lines, open_ones = [], 0
        source = text.split("\n")
        for line, function, what in sorted(made.missing):
            code = source[line - 1]
            why = explained(function, code, what)
            open_ones += why is None
            lines.append(
                f"{line:6} {function}: {what}\n       {code}"
                + (f"\n       BECAUSE {why}" if why else "")
            )
        (WORK / f"{name}.txt").write_text("\n".join(lines) + "\n")
        left += open_ones
        row = (percent(made.lines), percent(made.branches), percent(made.conditions), open_ones)
        print("{:66} {:>8} {:>9} {:>8} {:>12}".format(name, *row), flush=True)
    return left


def main(arguments: list[str]) -> int:
    sys.path[:0] = [str(ROOT)]
    from gen.spec import load_catalogue

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="headers with one of a|b|c in their names")
    parser.add_argument("--report", action="store_true", help="of what was run before")
    options = parser.parse_args(arguments)
    some = options.only.split("|")
    names = [h.name for h in load_catalogue() if any(part in h.name for part in some)]
    status = 0
    if not options.report:
        shutil.rmtree(WORK / "raw", ignore_errors=True)
        (WORK / "raw").mkdir(parents=True)
        command = [sys.executable, "-m", "pytest", *(str(HERE / test) for test in TESTS), "-q"]
        command += ["-n", str(options.jobs)] if options.jobs > 1 else []
        command += ["-k", " or ".join(some)] if options.only else []
        status = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
    left = report(names)
    print(f"{left} lines, branches and conditions that are not reached and not explained")
    return 1 if status or left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
