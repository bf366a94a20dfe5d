"""What every tensor of a call takes in whole numbers of any size, written down apart from the
headers: whether there can be memory for it on a machine of 32 or 64 bits."""

import ctypes
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helpers_wide
import numpy as np
from helpers import record_of
from helpers_every import description, kernel, text
from helpers_wide import Machine

HERE = Path(__file__).resolve().parent
ZEROS = 1  # the address of real memory, all 0 (probe.c)
ENTRIES = 1 << 16  # numbers there
NO_ISA = 99  # with this a call that is all right otherwise is not made either
ELEMENT = {"f32": 4, "f16": 2, "bf16": 2, "i8": 1}
BNSD, PA_BSND, SBH = 4, 2, 6


@dataclass
class Tensor:
    """One pointer of a call."""

    name: str
    bytes: int
    written: bool = False
    stride: str = ""  # its argument, if it has one
    packed: int = 0  # what the argument's largest default would be


@dataclass
class Asked:
    """A call as it is asked about: its fields, and what each tensor takes."""

    fields: dict[str, Any]
    tensors: list[Tensor]
    wrong: set[str] = field(default_factory=set)


def strided(
    fields: dict[str, Any],
    name: str,
    counts: tuple[int, int, int],
    channels: int,
    element: int,
    written: bool = False,
    layout: int = 0,
    stride: str = "",
) -> Tensor:
    """A tensor [batch][row][head][channels] with its strides: 0 is packed."""
    batches, rows, heads = counts
    stride = stride or f"{name}_stride"
    given = fields.get(stride, (0, 0, 0))
    default = [rows * heads * channels, heads * channels, channels]
    if layout == BNSD:
        default[1:] = [channels, rows * channels]
    if layout == SBH:
        default = [heads * channels, batches * heads * channels, channels]
    step = [g or d for g, d in zip(given, default, strict=True)]
    last = channels + sum((n - 1) * s for n, s in zip(counts, step, strict=True))
    none = min(counts) <= 0
    packed = max(rows, 1) * heads * channels
    return Tensor(name, 0 if none else last * element, written, stride, packed)


def count(rng: np.random.Generator, most: int = 31) -> int:
    """Of any order of magnitude, often a power of two or next to one."""
    top = int(rng.integers(0, most + 1))
    n = 1 << top
    n += int(rng.integers(-1, 2)) if rng.random() < 0.5 else int(rng.integers(0, n))
    return max(min(n, 2**31 - 1), 0)


def strides(rng: np.random.Generator, fields: dict[str, Any], bits: int, *names: str) -> None:
    """Some calls have strides: of any size, for each tensor by itself."""
    for name in names:
        if rng.random() < 0.3:
            fields[f"{name}_stride"] = tuple(
                int(2 ** rng.uniform(0, bits - 2)) if rng.random() < 0.5 else 0 for _ in range(3)
            )


def asked_sparse(name: str, rng: np.random.Generator, bits: int) -> Asked:
    of, record = description(name), record_of(description(name).kv)
    e, paged = ELEMENT[of.dtype], "BSND" not in of.layout_kv
    f: dict[str, Any] = {"batch": count(rng, 15), "seq_q": count(rng), "seq_kv": count(rng)}
    f |= {"heads_kv": 1 if paged else max(count(rng, 24), 1), "scale_value": 1.0, "isa": 1}
    f["heads_q"] = f["heads_kv"] * int(rng.integers(1, 65))
    b, s1, n1, n2 = f["batch"], f["seq_q"], f["heads_q"], f["heads_kv"]
    outer, inner = b, f["seq_kv"]
    if paged:
        f |= {"layout_kv": PA_BSND, "block_table": ZEROS, "max_blocks": 1}
        f |= {"num_blocks": max(count(rng), 1), "block_size": max(count(rng), 1)}
        outer, inner = f["num_blocks"], f["block_size"]
    if rng.random() < 0.5:
        f |= {"list_length": count(rng), "sparse_indices": None}
    strides(rng, f, bits, "query", *([] if record else ["key", "value"]), "out")
    d = of.dk + of.rope
    tensors = [strided(f, "query", (b, s1, n1), d, e)]
    rows = b * s1 * n1
    any_ = rows > 0
    if record is None:
        tensors.append(strided(f, "key", (outer, inner, n2), d, e))
        if of.dv != of.dk or rng.random() < 0.5:
            tensors.append(strided(f, "value", (outer, inner, n2), of.dv, e))
        for tensor in tensors[1:]:
            tensor.bytes = tensor.bytes if any_ else 0
    else:
        query = np.dtype(np.uint16)
        row = record.bytes_of(record.fields, query)
        behind = record.bytes_of(record.behind, query)
        page = -(-inner * (row + behind) // record.page_multiple) * record.page_multiple
        size = (outer - 1) * page + inner * (row + behind) if behind else outer * inner * n2 * row
        key = Tensor("key", size if any_ and outer and inner else 0, False, "key_stride")
        key.packed = max(page if behind else 0, inner * n2 * row)
        tensors.append(key)
    out = strided(f, "out", (b, s1, n1), of.dv, e, True)
    out.name = "attention_out"
    tensors.append(out)
    tensors += [Tensor(s, 4 * rows, True) for s in ("softmax_max", "softmax_sum", "softmax_lse")]
    if "sparse_indices" in f:
        tensors.append(Tensor("sparse_indices", 4 * b * s1 * n2 * f["list_length"]))
        if f["list_length"] == 0:
            f.pop("sparse_indices")
    return Asked(f, tensors)


def asked_decode(name: str, rng: np.random.Generator, bits: int) -> Asked:
    of = description(name)
    e = ELEMENT[of.dtype]
    codes = of.kv == "i8"
    layout = int(rng.choice((0, BNSD)))
    f: dict[str, Any] = {"batch": count(rng, 15), "seq_q": int(rng.integers(1, 17)), "isa": 1}
    f |= {"seq_kv": count(rng), "heads_kv": max(count(rng, 27), 1), "scale_value": 1.0}
    f["heads_q"] = f["heads_kv"] * int(rng.integers(1, 9))
    f |= {"layout_query": layout, "layout_kv": layout}
    f |= {"pse_batch": int(rng.choice((0, 1))), "mask_batch": int(rng.choice((0, 1)))}
    b, s1, s2, n1, n2 = (f[n] for n in ("batch", "seq_q", "seq_kv", "heads_q", "heads_kv"))
    f |= {"pse_width": count(rng), "mask_width": count(rng), "mask_rows": int(rng.choice((1, s1)))}
    if codes:
        f["antiquant_mode"] = int(rng.integers(0, 3))
    strides(rng, f, bits, "query", "key", "value", "out")
    c = 1 if codes else e
    tensors = [strided(f, "query", (b, s1, n1), of.dk, e, layout=layout)]
    key = strided(f, "key", (b, s2, n2), of.dk, c, layout=layout)
    value = strided(f, "value", (b, s2, n2), of.dv, c, layout=layout)
    tensors += [key, value]
    if rng.random() < 0.5:
        width = f["pse_width"] or s2
        tensors.append(Tensor("pse_shift", (f["pse_batch"] or b) * s1 * n1 * width * e))
    if rng.random() < 0.5:
        width = f["mask_width"] or s2
        tensors.append(Tensor("atten_mask", (f["mask_batch"] or b) * f["mask_rows"] * width))
    if codes:
        mode = f["antiquant_mode"]
        wide = 4 if mode == 2 else e
        numbers = (n2 * (of.dk + of.dv), 2, 2 * b * s2)[mode]
        tensors.append(Tensor("antiquant_scale", wide * numbers if b else 0))
    tensors.append(strided(f, "out", (b, s1, n1), of.dv, e, True, layout=layout))
    tensors[-1].name = "attention_out"
    if "stats" in of.features:
        tensors += [Tensor(s, 4 * b * s1 * n1, True) for s in ("softmax_max", "softmax_lse")]
    return Asked(f, tensors)


def asked_train(name: str, rng: np.random.Generator, bits: int) -> Asked:
    of = description(name)
    e, grad = ELEMENT[of.dtype], of.backward
    layout = int(rng.choice((0, BNSD, SBH)))
    f: dict[str, Any] = {"batch": count(rng), "seq_q": count(rng, 24), "seq_kv": count(rng)}
    f |= {"heads_kv": max(count(rng, 27), 1), "scale_value": 1.0, "isa": 1}
    f["heads_q"] = f["heads_kv"] * int(rng.integers(1, 9))
    f |= {"input_layout": layout, "keep_prob": float(rng.choice((1.0, 0.5)))}
    f |= {"pse_shape": int(rng.integers(0, 3)), "stats_width": int(rng.choice((1, 8)))}
    shape = f["pse_shape"] if rng.random() < 0.5 else None  # every row, one row, the last 1024
    if shape == 2:
        f["seq_kv"] = f["seq_q"]
        f["pse_width"] = max(f["seq_kv"], 1024)
    b, s1, s2, n1, n2 = (f[n] for n in ("batch", "seq_q", "seq_kv", "heads_q", "heads_kv"))
    f["mask_batch"] = int(rng.choice((1, b))) or 1
    f["mask_heads"] = int(rng.choice((1, n1)))
    pse_batch = f["pse_batch"] = int(rng.choice((1, b)))
    pse_batch = pse_batch or b
    outs = ("dquery", "dkey", "dvalue") if grad else ()
    strides(rng, f, bits, "query", "key", "value", "out", *outs)
    tensors = [
        strided(f, "query", (b, s1, n1), of.dk, e, layout=layout),
        strided(f, "key", (b, s2, n2), of.dk, e, layout=layout),
        strided(f, "value", (b, s2, n2), of.dv, e, layout=layout),
        strided(f, "attention_out", (b, s1, n1), of.dv, e, not grad, layout, "out_stride"),
    ]
    if grad:
        tensors += [
            strided(f, "dout", (b, s1, n1), of.dv, e, layout=layout),
            strided(f, "dquery", (b, s1, n1), of.dk, e, True, layout),
            strided(f, "dkey", (b, s2, n2), of.dk, e, True, layout),
            strided(f, "dvalue", (b, s2, n2), of.dv, e, True, layout),
        ]
        wanted = {n for n in outs if rng.random() < 0.7}
        tensors = [t for t in tensors if t.name not in outs or t.name in wanted]
    rows = 4 * b * s1 * n1
    for stat in ("softmax_max", "softmax_sum"):
        tensors.append(Tensor(stat, rows * f["stats_width"], not grad))
    if not grad:
        tensors.append(Tensor("softmax_lse", rows, True))
    if shape is not None:
        each = (s1 * s2, s2, 1024 * f.get("pse_width", 0))[shape]
        tensors.append(Tensor("pse", pse_batch * n1 * each * e))
    if rng.random() < 0.5:
        mask = f["mask_batch"] * f["mask_heads"] * s1 * s2
        tensors.append(Tensor("atten_mask", mask))
    if f["keep_prob"] < 1:
        weights = b * n1 * s1 * s2  # 2^64 of them may be called too large, whatever their bytes
        tensors.append(Tensor("dropout_mask", -(-weights // 8), packed=weights >> 1))
    return Asked(f, tensors)


def asked_append(name: str, rng: np.random.Generator, bits: int) -> Asked:
    """New rows of a decode cache, or of one of records; with lengths that are all 0 nothing would
    be written, if an instruction set could be found."""
    of, record = description(name), record_of(description(name).kv)
    e = ELEMENT[of.dtype]
    f: dict[str, Any] = {"batch": count(rng, 15), "rows": count(rng), "isa": NO_ISA}
    paged = "BSND" not in of.layout_kv
    f |= {"heads_kv": 1 if paged else max(count(rng, 24), 1), "seq_kv": count(rng)}
    f |= {"positions": ZEROS, "lengths": ZEROS}
    b, rows, n2 = f["batch"], f["rows"], f["heads_kv"]
    outer, inner = b, f["seq_kv"]
    if paged:
        f |= {"layout_kv": PA_BSND, "block_table": ZEROS, "max_blocks": 1}
        outer, inner = (max(count(rng), 1) for _ in range(2))
        f |= {"num_blocks": outer, "block_size": inner}
    any_ = b > 0 and rows > 0
    if record is not None:
        strides(rng, f, bits, "nope")
        row = record.bytes_of(record.fields, np.dtype(np.uint16))
        behind = record.bytes_of(record.behind, np.dtype(np.uint16))
        page = -(-inner * (row + behind) // record.page_multiple) * record.page_multiple
        size = (outer - 1) * page + inner * (row + behind) if behind else outer * inner * n2 * row
        key = Tensor("key", size if any_ and inner else 0, True, "key_stride")
        key.packed = max(page if behind else 0, inner * n2 * row)
        nope = strided(f, "nope", (b, rows, n2), of.dk + of.rope, e)
        return Asked(f, [nope, key])
    codes = of.kv == "i8"
    c = 1 if codes else e
    strides(rng, f, bits, "key", "value", "key_cache", "value_cache")
    tensors = []
    for side, channels in (("key", of.dk), ("value", of.dv)):
        tensors.append(strided(f, side, (b, rows, n2), channels, e))
        cache = strided(f, f"{side}_cache", (outer, inner, n2), channels, c, True)
        cache.packed = max(cache.packed, cache.bytes)  # a stride is looked at all the same
        cache.bytes = cache.bytes if any_ else 0
        tensors.append(cache)
    if codes:
        f["antiquant_mode"] = 2
        tensors.append(Tensor("token_scales", 8 * b * inner if any_ else 0, True))
    return Asked(f, tensors)


def asked_rows(name: str, rng: np.random.Generator, bits: int) -> Asked:
    """Quantise: rows that become records."""
    of, record = description(name), record_of(description(name).kv)
    e, query = ELEMENT[of.dtype], np.dtype(np.uint16)
    rows = int(2 ** rng.uniform(0, min(bits + 4, 62)))
    f: dict[str, Any] = {"rows": rows, "isa": NO_ISA}
    d = of.dk + of.rope
    row, behind = (record.bytes_of(fields, query) for fields in (record.fields, record.behind))
    step = {name: int(2 ** rng.uniform(12, bits - 2)) * 64 for name in ("nope", "record")}
    step = {n: s if s < 2 ** (bits - 1) and rng.random() < 0.4 else 0 for n, s in step.items()}
    f |= {f"{n}_stride": s for n, s in step.items()}
    nope = ((rows - 1) * (step["nope"] or d) + d) * e
    if not behind:
        records = (rows - 1) * (step["record"] or row) + row
        packed = 0
    else:
        size = f["block_size"] = max(count(rng), 1)
        each = step["record"] or row
        page = -(-size * (each + behind) // record.page_multiple) * record.page_multiple
        before = (rows - 1) // size
        records = before * page + size * each + (rows - before * size) * behind
        packed = page
    return Asked(
        f,
        [
            Tensor("nope", nope),
            Tensor("records", records, True, "block_size" if behind else "", packed),
        ],
    )


def kinds(name: str) -> dict[str, tuple[Callable, str]]:
    """What can be asked of a header: how calls are drawn, and the C expression that asks."""
    of, k = description(name), kernel(name)
    draw = asked_train if of.trains else asked_decode if of.decodes else asked_sparse
    plan = f"(({k.Plan.__name__} *)plan_room, (a), (e))"
    made = {"plan": (draw, f"{k.name}_plan{plan}")}
    if "append" in k.Rows:
        made["append"] = (asked_append, f"{k.name}_append((a), (e))")
    if "quantise_rows" in k.Rows:
        made["quantise_rows"] = (asked_rows, f"{k.name}_quantise_rows((a), (e))")
    return made


def answers(
    machine: Machine, name: str, kind: str, asked: list[Asked], header: str = ""
) -> list[tuple[int, ...]]:
    """What the header says there: (status, argument, rule, value, limit) of each call."""
    k = kernel(name)
    made = k.Args if kind == "plan" else k.Rows[kind]
    names = [n for n, t, *_ in made._fields_ if t is ctypes.c_void_p]
    pointers = ", ".join(f"offsetof({made.__name__}, {n})" for n in names)
    lines = [f"#define STRUCT {made.__name__}", f"#define POINTERS {pointers}"]
    lines += [f"static {k.Plan.__name__} plan_room[1];"] if kind == "plan" else []
    lines += [f"#define ASK(a, e) {kinds(name)[kind][1]}"]
    source = (HERE / "probe.c").read_text().replace('"header.h"', '"asked.h"')
    flags = ("-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    files = {"header.h": header or text(name), "probe.c": source}
    files["asked.h"] = "\n".join(['#include "header.h"', *lines, ""])
    command = helpers_wide.compiled(machine, files, flags)
    total, fields = helpers_wide.layout(machine, name, made)
    parts = [struct.pack(f"{machine.order}q", len(asked))]
    for one in asked:
        image = bytearray(total)
        for key, value in one.fields.items():
            at, size = fields[key]
            image[at : at + size] = helpers_wide.number_bytes(machine, value or 0, size)
        parts.append(bytes(image))
    with tempfile.TemporaryDirectory() as folder:
        to, back = Path(folder) / "asked", Path(folder) / "answers"
        to.write_bytes(b"".join(parts))
        run = subprocess.run([*command, str(to), str(back)], capture_output=True, timeout=300)
        assert run.returncode == 0, f"{name} {kind} on {machine.name}: exit {run.returncode}"
        data = back.read_bytes()
    numbers = struct.unpack(f"{machine.order}{len(data) // 8}q", data)
    return [numbers[i : i + 5] for i in range(0, len(numbers), 5)]


def place(asked: Asked, bits: int) -> None:
    """Addresses: inputs in the lower half, what is written apart from each other in the upper."""
    written = 0
    for i, tensor in enumerate(asked.tensors):
        if tensor.written:
            written += 1
            address = (1 << (bits - 1)) + (written << (bits - 5))
        else:
            address = (1 << (bits - 4)) + (i << (bits - 9))
        asked.fields[tensor.name] = address


def hold(machine: Machine, name: str, kind: str, seed: int, draws: int, header: str = "") -> tuple:
    """Random sizes: accepted is only what can be in memory, and what is said to be too large is.
    Returns how many were accepted, and how many were too large."""
    rng = np.random.default_rng(seed)
    asked = [kinds(name)[kind][0](name, rng, machine.bits) for _ in range(draws)]
    for one in asked:
        place(one, machine.bits)
    constants = kernel(name).constants
    most, top = (1 << (machine.bits - 1)) - 1, (1 << machine.bits) - 1
    unsupported, isa = constants["HL_ERR_UNSUPPORTED"], constants["HL_ARG_ISA"]
    accepted = large = 0
    said = answers(machine, name, kind, asked, header)
    for one, (status, argument, rule, value, limit) in zip(asked, said, strict=True):
        where = f"{name} {kind} {machine.name} {one} {(status, argument, rule, value, limit)}"
        spans = [(one.fields[t.name], t.bytes, t) for t in one.tensors if t.bytes]
        if status == 0 or (status, argument) == (unsupported, isa):
            accepted += 1
            for start, size, tensor in spans:
                assert size <= most and start + size <= top, f"{tensor.name}: {where}"
                for other, length, against in spans:
                    apart = other >= start + size or start >= other + length
                    assert against is tensor or not tensor.written or apart, where
        if rule == constants["HL_RULE_ADDRESSABLE"]:
            large += 1
            assert status == constants["HL_ERR_SHAPE"] and limit == most and value > 0, where
            named = [
                t
                for t in one.tensors
                if argument == constants[f"HL_ARG_{t.name.upper()}"]
                or (t.stride and argument == constants[f"HL_ARG_{t.stride.upper()}"])
            ]
            assert named, where
            assert any(
                max(t.bytes, t.packed) > most or one.fields[t.name] + t.bytes > top for t in named
            ), where
    return accepted, large
