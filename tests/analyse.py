"""`make analyse`: the static analysers that take too long for `make check`. One function a tool.

`make check` has cppcheck and clang-tidy (cert-*, bugprone-*, clang-analyzer-*) over every header;
here are gcc's -fanalyzer and clang's scan-build, each over every header with each of its
instruction sets by itself: that is where paths are, and what gcc holds in memory stays small.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import check  # noqa: E402

TARGETS = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-march=skylake-avx512",),
    "amx": ("-march=sapphirerapids",),
}
# gcc gives up on a path that grows too long: it says so with this, and it is no finding.
GCC = ("gcc", "-std=c99", "-O1", "-fanalyzer", "-Werror", "-c")
SCAN = ("scan-build", "--status-bugs", "-analyze-headers", "--use-cc=clang", "-maxloop", "4",
        "-enable-checker", "security.FloatLoopCounter",
        "-enable-checker", "security.insecureAPI.UncheckedReturn",
        "-enable-checker", "nullability", "-enable-checker", "optin.portability")  # fmt: skip
SMALLEST = "hl_sparse_flash_attention_f32_d32_rope8"


def source(name: str, isa: str) -> Path:
    """All of a header for one instruction set."""
    only = f"#define HL_ISA_ONLY_{isa.upper()}\n{check.EXPORT}{check.include_line(name)}\n"
    return check.write(f"analyse/{name}_{isa}.c", only)


def pairs() -> list[tuple[str, str]]:
    return [(name, isa) for name in check.header_names() for isa in TARGETS
            if isa in check.isas(name)]  # fmt: skip


def fanalyzer() -> Iterator[check.Check]:
    """gcc's: leaks, NULL, use after free, values that nothing was written to."""
    for name, isa in pairs():
        path = source(name, isa)
        line = [*GCC, *TARGETS[isa], f"-I{check.INCLUDE}", str(path), "-o", os.devnull]
        yield check.parse(f"{name} -fanalyzer {isa}", (name,), line, path)


def scan_build() -> Iterator[check.Check]:
    """clang's, through its driver, with more checkers than clang-tidy runs."""
    for name, isa in pairs():
        path = source(name, isa)

        def run(path=path, isa=isa) -> str:
            with tempfile.TemporaryDirectory() as folder:
                compile_it = ["clang", "-std=c99", *TARGETS[isa], f"-I{check.INCLUDE}", "-c"]
                check.execute([*SCAN, "-o", folder, *compile_it, str(path), "-o", os.devnull])
            return ""

        texts = (check.header_text(name), check.text_of(path), " ".join((*SCAN, *TARGETS[isa])))
        yield check.Check(f"{name} scan-build {isa}", run, (*texts, check.version("clang")))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    rules = {rule.__name__: rule for rule in (fanalyzer, scan_build)}
    parser.add_argument("rules", nargs="*", help=" ".join(rules))
    options = parser.parse_args(arguments)
    return check.run_rules([rules[name] for name in options.rules or rules], options.jobs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
