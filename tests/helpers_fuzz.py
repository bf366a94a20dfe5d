"""Fuzz targets of tests/fuzz, generated from the headers' own text and compiled with clang.

    binary = build("checks", "incre_flash_attention")
    found = fuzz(binary, seconds=3, corpus=folder)

A target is one program for all headers of an operator. glue() writes what its C files need to know
of them: tables of the structs' fields, and wrappers of the functions.
"""

import functools
import hashlib
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helpers
import helpers_decode
import numpy as np
import oracle
import oracle_decode

from gen import bind, render, spec

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "fuzz"
INCLUDE = HERE.parent / "include"
CLANG = "clang"
FAMILIES = {
    "sparse_flash_attention": "SPARSE",
    "sparse_flash_attention_antiquant": "RECORDS",
    "incre_flash_attention": "DECODE",
    "fusion_attention": "TRAIN",
    "fusion_attention_grad": "GRAD",
}
OPERATORS = tuple(FAMILIES)
SPARSE, DECODE = "sparse_flash_attention", "incre_flash_attention"
ASAN = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
MSAN = ("-fsanitize=fuzzer,memory", "-fsanitize-memory-track-origins", "-fno-sanitize-recover=all")
FLAGS = (
    *("-g1", "-O1", "-std=gnu11", "-fno-omit-frame-pointer", "-w"),
    "-fno-sanitize-coverage=trace-cmp",  # for mutators that know no fields; it doubles the time
)

# Which of a record's lists of words a pointer's entries are.
LIST_OF = {
    **dict.fromkeys(("block_table", "key_pages", "out"), 0),
    **dict.fromkeys(
        ("actual_seq_lengths_kv", "actual_seq_lengths", "actual_seq_kvlen", "lengths_list", "max"),
        1,
    ),
    **dict.fromkeys(("actual_seq_lengths_query", "actual_seq_qlen", "positions", "sum"), 2),
    "sparse_indices": 3,
    **dict.fromkeys(("sparse_lengths", "kv_padding_size", "prefix"), 4),
    "value_pages": 5,
}
LIST_BYTES = {"int32_t": 4, "int64_t": 8}
KINDS = {"float": "KIND_F32", "int32_t": "KIND_I32", "int64_t": "KIND_I64"}
WHAT = {
    "merge_parts": "PARTS",
    "quantise_rows": "QUANTISE",
    "dequantise_rows": "DEQUANTISE",
    "convert": "CONVERT",
}


def headers_of(op: str) -> list[Any]:
    """The shipped headers of an operator."""
    return [header for header in spec.load_catalogue() if header.kernels[0].op == op]


def shipped(header: Any) -> str:
    """A header as it is shipped."""
    return (INCLUDE / f"{header.name}.h").read_text()


# ---- headers cut behind their checks -------------------------------------------------------------

# The statement of a function's body that is the first to do anything: (function, what it is).
ENDS = (
    ("", r"    threads = \w+_threads\(&plan, bytes\);|#if defined\(_OPENMP\)\n    if \(plan"),
    ("_merge_parts", r"    \{\n(?:        const int32_t group|        for \(int32_t b = 0)"),
    ("_quantise_rows", r"    run\.number_step\[0\]"),
    ("_dequantise_rows", r"    run\.number_step\[0\]"),
    ("_convert", r"    first = \(const unsigned char \*\)"),
    ("_append", r"    for \(int32_t b = 0; (?:a\.rows > 0 && )?b < a\.batch"),
)


def without_work(text: str, name: str) -> str:
    """A header whose functions return where their checks end: nothing behind is compiled."""
    for suffix, first in ENDS:
        start = re.search(
            rf"^HL_API hl_status {name}{suffix}\((?:[^;{{]*)\)\n\{{", text, flags=re.M
        )
        if start is None:
            assert suffix, f"{name} is not defined as expected"
            continue
        end = text.index("\n}\n", start.end())
        found = re.search(first, text[start.end() : end], flags=re.M)
        assert found, f"{name}{suffix}: where its checks end has not been found"
        at = start.end() + found.start()
        checks = re.sub(r"^.*_store_state\(&plan\);\n", "", text[start.end() : at], flags=re.M)
        text = f"{text[: start.end()]}{checks}    return HL_OK;\n{text[at:]}"
    return text


# ---- glue ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """One number of a struct."""

    slot: str
    name: str  # as an error says it
    place: str  # within the struct, as offsetof wants it
    kind: str
    list: int = -1
    list_bytes: int = 0


def slot_of(declared: bind.CField) -> str:
    """Fields of one name have one slot, whatever struct they are in, but for a count and a list."""
    return "lengths_list" if declared.name == "lengths" and declared.stars else declared.name


def fields_of(parsed: bind.HeaderText, of: str, path: str = "") -> list[Field]:
    """All numbers of a struct, strides as three."""
    made = []
    for x in parsed.structs[of]:
        slot, place = slot_of(x), path + x.name
        if x.stars:
            at = LIST_OF.get(slot, -1)
            entry = 8 if x.stars == 2 else LIST_BYTES.get(x.type, 0)
            kind = "KIND_POINTERS" if x.stars == 2 else "KIND_POINTER"
            at = at if entry else -1
            made.append(Field(slot, x.name, place, kind, at, entry))
        elif x.type.endswith("_stride"):
            parts = ("batch", "row", "head")
            made += [
                Field(slot + (f" + {i}" if i else ""), x.name, f"{place}.{part}", "KIND_I64")
                for i, part in enumerate(parts)
            ]
        elif x.type in parsed.structs:
            made += fields_of(parsed, x.type, f"{place}.")
        else:
            made.append(Field(slot, x.name, place, KINDS.get(x.type, "KIND_I64")))
    return made


@functools.cache
def all_slots() -> list[str]:
    """Every field of every args struct that is shipped, and the two more numbers of strides."""
    names: dict[str, bool] = {}  # -> whether it is a stride
    for header in spec.load_catalogue():
        parsed = bind.parse(shipped(header))
        for name, fields in parsed.structs.items():
            if name.endswith(("_args", "_parts")):
                for x in fields:
                    names[slot_of(x)] = names.get(slot_of(x), False) or slot_of(x).endswith(
                        "_stride"
                    )
    return [f"{name}{more}" for name, s in names.items() for more in ("", "_1", "_2")[: 1 + 2 * s]]


def table_text(parsed: bind.HeaderText, of: str, label: str) -> str:
    """The table of a struct's fields."""
    rows = []
    for x in fields_of(parsed, of):
        argument = f"HL_ARG_{x.name.upper()}"
        argument = argument if argument in parsed.constants else "-1"
        plan = of.endswith("_plan")
        slot = "-1" if plan else f"S_{x.slot}"
        rows.append(
            f"    {{{slot}, (int32_t)offsetof({of}, {x.place}), {x.kind}, {x.list}, "
            f'{x.list_bytes}, {argument}, "{x.name}"}},'
        )
    return (
        f"static const field {label}_fields[] = {{\n" + "\n".join(rows) + "\n};\n"
        f"static const table {label} = {{{label}_fields, "
        f"sizeof {label}_fields / sizeof(field), sizeof({of})}};\n"
    )


LAYOUTS = ("BSND", "TND", "PA_BSND", "BSH", "BNSD", "PA_BNSD", "SBH")
ISAS = ("best", "scalar", "neon", "avx2", "avx512", "amx")


def mask_of(names: Sequence[str], known: Sequence[str]) -> int:
    return sum(1 << known.index(name) for name in names)


def kernel_text(kernel: Any, i: int) -> str:
    """What the model has to know of a kernel."""
    view = render.kernel_view(kernel)
    record = view.record
    has = kernel.features
    numbers = {
        "name": f'"{kernel.name}"',
        "family": FAMILIES[kernel.op],
        "bytes": view.bytes,
        "dk": kernel.dk,
        "dv": kernel.dv,
        "rope": kernel.rope,
        "d": kernel.d,
        "key_width": view.key.width,
        "key_element": view.key.element,
        "key_align": view.key.align,
        "value_width": view.value.width,
        "value_element": view.value.element,
        "value_align": view.value.align,
        "value_shared": int(getattr(view, "value_shared", 0)),
        "code_sides": int(getattr(view, "code_sides", 0)),
        "code_channels": int(getattr(view, "code_channels", 0)),
        "record": record.bytes if record else 0,
        "record_align": record.align if record else 1,
        "record_behind": record.behind if record and record.scales_behind else 0,
        "record_multiple": record.page_multiple if record else 1,
        "layouts_q": mask_of(kernel.layout_q, LAYOUTS),
        "layouts_kv": mask_of(kernel.layout_kv, LAYOUTS),
        "isas": mask_of([isa for isa in kernel.isa if isa != "neon"], ISAS),
        "float16": int(kernel.dtype == "f16"),
        **{
            name: int(name in has)
            for name in ("slots", "pages", "stats", "sinks", "window", "softcap", "alibi")
        },
        "pse_types": int("pse_types" in has),
    }
    rows = ", ".join(f".{name} = {value}" for name, value in numbers.items())
    return f"static const kernel kernel_{i} = {{{rows}}};\n"


def routine_text(parsed: bind.HeaderText, kernel: Any, i: int, tables: dict, checks: bool) -> str:
    """Wrappers of a kernel's functions, and their rows of the table of routines."""
    name, op = kernel.name, f"hl_{kernel.op}"
    text = f"""
static int32_t make_{i}(void *plan, const void *args, hl_error *error)
{{
    return (int32_t){name}_plan(({op}_plan *)plan, (const {op}_args *)args, error);
}}

static int32_t whole_{i}(const void *args, void *workspace, size_t bytes, hl_error *error)
{{
    return (int32_t){name}((const {op}_args *)args, workspace, bytes, error);
}}

static size_t needs_{i}(const void *args)
{{
    return {name}_workspace_bytes((const {op}_args *)args);
}}
"""
    work = ""
    if not checks:
        text += f"""
static void task_{i}(const void *plan, int64_t task, void *workspace)
{{
    {name}_task((const {op}_plan *)plan, task, workspace);
}}
"""
        work = f", .task = task_{i}"
        if f"{name}_merge(" in parsed.text:
            text += f"""
static void merge_{i}(const void *plan, int64_t merge)
{{
    {name}_merge((const {op}_plan *)plan, merge);
}}
"""
            work += f", .merge = merge_{i}"
    rows = [
        f"{{.of = &kernel_{i}, .what = PLAN, .args = &{tables[f'{op}_args']}, "
        f'.plan = &{tables[f"{op}_plan"]}, .name = "{name}", .make = make_{i}, '
        f".whole = whole_{i}, .needs = needs_{i}{work}}}"
    ]
    for routine in (*bind.ROUTINES, "merge_parts"):
        found = re.search(rf"\b{name}_{routine}\(\s*const (\w+)", parsed.text)
        if not found:
            continue
        what = WHAT.get(routine) or ("DECODE_APPEND" if kernel.decodes else "KV_APPEND")
        text += f"""
static int32_t {routine}_{i}(const void *args, hl_error *error)
{{
    return (int32_t){name}_{routine}((const {found[1]} *)args, error);
}}
"""
        rows.append(
            f"{{.of = &kernel_{i}, .what = {what}, .args = &{tables[found[1]]}, "
            f'.name = "{name}_{routine}", .call = {routine}_{i}}}'
        )
    return text + f"#define ROUTINES_{i} \\\n    " + ", \\\n    ".join(rows) + "\n"


def glue(headers: Sequence[tuple[Any, str]], checks: bool) -> str:
    """glue.h for a target of these headers: (description, text)."""
    slots = all_slots()
    parts = [f'#include "{header.name}.h"' for header, _ in headers]
    parts.append("enum {\n    " + ",\n    ".join(f"S_{x}" for x in slots) + ",\n    SLOTS\n};")
    names = ",\n    ".join(f'"{x}"' for x in slots)
    parts.append(f"static const char *const slot_names[] = {{\n    {names}\n}};")
    tables: dict[str, str] = {}
    for i, (header, text) in enumerate(headers):
        parsed = bind.parse(text)
        for name in parsed.structs:
            if name.endswith(("_args", "_parts", "_plan")) and name not in tables:
                tables[name] = f"table_{name}"
                parts.append(table_text(parsed, name, tables[name]))
        kernel = header.kernels[0]
        parts.append(kernel_text(kernel, i) + routine_text(parsed, kernel, i, tables, checks))
    rows = ",\n    ".join(f"ROUTINES_{i}" for i in range(len(headers)))
    parts.append(f"static const routine routines[] = {{\n    {rows}\n}};")
    parts.append("enum { ROUTINES = sizeof routines / sizeof routines[0] };")
    return "\n".join(parts) + "\n"


# ---- building ------------------------------------------------------------------------------------


def sources(
    target: str,
    op: str,
    names: Sequence[str] = (),
    change: dict[str, tuple[str, str]] | None = None,
) -> dict[str, str]:
    """The files of a target; of an operator's headers only those named, if any are. change: header
    -> (what, by what), a defect to be found."""
    files = {path.name: path.read_text() for path in SOURCES.glob("*.h")}
    files[f"{target}.c"] = (SOURCES / f"{target}.c").read_text()
    chosen = []
    for header in headers_of(op):
        if names and header.name not in names:
            continue
        text = shipped(header)
        if change and header.name in change:
            what, by = change[header.name]
            assert what in text, f"{header.name} does not say {what!r}"
            text = text.replace(what, by)
        text = without_work(text, header.kernels[0].name) if target == "checks" else text
        files[f"{header.name}.h"] = text
        chosen.append((header, text))
    files["glue.h"] = glue(chosen, target == "checks")
    return files


def build(
    target: str,
    op: str,
    names: Sequence[str] = (),
    sanitize: Sequence[str] = ASAN,
    change: dict[str, tuple[str, str]] | None = None,
    more: Sequence[str] = (),
) -> Path:
    """A target's program."""
    return bind.compile_c(
        sources(target, op, names, change),
        compiler=CLANG,
        flags=(*FLAGS, *sanitize, *more),
        suffix=".bin",
    )


# ---- corpora -------------------------------------------------------------------------------------

CORPUS = SOURCES / "corpus"
KEPT = 800  # inputs of a target, at most
LISTS, WORDS = 6, 16


def routine_names(target: str, op: str, names: Sequence[str] = ()) -> list[str]:
    """A target's routines, in the order of its table."""
    glued = sources(target, op, names)["glue.h"]
    return re.findall(r'\.name = "(hl_\w+)", \.(?:make|call)', glued)


def unpack(target: str, op: str, folder: Path, names: Sequence[str] = ()) -> int:
    """Writes the kept inputs of a target into a folder, as its program reads them; how many. They
    are kept by names, so that a new field or header does not spoil them."""
    path = CORPUS / f"{target}-{op}.json.xz"
    if not path.exists():
        return 0
    slots = {name: i for i, name in enumerate(all_slots())}
    routines = routine_names(target, op, names)
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for kept in json.loads(lzma.decompress(path.read_bytes())):
        if kept["routine"] not in routines:
            continue
        values = [0] * len(slots)
        for name, value in kept["slots"].items():
            if name in slots:
                values[slots[name]] = value
        data = struct.pack("<BB", routines.index(kept["routine"]), kept["flags"])
        data += bytes.fromhex(kept["seed"]) + struct.pack(f"<{len(values)}q", *values)
        data += struct.pack(f"<{LISTS * WORDS}i", *kept["words"])
        (folder / hashlib.sha256(data).hexdigest()[:24]).write_bytes(data)
        count += 1
    return count


def pack(target: str, op: str, folder: Path, names: Sequence[str] = ()) -> int:
    """Keeps a folder's inputs; how many they are."""
    slots, routines = all_slots(), routine_names(target, op, names)
    size = 8 + 8 * len(slots) + 4 * LISTS * WORDS
    kept = []
    paths = sorted(path for path in folder.iterdir() if path.stat().st_size == size)
    for path in paths[:KEPT]:  # their names are hashes: any of them
        data = path.read_bytes()
        values = struct.unpack_from(f"<{len(slots)}q", data, 8)
        kept.append(
            {
                "routine": routines[data[0] % len(routines)],
                "flags": data[1],
                "seed": data[2:8].hex(),
                "slots": {n: x for n, x in zip(slots, values, strict=True) if x},
                "words": struct.unpack_from(f"<{LISTS * WORDS}i", data, 8 + 8 * len(slots)),
            }
        )
    CORPUS.mkdir(exist_ok=True)
    text = json.dumps(kept, separators=(",", ":"), sort_keys=True)
    (CORPUS / f"{target}-{op}.json.xz").write_bytes(lzma.compress(text.encode(), preset=9))
    return len(kept)


# ---- running -------------------------------------------------------------------------------------

ENV = {
    "ASAN_OPTIONS": "quarantine_size_mb=1:malloc_context_size=0:detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@dataclass
class Found:
    """What a run of a target said."""

    executions: int = 0  # inputs
    calls: int = 0  # of the functions under test
    accepted: int = 0
    edges: int = 0
    features: int = 0
    seconds: float = 0.0
    failure: str = ""  # the first lines of what went wrong
    log: str = field(default="", repr=False)


def numbers(pattern: str, log: str) -> list[int]:
    found = re.findall(pattern, log)
    return (
        [int(x) for x in (found[-1] if isinstance(found[-1], tuple) else found[-1:])]
        if found
        else [0, 0]
    )


def fuzz(
    binary: Path,
    corpus: Path,
    *,
    seconds: int = 0,
    runs: int = -1,
    seed: int = 0,
    env: dict[str, str] | None = None,
    artifacts: Path | None = None,
) -> Found:
    """Runs a target on a folder of inputs, to which new ones are added; runs=0: these alone."""
    corpus.mkdir(parents=True, exist_ok=True)
    to = artifacts or corpus.with_name(corpus.name + "-found")
    to.mkdir(parents=True, exist_ok=True)
    options = [f"-runs={runs}", "-max_len=4096", "-timeout=60", f"-artifact_prefix={to}/"]
    options += [f"-max_total_time={seconds}"] if seconds else []
    options += [f"-seed={seed}"] if seed else []
    started = time.monotonic()
    run = subprocess.run(
        [str(binary), *options, str(corpus)],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **ENV, **(env or {})},
        check=False,
    )
    log = run.stderr
    units = numbers(r"#(\d+)\s+(?:DONE|NEW|REDUCE|INITED|pulse)", log)
    calls = numbers(r"fuzz: (\d+) calls, (\d+) of them", log)
    covered = numbers(r"cov: (\d+) ft: (\d+)", log)
    failure = ""
    if run.returncode:
        lines = re.findall(
            r"^(?:fuzz: .*|.*runtime error.*|.*Sanitizer: .*|\s+#[0-3] .*|.*ERROR.*)$", log, re.M
        )
        failure = "\n".join(lines[:12]) or log[-1500:]
    return Found(
        units[0],
        calls[0],
        calls[1],
        covered[0],
        covered[1],
        time.monotonic() - started,
        failure,
        log,
    )


def minimised(binary: Path, corpus: Path, to: Path) -> int:
    """A small set of inputs that cover what all of a folder's do."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    subprocess.run(
        [str(binary), "-set_cover_merge=1", "-max_len=4096", str(to), str(corpus)],
        capture_output=True,
        env={**os.environ, **ENV},
        check=False,
    )
    return len(list(to.iterdir()))


# ---- the oracle ----------------------------------------------------------------------------------

T_NUMBER, T_FLOAT, T_BF16, T_CODE, T_RECORD, T_MASK, T_BITS, T_LIST = range(8)


@dataclass
class Piece:
    """An array of a dumped call."""

    type: int
    written: int
    count: tuple[int, int, int]
    channels: int
    step: tuple[int, int, int]
    element: int
    data: bytes


@dataclass
class Dumped:
    """A call that run.c was asked to dump: plain C's."""

    kernel: Any
    routine: str
    values: dict[str, Any]
    pieces: dict[str, Piece]

    def dtype(self, piece: Piece) -> np.dtype:
        return np.dtype(
            {
                T_NUMBER: bind.DTYPES[self.kernel.dtype],
                T_FLOAT: np.float32,
                T_BF16: bind.DTYPES["bf16"],
                T_CODE: np.int8,
            }.get(piece.type, np.uint8)
        )

    def flat(self, name: str, dtype: Any = None) -> np.ndarray | None:
        """A list, or a tensor without strides."""
        piece = self.pieces.get(name)
        return None if piece is None else np.frombuffer(piece.data, dtype or self.dtype(piece))

    def tensor(self, name: str) -> np.ndarray | None:
        """[batches][rows][heads][channels], packed."""
        piece = self.pieces.get(name)
        if piece is None:
            return None
        dtype = self.dtype(piece)
        raw = np.frombuffer(piece.data, np.uint8)
        raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
        strides = [step * piece.element for step in piece.step]
        shape = (*piece.count, piece.channels * piece.element // dtype.itemsize)
        return np.lib.stride_tricks.as_strided(raw, shape, (*strides, dtype.itemsize)).copy()


def read_dump(path: Path, op: str, names: Sequence[str] = ()) -> Iterator[Dumped]:
    """The calls of a dump, in order."""
    data, at, slots = path.read_bytes(), 0, all_slots()
    routines = routine_names("run", op, names)
    kernels = {h.kernels[0].name: (h, h.kernels[0]) for h in headers_of(op)}
    while at < len(data):
        _, which, size, count = struct.unpack_from("<4q", data, at)
        routine = routines[which]
        name = next(n for n in sorted(kernels, key=len, reverse=True) if routine.startswith(n))
        header, kernel = kernels[name]
        parsed = bind.parse(shipped(header))
        args, at = data[at + 32 : at + 32 + size], at + 32 + size
        values = {}
        if routine == name:
            made = bind.structures(parsed)[f"hl_{op}_args"].from_buffer_copy(args)
            values = {n: getattr(made, n) for n, _ in made._fields_}
        pieces = {}
        for _ in range(count):
            x = struct.unpack_from("<12q", data, at)
            at += 96
            pieces[slots[x[0]]] = Piece(
                x[1], x[3], x[4:7], x[7], x[8:11], x[11], data[at : at + x[2]]
            )
            at += x[2]
        yield Dumped(kernel, routine, values, pieces)


def outputs_of(d: Dumped, shape: Sequence[int], stats: Sequence[int]) -> dict[str, np.ndarray]:
    got = {"attention_out": d.tensor("attention_out").reshape(shape)}
    for name in bind.STATS:
        if name in d.pieces:
            got[name] = d.flat(name, np.float32).reshape(stats)
    return got


def check_sparse(d: Dumped) -> bool:
    """A call of sparse_flash_attention without records."""
    v = d.values
    tnd_q, tnd_kv = v["layout_query"] == oracle.TND, v["layout_kv"] == oracle.TND
    n2 = v["heads_kv"] or 1

    def rows(name: str, tnd: bool) -> np.ndarray | None:
        x = d.tensor(name)
        return x if x is None or not tnd else x[0]

    query = rows("query", tnd_q)
    if query is None or query.size == 0 or "key" not in d.pieces or v["batch"] == 0:
        return False
    lead = query.shape[:-2]
    ids, lengths = d.flat("sparse_indices", np.int32), d.flat("sparse_lengths", np.int32)
    table = d.flat("block_table", np.int32)
    paged = v["layout_kv"] == oracle.PA_BSND
    if (v["sparse_indices"] and ids is None) or (paged and table is None):
        return False  # lists without entries are nothing to NumPy
    a = oracle.Args(
        query=query,
        key=rows("key", tnd_kv),
        scale_value=v["scale_value"],
        dv=d.kernel.dv,
        query_rope=rows("query_rope", tnd_q),
        key_rope=rows("key_rope", tnd_kv),
        value=rows("value", tnd_kv),
        sparse_indices=None if ids is None else ids.reshape(*lead, n2, v["list_length"]),
        sparse_lengths=None if lengths is None else lengths.reshape(*lead, n2),
        block_table=None if table is None else table.reshape(v["batch"], v["max_blocks"]),
        actual_seq_lengths_query=d.flat("actual_seq_lengths_query", np.int32),
        actual_seq_lengths_kv=d.flat("actual_seq_lengths_kv", np.int32),
        sinks=d.flat("sinks", np.float32),
        sparse_block_size=v["sparse_block_size"] or 1,
        layout_query=v["layout_query"],
        layout_kv=v["layout_kv"],
        sparse_mode=v["sparse_mode"],
        index_kind=v["index_kind"],
    )
    stats = (*lead[:-1], n2, lead[-1], v["heads_q"] // n2)
    helpers.check(a, outputs_of(d, (*query.shape[:-1], a.dv), stats), "scalar")
    return True


def check_decode(d: Dumped) -> bool:
    """A call of incre_flash_attention whose cache holds numbers."""
    v, k = d.values, d.kernel
    by_head = {bind_layout("BNSD"), bind_layout("PA_BNSD")}

    def laid(name: str, layout: int) -> np.ndarray | None:
        x = d.tensor(name)
        if x is None:
            return None
        return np.ascontiguousarray(x.swapaxes(1, 2)) if layout in by_head else x

    if "key" not in d.pieces or "query" not in d.pieces:
        return False
    query = laid("query", v["layout_query"])
    n1, rows = v["heads_q"] or 1, v["seq_q"] or 1
    pse, mask, table = d.flat("pse_shift"), d.flat("atten_mask"), d.flat("block_table", np.int32)
    paged = v["layout_kv"] in (bind_layout("PA_BSND"), bind_layout("PA_BNSD"))
    if paged and table is None:
        return False  # a list without entries is nothing to NumPy
    if k.kv != k.dtype and "value" not in d.pieces:
        return False  # the oracle's values are decoded keys, the kernel's have numbers of their own
    a = oracle_decode.Args(
        query=query,
        key=laid("key", v["layout_kv"]),
        dk=k.dk,
        dv=k.dv,
        value=laid("value", v["layout_kv"]),
        formats=tuple("" if k.kv == k.dtype else k.kv for _ in "kv"),
        antiquant_scale=d.flat("antiquant_scale"),
        antiquant_offset=d.flat("antiquant_offset"),
        antiquant_mode=v["antiquant_mode"],
        pse_shift=None if pse is None else pse.reshape(v["pse_batch"] or v["batch"], n1, rows, -1),
        atten_mask=None
        if mask is None
        else mask.reshape(v["mask_batch"] or v["batch"], v["mask_rows"] or 1, -1),
        actual_seq_lengths=d.flat("actual_seq_lengths", np.int32),
        lengths=v["lengths"],
        kv_padding_size=d.flat("kv_padding_size", np.int32),
        block_table=None if table is None else table.reshape(v["batch"], v["max_blocks"]),
        quant_scale2=d.flat("quant_scale2"),
        quant_offset2=d.flat("quant_offset2"),
        alibi_slopes=d.flat("alibi_slopes", np.float32),
        sinks=d.flat("sinks", np.float32),
        layout_query=v["layout_query"],
        layout_kv=v["layout_kv"],
        window=v["window"],
        scale_value=v["scale_value"],
        softcap=v["softcap"],
    )
    out = laid("attention_out", v["layout_query"])
    got = {"attention_out": out}
    for name in bind.STATS:
        if name in d.pieces:
            got[name] = d.flat(name, np.float32).reshape(v["batch"], n1, rows)
    helpers_decode.check(a, got, "scalar")
    return True


def bind_layout(name: str) -> int:
    return LAYOUTS.index(name)


def oracle_agrees(d: Dumped) -> bool:
    """Holds a dumped call against the oracle; False where there is no way to say it in NumPy."""
    checks = {SPARSE: check_sparse, DECODE: check_decode}
    if d.routine != d.kernel.name or d.kernel.op not in checks:
        return False
    softcap = d.values.get("softcap", 0)
    if abs(d.values["scale_value"]) > 16 or not (softcap == 0 or 1e-3 < softcap < 1e4):
        return False  # float32 ends where the oracle's float64 does not
    with np.errstate(all="ignore"):
        return checks[d.kernel.op](d)
