#!/usr/bin/env python3
"""Compiles every example by the cc line at its top, runs it, and says ok or FAILED.

The lines work from the repository's root; here they run in build/examples, where `include` and
`examples` are links to the root's, so that programs and results stay out of the source tree.
$CC replaces `cc`; names on the command line pick examples.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "examples"


def commands(source):
    """The compile and the run command at the top of an example."""
    first = source.read_text().split("\n", 1)[0]
    line = re.match(r"/\* (cc .*?) && (\./.*?)(?: \*/)?$", first)
    if line is None:
        raise SystemExit(f"{source}: the first line is not '/* cc ... && ./...'")
    return line[1], line[2]


def enter_build():
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in ("include", "examples"):
        link = BUILD / name
        if not link.exists():
            link.symlink_to(ROOT / name)


def shell(command):
    """Exit status and output of a command run in build/examples."""
    done = subprocess.run(command, shell=True, cwd=BUILD, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    return done.returncode, done.stdout


def run(source):
    """Compiles and runs one example; True if both worked."""
    compile_line, run_line = commands(source)
    compiler = os.environ.get("CC") or "cc"
    start = time.monotonic()
    status, output = shell(compile_line.replace("cc", compiler, 1))
    seconds = time.monotonic() - start
    if status == 0:
        status, output = shell(run_line)
    word = "ok" if status == 0 else f"FAILED ({status})"
    print(f"{word:6} {source.stem} (compiled in {seconds:.1f} s)")
    print("".join(f"       {line}\n" for line in output.splitlines()[:20]), end="", flush=True)
    return status == 0


def main(names):
    sources = sorted(HERE.glob("*.c"))
    unknown = set(names) - {source.stem for source in sources}
    if unknown:
        raise SystemExit(f"no such example: {', '.join(sorted(unknown))}; "
                         f"there are {', '.join(source.stem for source in sources)}")
    enter_build()
    results = [run(source) for source in sources if not names or source.stem in names]
    print(f"{sum(results)} of {len(results)} examples ok")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
