"""`make sanitize`: every shipped header under the sanitizers and valgrind. One function a tool.

Each header becomes a program around tests/runner.c, its buffers from the heap, that plays random
calls on every instruction set that the tool knows; what comes out is held against the oracle too.
What these tools cannot see (tests/test_detectors.py) is left to the guard pages.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    sys.path.insert(0, str(folder))

import check  # noqa: E402
import helpers_every  # noqa: E402
import numpy as np  # noqa: E402
from helpers_runner import BY_TASK, PARTIALS, play, program  # noqa: E402
from helpers_tiles import preload_environment  # noqa: E402

from gen.isa import ISAS  # noqa: E402

WORKERS = 16
HEAP = "-DFROM_HEAP"
STRICT = "-fno-sanitize-recover=all"
ADDRESS = ("-O0", "-g", HEAP, "-fsanitize=address,undefined", STRICT)
MEMORY = ("-O1", "-g", HEAP, "-fsanitize=memory", "-fno-omit-frame-pointer", STRICT)
THREAD = ("-O1", "-g", HEAP, f"-DWORKERS={WORKERS}", "-fsanitize=thread", "-pthread")
VALGRIND = ("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", "--track-origins=no")
# What the tools' own handlers would do with an instruction that tests/tiles.c emulates.
SIGNALS = "verify_asan_link_order=0:handle_sigill=0:handle_sigtrap=0"


def numbers(name: str, isas: Sequence[str]) -> dict[str, int]:
    """Values of args.isa, also where the library in this process would not run them."""
    constants = helpers_every.kernel(name).constants
    return {isa: constants[f"HL_ISA_{isa.upper()}"] for isa in isas}


def isas_of(name: str, tiles: bool) -> list[str]:
    return [isa for isa in helpers_every.isas_in(name) if tiles or not ISAS[isa].tiles]


def built(name: str, compiler: str, flags: Sequence[str], text: str | None = None) -> Path:
    kernel = helpers_every.kernel(name)
    text = text or helpers_every.text(name)
    return program(text, kernel.name, compiler=compiler, flags=("-std=gnu99", *flags))


def calls_of(name: str, count: int) -> list[helpers_every.Call]:
    """Random ones, and one whose rows are long enough to be cut into pieces."""
    return [
        *helpers_every.calls(name, 21, count),
        helpers_every.sized(name, keys=300, rows=2, heads=3, seed=1),
    ]


def played(
    name: str, command: Sequence[str], isas: Sequence[str], count: int, env: dict | None = None
) -> str:
    """Plays the calls in another program, each by its tasks or at once, in turn, and checks what
    comes out. A report of the tool ends the program, and this."""
    pairs = [(c, isa) for c in calls_of(name, count) for isa in isas]
    value = numbers(name, isas)
    split = {} if helpers_every.description(name).trains else {"chunk_keys": 128}
    recorded = [
        call.recorded(value[isa], (BY_TASK | PARTIALS) * (number // len(isas) % 2), **split)
        for number, (call, isa) in enumerate(pairs)
    ]
    _, results = play(command, recorded, env=env)
    for (call, isa), got in zip(pairs, results, strict=True):
        if ISAS[isa].tiles:  # bfloat16 weights: a few elements are no sample for the error rule
            check_near(got, call.run(isa, **split))
        else:
            call.check(got, isa)
    return f"{len(pairs)} calls on {', '.join(isas)}"


def check_near(got: dict[str, np.ndarray], known: dict[str, np.ndarray]) -> None:
    """The same to the eighth bit, from another compiler."""
    for name, want in known.items():
        found, want = got[name].astype(np.float64), want.astype(np.float64)
        wrong = ~np.isclose(found, want, rtol=2.0**-8, atol=2.0**-8, equal_nan=True)
        assert not wrong.any(), f"{name}: {found[wrong][:4]} for {want[wrong][:4]}"


def environment(options: str, tiles: bool = False) -> dict[str, str]:
    made = preload_environment("granted") if tiles else dict(os.environ)
    for tool in ("ASAN", "TSAN", "MSAN", "UBSAN"):
        made[f"{tool}_OPTIONS"] = options
    return made


def with_tiles(name: str) -> bool:
    """Whether a header has tiles, and they have to be emulated."""
    return any(ISAS[isa].tiles for isa in helpers_every.isas_in(name))


def address(name: str, count: int, compiler: str = "gcc") -> str:
    """ASan and UBSan. At -O0 every access is still there to be seen."""
    command = (str(built(name, compiler, ADDRESS)),)
    tiles = with_tiles(name)
    env = environment(f"{SIGNALS}:detect_leaks={int(not tiles)}", tiles)
    return played(name, command, isas_of(name, tiles=True), count, env)


def address_clang(name: str, count: int) -> str:
    """clang's, which sees masked loads and stores."""
    return address(name, count, "clang")


def memory(name: str, count: int) -> str:
    """MSan: no result depends on memory that nothing was written to, and results are written."""
    command = (str(built(name, "clang", MEMORY)),)
    return played(name, command, isas_of(name, tiles=False), count, environment(""))


def thread(name: str, count: int) -> str:
    """TSan: tasks and merges on 16 threads. gcc's, which sees whole vectors."""
    command = (str(built(name, "gcc", THREAD)),)
    env = environment("halt_on_error=1:exitcode=9")
    return played(name, command, isas_of(name, tiles=False), count, env)


def valgrind(name: str, count: int) -> str:
    """Scalar and AVX2: it knows no AVX-512, does not show any to who asks, and dies of it."""
    command = (*VALGRIND, str(built(name, "gcc", ("-O1", "-g", HEAP))))
    isas = [isa for isa in isas_of(name, tiles=False) if isa in ("scalar", "avx2")]
    return played(name, command, isas, count, environment(""))


TOOLS: dict[str, Callable[[str, int], str]] = {
    tool.__name__: tool for tool in (address, address_clang, memory, thread, valgrind)
}


def rule(tool: Callable[[str, int], str], names: Sequence[str], count: int) -> Callable:
    """The tool over these headers, as tests/check.py runs rules."""

    def checks() -> Iterator[check.Check]:
        own = [check.text_of(path) for path in (Path(__file__), HERE / "runner.c")]
        for name in names:

            def run(name=name) -> str:
                try:
                    return tool(name, count)
                except AssertionError as wrong:
                    raise check.Wrong(str(wrong)) from wrong

            yield check.Check(
                f"{name} {tool.__name__}", run, (helpers_every.text(name), *own, str(count))
            )

    checks.__name__ = tool.__name__
    return checks


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="programs at a time")
    parser.add_argument("--calls", type=int, default=30, help="random calls of each header")
    parser.add_argument("--only", default="", help="headers whose name has this in it")
    parser.add_argument("tools", nargs="*", help=" ".join(TOOLS))
    options = parser.parse_args(arguments)
    names = [name for name in helpers_every.HEADERS if options.only in name]
    chosen = [TOOLS[name] for name in options.tools or TOOLS]
    missing = [t for t in ("gcc", "clang", "valgrind") if shutil.which(t) is None]
    if missing:
        parser.error(f"{', '.join(missing)} missing; fix: sh tools/setup.sh cc lint analyse")
    return check.run_rules([rule(tool, names, options.calls) for tool in chosen], options.jobs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
