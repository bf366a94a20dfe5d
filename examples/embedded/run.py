#!/usr/bin/env python3
"""Builds the firmware for a Cortex-M4F, runs it under qemu, and prints what it costs.

Exits with 1 if a number is wrong or the kernel needs what small targets do not have.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "embedded"
KERNEL = "hl_sparse_flash_attention_f32_d32_rope8"

CPU = ["-mthumb", "-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"]
FLAGS = ["-std=c99", "-Os", "-ffreestanding", "-ffunction-sections", "-fdata-sections",
         "-Wall", "-Wextra", "-Wdouble-promotion", "-Werror"]
# The memory of the mps2-an386 board: code at 0, 256 KiB of data memory.
LINK = ["--specs=picolibc.specs", "--oslib=semihost", "--crt0=hosted", "-Wl,--gc-sections",
        "-Wl,--defsym=__flash=0", "-Wl,--defsym=__flash_size=0x60000",
        "-Wl,--defsym=__ram=0x20000000", "-Wl,--defsym=__ram_size=0x40000"]
QEMU = ["qemu-system-arm", "-M", "mps2-an386", "-display", "none", "-monitor", "none", "-serial",
        "none", "-icount", "shift=0", "-chardev", "stdio,id=console", "-semihosting-config",
        "enable=on,target=native,chardev=console", "-kernel"]

HEADS, DK, ROPE, KEYS, SELECTED, BLOCK_SIZE, SCALE = 4, 32, 8, 64, 32, 16, 0.25
LIBC_ALLOWED = {"memcpy", "memset"}
DIVISIONS = {"__aeabi_ldivmod", "__aeabi_uldivmod"}


class Wrong(Exception):
    """A check failed; the text says which."""


def command(*words):
    """Runs a tool in the build directory and returns what it printed."""
    done = subprocess.run([str(w) for w in words], cwd=BUILD, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=300, check=False)
    if done.returncode != 0:
        raise Wrong(f"{words[0]} failed ({done.returncode}):\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def check_tools():
    """Names the Debian packages of what is missing."""
    missing = [package for tool, package in [("arm-none-eabi-gcc", "gcc-arm-none-eabi"),
                                             ("qemu-system-arm", "qemu-system-arm")]
               if shutil.which(tool) is None]
    specs = "picolibc.specs"
    if "gcc-arm-none-eabi" in missing or (
            command("arm-none-eabi-gcc", f"-print-file-name={specs}").strip() == specs):
        missing.append("picolibc-arm-none-eabi")
    if missing:
        raise Wrong("the embedded run needs Debian packages that are not installed; fix: "
                    f"apt-get install {' '.join(missing)}")


# ---- the problem and its answer --------------------------------------------------------------


def attend(query, key, ids):
    """softmax(scale q K^T) V in float64; V is the part of the key without its position."""
    scores = SCALE * query @ key[ids].T
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    return weights / total @ key[ids, :DK], (top + np.log(total))[:, 0]


def c_array(name, values, kind="float"):
    """A C array of exact (hexadecimal) floats, or of integers."""
    flat = np.asarray(values).ravel()
    words = [f"{float(v).hex()}f" if kind == "float" else str(v) for v in flat]
    lines = [", ".join(words[i:i + 4]) for i in range(0, len(words), 4)]
    return f"static const {kind} {name}[{len(words)}] = {{\n    " + ",\n    ".join(lines) + "};\n"


def write_vectors():
    """vectors.h: inputs from a fixed seed, outputs from float64 rounded to float32."""
    rng = np.random.default_rng(2024)
    query = rng.standard_normal((HEADS, DK + ROPE)).astype(np.float32)
    key = rng.standard_normal((KEYS, DK + ROPE)).astype(np.float32)
    selected = np.sort(rng.choice(KEYS, SELECTED, replace=False))
    table = rng.permutation(KEYS // BLOCK_SIZE)  # page table[n] holds the n-th 16 tokens
    pages = np.empty((KEYS // BLOCK_SIZE, BLOCK_SIZE, DK + ROPE), np.float32)
    pages[table] = key.reshape(pages.shape)
    exact = [attend(query.astype(np.float64), key.astype(np.float64), ids)
             for ids in (selected, np.arange(KEYS))]
    parts = ["/* Written by run.py. */\n#include <stdint.h>\n",
             f"enum {{ HEADS = {HEADS}, SELECTED = {SELECTED}, BLOCKS = {KEYS // BLOCK_SIZE}, "
             f"BLOCK_SIZE = {BLOCK_SIZE} }};",
             f"#define SCALE {SCALE}f",
             f"static const int32_t cached = {KEYS};\n",
             c_array("query", query[:, :DK]), c_array("query_rope", query[:, DK:]),
             c_array("key", pages[..., :DK]), c_array("key_rope", pages[..., DK:]),
             c_array("selected", selected, "int32_t"), c_array("block_table", table, "int32_t")]
    for name, (out, lse) in zip(("sparse", "dense"), exact, strict=True):
        parts += [c_array(f"{name}_out", out.astype(np.float32)),
                  c_array(f"{name}_lse", lse.astype(np.float32))]
    (BUILD / "vectors.h").write_text("\n".join(parts))


# ---- what the object file says ---------------------------------------------------------------


def check_symbols():
    """Nothing from outside but memcpy and memset, and no memory of its own."""
    undefined = set(command("arm-none-eabi-nm", "-u", "-j", "kernel.o").split())
    if undefined - LIBC_ALLOWED - DIVISIONS:
        raise Wrong(f"the kernel needs {sorted(undefined - LIBC_ALLOWED - DIVISIONS)}; "
                    f"only {sorted(LIBC_ALLOWED)} are promised")
    symbols = [line.split()[-2:] for line in command("arm-none-eabi-nm", "kernel.o").splitlines()]
    mutable = [name for kind, name in symbols if kind in "dDbBcC"]
    if mutable:
        raise Wrong(f"the kernel has mutable static data: {mutable}")
    linked = set(command("arm-none-eabi-nm", "-j", "firmware.elf").split())
    if linked & {"malloc", "_malloc_r", "calloc", "free", "sbrk", "_sbrk"}:
        raise Wrong("the firmware has a heap")
    return undefined


INSTRUCTION = re.compile(r"^ +([0-9a-f]+):\t[0-9a-f ]+\t(\S+)(?:\t(.*))?$", re.MULTILINE)
RELOCATION = re.compile(r"^\s+([0-9a-f]+): R_ARM_\S+\s+(\S+)$", re.MULTILINE)
CONDITIONAL = re.compile(r"b(eq|ne|cs|cc|mi|pl|vs|vc|hi|ls|ge|lt|gt|le)|cbn?z")


def successors(instructions, relocated):
    """Which instructions may follow each one of a function: address -> addresses."""
    after = {}
    for n, (at, name, operands) in enumerate(instructions):
        name = name.removesuffix(".n").removesuffix(".w")
        nexts = {instructions[n + 1][0]} if n + 1 < len(instructions) else set()
        if name in ("tbb", "tbh"):  # a jump table: anywhere, to be safe
            nexts = {other for other, _, _ in instructions}
        elif name in ("b", "bx") or (name in ("pop", "ldmia") and "pc" in operands):
            nexts = set()
        if at not in relocated and (name == "b" or CONDITIONAL.fullmatch(name)):
            nexts.add(int(re.search(r"([0-9a-f]+) <", operands)[1], 16))
        after[at] = nexts
    return after


def divisions_in_loops(listing):
    """64-bit divisions that their function can come back to, as 'function+0xoffset'."""
    found = []
    for function in re.split(r"\n(?=[0-9a-f]+ <\S+>:)", listing)[1:]:
        relocated = {int(at, 16): symbol for at, symbol in RELOCATION.findall(function)}
        after = successors([(int(at, 16), *rest) for at, *rest in INSTRUCTION.findall(function)],
                           relocated)
        for call in (at for at, symbol in relocated.items() if symbol in DIVISIONS):
            seen, todo = set(), [call]
            while todo:
                new = after.get(todo.pop(), set()) - seen
                seen |= new
                todo += new
            if call in seen:
                name = re.search(r"<(\S+)>:", function)[1]
                found.append(f"{name}+0x{call:x}")
    return found


def code_and_constants():
    """Bytes of the kernel's functions and constants in the linked firmware, and the functions."""
    sizes = {"t": {}, "r": {}}
    for line in command("arm-none-eabi-nm", "-S", "firmware.elf").splitlines():
        words = line.split()
        if len(words) == 4 and words[3].startswith("hl_") and words[2].lower() in sizes:
            sizes[words[2].lower()][words[3]] = int(words[1], 16)
    return sum(sizes["t"].values()), sum(sizes["r"].values()), sizes["t"]


def deepest_stack():
    """Bytes of the deepest call path of the one-call function, from gcc's call graph."""
    text = (BUILD / "kernel.ci").read_text()
    frames, calls = {}, {}
    for title, label in re.findall(r'node: \{ title: "([^"]*)" label: "([^"]*)"', text):
        if size := re.search(r"(\d+) bytes \((\w+)", label):
            if size[2] != "static":
                raise Wrong(f"the stack of {title} is not known at compile time: {size[0]}")
            frames[title] = int(size[1])
    for source, target in re.findall(r'edge: \{ sourcename: "([^"]*)" targetname: "([^"]*)"', text):
        calls.setdefault(source, set()).add(target)

    def depth(name, above=()):
        if name in above or name == "__indirect_call":
            raise Wrong(f"{above[-1]} calls {name}: recursion or a pointer, no bound on the stack")
        below = [depth(callee, (*above, name)) for callee in calls.get(name, ())]
        return frames.get(name, 0) + max(below, default=0)

    return depth(KERNEL)


# ---- the run -----------------------------------------------------------------------------------


def own_headers():
    """The compiler's own stdint.h and stddef.h: all that a freestanding file may include."""
    return command("arm-none-eabi-gcc", "-print-file-name=include").strip()


def build():
    """The kernel without any C library in sight; the firmware and its printf with picolibc."""
    cc = ["arm-none-eabi-gcc", *CPU, *FLAGS, f"-I{ROOT / 'include'}", "-I."]
    command(*cc, "-nostdinc", "-isystem", own_headers(), "-fcallgraph-info=su",
            "-c", HERE / "kernel.c", "-o", "kernel.o")
    command(*cc, "--specs=picolibc.specs", "-c", HERE / "firmware.c", "-o", "firmware.o")
    command("arm-none-eabi-gcc", *CPU, *LINK, "kernel.o", "firmware.o", "-o", "firmware.elf")


def run_firmware():
    """The firmware's words as numbers, from two runs that have to be equal."""
    first, second = (command(*QEMU, "firmware.elf") for _ in range(2))
    if first != second:
        raise Wrong(f"two runs differ:\n{first}{second}")
    results = {}
    for line in first.splitlines():
        name, *words = line.split()
        results[name] = words
    if results["instructions_per_tick"][0] != "40":
        raise Wrong(f"a SysTick tick is not 40 instructions here: {first}")
    return results


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def main():
    BUILD.mkdir(parents=True, exist_ok=True)
    check_tools()
    write_vectors()
    build()
    undefined = check_symbols()
    if looping := divisions_in_loops(command("arm-none-eabi-objdump", "-dr", "kernel.o")):
        raise Wrong(f"64-bit division inside a loop: {looping}")
    code, constants, functions = code_and_constants()
    bound = deepest_stack()
    results = run_firmware()

    cases = [results["sparse"], results["dense"]]
    fields = [dict(zip(case[0::2], case[1::2], strict=False)) for case in cases]
    repeats = [case[-2:] for case in cases]
    row(f"Cortex-M4F, {HEADS} heads of {DK}+{ROPE}, float32, -Os",
        f"{SELECTED} of {KEYS} keys selected", f"all {KEYS} keys")
    row("---", "---:", "---:")
    row("code, bytes (as linked)", code, code)
    row("constants, bytes", constants, constants)
    row("workspace, bytes", *[results["instructions_per_tick"][2]] * 2)
    row("stack, bytes (deepest path in gcc's call graph)", bound, bound)
    row("stack, bytes (painted and seen on the target)", *[f["stack"] for f in fields])
    row("instructions a decode", *[first for first, _ in repeats])
    row("largest error of the output", *[f"{int(f['out_error']) * 1e-9:.1e}" for f in fields])
    row("largest error of the LSE", *[f"{int(f['lse_error']) * 1e-9:.1e}" for f in fields])
    print()
    print(f"The kernel calls {', '.join(sorted(undefined)) or 'nothing'} (whose own stack the call "
          "graph leaves out); no heap, no mutable data, no 64-bit division in a loop. "
          "Instructions were counted twice, equal both times.")
    largest = sorted(functions.items(), key=lambda item: -item[1])[:5]
    print("Largest functions: " + ", ".join(f"{name} {size}" for name, size in largest))
    for f, (first, second) in zip(fields, repeats, strict=True):
        if f["status"] != "0" or first != second or int(f["stack"]) > bound:
            raise Wrong(f"status, repetition or stack is off: {results}")


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"examples/embedded/run.py: {wrong}")
