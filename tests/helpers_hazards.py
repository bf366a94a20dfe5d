"""Calls with one thing wrong, of any shipped header: what the tests of the hazard table share."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import helpers_every as every
import numpy as np
from helpers_cases import INT_MIN, TENSORS
from helpers_memory import Arena, in_child
from oracle import PA_BSND, TND

from gen import bind

HEADERS = every.HEADERS
DECODES = tuple(n for n in HEADERS if every.description(n).decodes)
TRAINS = tuple(n for n in HEADERS if every.description(n).trains)
SPARSE = tuple(n for n in HEADERS if n not in DECODES + TRAINS)
GRADS = tuple(n for n in TRAINS if every.description(n).backward)
FORWARD = tuple(n for n in HEADERS if n not in GRADS)
CACHES = SPARSE + DECODES  # those with a cache, which can be paged
SLOTS = tuple(n for n in SPARSE if "slots" in every.description(n).features)
RECORDS = tuple(n for n in SPARSE if "antiquant" in n)
APPENDS = RECORDS + DECODES
ENDS = {"q": "actual_seq_qlen", "kv": "actual_seq_kvlen"}  # of training, TND
NEGATIVE = (-1, -2, INT_MIN)
FLUSHES = ("left", "right")


def feature(name: str, wanted: str) -> bool:
    """Whether a header was generated with an option."""
    return wanted in every.description(name).features


def with_feature(*wanted: str) -> tuple[str, ...]:
    return tuple(n for n in HEADERS if all(feature(n, f) for f in wanted))


def made(
    name: str,
    keys: tuple[int, ...] = (20,),
    rows: int = 2,
    heads: int = 2,
    seed: int = 1,
    **more: Any,
) -> every.Call:
    """A call of batches with so many keys each (of training: the first batch's, for all); `more`
    are fields of the operator's Shape."""
    if name in TRAINS:
        tnd = more.get("layout") == TND
        lens_kv = keys if tnd else keys[:1] * len(keys)
        lens = {"lens_q": (rows,) * len(keys), "lens_kv": lens_kv}
    elif name in DECODES:
        lens = {"lens": keys, "seq_q": rows}
    else:
        lens = {"lens_q": (rows,) * len(keys), "lens_kv": keys}
        if "BSND" not in every.description(name).layout_kv:
            more = {"layout_kv": PA_BSND, **more}
    if name in SPARSE and "layout_kv" in more and more["layout_kv"] == TND:
        more = {"layout_q": TND, **more}
    return every.sized(name, 1, seed=seed, **{**lens, "group": heads, **more})


def paged(name: str, keys: tuple[int, ...] = (20, 9), **more: Any) -> every.Call:
    """The same from pages of 4 tokens."""
    return made(name, keys, **{"layout_kv": PA_BSND, "block_size": 4, **more})


def full(name: str) -> list[every.Call]:
    """Calls that between them have something behind every pointer that the header reads."""
    if name in TRAINS:
        sinks = "plain" if feature(name, "sinks") else "none"
        common = {"sinks": sinks, "keep_prob": 0.5, "bits": True, "pse": "full"}
        return [
            made(name, (9, 13), 7, layout=TND, mode=6, mask="formula", **common),
            made(name, (9, 9), 7, mode=1, mask="given", hidden=0.3, **common),
        ]
    if name in DECODES:
        sinks = "plain" if feature(name, "sinks") else "none"
        common = {
            "pse": "each",
            "mask": "each",
            "alibi": feature(name, "alibi"),
            "sinks": sinks,
            "hidden": 0.2,
        }
        return [
            made(name, (20, 9), padding=2, quant="channel", **common),
            paged(name, **common),
        ]
    common = {"sinks": "plain", "value": name not in RECORDS, "list_length": 7}
    calls = [paged(name, lists="blocks", **common)]
    if name in SLOTS:
        calls.append(paged(name, lists="slots", list_lengths=True, **common))
    return calls


@functools.cache
def pointers(name: str) -> tuple[str, ...]:
    """Fields of the args struct that are pointers."""
    k = every.kernel(name)
    return tuple(f.name for f in k.header.structs[f"{k.op}_args"] if f.stars)


def images(fields: dict[str, Any]) -> dict[str, bytes]:
    return {n: a.tobytes() for n, a in fields.items() if isinstance(a, np.ndarray)}


def refused(
    call: every.Call,
    changes: dict[str, Any],
    status: str,
    argument: str,
    rule: str = "",
    **expected: Any,
) -> bind.Result:
    """plan and the one call refuse in the same words; plan, outputs, inputs and workspace stay as
    they are."""
    k = call.kernel
    plain = {**call.fields(), **call.outputs()}
    assert k.plan(**plain)[1].ok, "the control: the call is refused without the change too"
    fields = {**plain, **changes}
    workspace = np.full(4096, 0xC3, np.uint8)
    before = images(fields)
    plan, planned = k.plan(**fields)
    result = k.run(**fields, workspace=workspace)
    assert bytes(plan) == bytes(len(bytes(plan))), "a refused plan was written"
    for one in (planned, result):
        assert one.status_name == f"HL_ERR_{status}", f"{one} {changes}"
        assert not argument or one.argument == argument.upper(), one
        assert not rule or one.rule == rule, one
        for name, value in expected.items():
            assert getattr(one, name) == value, (name, one)
        assert one.error_text
    assert images(fields) == before, "a refused call wrote"
    assert (workspace == 0xC3).all(), "a refused call wrote its workspace"
    assert k.workspace_bytes(**fields) == 0
    return result


def accepted(call: every.Call, isa: str | int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """The outputs of a call with some of its fields replaced."""
    return call.run(isa, **changes)


def same(x: dict[str, np.ndarray], y: dict[str, np.ndarray], what: object = "") -> None:
    """Equal in every bit."""
    assert x.keys() == y.keys()
    for name in x:
        assert x[name].tobytes() == y[name].tobytes(), f"{name} {what}"


def differs(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> bool:
    return any(x[name].tobytes() != y[name].tobytes() for name in x)


def changed(call: every.Call, **changes: Any) -> every.Call:
    """The call with some of the oracle's arguments replaced, which then judges it."""
    if call.grads:
        case = call.case.case.changed(**changes)
        return every.Call(call.name, dataclasses.replace(call.case, case=case))
    return every.Call(call.name, call.case.changed(**changes))


def filled(call: every.Call) -> every.Call:
    """The call with numbers where no row sees any: what a changed list may then name."""
    changes = {}
    for tensor in (*TENSORS, "pse", "pse_shift", "antiquant_scale", "antiquant_offset"):
        x = getattr(args_of(call), tensor, None)
        if x is None:
            continue
        if x.dtype == np.uint8:  # records
            rows = x.reshape(-1, x.shape[-1]).copy()
            nobody = (rows == 0xFF).all(axis=1)
            rows[nobody] = rows[~nobody][0]
            changes[tensor] = rows.reshape(x.shape)
        else:
            with np.errstate(all="ignore"):
                changes[tensor] = np.where(np.isnan(x.astype(np.float32)), x.dtype.type(0.5), x)
    return changed(call, **changes)


def args_of(call: every.Call) -> Any:
    """The oracle's arguments."""
    return (call.case.case if call.grads else call.case).args


def between_pages(
    call: every.Call, changes: dict[str, np.ndarray], isas: tuple[str, ...], flush: str = "right"
) -> dict[str, dict[str, np.ndarray]]:
    """One child runs the call on each instruction set with its own buffers between forbidden pages,
    some inputs replaced."""
    with Arena(flush) as arena:
        inputs = {n: arena.place(a) for n, a in {**call.inputs(), **changes}.items()}
        outputs = {isa: call.outputs(arena) for isa in isas}
        arena.protect()
        k = call.kernel

        def run_all() -> None:
            for isa in isas:
                fields = {**call.sizes(), **inputs, **outputs[isa], "isa": k.isas()[isa]}
                k.run(**fields).check()

        in_child(run_all, f"{call}")
        arena.check()
        return {isa: {n: a.copy() for n, a in o.items()} for isa, o in outputs.items()}


# ---- rows that are written to a cache -----------------------------------------------------------


def appending(name: str, rows: int = 3) -> dict[str, Any]:
    """Two batches whose new rows go to pages of 4 tokens: all fields of ..._append, arrays of this
    process."""
    call = paged(name, (20, 9))
    a, sizes = args_of(call), call.sizes()
    k, rng, batch = call.kernel, np.random.default_rng(2), 2
    fields: dict[str, Any] = {n: sizes[n] for n in ("num_blocks", "block_size", "max_blocks")}
    fields |= {
        "block_table": a.block_table.copy(),
        "positions": np.array([17, 2], np.int32),
        "lengths": np.array([3, 2], np.int32),
        "batch": batch,
        "rows": rows,
        "heads_kv": sizes["heads_kv"],
        "layout_kv": sizes["layout_kv"],
    }
    heads = sizes["heads_kv"]
    if name in RECORDS:
        numbers = rng.standard_normal((batch, rows, heads, k.dk + k.rope)).astype(k.dtype)
        return {**fields, "nope": numbers, "key": call.inputs()["key"].copy()}
    for side, channels in (("key", k.dk), ("value", k.dv)):
        numbers = rng.standard_normal((batch, rows, heads, channels))
        fields[side] = numbers.astype(k.dtype)
        fields[f"{side}_cache"] = call.inputs()[side].copy()
    if a.antiquant_scale is not None:
        fields["antiquant_scale"] = a.antiquant_scale.copy()
        fields["antiquant_f32"] = 1
    return fields


def append_refused(name: str, changes: dict[str, Any], status: str, argument: str) -> None:
    """...and the cache, like everything else, stays as it is."""
    fields = {**appending(name), **changes}
    before = images(fields)
    result = every.kernel(name).append(**fields)
    assert (result.status_name, result.argument) == (f"HL_ERR_{status}", argument.upper()), result
    assert images(fields) == before, "a refused append wrote"


def with_entry(array: np.ndarray, at: tuple[int, ...] | int, value: int) -> np.ndarray:
    """A copy with one element replaced."""
    other = array.copy()
    other[at] = value
    return other


def lengths_argument(name: str) -> str:
    """What says how many keys each batch has."""
    if name in TRAINS:
        return "actual_seq_kvlen"
    return "actual_seq_lengths" if name in DECODES else "actual_seq_lengths_kv"


def limit_of(call: every.Call) -> int:
    """Keys that a batch may have at most."""
    sizes = call.sizes()
    if sizes.get("layout_kv") == PA_BSND and call.name not in TRAINS:
        return sizes["max_blocks"] * sizes["block_size"]
    return sizes["seq_kv"]


def per_pair(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in names:
        for isa in every.isas_in(name):
            yield name, isa
