"""Every shipped header on every instruction set: random calls against the float64 oracle, the same
bits whichever way a call is made, and each argument out of its range, one at a time.

What is asked of single operators, of odd shapes and of small kernels is in their own files; this is
what all headers have to pass, and what tests/mutate.py runs first."""

import ctypes
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import helpers_every as every
import helpers_runner
import numpy as np
import pytest
import test_decode_append as append
from helpers import FEW_HEADS, WORDS_HERE
from helpers_cases import INT_MAX, INT_MIN
from helpers_every import Call, by_pair, description, sized
from helpers_fusion import RECTANGLE, TRIANGLE
from helpers_memory import in_child
from oracle import BSND, PA_BSND, TND
from oracle_decode import BSH, PA_BNSD, TENSOR, TOKEN, span
from oracle_fusion import BNSD, SBH, SLOPE, spans_of
from test_bad_input import OTHER_MACHINES_ISA

from gen import bind
from gen.isa import ISAS

FLOATS = ("bf16", "f16", "f32")
SEED, COUNT = 7, 8  # random calls of each header
CHUNK = 128  # the smallest number of keys that chunk_keys takes


# ---- results ------------------------------------------------------------------------------------


def corners(name: str) -> Iterator[Call]:
    """Calls that random ones seldom are: several chunks, all ways through a block of heads, tasks
    of several blocks."""
    of = description(name)
    growing = {"spread": "growing"}  # maxima rise from block to block
    yield sized(name, 0, 3, 2)
    yield sized(name, 1, 3, 2)
    if of.trains:
        yield sized(name, 210, rows=201, heads=1, seed=1, keep_prob=0.8)
        yield sized(name, 40, rows=50, heads=3, seed=2, mode=3, mask="formula")
        yield sized(name, 130, rows=110, heads=2, seed=3, mode=3, mask="formula", **growing)
        yield sized(name, 140, rows=100, heads=1, seed=4, mode=4, mask="formula", band=(50, -20))
        return
    if of.decodes:
        for keys, rows, heads in ((300, 1, 4), (290, 2, 17), (150, 1, 1), (135, 3, 2)):
            yield sized(name, keys, rows, heads, seed=keys)
        yield sized(name, 280, 1, 33, seed=5, lens=(280, 20), **growing)
        yield sized(name, 270, 1, 3, seed=6, lens=(270, 0, 20), **growing)
        return
    lists = "slots" if "slots" in of.features else "blocks"
    yield sized(name, 300, 1, 33, seed=1)
    yield sized(name, 270, 2, 4, seed=2, lists=lists, list_length=200)
    yield sized(name, 40, 3, 17, seed=3, sparse_mode=3, sinks="plain")
    yield sized(name, 150, 1, 1, seed=4, lists="blocks", list_length=12, sparse_block_size=16)
    uneven = {"lens_q": (1, 1), "lens_kv": (280, 20), **growing}
    yield sized(name, 280, 1, 33, seed=5, **uneven)
    yield sized(name, 280, 1, 3, seed=6, **uneven)


@functools.cache
def drawn(name: str) -> tuple[Call, ...]:
    """A header's calls, with what should come out of them."""
    made = (*every.calls(name, SEED, COUNT), *corners(name), *based(name))
    for call in made:
        assert call.known is None or call.known  # the oracle's part, before a child is forked
    return made


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray], what: str) -> None:
    for name, array in got.items():
        assert array.tobytes() == want[name].tobytes(), f"{name} has other bits: {what}"


def check_call(call: Call, isa: str, turn: int) -> None:
    """Right, and the same bits with strides, by task, between guard pages on either side."""
    plain = call.run(isa)
    call.check(plain, isa)
    of = description(call.name)
    way: dict[str, Any] = {"strides": turn % 3 == 0, "by_task": turn % 2 == 0}
    flush = ("left", "right")[turn // 2 % 2]
    same(call.guarded(isa, flush, **way), plain, f"{flush} {way}")
    if not of.trains and turn < COUNT + 8:  # corners among them
        chunks = call.run(isa, chunk_keys=CHUNK)
        call.check(chunks, isa)
        way |= {"chunk_keys": CHUNK, "partials": True, "by_task": turn % 2 == 1}
        same(call.guarded(isa, flush, **way), chunks, f"{flush} {way}")


def check_calls(name: str, isa: str) -> None:
    for turn, call in enumerate(drawn(name)):
        check_call(call, isa, turn)


SPOILED = [n for n in every.HEADERS if not description(n).backward and description(n).kv in FLOATS]


@functools.cache
def clean(name: str) -> Call:
    """Where a NaN is put: 30 rows of fusion_attention see keys up to their own, 2 rows all 40."""
    if description(name).trains:
        return sized(name, 40, 30, 3, seed=6, heads_kv=2, mode=3, mask="formula")
    return sized(name, 40, 2, 3, seed=6, heads_kv=2)


def check_nan(name: str, isa: str) -> None:
    """A NaN in one head of a row, or in a key, or in one channel of a value: it reaches exactly
    what it has to do with, and changes no bit of anything else."""
    call = clean(name)
    want = call.run(isa)["attention_out"]
    _, rows, heads, channels = want.shape
    for tensor, at in (("query", 1), ("key", 17), ("key", 39), ("value", 17), ("value", 39)):
        array = getattr(call.case.args, tensor)
        if array is None:
            continue
        array = array.copy()
        array[0, at, 1, 5] = np.nan
        got = Call(name, call.case.changed(**{tensor: array})).run(isa)["attention_out"]
        lost = np.zeros((rows, heads, channels), bool)
        if tensor == "query":
            lost[at, 1] = True
        else:
            first = max(at - (40 - rows), 0) if kind_of(name) != "sparse" else 0
            lost[first:, 3:, 5 if tensor == "value" else slice(None)] = True
        found = np.isnan(got.astype(np.float32))[0]
        if tensor == "value" and ISAS[isa].tiles:  # words of two channels, as documented
            found[..., 4] &= ~found[..., 5]
        assert (found == lost).all(), f"{tensor}[{at}]: {np.argwhere(found != lost)[0]}"
        if tensor == "value" and description(name).trains:
            continue  # what is not finite is added apart: other roundings
        lost[..., 4] |= lost[..., 5]
        same = got.view(f"u{got.itemsize}")[0][~lost] == want.view(f"u{want.itemsize}")[0][~lost]
        assert same.all(), f"{tensor}[{at}] changed what it has nothing to do with"


@by_pair(*SPOILED)
def test_nan_reaches_what_it_has_to_do_with(name, isa):
    clean(name), every.kernel(name)
    in_child(lambda: check_nan(name, isa), f"{name} {isa}")


@by_pair()
def test_random_calls_are_right_in_every_way(name, isa):
    drawn(name), every.kernel(name)
    in_child(lambda: check_calls(name, isa), f"{name} {isa}")


# ---- refusals -----------------------------------------------------------------------------------

SPARSE = {"sparse_flash_attention", "sparse_flash_attention_antiquant"}
TWO = {"lens_q": (2, 1), "lens_kv": (20, 9), "heads_kv": 2, "group": 3}
ROWS = {"lens": (20, 9), "seq_q": 2, "heads_kv": 2, "group": 3, "pse": "each", "mask": "each"}
BOTH = {"lens_q": (5, 5), "lens_kv": (9, 9), "heads_kv": 2, "group": 3}
ENDS = {"lens_q": (5, 2), "lens_kv": (9, 4), "pad_q": 1, "pad_kv": 2, "layout": TND}
GIVEN = {"mask": "given", "hidden": 0.2, "pse": "full", "keep_prob": 0.5, "bits": True}


def bases(name: str) -> Iterator[Call]:
    """Accepted calls that together give every pointer of a header."""
    of = description(name)
    if of.trains:
        yield sized(name, 9, **BOTH, **GIVEN, mask_batch=True, mask_heads=True, band=(3, 4))
        yield sized(name, 9, **ENDS, **GIVEN, heads_kv=2, group=3)
        yield sized(name, 9, **BOTH, layout=SBH, mode=6, mask="formula", pse="one_row")
        yield sized(name, 9, **BOTH, layout=BNSD, stats_width=1)
        last = {"lens_q": (5, 5), "lens_kv": (5, 5), "pse": "last_rows", "pse_each": False}
        yield sized(name, 5, **last, group=3)
        if "pse_types" in of.features:
            yield sized(name, 9, **BOTH, pse="slope", pse_type=SLOPE)
        return
    if of.decodes:
        more: dict[str, Any] = {n: "plain" for n in ("sinks",) if n in of.features}
        more |= {"alibi": True} if "alibi" in of.features else {}
        yield sized(name, 20, **ROWS, **more, room=1, mask_rows=True, quant="channel")
        yield sized(name, 20, **ROWS, **more, padding=1, quant="tensor", quant_bf16=True)
        yield sized(name, 20, **ROWS, layout_kv=PA_BSND, block_size=4, antiquant=TOKEN)
        yield sized(name, 20, **ROWS, layout_q=BNSD, layout_kv=PA_BNSD, block_size=4)
        yield sized(name, 20, **ROWS, layout_q=BNSD, layout_kv=BNSD, antiquant=TENSOR)
        return
    lists = {"lists": "blocks", "list_length": 6, "sinks": "plain"}
    one_head = {"heads_kv": 1} if "BSND" not in of.layout_kv else {}
    paged = {**TWO, **lists, **one_head, "layout_kv": PA_BSND}
    yield sized(name, 20, **paged, block_size=4, pad_q=1)
    if not one_head:
        yield sized(name, 20, **TWO, **lists, layout_kv=BSND, pad_q=1, pad_kv=1)
        yield sized(name, 20, **TWO, layout_q=TND, layout_kv=TND, pad_q=1, pad_kv=2, value=True)
        if of.rope:
            yield sized(name, 20, **TWO, **lists, layout_kv=BSND, joined_q=True, joined_k=True)
    if "slots" in of.features:
        slots = {**TWO, **lists, **one_head, "lists": "slots", "list_lengths": True}
        yield sized(name, 20, **slots, layout_kv=PA_BSND, block_size=4)


REQUIRED = {
    "sparse_flash_attention": "query key block_table",
    "sparse_flash_attention_antiquant": "query key block_table",
    "incre_flash_attention": "query key block_table antiquant_scale",
    "fusion_attention": "query key value actual_seq_qlen actual_seq_kvlen prefix",
    "fusion_attention_grad": "query key value attention_out dout softmax_max softmax_sum "
    "actual_seq_qlen actual_seq_kvlen prefix",
}


@dataclass(frozen=True)
class Refused:
    """What plan has to say."""

    status: str
    argument: str
    rule: str
    value: int = 0
    limit: int = 0
    position: tuple[int, ...] = ()


def expect(k: bind.Kernel, fields: dict[str, Any], want: Refused | None, what: str) -> None:
    """The plan of a call is refused exactly so, or accepted."""
    _, got = k.plan(**fields)
    if want is None:
        assert got.ok, f"{what}: {got.error_text}"
        return
    argument = want.argument.upper()
    found = (got.status_name, got.argument, got.rule, got.value, got.limit, got.position)
    told = (want.value, want.limit, want.position)
    assert found == (f"HL_ERR_{want.status}", argument, want.rule, *told), f"{what}: {found} {want}"
    assert k.workspace_bytes(**fields) == 0, what


LISTS = ("prefix", "block_table", "kv_padding_size")  # that are read while they are checked


def alignment(call: Call, name: str, array: np.ndarray) -> int:
    record = getattr(call.kernel, "record", None)
    if name == "key" and record is not None:
        return record.align(call.case.dtype)
    return array.itemsize


def check_pointers(call: Call, fields: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Each that is needed, and each alignment."""
    k, needed = call.kernel, REQUIRED[description(call.name).op].split()
    outputs = [] if call.grads else ["attention_out"]
    slots = fields.get("index_kind")
    for name, array in arrays.items():
        if name in (*needed, *outputs) and not (slots and name == "block_table"):
            want = Refused("NULL", name, "NOT_NULL")
            expect(k, {**fields, name: None}, want, f"{name} NULL")
        align = alignment(call, name, array)
        for off in {1, align // 2} - {0, align}:
            want = Refused("ALIGN", name, "MULTIPLE_OF", off, align)
            moved = {**fields, name: array.ctypes.data + off}
            expect(k, moved, want, f"{name} off by {off}")
        if array.nbytes > 64 and not (name in LISTS or "seq_" in name):
            want = Refused("SHAPE", name, "ADDRESSABLE", array.nbytes, INT64_MAX)
            expect(k, {**fields, name: 2**64 - 64}, want, f"{name} past the last address")


def side_by_side(a: np.ndarray, b: np.ndarray, shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """Copies, the second where the first ends, or over its last bytes."""
    end = -(-a.nbytes // 64) * 64 + 64
    start = end - a.nbytes // a.itemsize * a.itemsize
    start -= start % a.itemsize
    behind = start + a.nbytes
    step = max(b.itemsize, 4)
    at = (behind - 1) // step * step if shared else -(-behind // step) * step
    pool = np.zeros(at + b.nbytes + 64, np.uint8)
    room = pool[-pool.ctypes.data % 64 :] if pool.ctypes.data % 64 else pool
    pool = np.zeros(at + b.nbytes + 128, np.uint8)
    room = pool[-pool.ctypes.data % 64 :]
    made = []
    for array, first in ((a, start), (b, at)):
        place = room[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
        made.append(place)
    made[1][...] = b
    made[0][...] = a
    return made[0], made[1]


def check_overlaps(call: Call, fields: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """What is written may touch everything and share nothing, not an element; what is only read
    may lie over each other."""
    k, outputs = call.kernel, list(call.outputs())
    for name in outputs:
        for other in arrays:
            if other == name:
                continue
            both = other in outputs
            first = min(name, other, key=outputs.index) if both else name
            for pair in ((name, other), (other, name)):
                for shared in (True, False):
                    places = side_by_side(arrays[pair[0]], arrays[pair[1]], shared)
                    moved = {**fields, **dict(zip(pair, places, strict=True))}
                    lists = {n: arrays[n] for n in pair if n not in outputs and shared}
                    if shared and any(a.dtype.kind == "i" for a in lists.values()):
                        moved |= dict.fromkeys(())  # the numbers of a list survive: it is put last
                        places[pair.index(other)][...] = arrays[other]
                    want = Refused("ALIAS", first, "DISJOINT") if shared else None
                    expect(k, moved, want, f"{pair} {'share' if shared else 'touch'}")


def stride_names(k: bind.Kernel) -> list[str]:
    return [f.name for f in k.header.structs[k.Args.__name__] if f.name.endswith("_stride")]


def strided_tensor(name: str, arrays: dict[str, np.ndarray]) -> str:
    """The argument that a stride belongs to."""
    return "attention_out" if name == "out_stride" else name.removesuffix("_stride")


def check_strides(call: Call, fields: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """None is negative; a tensor fits in memory; rows that are written do not overlap."""
    k, outputs = call.kernel, call.outputs()
    for name in stride_names(k):
        for i in range(3):
            strides = tuple(-4 if j == i else 0 for j in range(3))
            want = Refused("SHAPE", name, "AT_LEAST", -4, 0)
            expect(k, {**fields, name: strides}, want, f"{name} {strides}")
        tensor = strided_tensor(name, arrays)
        array = arrays.get(tensor)
        layout = fields.get("layout_kv" if tensor in KV else "layout_query")
        layout = fields.get("input_layout", layout)
        if array is None or layout not in (BSND, PA_BSND) or array.ndim != 4:
            continue
        for i in range(3):
            if array.shape[i] > 1:
                far = 2**62 if array.itemsize > 1 else 2**63 - 64
                strides = tuple(far if j == i else 0 for j in range(3))
                want = Refused("SHAPE", tensor, "ADDRESSABLE", INT64_MAX, INT64_MAX)
                expect(k, {**fields, name: strides}, want, f"{name} {strides}")
        if tensor in outputs:
            check_apart(call, fields, name, array)


KV = ("key", "key_rope", "value")
INT64_MAX = 2**63 - 1


def check_apart(call: Call, fields: dict[str, Any], name: str, array: np.ndarray) -> None:
    """[B][S][N][C] that is written: each step is at least what lies below it."""
    batches, rows, heads, channels = array.shape
    packed = (rows * heads * channels, heads * channels, channels)
    for i, count in enumerate((batches, rows, heads)):
        strides = tuple(packed[i] - 1 if j == i else 0 for j in range(3))
        want = Refused("SHAPE", name, "AT_LEAST", packed[i] - 1, packed[i])
        expect(call.kernel, {**fields, name: strides}, want if count > 1 else None, f"{strides}")
    expect(call.kernel, {**fields, name: packed}, None, f"{name} {packed}")
    if heads > 1 and rows > 1:  # heads first: rows within heads, batches behind both
        first = (0, channels, rows * channels)
        expect(call.kernel, {**fields, name: first}, None, f"{name} {first}")
        close = (0, channels, rows * channels - 1)
        want = Refused("SHAPE", name, "AT_LEAST", close[2], close[2] + 1)
        expect(call.kernel, {**fields, name: close}, want, f"{name} {close}")


def check_sparse_lists(call: Call, fields: dict[str, Any]) -> None:
    """Entries of each list that count; ids, where strict_lists asks for it."""
    k, lists = call.kernel, fields.get("sparse_indices")
    if lists is None:
        return
    slots, length = fields["index_kind"] == 1, lists.shape[-1]
    counted = fields.get("sparse_lengths")
    if counted is not None:
        flat = counted.size - 1 if fields["layout_query"] == TND else 0
        for at in {0, flat}:
            for value, rule, limit in (
                (-1, "AT_LEAST", 0), (INT_MIN, "AT_LEAST", 0), (length + 1, "AT_MOST", length),
                (0, "", 0), (length, "", 0),
            ):  # fmt: skip
                changed = counted.copy()
                changed.reshape(-1)[at] = value
                want = Refused("LENGTH", "sparse_lengths", rule, value, limit, (at,))
                changed = {**fields, "sparse_lengths": changed}
                expect(k, changed, want if rule else None, f"sparse_lengths[{at}] = {value}")
    none = np.full_like(lists, -1)
    strict = {**fields, "strict_lists": 1}
    if counted is not None:
        strict["sparse_lengths"] = np.full_like(counted, length)
    expect(k, {**strict, "sparse_indices": none}, None, "no ids")
    keys = int(call.case.args.actual_seq_lengths_kv[0]) if not slots else 0
    most = (keys - 1) // fields["sparse_block_size"] if not slots else (
        fields["num_blocks"] * fields["block_size"] - 1
    )  # fmt: skip
    cases = [
        ({0: most}, None), ({0: 0}, None), ({0: 1, 1: 0}, None),
        ({0: most + 1}, (0, "AT_MOST", most + 1, most)),
        ({0: 0, 1: INT_MAX}, (1, "AT_MOST", INT_MAX, most)),
        ({0: -2}, (0, "AT_LEAST", -2, -1)), ({0: 1, 1: INT_MIN}, (1, "AT_LEAST", INT_MIN, -1)),
        ({0: 1, 1: 1}, (1, "UNIQUE", 1, 0)), ({0: 2, 1: 0, 2: 1, 3: 0}, (3, "UNIQUE", 0, 1)),
        ({0: -1, 1: -7}, (1, "AT_LEAST", -7, -1) if slots else None),
        ({0: 1, 1: -1, 2: 1}, (2, "UNIQUE", 1, 0) if slots else None),
    ]  # fmt: skip
    for ids, told in cases:
        changed = none.copy()
        for t, value in ids.items():
            changed.reshape(-1, length)[0, t] = value
        want = told and Refused("INDEX", "sparse_indices", told[1], told[2], told[3], (0, told[0]))
        expect(k, {**strict, "sparse_indices": changed}, want, f"ids {ids}")
        plain = {**fields, "sparse_indices": changed}
        expect(k, plain, None, f"ids {ids}, not strict")
    if counted is not None:  # ids behind a list's end are no part of the call
        short = {**strict, "sparse_lengths": np.full_like(counted, 2)}
        changed = none.copy()
        changed[..., 2:] = INT_MAX
        expect(k, {**short, "sparse_indices": changed}, None, "behind the end")


def check_partials(call: Call, fields: dict[str, Any]) -> None:
    """Memory to split rows: to the byte, and it overlaps nothing."""
    k = call.kernel
    fields = {**fields, "chunk_keys": CHUNK}
    plan, got = k.plan(**fields)
    assert got.ok and plan.split_bytes > 0 and plan.n_merges == 0 and plan.chunks > 1
    need = plan.split_bytes
    pool = np.zeros(need + 128, np.uint8)
    room = pool[-pool.ctypes.data % 64 :][:need]
    for held in (0, 1, need - 1):
        want = Refused("WORKSPACE", "partials_bytes", "AT_LEAST", held, need)
        expect(k, {**fields, "partials": room, "partials_bytes": held}, want, f"partials {held}")
    split, got = k.plan(**{**fields, "partials": room, "partials_bytes": need})
    assert got.ok and split.n_merges > 0 and split.n_tasks == plan.n_tasks * plan.chunks
    assert split.task_bytes == plan.task_bytes and split.chunks == plan.chunks
    for name, array in ((n, a) for n, a in fields.items() if isinstance(a, np.ndarray)):
        place, other = side_by_side(array, np.zeros(need, np.uint8), True)
        moved = {**fields, name: place, "partials": other, "partials_bytes": need}
        whose = name if name in call.outputs() else "partials"
        expect(k, moved, Refused("ALIAS", whose, "DISJOINT"), f"partials over {name}")


def check_triangle(call: Call, fields: dict[str, Any]) -> None:
    """The mask that a mode wants to be given, byte by byte, on request."""
    k = call.kernel
    fields = {**fields, "mask_check": 1, "mask_batch": 1, "mask_heads": 1, "pse": None}
    fields |= {"dpse": None} if call.grads else {}
    fields["prefix"] = np.array([3, 4], np.int64)
    for mode in (2, 6):
        right = RECTANGLE if mode == 6 else TRIANGLE[0, 0]
        rows, width = right.shape
        given = {**fields, "sparse_mode": mode, "mask_rows": rows, "mask_width": width}
        expect(k, {**given, "atten_mask": right}, None, f"mode {mode}")
        for n, size in (("mask_rows", rows), ("mask_width", width)):
            want = Refused("SHAPE", n, "EQUAL", size - 1, size)
            expect(k, {**given, "atten_mask": right, n: size - 1}, want, f"{n} {size - 1}")
        places = [(0, 0), (0, 1), (7, 8), (2047, 2047), (2047, 0)]
        places += [(2048, 1023), (2048, 1024), (3071, 2047), (3071, 0)] if mode == 6 else []
        for at in places:
            wrong = right.copy()
            wrong[at] ^= 1
            value = int(wrong[at])
            want = Refused("VALUE", "atten_mask", "EQUAL", value, 1 - value, at)
            expect(k, {**given, "atten_mask": wrong}, want, f"mode {mode} {at}")


# argument -> least and most, where a call has nothing to do
RANGES: dict[str, dict[str, tuple[int, int]]] = {
    "sparse": dict.fromkeys(
        ("batch", "seq_q", "heads_q", "heads_kv", "list_length", "chunk_keys"), (0, INT_MAX)
    )
    | {"out_f32": (0, 1), "strict_lists": (0, 1)},  # whose limit below is told as the one above
    "decode": dict.fromkeys(
        ("batch", "heads_q", "heads_kv", "lengths", "pse_batch", "pse_width", "mask_batch"),
        (0, INT_MAX),
    )
    | dict.fromkeys(("mask_rows", "mask_width", "chunk_keys", "seq_kv"), (0, INT_MAX))
    | {"seq_q": (0, 16), "inner_precise": (0, 1), "out_f32": (0, 1), "antiquant_f32": (0, 1)}
    | {"quant_per_channel": (0, 1), "quant_bf16": (0, 1)},
    "train": dict.fromkeys(
        ("batch", "seq_q", "seq_kv", "pse_batch", "pse_width", "mask_rows", "mask_width"),
        (0, INT_MAX),
    )
    | dict.fromkeys(("heads_kv", "mask_batch", "mask_heads", "heads_q"), (1, INT_MAX))
    | dict.fromkeys(("mask_from_mode", "mask_check", "band", "stats_order", "out_f32"), (0, 1))
    | {"sparse_mode": (0, 8), "pse_type": (0, 3), "pse_shape": (0, 2), "inner_precise": (0, 2)}
    | {"q_start": (-(2**40), 2**40), "kv_start": (-(2**40), 2**40)}
    | {"dropout_offset": (0, 2**32 - 1)},
}


def kind_of(name: str) -> str:
    of = description(name)
    return "train" if of.trains else "decode" if of.decodes else "sparse"


def nothing(name: str) -> dict[str, Any]:
    """A call of no batch: only its numbers count."""
    k, of = every.kernel(name), description(name)
    made: dict[str, Any] = {"heads_q": 4, "heads_kv": 1, "scale_value": 0.5}
    if of.trains:
        return {**made, "input_layout": BSND, "seq_q": 3, "seq_kv": 5}
    layout = BSND if "BSND" in of.layout_kv else PA_BSND
    made |= {"seq_q": 3, "layout_query": BSND, "layout_kv": layout}
    paged = {"block_size": 4, "num_blocks": 3, "max_blocks": 2}
    return {**made, **({"seq_kv": 5} if layout == BSND else paged)} if k else made


ANY = {"lengths", "pse_width", "mask_width", "seq_kv", "list_length", "mask_rows"}
ODD = {"sparse_mode", "attention_mode"}


def rows_of_numbers(name: str) -> Iterator[tuple[dict[str, Any], Refused | None]]:
    """Each number just in and just out of its range; the checks that two of them make."""
    of, kind = description(name), kind_of(name)
    for n, (least, most) in RANGES[kind].items():
        low, high = ("AT_LEAST", least), ("AT_MOST", most)
        if n == "pse_type" and "pse_types" not in of.features:
            continue
        low = high if kind == "sparse" and most == 1 else low
        for value, (rule, limit) in (
            (least - 1, low), (INT_MIN if least >= -1 else least - 7, low),
            *([(most + 1, high), (most + 7, high)] if most < INT_MAX or least < -1 else []),
        ):  # fmt: skip
            if n == "heads_q" and kind == "train" and value == 0:
                continue
            if value == 0 and n in ("heads_kv", "mask_batch", "mask_heads"):
                continue  # their default
            yield {n: value}, Refused("SHAPE", n, rule, value, limit)
        if most < INT_MAX and n not in ("sparse_mode", "pse_type", "mask_from_mode", "mask_check"):
            yield {n: most}, None
            yield {n: least}, None
    written = ("dquery", "dkey", "dvalue") if of.trains and of.backward else ("out",)
    for tensor in written:  # of nothing: it overlaps nothing
        yield {f"{tensor}_stride": (1, 1, 1)}, None
    for value in (math.nan, math.inf, -math.inf):
        yield {"scale_value": value}, Refused("VALUE", "scale_value", "FINITE")
    yield {"scale_value": 3e38}, None
    yield {"isa": INT_MAX}, Refused("UNSUPPORTED", "isa", "GENERATED", INT_MAX)
    for value in (OTHER_MACHINES_ISA, 6, 31, 32, -1, INT_MIN):
        yield {"isa": value}, Refused("UNSUPPORTED", "isa", "GENERATED", value)
    for heads, kv in ((7, 2), (5, 4), (3, 6)):
        if "BSND" in getattr(of, "layout_kv", ("BSND",)) or of.trains:
            many = {"heads_q": heads, "heads_kv": kv}
            yield many, Refused("SHAPE", "heads_q", "MULTIPLE_OF", heads, kv)
    yield from {"sparse": sparse_numbers, "decode": decode_numbers, "train": train_numbers}[kind](
        name
    )


def chunked() -> Iterator[tuple[dict[str, Any], Refused | None]]:
    for value in (1, 64, 127, 129, 192):
        want = Refused("SHAPE", "chunk_keys", "MULTIPLE_OF", value, 128)
        yield {"chunk_keys": value}, want
    for value in (0, 128, 256, 1 << 30):
        yield {"chunk_keys": value}, None


def pages(group: int) -> Iterator[tuple[dict[str, Any], Refused | None]]:
    """Numbers of a paged cache."""
    base = {"layout_kv": PA_BSND, "block_size": 4, "num_blocks": 3, "max_blocks": 2}
    base |= {"heads_kv": 1, "heads_q": group}
    for n, least in (("block_size", 1), ("num_blocks", 0), ("max_blocks", 0)):
        for value in (least - 1, INT_MIN):
            yield {**base, n: value}, Refused("SHAPE", n, "AT_LEAST", value, least)
        yield {**base, n: least}, None
    most = INT_MAX // 4
    for value in (most + 1, INT_MAX):
        want = Refused("SHAPE", "max_blocks", "AT_MOST", value, most)
        yield {**base, "max_blocks": value}, want
    yield {**base, "max_blocks": most}, None


WIDE = {"heads_q": INT_MAX - 1, "heads_kv": INT_MAX - 1, "seq_kv": INT_MAX}


def sparse_numbers(name: str) -> Iterator[tuple[dict[str, Any], Refused | None]]:
    of = description(name)
    yield from chunked()
    yield from pages(4)
    for value in (3, 6, 96, 129, 256, INT_MAX):
        want = Refused("SHAPE", "sparse_block_size", "POWER_OF_2", value, 128)
        yield {"sparse_block_size": value}, want
    for value in (-1, INT_MIN):
        want = Refused("SHAPE", "sparse_block_size", "AT_LEAST", value, 0)
        yield {"sparse_block_size": value}, want
    for value in (0, 1, 2, 4, 64, 128):
        yield {"sparse_block_size": value}, None
    most = Refused("SHAPE", "heads_q", "AT_MOST", 65537, 65536)
    yield {"heads_q": 65537, "heads_kv": 1}, most
    yield {"heads_q": 65536, "heads_kv": 1}, None
    yield {"heads_q": 4, "heads_kv": 0}, None
    for n, good, bad, limit in (
        ("sparse_mode", (0, 3), (1, 2, 4, -1), 3),
        ("attention_mode", (0, 2), (1, 3, -1), 2),
    ):
        for value in bad:
            yield {n: value}, Refused("UNSUPPORTED", n, "GENERATED", value, limit)
        for value in good:
            yield {n: value}, None
    slots = "slots" in of.features
    for value in (2, -1, *(() if slots else (1,))):
        want = Refused("UNSUPPORTED", "index_kind", "GENERATED", value, int(slots))
        yield {"index_kind": value}, want
    if slots:
        both = {"index_kind": 1, "sparse_mode": 3}
        yield both, Refused("UNSUPPORTED", "sparse_mode", "NULL", 3)
        both = {"index_kind": 1, "sparse_block_size": 2}
        yield both, Refused("SHAPE", "sparse_block_size", "EQUAL", 2, 1)
    for value in (2, 3, -1):
        yield {"layout_query": value}, Refused("UNSUPPORTED", "layout_query", "GENERATED", value)
    for value in (3, 7, -1):
        yield {"layout_kv": value}, Refused("UNSUPPORTED", "layout_kv", "GENERATED", value)
    if "BSND" in of.layout_kv and not of.op.endswith("antiquant"):
        yield WIDE, Refused("SHAPE", "key_stride", "ADDRESSABLE", INT64_MAX, INT64_MAX)
    forgotten = Refused("NULL", "sparse_indices", "NOT_NULL")
    yield {"list_length": 1}, forgotten
    if "BSND" in of.layout_kv:
        for a, b in ((BSND, TND), (TND, BSND)):
            both = {"layout_query": a, "layout_kv": b}
            yield both, Refused("UNSUPPORTED", "layout_kv", "PAIRED", b, a)
        for value in (-1, INT_MIN):
            yield {"seq_kv": value}, Refused("SHAPE", "seq_kv", "AT_LEAST", value)
        table = {"block_table": np.zeros(4, np.int32)}
        yield table, Refused("UNSUPPORTED", "block_table", "NULL", 1)
        ends = {"layout_query": TND, "layout_kv": TND}
        yield {**ends, "seq_q": 0}, None
        fields = {**ends, "batch": 1, "actual_seq_lengths_query": np.zeros(1, np.int32)}
        yield fields, Refused("NULL", "actual_seq_lengths_kv", "NOT_NULL")
        fields = {**ends, "batch": 1, "actual_seq_lengths_kv": np.zeros(1, np.int32)}
        yield fields, Refused("NULL", "actual_seq_lengths_query", "NOT_NULL")
    if of.op.endswith("antiquant"):
        yield from record_numbers(name)


def record_numbers(name: str) -> Iterator[tuple[dict[str, Any], Refused | None]]:
    of, record = description(name), every.kernel(name).record
    only = {"key_quant_mode": 2, "value_quant_mode": 2, "quant_scale_repo_mode": 1}
    only |= {"tile_size": record.tile, "rope_head_dim": of.rope}
    for n, value in only.items():
        for bad in (value - 1, value + 1, -1, INT_MAX, INT_MIN):
            if bad:
                yield {n: bad}, Refused("UNSUPPORTED", n, "EQUAL", bad, value)
        yield {n: value}, None
        yield {n: 0}, None
    some = np.zeros(64, np.float32)
    for n in ("key_dequant_scale", "value_dequant_scale"):
        yield {n: some}, Refused("UNSUPPORTED", n, "NULL", 1)
    if "BSND" not in of.layout_kv:
        for value in (2, 4):
            yield {"heads_kv": value}, Refused("SHAPE", "heads_kv", "EQUAL", value, 1)


def decode_numbers(name: str) -> Iterator[tuple[dict[str, Any], Refused | None]]:
    of = description(name)
    yield from chunked()
    yield from pages(4)
    some = np.zeros(4096, np.float32)
    for seq_q, most in ((1, 65536), (3, 21845), (16, 4096)):
        fields = {"seq_q": seq_q, "heads_q": most, "heads_kv": 1}
        yield fields, None
        want = Refused("SHAPE", "heads_q", "AT_MOST", most + 1, most)
        yield {**fields, "heads_q": most + 1}, want
    for n in ("pse_batch", "mask_batch"):
        for value in (2, 5):
            yield {n: value}, Refused("SHAPE", n, "EQUAL", value, 0)
        yield {n: 1}, None
    for value in (2, 4):
        yield {"mask_rows": value}, Refused("SHAPE", "mask_rows", "EQUAL", value, 3)
    for value in (0, 1, 3):
        yield {"mask_rows": value}, None
    yield {"quant_offset2": some}, Refused("NULL", "quant_scale2", "NOT_NULL")
    both = {"quant_scale2": some, "out_f32": 1}
    yield both, Refused("UNSUPPORTED", "out_f32", "NULL", 1)
    for n in ("dequant_scale1", "quant_scale1", "dequant_scale2"):
        yield {n: some}, Refused("UNSUPPORTED", n, "NULL", 1)
    absent = {"alibi": "alibi_slopes", "sinks": "sinks"}
    for feature, n in absent.items():
        if feature not in of.features:
            yield {n: some}, Refused("UNSUPPORTED", n, "NULL", 1)
    if "stats" not in of.features:
        for n in ("softmax_max", "softmax_sum", "softmax_lse"):
            yield {n: some}, Refused("UNSUPPORTED", n, "NULL", 1)
    if "window" in of.features:
        for value in (-1, INT_MIN):
            yield {"window": value}, Refused("SHAPE", "window", "AT_LEAST", value)
        yield {"window": INT_MAX}, None
    else:
        yield {"window": 1}, Refused("UNSUPPORTED", "window", "NULL", 1)
    if "softcap" in of.features:
        for value in (math.nan, math.inf, -math.inf, -1.0, -1e-40):
            yield {"softcap": value}, Refused("VALUE", "softcap", "FINITE")
        yield {"softcap": 1e-40}, None
    else:
        yield {"softcap": 1.0}, Refused("UNSUPPORTED", "softcap", "NULL", 1)
    codes = any(side in ("i8", "e4m3") for side in of.kv.split("x"))
    for value in (3, INT_MAX):
        want = Refused("SHAPE", "antiquant_mode", "AT_MOST", value, 2)
        yield {"antiquant_mode": value}, want
    for value in (-1, INT_MIN):
        want = Refused("SHAPE", "antiquant_mode", "AT_LEAST", value)
        yield {"antiquant_mode": value}, want
    for value in (1, 2):
        want = Refused("UNSUPPORTED", "antiquant_mode", "NULL", value)
        yield {"antiquant_mode": value}, None if codes else want
    if not codes:
        for n in ("antiquant_scale", "antiquant_offset"):
            yield {n: some}, Refused("UNSUPPORTED", n, "NULL", 1)
    for value in (TND, PA_BSND, PA_BNSD, 6, -1):
        yield {"layout_query": value}, Refused("UNSUPPORTED", "layout_query", "GENERATED", value)
    for value in (TND, 6, -1):
        yield {"layout_kv": value}, Refused("UNSUPPORTED", "layout_kv", "GENERATED", value)
    allowed = {(q, q) for q in (BSND, BSH, BNSD)} | {(BNSD, PA_BNSD)}
    allowed |= {(q, PA_BSND) for q in (BSND, BSH, BNSD)}
    for q in (BSND, BSH, BNSD):
        for kv in (BSND, BSH, BNSD, PA_BSND, PA_BNSD):
            want = Refused("UNSUPPORTED", "layout_kv", "PAIRED", kv, q)
            fields = {"layout_query": q, "layout_kv": kv, "block_size": 4}
            yield fields, None if (q, kv) in allowed else want
    table = {"block_table": np.zeros(4, np.int32)}
    yield table, Refused("UNSUPPORTED", "block_table", "NULL", 1)
    paged = {"layout_kv": PA_BSND, "block_size": 4, "max_blocks": 1, "batch": 1}
    yield paged, Refused("NULL", "actual_seq_lengths", "NOT_NULL")
    yield WIDE, Refused("SHAPE", "key_stride", "ADDRESSABLE", INT64_MAX, INT64_MAX)
    two = {"batch": 3, "actual_seq_lengths": np.zeros(3, np.int32)}
    yield {**two, "lengths": 2}, Refused("SHAPE", "lengths", "AT_LEAST", 2, 3)


def train_numbers(name: str) -> Iterator[tuple[dict[str, Any], Refused | None]]:
    of = description(name)
    some, longs = np.zeros(4096, np.float32), np.zeros(4, np.int64)
    yield {"heads_q": 0}, Refused("SHAPE", "heads_q", "AT_LEAST", 0, 1)
    for value in (-1, 2, 7, 9, INT_MAX):
        yield {"stats_width": value}, Refused("SHAPE", "stats_width", "EQUAL", value, 8)
    for value in (0, 1, 8):
        yield {"stats_width": value}, None
    for n, other in (("pse_batch", 0), ("mask_batch", 0), ("mask_heads", 4)):
        for value in (2, 5):
            yield {n: value}, Refused("SHAPE", n, "EQUAL", value, other)
        yield {n: 1}, None
    yield {"mask_heads": 4}, None
    for value in (math.nan, 1e-40):  # nor may 1 / keep_prob be infinite
        yield {"keep_prob": value}, Refused("VALUE", "keep_prob", "FINITE")
    for value in (1.0001, math.inf):
        yield {"keep_prob": value}, Refused("VALUE", "keep_prob", "AT_MOST", 2, 1)
    for value in (-1e-30, -math.inf):
        yield {"keep_prob": value}, Refused("VALUE", "keep_prob", "AT_LEAST", -1, 0)
    for value in (1e-30, 1.0, 0.0):
        yield {"keep_prob": value}, None
    if "softcap" in of.features:
        for value in (math.nan, math.inf, -math.inf, -1.0, -1e-40):
            yield {"softcap": value}, Refused("VALUE", "softcap", "FINITE")
    else:
        yield {"softcap": 1.0}, Refused("UNSUPPORTED", "softcap", "NULL", 1)
    if "pse_types" not in of.features:
        for value in (1, 2, 3):
            want = Refused("UNSUPPORTED", "pse_type", "NULL", 1)
            yield {"pse_type": value}, want
    if "sinks" not in of.features and not of.backward:
        yield {"sinks": some}, Refused("UNSUPPORTED", "sinks", "NULL", 1)
    for group in (1, 4):
        most = INT_MAX // 2 // group
        fields = {"heads_q": group, "heads_kv": 1}
        yield {**fields, "seq_q": most}, None
        want = Refused("SHAPE", "seq_q", "AT_MOST", most + 1, most)
        yield {**fields, "seq_q": most + 1}, want
    for value in (PA_BSND, 5, 7, -1, INT_MIN):
        yield {"input_layout": value}, Refused("UNSUPPORTED", "input_layout", "GENERATED", value)
    empty = {"seq_q": 0, "seq_kv": 0}
    for value in (BSND, BSH, SBH, BNSD, TND):
        yield {**empty, "input_layout": value}, None
    for n in ("actual_seq_qlen", "actual_seq_kvlen"):
        yield {n: longs}, Refused("UNSUPPORTED", n, "NULL", 1)
    for value in (7, 8):
        want = Refused("UNSUPPORTED", "sparse_mode", "AT_MOST", value, 6)
        yield {"sparse_mode": value}, want
        tnd = {**empty, "sparse_mode": value, "input_layout": TND}
        yield tnd, None
        yield {**tnd, "pse": some}, Refused("UNSUPPORTED", "pse", "NULL", 1)
    given = {"atten_mask": some, "mask_rows": 3, "mask_width": 5}
    five = {**given, "sparse_mode": 5}
    yield {**five, "input_layout": TND}, Refused("UNSUPPORTED", "sparse_mode", "EQUAL", 5, 6)
    yield five, None
    for n in ("pre_tokens", "next_tokens"):
        yield {n: 1}, Refused("SHAPE", "band", "EQUAL", 0, 1)
        yield {n: 1, "band": 1}, None
    yield WIDE, Refused("SHAPE", "key_stride", "ADDRESSABLE", INT64_MAX, INT64_MAX)
    small = {"mask_rows": 2, "mask_width": 4}
    for n, most in (("mask_rows", 3), ("mask_width", 5)):
        want = Refused("SHAPE", n, "AT_LEAST", small[n], most)
        yield {**given, n: small[n]}, want
    last = {"pse": some, "pse_shape": 2, "seq_kv": 3}
    yield {**last, "seq_kv": 5}, Refused("SHAPE", "seq_kv", "EQUAL", 5, 3)
    wide = Refused("SHAPE", "pse_width", "AT_LEAST", 1023, 1024)
    yield {**last, "pse_width": 1023}, wide
    yield {**last, "pse_width": 1024}, None
    for mode in (4, 6):
        fields = {**last, "sparse_mode": mode, "pse_width": 1024, "mask_from_mode": 1}
        yield fields, Refused("UNSUPPORTED", "sparse_mode", "AT_MOST", mode, 3)


def check_numbers(name: str) -> None:
    k, base = every.kernel(name), nothing(name)
    expect(k, base, None, "nothing to do")
    wrong = []
    for change, want in rows_of_numbers(name):
        try:
            expect(k, {**base, **change}, want, f"{change}")
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def check_lists(call: Call, fields: dict[str, Any]) -> None:
    """Lengths, ends and blocks: each entry that is read, just in and just out of range."""
    k, arrays = call.kernel, call.inputs()

    def entry(name: str, at: tuple[int, ...], value: int, want: Refused | None) -> None:
        changed = arrays[name].copy()
        changed[at] = value
        expect(k, {**fields, name: changed}, want, f"{name}{list(at)} = {value}")

    def bounds(name: str, at: tuple[int, ...], least: int, most: int, status: str) -> None:
        for value, rule, limit in ((least - 1, "AT_LEAST", least), (most + 1, "AT_MOST", most)):
            entry(name, at, value, Refused(status, name, rule, value, limit, at))

    paged = fields.get("layout_kv") in (PA_BSND, PA_BNSD)
    span = fields.get("max_blocks", 0) * fields.get("block_size", 0)
    for name, array in arrays.items():
        if name == "block_table" and not fields.get("index_kind"):
            lens = arrays.get("actual_seq_lengths_kv", arrays.get("actual_seq_lengths"))
            for b, n in enumerate(lens):
                for i in range(-(-int(n) // fields["block_size"])):
                    bounds(name, (b, i), 0, fields["num_blocks"] - 1, "BLOCK_ID")
                    entry(name, (b, i), 0, None)
                    entry(name, (b, i), fields["num_blocks"] - 1, None)
        for b in range(len(array)) if name == "prefix" else ():
            entry(name, (b,), -1, Refused("LENGTH", name, "AT_LEAST", -1, 0, (b,)))
            entry(name, (b,), 0, None)
        if "seq" not in name or (name == "actual_seq_lengths" and fields.get("lengths") == 1):
            continue
        total = fields["seq_q"] if name.endswith(("query", "qlen")) else fields.get("seq_kv", 0)
        if paged and name != "actual_seq_lengths_query":
            total = span
        ends = TND in (fields.get("layout_query"), fields.get("input_layout"))
        ends = ends and not (paged and name.endswith("kv"))
        if fields.get("index_kind") and name.endswith("kv"):
            continue
        for b in range(len(array)):
            least = int(array[b - 1]) if ends and b else 0
            if ends and b + 1 < len(array):
                want = Refused("LENGTH", name, "AT_LEAST", least - 1, least, (b,))
                entry(name, (b,), least - 1, want)
                continue
            bounds(name, (b,), least, total, "LENGTH")


def check_room(call: Call, fields: dict[str, Any]) -> None:
    """A workspace of the bytes that are asked for is enough, one less is not; it overlaps
    nothing."""
    k, need = call.kernel, call.kernel.workspace_bytes(**fields)
    plan, _ = k.plan(**fields)
    assert need == plan.task_bytes > 0
    pool = np.zeros(need + 128, np.uint8)
    room = pool[-pool.ctypes.data % 64 :]
    for capacity in (0, need - 1):
        got = k.run(**fields, workspace=room, capacity=capacity)
        assert (got.status_name, got.argument) == ("HL_ERR_WORKSPACE", "WORKSPACE")
        assert (got.rule, got.value, got.limit) == ("AT_LEAST", capacity, need)
    got = k.run(**fields, workspace=None, capacity=need)
    assert (got.status_name, got.argument) == ("HL_ERR_NULL", "WORKSPACE")
    assert k.run(**fields, workspace=room, capacity=need).ok
    arrays = {n: a for n, a in fields.items() if isinstance(a, np.ndarray)}
    outputs = list(call.outputs())
    for name, array in arrays.items():
        for shared in (True, False):
            place, work = side_by_side(array, np.zeros(need + 64, np.uint8), shared)
            got = k.run(**{**fields, name: place}, workspace=work, capacity=work.nbytes)
            if shared:
                found = got.status_name, got.argument
                whose = name.upper() if name in outputs else "WORKSPACE"
                assert found == ("HL_ERR_ALIAS", whose), f"{name}: {found}"
            else:
                assert got.ok, f"{name}: {got.error_text}"


def longest_of(call: Call, fields: dict[str, Any]) -> int:
    """Keys of a call's longest row, at most."""
    if fields.get("sparse_indices") is not None:
        return fields["list_length"] * fields["sparse_block_size"]
    if not description(call.name).decodes:
        paged = fields["layout_kv"] == PA_BSND
        return fields["max_blocks"] * fields["block_size"] if paged else fields["seq_kv"]
    return max(span(call.case.args, b)[1] for b in range(fields["batch"]))


def planned(call: Call, fields: dict[str, Any]) -> dict[str, int]:
    """What a plan says of a call, counted from its sizes."""
    of, heads = description(call.name), fields["heads_q"]
    group = heads // fields["heads_kv"]
    tnd = TND in (fields.get("layout_query"), fields.get("input_layout"))
    if of.trains:
        a = call.case.case.args if call.grads else call.case.args
        lens = spans_of(a)
        pairs = sum(q * kv for _, q, _, kv in lens)
        each = 4 * of.dk + 3 * of.dv if of.backward else of.dk + of.dv
        return {"group": group, "work": pairs * heads * each}
    rows = (1 if tnd else fields["batch"]) * fields["seq_q"]
    longest = longest_of(call, fields)
    made = {"group": group, "chunks": max(-(-longest // fields.get("chunk_keys", 2048)), 1)}
    made["work"] = rows * longest * heads * (of.dk + of.rope + of.dv)
    made["n_tasks"] = rows * fields["heads_kv"]
    if of.decodes:
        made["group"], made["longest"] = group * fields["seq_q"], longest
        made["n_tasks"] = fields["batch"] * fields["heads_kv"]
    return {**made, "n_merges": 0}


def check_plan(call: Call, fields: dict[str, Any]) -> None:
    """Numbers of tasks, work, defaults that are filled in."""
    k, of = call.kernel, description(call.name)
    plan, got = k.plan(**{**fields, "isa": 0})
    assert got.ok, got.error_text
    for name, value in planned(call, fields).items():
        assert getattr(plan, name) == value, f"{name}: {getattr(plan, name)}, not {value}"
    isas = k.isas()
    if not of.trains and of.dtype == "f16" and plan.group <= FEW_HEADS:
        isas.pop("amx", None)  # words do better
    best = next(isa for isa in ("amx", "avx512", "avx2", "neon", "scalar") if isa in isas)
    assert plan.args.isa == isas[best]
    scale = fields["scale_value"] or (kind_of(call.name) != "sparse")  # elsewhere 0 is 1
    scale = np.float32(scale) * np.float32(1.44269504)
    assert abs(plan.scale_log2 - scale) <= abs(scale) * 2.0**-22
    assert k.workspace_bytes(**fields) == k.plan(**fields)[0].task_bytes
    if of.trains and fields["input_layout"] != TND:
        tasks = -(-fields["seq_q"] * plan.group // plan.queries)
        if of.backward:
            assert plan.q_tasks == fields["batch"] * fields["heads_kv"] * tasks
            tasks += -(-fields["seq_kv"] // plan.keys)
        assert plan.n_tasks == fields["batch"] * fields["heads_kv"] * tasks


def check_structs(name: str) -> None:
    """No plan, no arguments, no place for an error."""
    k = every.kernel(name)
    args, error, plan = k.args(**nothing(name)), k.Error(), k.Plan()
    place = ctypes.byref
    null = k.constants["HL_ERR_NULL"]
    for made, given, argument in (
        (None, place(args), "PLAN"), (place(plan), None, "ARGS"), (None, None, "PLAN"),
    ):  # fmt: skip
        assert k._c_plan(made, given, place(error)) == null
        told = k.result(-1, error)
        assert (told.argument, told.rule) == (argument, "NOT_NULL")
        assert (told.value, told.limit, told.position) == (0, 0, ())
        assert list(error.position) == [0, 0]
    assert k._c(None, None, 0, place(error)) == null
    assert k.result(-1, error).argument == "ARGS"
    assert k._c_workspace_bytes(None) == 0
    assert k._c_plan(place(plan), place(args), None) == 0
    bad = k.args(**{**nothing(name), "batch": -1})
    assert k._c_plan(place(plan), place(bad), None) == k.constants["HL_ERR_SHAPE"]


@functools.cache
def based(name: str) -> tuple[Call, ...]:
    """The bases, and last one of one batch, one row and one head."""
    return (*bases(name), sized(name, 3, 1, 1))


@functools.cache
def long_call(name: str) -> Call:
    """Of several chunks."""
    return sized(name, 300, 2, 3, seed=5)


def check_refusals(name: str) -> None:
    """Everything that plan and the call refuse, and what is just within bounds."""
    check_numbers(name)
    check_structs(name)
    for turn, call in enumerate(based(name)):
        fields = {**call.fields(), **call.outputs()}
        arrays = {n: a for n, a in fields.items() if isinstance(a, np.ndarray)}
        expect(call.kernel, fields, None, "as it is")
        check_plan(call, fields)
        check_pointers(call, fields, arrays)
        check_overlaps(call, fields, arrays)
        check_strides(call, fields, arrays)
        check_lists(call, fields)
        if kind_of(name) == "sparse":
            check_sparse_lists(call, fields)
        if turn < 2:
            check_room(call, fields)
    if description(name).trains:
        call = based(name)[0]
        check_triangle(call, {**call.fields(), **call.outputs()})
    else:
        call = long_call(name)
        check_partials(call, {**call.fields(), **call.outputs()})


@pytest.mark.parametrize("name", every.HEADERS)
def test_each_argument_just_in_and_just_out_of_its_range(name):
    based(name), every.kernel(name)  # here, not in the child
    if not description(name).trains:
        long_call(name)
    in_child(lambda: check_refusals(name), name)


# ---- a cache's rows -----------------------------------------------------------------------------


def check_appends(name: str, isas: tuple[str, ...]) -> None:
    """A decode header's append: every layout, every mode, at once and by token. What writes and
    reads records is tried on the shipped headers in test_rows.py."""
    for turn, way in enumerate(append.ways(name)):
        for i, (mode, antiquant_f32) in enumerate(append.modes(name)):
            call = append.Call(name, way, mode, antiquant_f32, (turn + i) % 2)
            flush = ("left", "right")[turn % 2]
            call.check(flush, turn % 2 == 0, isas)


def refused_appends(name: str) -> list[append.Bad]:
    """Those bad calls of test_decode_append.py that say the same of a shipped header: it has no
    slots and no pages, other widths, and bfloat16 or codes."""
    of = description(name)
    like = ("i8",) if "i8" in of.kv else ("bf16", "f16")
    absent = ("INDEX_KIND", "ANTIQUANT_MODE")  # what the small f16 kernel lacks too
    steps = [bad for bad in append.BAD if bad[3].endswith("_STRIDE") and bad[7] == -1]
    return [(name, *bad[1:]) for bad in steps] + [
        (name, *bad[1:])
        for bad in append.BAD
        if bad[0] in like
        and bad[1] in ("BSND", "PA")
        and not bad[3].endswith("_STRIDE")
        and (bad[3] in absent if bad[0] == "f16" else bad[3] != "INDEX_KIND")
        and (of.dtype == "bf16" or bad[4] != "ALIGN")
    ]


def check_refused_appends(name: str) -> None:
    for bad in refused_appends(name):
        append.test_bad_input(*bad)
    k = append.kernel(name)
    for way in ("BSND", "PA"):
        fields = append.base(name, way)
        inputs = [n for n, a in fields.items() if isinstance(a, np.ndarray) and "cache" not in n]
        for cache in ("key_cache", "value_cache"):
            for pair in ((n, cache) for n in inputs):
                for first, second in (pair, pair[::-1]):
                    for shared in (True, False):
                        places = side_by_side(fields[first], fields[second], shared)
                        got = k.append(**{**fields, first: places[0], second: places[1]})
                        what = f"{first} {second} {'share' if shared else 'touch'}"
                        want = ("HL_ERR_ALIAS", cache.upper()) if shared else ("HL_OK", "")
                        assert (got.status_name, got.argument) == want, f"{what}: {got.error_text}"


APPENDS = [name for name in every.HEADERS if description(name).decodes]


@pytest.mark.parametrize("name", APPENDS)
def test_appended_rows_are_the_oracles_bytes(name):
    append.kernel(name)
    isas = tuple(isa for isa in WORDS_HERE if isa in every.isas_in(name))
    in_child(lambda: check_appends(name, isas), name)


@pytest.mark.parametrize("name", APPENDS)
def test_appends_that_are_refused(name):
    append.kernel(name)
    in_child(lambda: check_refused_appends(name), name)


def check_all(name: str, isas: list[str], first: str = "") -> None:
    """All of this file for a header, on some instruction sets; for tests/mutate.py."""
    parts = [check_refusals, *(functools.partial(check_calls, isa=isa) for isa in isas)]
    if name in SPOILED:
        parts += [functools.partial(check_nan, isa=isa) for isa in isas]
    if description(name).decodes:
        words = tuple(isa for isa in isas if isa in WORDS_HERE)
        parts.insert(1, functools.partial(check_appends, isas=words))
        parts.insert(1, check_refused_appends)
    for part in parts if first == "refusals" else reversed(parts):
        part(name)


def check_neon(name: str, text: str) -> None:
    """Recorded calls of a header's NEON code, under qemu."""
    defines = ("-O1", "-DHL_ISA_ONLY_NEON")
    made = helpers_runner.program(text, name, flags=defines)
    isa = every.kernel(name).constants["HL_ISA_NEON"]
    recorded = [call.recorded(isa) for call in drawn(name)]
    _, results = helpers_runner.play([*helpers_runner.QEMU, str(made)], recorded)
    for call, got in zip(drawn(name), results, strict=True):
        call.check(got, "neon")
