#!/usr/bin/env python3
"""Builds firmware for a Cortex-M4F, runs it under qemu, and prints what it costs.

Two of them, each with one header: sparse attention in float32, decoding from an int8 cache.
Exits with 1 if a number is wrong or a kernel needs what small targets do not have.
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
# Kernels by the ending of their files: kernel*.c, firmware*.c.
KERNELS = {
    "": "hl_sparse_flash_attention_f32_d32_rope8",
    "_int8": "hl_incre_flash_attention_f16_i8_d32",
}

CPU = ["-mthumb", "-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"]
FLAGS = [
    "-std=c99",
    "-Os",
    "-ffreestanding",
    "-ffunction-sections",
    "-fdata-sections",
    "-Wall",
    "-Wextra",
    "-Wdouble-promotion",
    "-Werror",
]
# The memory of the mps2-an386 board: code at 0, 256 KiB of data memory.
LINK = [
    "--specs=picolibc.specs",
    "--oslib=semihost",
    "--crt0=hosted",
    "-Wl,--gc-sections",
    "-Wl,--defsym=__flash=0",
    "-Wl,--defsym=__flash_size=0x60000",
    "-Wl,--defsym=__ram=0x20000000",
    "-Wl,--defsym=__ram_size=0x40000",
]
QEMU = [
    "qemu-system-arm",
    "-M",
    "mps2-an386",
    "-display",
    "none",
    "-monitor",
    "none",
    "-serial",
    "none",
    "-icount",
    "shift=0",
    "-chardev",
    "stdio,id=console",
    "-semihosting-config",
    "enable=on,target=native,chardev=console",
    "-kernel",
]

HEADS, DK, ROPE, KEYS, SELECTED, BLOCK_SIZE, SCALE = 4, 32, 8, 64, 32, 16, 0.25
KV_HEADS = 2  # of the int8 cache: two query heads share one
LIBC_ALLOWED = {"memcpy", "memset"}
CALLER = 16  # bytes of stack that the firmware's function around a call may have, with alignment
DIVISIONS = {"__aeabi_ldivmod", "__aeabi_uldivmod"}


class Wrong(Exception):
    """A check failed; the text says which."""


def command(*words):
    """Runs a tool in the build directory and returns what it printed."""
    done = subprocess.run(
        [str(w) for w in words],
        cwd=BUILD,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        raise Wrong(f"{words[0]} failed ({done.returncode}):\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def check_tools():
    """Names the Debian packages of what is missing."""
    missing = [
        package
        for tool, package in [
            ("arm-none-eabi-gcc", "gcc-arm-none-eabi"),
            ("qemu-system-arm", "qemu-system-arm"),
        ]
        if shutil.which(tool) is None
    ]
    specs = "picolibc.specs"
    if "gcc-arm-none-eabi" in missing or (
        command("arm-none-eabi-gcc", f"-print-file-name={specs}").strip() == specs
    ):
        missing.append("picolibc-arm-none-eabi")
    if missing:
        raise Wrong(
            "the embedded run needs Debian packages that are not installed; fix: "
            f"apt-get install {' '.join(missing)}"
        )


# ---- the problems and their answers ----------------------------------------------------------


def attend(query, key, value):
    """softmax(scale q K^T) V in float64, and the LSE."""
    scores = SCALE * query @ key.T
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    return weights / total @ value, (top + np.log(total))[:, 0]


def c_array(name, values, kind="float"):
    """A C array of exact (hexadecimal) floats, or of integers."""
    flat = np.asarray(values).ravel()
    words = [f"{float(v).hex()}f" if kind == "float" else str(v) for v in flat]
    lines = [", ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    return f"static const {kind} {name}[{len(words)}] = {{\n    " + ",\n    ".join(lines) + "};\n"


def in_pages(rows, table):
    """Rows of a sequence where its page table says: table[n] holds the n-th 16 tokens."""
    pages = np.empty((len(table), BLOCK_SIZE, *rows.shape[1:]), rows.dtype)
    pages[table] = rows.reshape(pages.shape)
    return pages


def write_vectors():
    """vectors.h: inputs from a fixed seed, outputs from float64 rounded to float32."""
    rng = np.random.default_rng(2024)
    query = rng.standard_normal((HEADS, DK + ROPE)).astype(np.float32)
    key = rng.standard_normal((KEYS, DK + ROPE)).astype(np.float32)
    selected = np.sort(rng.choice(KEYS, SELECTED, replace=False))
    table = rng.permutation(KEYS // BLOCK_SIZE)
    pages = in_pages(key, table)
    numbers = key.astype(np.float64)  # values are keys without their position
    exact = [
        attend(query.astype(np.float64), numbers[ids], numbers[ids, :DK])
        for ids in (selected, np.arange(KEYS))
    ]
    parts = [
        "/* Written by run.py. */\n#include <stdint.h>\n",
        f"enum {{ HEADS = {HEADS}, SELECTED = {SELECTED}, BLOCKS = {KEYS // BLOCK_SIZE}, "
        f"BLOCK_SIZE = {BLOCK_SIZE} }};",
        f"#define SCALE {SCALE}f",
        f"static const int32_t cached = {KEYS};\n",
        c_array("query", query[:, :DK]),
        c_array("query_rope", query[:, DK:]),
        c_array("key", pages[..., :DK]),
        c_array("key_rope", pages[..., DK:]),
        c_array("selected", selected, "int32_t"),
        c_array("block_table", table, "int32_t"),
    ]
    for name, (out, lse) in zip(("sparse", "dense"), exact, strict=True):
        parts += [
            c_array(f"{name}_out", out.astype(np.float32)),
            c_array(f"{name}_lse", lse.astype(np.float32)),
        ]
    (BUILD / "vectors.h").write_text("\n".join(parts))


def write_vectors_int8():
    """vectors_int8.h: new rows in float32, the codes that they become, and two outputs: from the
    codes, and from the rows as they came."""
    rng = np.random.default_rng(2025)
    query = rng.standard_normal((HEADS, DK)).astype(np.float16)
    rows = rng.standard_normal((2, KEYS, KV_HEADS, DK)).astype(np.float32)  # keys, values
    rows *= np.where(np.arange(DK) % 4 == 0, 1, 0.25).astype(np.float32)  # channels differ
    scales = (np.abs(rows).max(axis=1) / 127).astype(np.float16)
    quotients = rows / scales.astype(np.float32)[:, None]
    codes = np.clip(np.rint(quotients), -128, 127).astype(np.int8)
    table = rng.permutation(KEYS // BLOCK_SIZE)

    def outputs(numbers):
        groups = np.split(query.astype(np.float64), KV_HEADS)
        return np.concatenate([attend(q, *numbers[:, :, head])[0] for head, q in enumerate(groups)])

    stored = codes * scales.astype(np.float64)[:, None]
    parts = [
        "/* Written by run.py. */\n#include <stdint.h>\n",
        f"enum {{ HEADS = {HEADS}, KV_HEADS = {KV_HEADS}, KEYS = {KEYS}, "
        f"BLOCKS = {KEYS // BLOCK_SIZE}, BLOCK_SIZE = {BLOCK_SIZE} }};",
        f"#define SCALE {SCALE}f",
        f"static const int32_t cached = {KEYS};\n",
        c_array("query", query.view(np.uint16), "uint16_t"),
        c_array("scales", scales.view(np.uint16), "uint16_t"),
        c_array("key", rows[0]),
        c_array("value", rows[1]),
        c_array("block_table", table, "int32_t"),
        c_array("key_codes", in_pages(codes[0], table), "int8_t"),
        c_array("value_codes", in_pages(codes[1], table), "int8_t"),
        c_array("code_out", outputs(stored).astype(np.float32)),
        c_array("exact_out", outputs(rows.astype(np.float64)).astype(np.float32)),
    ]
    (BUILD / "vectors_int8.h").write_text("\n".join(parts))


# ---- what the object file says ---------------------------------------------------------------


def check_symbols(which=""):
    """Nothing from outside but memcpy and memset, and no memory of its own."""
    kernel = f"kernel{which}.o"
    undefined = set(command("arm-none-eabi-nm", "-u", "-j", kernel).split())
    if undefined - LIBC_ALLOWED - DIVISIONS:
        raise Wrong(
            f"the kernel needs {sorted(undefined - LIBC_ALLOWED - DIVISIONS)}; "
            f"only {sorted(LIBC_ALLOWED)} are promised"
        )
    symbols = [line.split()[-2:] for line in command("arm-none-eabi-nm", kernel).splitlines()]
    mutable = [name for kind, name in symbols if kind in "dDbBcC"]
    if mutable:
        raise Wrong(f"the kernel has mutable static data: {mutable}")
    linked = set(command("arm-none-eabi-nm", "-j", f"firmware{which}.elf").split())
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
        after = successors(
            [(int(at, 16), *rest) for at, *rest in INSTRUCTION.findall(function)], relocated
        )
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


def code_and_constants(which):
    """Bytes of the kernel's functions and constants in the linked firmware, and the functions."""
    sizes = {"t": {}, "r": {}}
    for line in command("arm-none-eabi-nm", "-S", f"firmware{which}.elf").splitlines():
        words = line.split()
        if len(words) == 4 and words[3].startswith("hl_") and words[2].lower() in sizes:
            sizes[words[2].lower()][words[3]] = int(words[1], 16)
    return sum(sizes["t"].values()), sum(sizes["r"].values()), sizes["t"]


def deepest_stack(which, entry):
    """Bytes of the deepest call path of a function, from gcc's call graph."""
    text = (BUILD / f"kernel{which}.ci").read_text()
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

    return depth(entry)


# ---- the run -----------------------------------------------------------------------------------


def own_headers():
    """The compiler's own stdint.h and stddef.h: all that a freestanding file may include."""
    return command("arm-none-eabi-gcc", "-print-file-name=include").strip()


def build(which=""):
    """The kernel without any C library in sight; the firmware and its printf with picolibc."""
    cc = ["arm-none-eabi-gcc", *CPU, *FLAGS, f"-I{ROOT / 'include'}", "-I."]
    kernel, firmware = f"kernel{which}", f"firmware{which}"
    command(
        *cc,
        "-nostdinc",
        "-isystem",
        own_headers(),
        "-fcallgraph-info=su",
        "-c",
        HERE / f"{kernel}.c",
        "-o",
        f"{kernel}.o",
    )
    command(*cc, "--specs=picolibc.specs", "-c", HERE / f"{firmware}.c", "-o", f"{firmware}.o")
    command(
        "arm-none-eabi-gcc", *CPU, *LINK, f"{kernel}.o", f"{firmware}.o", "-o", f"{firmware}.elf"
    )


def run_firmware(which=""):
    """The firmware's lines, a name and pairs of words each, from two runs that have to be equal."""
    first, second = (command(*QEMU, f"firmware{which}.elf") for _ in range(2))
    if first != second:
        raise Wrong(f"two runs differ:\n{first}{second}")
    results = {}
    for name, *words in map(str.split, first.splitlines()):
        results[name] = dict(zip(words[0::2], words[1::2], strict=True))
    if results["target"]["instructions_per_tick"] != "40":
        raise Wrong(f"a SysTick tick is not 40 instructions here: {first}")
    return results


# ---- the report --------------------------------------------------------------------------------


class Report:
    """One firmware, built, checked and run: a column for each call that it measured."""

    def __init__(self, which, entries):
        """entries: line of the firmware's output -> the kernel's function behind it."""
        build(which)
        self.undefined = check_symbols(which)
        if looping := divisions_in_loops(
            command("arm-none-eabi-objdump", "-dr", f"kernel{which}.o")
        ):
            raise Wrong(f"64-bit division inside a loop: {looping}")
        self.code, self.constants, self.functions = code_and_constants(which)
        self.bounds = [deepest_stack(which, entry) for entry in entries.values()]
        results = run_firmware(which)
        self.workspace = results["target"]["workspace"]
        self.lines = [results[name] for name in entries]
        for line, bound in zip(self.lines, self.bounds, strict=True):
            if (
                line["status"] != "0"
                or line["instructions"] != line["again"]
                or int(line["stack"]) > bound + CALLER
            ):
                raise Wrong(f"status, repetition or stack is off: {results}")

    def title(self, *cells):
        self.row(*cells)
        self.row("---", *["---:"] * (len(cells) - 1))

    def row(self, *cells):
        print("| " + " | ".join(str(cell) for cell in cells) + " |")

    def costs(self, memory):
        """The rows that every table has; memory: the rows between code and stack."""
        self.row("code, bytes (as linked)", *[self.code] * len(self.lines))
        self.row("constants, bytes", *[self.constants] * len(self.lines))
        for name, *cells in memory:
            self.row(name, *cells)
        self.row("stack, bytes (deepest path in gcc's call graph)", *self.bounds)
        self.row(
            "stack, bytes (painted and seen on the target)", *[line["stack"] for line in self.lines]
        )
        self.row("instructions", *[line["instructions"] for line in self.lines])

    def errors(self, title, name):
        """A row of errors, which the firmware prints in units of 1e-9."""
        self.row(
            title, *[f"{int(line[name]) * 1e-9:.1e}" if name in line else "" for line in self.lines]
        )

    def promises(self):
        print(
            f"\nThe kernel calls {', '.join(sorted(self.undefined)) or 'nothing'} (whose own "
            "stack the call graph leaves out); no heap, no mutable data, no 64-bit division in a "
            "loop. Stack seen is with that of the caller. Instructions were counted twice, equal "
            "both times."
        )
        largest = sorted(self.functions.items(), key=lambda item: -item[1])[:5]
        print("Largest functions: " + ", ".join(f"{name} {size}" for name, size in largest))


def report_sparse():
    write_vectors()
    report = Report("", dict.fromkeys(("sparse", "dense"), KERNELS[""]))
    report.title(
        f"Cortex-M4F, {HEADS} heads of {DK}+{ROPE}, float32, -Os",
        f"{SELECTED} of {KEYS} keys selected",
        f"all {KEYS} keys",
    )
    report.costs([("workspace, bytes", report.workspace, report.workspace)])
    report.errors("largest error of the output", "out_error")
    report.errors("largest error of the LSE", "lse_error")
    report.promises()


def report_int8():
    write_vectors_int8()
    kernel = KERNELS["_int8"]
    report = Report("_int8", {"append": f"{kernel}_append", "decode": kernel})
    report.title(
        f"Cortex-M4F, {HEADS} heads of {DK} on {KV_HEADS}, int8 cache, -Os",
        "append a token",
        f"attend to {KEYS}",
    )
    token = 2 * KV_HEADS * DK
    report.costs(
        [
            ("workspace, bytes", 0, report.workspace),
            (f"cache, bytes (float32: {4 * token * KEYS})", token, token * KEYS),
        ]
    )
    report.errors("largest error of the output, from the cache's own numbers", "out_error")
    report.errors("largest error of the output, from the numbers before int8", "int8_error")
    report.promises()


def main():
    BUILD.mkdir(parents=True, exist_ok=True)
    check_tools()
    report_sparse()
    print()
    report_int8()


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"examples/embedded/run.py: {wrong}")
