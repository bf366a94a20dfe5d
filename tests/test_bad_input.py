"""Everything that can be wrong with a call: a status, which argument, where, what it was and what
it had to be, a sentence; and nothing written."""

import ctypes
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import helpers_decode
import numpy as np
import pytest
from helpers import ISAS_HERE, best_in, check, kernel, table, text
from helpers_cases import INT_MAX, INT_MIN, Case, Shape, Way, make_case, run, run_guarded
from helpers_memory import Arena, in_child
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BSND, PA_BSND, TND

from gen import bind, spec

NAME = "f32_small"
OTHER_MACHINES_ISA = 3 if "neon" in ISAS_HERE else 2  # HL_ISA_AVX2, HL_ISA_NEON
PAGED = Shape(
    lens_q=(2, 1),
    lens_kv=(20, 9),
    heads_kv=2,
    group=3,
    layout_kv=PA_BSND,
    block_size=4,
    spare_blocks=2,
    lists="blocks",
    list_length=6,
    seed=1,
)
BASES = {
    "bsnd": dataclasses.replace(PAGED, layout_kv=BSND, pad_q=1, pad_kv=1),
    "dense": dataclasses.replace(PAGED, layout_kv=BSND, lists="none"),
    "tnd": dataclasses.replace(PAGED, layout_q=TND, layout_kv=TND, pad_q=1, pad_kv=2),
    "paged": PAGED,
    "slots": dataclasses.replace(PAGED, lists="slots", list_lengths=True),
    "joined": dataclasses.replace(PAGED, layout_kv=BSND, joined_q=True, joined_k=True, value=True),
}


def base(name: str) -> tuple[Case, dict[str, Any]]:
    """A call that is accepted: its case and all its fields."""
    case = make_case(kernel(NAME), BASES[name])
    return case, {**case.inputs(), **case.sizes(), **case.outputs()}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def with_entry(name: str, at: tuple[int, ...], value: int) -> Callable:
    """One element of an int32 array replaced."""

    def change(fields: dict[str, Any]) -> dict[str, Any]:
        array = fields[name].copy()
        array[at] = value
        return {name: array}

    return change


def address(name: str, offset: int = 0) -> Callable:
    """Where another argument lies."""
    return lambda fields: fields[name].ctypes.data + offset


@dataclass(frozen=True)
class Bad:
    """One bad call: what is changed in which base, and how it has to be refused."""

    base: str
    change: Any  # fields, or a function from the fields to fields
    status: str
    argument: str
    rule: str = ""
    position: tuple[int, ...] = ()
    value: int | None = None
    limit: int | None = None

    @property
    def id(self) -> str:
        what = self.change if isinstance(self.change, dict) else ""
        shown = (
            "-".join(f"{k}={v}" for k, v in what.items() if isinstance(v, (int, float)))
            if what
            else ""
        )
        return f"{self.base}-{self.status}-{self.argument}-{shown}-{self.position}-{self.value}"


def shape(
    base_name: str, argument: str, value: int, rule: str = "AT_LEAST", limit: int | None = 0
) -> Bad:
    """A size out of its range."""
    return Bad(base_name, {argument: value}, "SHAPE", argument, rule, (), value, limit)


def length(
    base_name: str, argument: str, values: np.ndarray, at: int, rule: str, limit: int
) -> Bad:
    return Bad(
        base_name, {argument: values}, "LENGTH", argument, rule, (at,), int(values[at]), limit
    )


def block_id(b: int, i: int, value: int) -> Bad:
    rule, limit = ("AT_LEAST", 0) if value < 0 else ("AT_MOST", 9)
    return Bad(
        "paged",
        with_entry("block_table", (b, i), value),
        "BLOCK_ID",
        "block_table",
        rule,
        (b, i),
        value,
        limit,
    )


QUERY_LENS, KV_LENS = "actual_seq_lengths_query", "actual_seq_lengths_kv"
TABLE = [
    # Required pointers.
    *(Bad("bsnd", {n: None}, "NULL", n, "NOT_NULL") for n in ("query", "key", "attention_out")),
    Bad("paged", {"block_table": None}, "NULL", "block_table", "NOT_NULL"),
    Bad("bsnd", {"sparse_indices": None}, "NULL", "sparse_indices", "NOT_NULL"),
    Bad("slots", {"sparse_indices": None}, "NULL", "sparse_indices", "NOT_NULL"),
    Bad("tnd", {QUERY_LENS: None}, "NULL", QUERY_LENS, "NOT_NULL"),
    Bad("tnd", {KV_LENS: None}, "NULL", KV_LENS, "NOT_NULL"),
    # Pointers that must not be there.
    Bad("bsnd", {"block_table": np.zeros((2, 9), np.int32)}, "UNSUPPORTED", "block_table", "NULL"),
    Bad(
        "bsnd",
        {"sparse_lengths": np.zeros((2, 3, 2), np.int32)},
        "UNSUPPORTED",
        "sparse_lengths",
        "NULL",
    ),
    # Sizes.
    *(
        shape("bsnd", n, v)
        for v in (-1, INT_MIN)
        for n in (
            "batch",
            "seq_q",
            "seq_kv",
            "heads_q",
            "heads_kv",
            "list_length",
            "sparse_block_size",
            "chunk_keys",
        )
    ),
    *(shape("paged", n, -1) for n in ("num_blocks", "max_blocks")),
    *(shape("paged", "block_size", v, limit=1) for v in (0, -1, INT_MIN)),
    Bad("bsnd", {"heads_kv": 4}, "SHAPE", "heads_q", "MULTIPLE_OF", (), 6, 4),
    Bad("bsnd", {"heads_kv": 7}, "SHAPE", "heads_q", "MULTIPLE_OF", (), 6, 7),
    *(shape("bsnd", "sparse_block_size", v, "POWER_OF_2", 128) for v in (3, 6, 129, 256, INT_MAX)),
    *(shape("bsnd", "chunk_keys", v, "MULTIPLE_OF", 128) for v in (1, 127, 129, INT_MAX)),
    shape("paged", "max_blocks", INT_MAX, "AT_MOST", INT_MAX // 4),
    shape("slots", "sparse_block_size", 2, "EQUAL", 1),
    *(shape("bsnd", "out_f32", v, "AT_MOST", 1) for v in (2, -1)),
    *(shape("bsnd", "strict_lists", v, "AT_MOST", 1) for v in (2, -1)),
    # Sizes that together do not fit in memory.
    Bad(
        "dense",
        {"batch": INT_MAX, "seq_q": INT_MAX, QUERY_LENS: None, KV_LENS: None},
        "SHAPE",
        "query",
        "ADDRESSABLE",
    ),
    Bad(
        "dense",
        {
            "batch": INT_MAX,
            "seq_kv": INT_MAX,
            QUERY_LENS: None,
            KV_LENS: None,
            "seq_q": 1,
            "heads_q": 65536,
            "heads_kv": 65536,
        },
        "SHAPE",
        "key",
        "ADDRESSABLE",
    ),
    Bad(
        "dense",
        {"seq_kv": INT_MAX, "heads_q": INT_MAX - 1, "heads_kv": INT_MAX - 1, KV_LENS: None},
        "SHAPE",
        "key_stride",
        "ADDRESSABLE",
    ),
    Bad(
        "bsnd",
        {
            "list_length": INT_MAX,
            "batch": INT_MAX,
            QUERY_LENS: None,
            KV_LENS: None,
            "seq_kv": 1,
            "heads_q": 65536,
            "heads_kv": 65536,
        },
        "SHAPE",
        "sparse_indices",
        "ADDRESSABLE",
    ),
    Bad("dense", {"query_stride": (2**62, 0, 0)}, "SHAPE", "query", "ADDRESSABLE"),
    Bad("dense", {"key_stride": (0, 2**62, 0)}, "SHAPE", "key", "ADDRESSABLE"),
    # Strides.
    *(
        Bad("dense", {f"{n}_stride": s}, "SHAPE", f"{n}_stride", "AT_LEAST", (), -4, 0)
        for n in ("query", "query_rope", "key", "key_rope", "value", "out")
        for s in ((-4, 0, 0), (0, -4, 0), (0, 0, -4))
    ),
    Bad("dense", {"out_stride": (0, 0, 6)}, "SHAPE", "out_stride", "AT_LEAST", (), 6, 7),
    Bad("dense", {"out_stride": (0, 41, 0)}, "SHAPE", "out_stride", "AT_LEAST", (), 41, 42),
    Bad("dense", {"out_stride": (83, 0, 0)}, "SHAPE", "out_stride", "AT_LEAST", (), 83, 84),
    # Lengths and ends.
    *(length("bsnd", QUERY_LENS, ints(2, v), 1, "AT_LEAST", 0) for v in (-1, INT_MIN)),
    *(length("bsnd", QUERY_LENS, ints(v, 1), 0, "AT_MOST", 3) for v in (4, INT_MAX)),
    *(length("bsnd", KV_LENS, ints(v, 9), 0, "AT_LEAST", 0) for v in (-1, INT_MIN)),
    *(length("bsnd", KV_LENS, ints(20, v), 1, "AT_MOST", 21) for v in (22, INT_MAX)),
    *(length("paged", KV_LENS, ints(20, v), 1, "AT_MOST", 28) for v in (29, INT_MAX)),
    *(length("paged", KV_LENS, ints(v, 9), 0, "AT_LEAST", 0) for v in (-1, INT_MIN)),
    length("tnd", QUERY_LENS, ints(-1, 3), 0, "AT_LEAST", 0),
    length("tnd", QUERY_LENS, ints(3, 2), 1, "AT_LEAST", 3),
    *(length("tnd", QUERY_LENS, ints(2, v), 1, "AT_MOST", 4) for v in (5, INT_MAX)),
    length("tnd", QUERY_LENS, ints(2, INT_MIN), 1, "AT_LEAST", 2),
    length("tnd", KV_LENS, ints(20, 19), 1, "AT_LEAST", 20),
    length("tnd", KV_LENS, ints(-5, 29), 0, "AT_LEAST", 0),
    *(length("tnd", KV_LENS, ints(20, v), 1, "AT_MOST", 31) for v in (32, INT_MAX)),
    # Needed entries of the block table; there are 10 blocks.
    *(block_id(b, i, v) for v in (-1, -2, INT_MIN, 10, 11, INT_MAX) for b, i in ((0, 4), (1, 0))),
    # Numbers and options.
    *(
        Bad("bsnd", {"scale_value": v}, "VALUE", "scale_value", "FINITE")
        for v in (math.nan, math.inf, -math.inf)
    ),
    *(
        Bad("bsnd", {"sparse_mode": v}, "UNSUPPORTED", "sparse_mode", "GENERATED", (), v)
        for v in (1, 2, 4, -1)
    ),
    *(
        Bad("bsnd", {"attention_mode": v}, "UNSUPPORTED", "attention_mode", "GENERATED", (), v)
        for v in (1, 3, -1)
    ),
    *(
        Bad("bsnd", {"index_kind": v}, "UNSUPPORTED", "index_kind", "GENERATED", (), v)
        for v in (2, -1)
    ),
    *(
        Bad("bsnd", {"layout_query": v}, "UNSUPPORTED", "layout_query", "GENERATED", (), v)
        for v in (2, 3, -1)
    ),
    *(
        Bad("bsnd", {"layout_kv": v}, "UNSUPPORTED", "layout_kv", "GENERATED", (), v)
        for v in (3, -1)
    ),
    Bad("bsnd", {"layout_kv": TND}, "UNSUPPORTED", "layout_kv", "PAIRED", (), TND, BSND),
    Bad("tnd", {"layout_kv": BSND}, "UNSUPPORTED", "layout_kv", "PAIRED", (), BSND, TND),
    Bad("slots", {"sparse_mode": 3}, "UNSUPPORTED", "sparse_mode", "NULL", (), 3),
    *(
        Bad("bsnd", {"isa": v}, "UNSUPPORTED", "isa", "GENERATED", (), v)
        for v in (OTHER_MACHINES_ISA, 5, 6, 31, 32, -1, INT_MAX, INT_MIN)
    ),
    # Alignment: each tensor to its element, nothing more.
    *(
        Bad(
            "joined",
            lambda f, n=n, o=o: {n: f[n].ctypes.data + o},
            "ALIGN",
            n,
            "MULTIPLE_OF",
            (),
            o,
            4,
        )
        for o in (1, 2, 3)
        for n in (
            "query",
            "key",
            "value",
            "sparse_indices",
            QUERY_LENS,
            KV_LENS,
            "attention_out",
            "softmax_max",
            "softmax_sum",
            "softmax_lse",
        )
    ),
    *(
        Bad("paged", lambda f, n=n: {n: f[n].ctypes.data + 2}, "ALIGN", n, "MULTIPLE_OF", (), 2, 4)
        for n in ("query_rope", "key_rope", "block_table")
    ),
    Bad(
        "slots",
        lambda f: {"sparse_lengths": f["sparse_lengths"].ctypes.data + 1},
        "ALIGN",
        "sparse_lengths",
        "MULTIPLE_OF",
        (),
        1,
        4,
    ),
    # Outputs over anything else.
    *(
        Bad(
            "joined",
            lambda f, n=n: {"attention_out": f[n].ctypes.data},
            "ALIAS",
            "attention_out",
            "DISJOINT",
        )
        for n in ("query", "key", "value", "sparse_indices", QUERY_LENS, KV_LENS)
    ),
    *(
        Bad("joined", lambda f, n=n, m=m: {n: f[m].ctypes.data + 8}, "ALIAS", n, "DISJOINT")
        for n in ("softmax_max", "softmax_sum", "softmax_lse")
        for m in ("query", "key", "value")
    ),
    Bad(
        "paged",
        lambda f: {"softmax_sum": f["block_table"].ctypes.data},
        "ALIAS",
        "softmax_sum",
        "DISJOINT",
    ),
    Bad(
        "bsnd",
        lambda f: {"softmax_sum": f["softmax_max"].ctypes.data},
        "ALIAS",
        "softmax_max",
        "DISJOINT",
    ),
    Bad(
        "bsnd",
        lambda f: {"softmax_lse": f["attention_out"].ctypes.data},
        "ALIAS",
        "attention_out",
        "DISJOINT",
    ),
]


def refuse(k: bind.Kernel, fields: dict[str, Any], bad: Bad) -> bind.Result:
    """plan and the one call refuse alike; returns what they said."""
    plan, planned = k.plan(**fields)
    assert bytes(plan) == bytes(ctypes.sizeof(plan)), "a refused plan was written"
    workspace = np.full(1 << 16, 0xFF, np.uint8)
    result = k.run(**fields, workspace=workspace)
    assert (workspace == 0xFF).all(), "a refused call wrote its workspace"
    for one in (planned, result):
        assert one.status_name == f"HL_ERR_{bad.status}", one
        assert one.argument == bad.argument.upper(), one
        assert not bad.rule or one.rule == bad.rule, one
        assert one.position == bad.position, one
        assert bad.value is None or one.value == bad.value, one
        assert bad.limit is None or one.limit == bad.limit, one
    assert k.workspace_bytes(**fields) == 0
    return result


def check_refused(k: bind.Kernel, fields: dict[str, Any], bad: Bad) -> str:
    """A call that was fine before one change: refused, in a sentence, and nothing is written."""
    arrays = {name: array for name, array in fields.items() if isinstance(array, np.ndarray)}
    before = {name: array.tobytes() for name, array in arrays.items()}
    change = bad.change(fields) if callable(bad.change) else bad.change
    result = refuse(k, {**fields, **change}, bad)
    assert {name: array.tobytes() for name, array in arrays.items()} == before
    sentence = result.error_text
    assert sentence.startswith(bad.argument) and len(sentence) < 160 and sentence.isprintable()
    for at in bad.position:
        assert f"[{at}]" in sentence
    if bad.rule in ("AT_LEAST", "AT_MOST", "EQUAL", "MULTIPLE_OF", "POWER_OF_2", "PAIRED"):
        assert str(result.value) in sentence and str(result.limit) in sentence
    print(sentence)
    return sentence


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_refused(bad):
    check_refused(kernel(NAME), base(bad.base)[1], bad)


@pytest.mark.parametrize("layout", ["bsnd", "tnd"])
def test_a_cache_in_the_other_layout_is_told_what_would_do(layout):
    """Not a number that a layout has to equal: the query's layout, or pages."""
    k = kernel(NAME)
    _, fields = base(layout)
    other = BSND if layout == "tnd" else TND
    sentence = k.run(**{**fields, "layout_kv": other}).error_text
    assert "paged" in sentence and "as the query is" in sentence


@pytest.mark.parametrize("name", BASES)
def test_the_bases_are_accepted(name):
    """The control: each call of the table is fine but for the one change."""
    _, fields = base(name)
    result = kernel(NAME).run(**fields)
    assert result.ok and result.error_text == ""
    plan, planned = kernel(NAME).plan(**fields)
    assert planned.ok and plan.n_tasks > 0
    text_of_success = kernel(NAME).error_text(kernel(NAME).Error())
    assert text_of_success == "no error"


def test_null_structs():
    k = kernel(NAME)
    _, fields = base("bsnd")
    args, error, plan = k.args(**fields), k.Error(), k.Plan()
    place = ctypes.byref
    assert k._c_plan(None, place(args), place(error)) == k.constants["HL_ERR_NULL"]
    assert k.result(-1, error).argument == "PLAN"
    assert k._c_plan(place(plan), None, place(error)) == k.constants["HL_ERR_NULL"]
    assert k.result(-1, error).argument == "ARGS"
    assert k._c(None, None, 0, place(error)) == k.constants["HL_ERR_NULL"]
    assert k._c_workspace_bytes(None) == 0
    assert k._c_merge_parts(None, place(error)) == k.constants["HL_ERR_NULL"]
    assert k.result(-1, error).argument == "PARTS"
    bad = k.args(**{**fields, "batch": -1})
    assert k._c_plan(place(plan), place(bad), None) == k.constants["HL_ERR_SHAPE"]
    assert k._c(place(bad), None, 0, None) == k.constants["HL_ERR_SHAPE"]
    assert k._c_plan(place(plan), place(args), None) == 0


def test_workspace_to_the_byte():
    k = kernel(NAME)
    _, fields = base("paged")
    need = k.workspace_bytes(**fields)
    assert need > 0
    plan, _ = k.plan(**fields)
    assert need == plan.task_bytes
    before = fields["attention_out"].tobytes()
    workspace = np.full(need, 0xFF, np.uint8)
    for capacity in (0, 1, need - 1):
        result = k.run(**fields, workspace=workspace, capacity=capacity)
        assert (result.status_name, result.argument) == ("HL_ERR_WORKSPACE", "WORKSPACE")
        assert (result.rule, result.value, result.limit) == ("AT_LEAST", capacity, need)
        assert str(need) in result.error_text
    result = k.run(**fields, workspace=None, capacity=need)
    assert (result.status_name, result.argument) == ("HL_ERR_NULL", "WORKSPACE")
    assert fields["attention_out"].tobytes() == before and (workspace == 0xFF).all()
    assert k.run(**fields, workspace=workspace, capacity=need).ok


def test_workspace_and_partials_overlap_nothing():
    k = kernel(NAME)
    _, fields = base("paged")
    need = k.workspace_bytes(**fields)
    pool = np.full(need + 4096, 0xFF, np.uint8)
    for victim in ("attention_out", "softmax_max", "softmax_sum", "softmax_lse"):
        moved = {**fields, victim: (pool.ctypes.data + 63) // 64 * 64}
        before = {n: a.tobytes() for n, a in fields.items() if isinstance(a, np.ndarray)}
        result = k.run(**moved, workspace=pool)
        assert result.status_name == "HL_ERR_ALIAS", result
        assert result.argument in (victim.upper(), "WORKSPACE")
        assert {n: a.tobytes() for n, a in fields.items() if isinstance(a, np.ndarray)} == before
        assert (pool == 0xFF).all()
    for victim in ("query", "key", "block_table", "sparse_indices"):
        inside = pool[64 : 64 + fields[victim].nbytes].view(fields[victim].dtype)
        inside[...] = fields[victim].reshape(-1)
        held = pool.tobytes()
        result = k.run(**{**fields, victim: inside}, workspace=pool)
        assert (result.status_name, result.argument) == ("HL_ERR_ALIAS", "WORKSPACE"), result
        assert pool.tobytes() == held


def long_call() -> tuple[Case, dict[str, Any]]:
    case = make_case(kernel(NAME), dataclasses.replace(PAGED, lens_kv=(300, 9), lists="none"))
    return case, {**case.inputs(), **case.sizes(), **case.outputs(), "chunk_keys": 128}


def test_partials_to_the_byte():
    k = kernel(NAME)
    _, fields = long_call()
    plan, _ = k.plan(**fields)
    assert plan.chunks == 3 and plan.split_bytes > 0 and plan.n_merges == 0
    partials = np.full(plan.split_bytes, 0xFF, np.uint8)
    for held in (0, 1, plan.split_bytes - 1):
        _, result = k.plan(**fields, partials=partials, partials_bytes=held)
        assert (result.status_name, result.argument) == ("HL_ERR_WORKSPACE", "PARTIALS_BYTES")
        assert (result.value, result.limit) == (held, plan.split_bytes)
    split, result = k.plan(**fields, partials=partials, partials_bytes=plan.split_bytes)
    assert result.ok and split.n_merges > 0 and split.n_tasks == 3 * plan.n_tasks
    over = {**fields, "attention_out": partials.ctypes.data // 4 * 4 + 4}
    _, result = k.plan(**over, partials=partials, partials_bytes=plan.split_bytes)
    assert result.status_name == "HL_ERR_ALIAS"
    result = k.run(**fields, partials=partials, partials_bytes=plan.split_bytes, workspace=partials)
    assert result.status_name == "HL_ERR_ALIAS"
    assert (partials == 0xFF).all()


def test_neighbours_do_not_overlap():
    """The control of the alias checks: outputs and inputs that touch are fine."""
    k = kernel(NAME)
    case, fields = base("dense")
    want = run(k, case)
    names = [n for n in fields if isinstance(fields[n], np.ndarray)]
    pool = np.zeros(sum(fields[n].nbytes for n in names), np.uint8)
    at, moved = 0, dict(fields)
    for n in names:
        place = pool[at : at + fields[n].nbytes]
        place[...] = fields[n].reshape(-1).view(np.uint8)
        moved[n] = place.view(fields[n].dtype).reshape(fields[n].shape)
        at += fields[n].nbytes
    assert k.run(**moved).ok
    assert all(moved[n].tobytes() == want[n].tobytes() for n in want)


@pytest.mark.parametrize("output", ["attention_out", "softmax_max", "softmax_sum", "softmax_lse"])
@pytest.mark.parametrize("other", ["query", "key", "value", "sparse_indices"])
def test_one_shared_element_is_an_overlap(output, other):
    """The last of one with the first of the other, both ways round; one further is fine."""
    k = kernel(NAME)
    _, fields = base("joined")
    a, b = fields[other], fields[output]
    for first, second in ((a, b), (b, a)):
        for shared in (4, 0):
            pool = np.zeros(first.nbytes + second.nbytes, np.uint8)
            start = first.nbytes - shared
            places = {}
            for array, at in ((first, 0), (second, start)):
                place = pool[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
                places[output if array is b else other] = place
            places[other][...] = a
            held = pool.tobytes()
            result = k.run(**{**fields, **places})
            if shared:
                assert (result.status_name, result.argument) == ("HL_ERR_ALIAS", output.upper())
                assert pool.tobytes() == held
            else:
                assert result.ok, result


@pytest.mark.parametrize("name", ["bsnd", "tnd", "paged", "slots", "dense"])
@pytest.mark.parametrize("size", ["batch", "seq_q", "heads_q"])
def test_nothing_to_do_needs_nothing(name, size):
    """An extent of 0: accepted, nothing read, nothing written; every pointer may be NULL."""
    k = kernel(NAME)
    case, fields = base(name)
    before = {n: fields[n].tobytes() for n in case.outputs()}
    zero = {**fields, size: 0}
    if size == "seq_q":
        zero[QUERY_LENS] = np.zeros(2, np.int32)
    assert k.run(**zero, workspace=np.zeros(1 << 16, np.uint8)).ok
    if size == "batch" and name == "tnd":  # every row is padding
        assert not fields["attention_out"].any() and np.isneginf(fields["softmax_lse"]).all()
        return
    assert {n: fields[n].tobytes() for n in before} == before
    needed = {
        "batch": (),
        "seq_q": (QUERY_LENS, KV_LENS, "block_table"),
        "heads_q": (QUERY_LENS, KV_LENS, "block_table"),
    }[size]
    bare = {n: v for n, v in zero.items() if not isinstance(v, np.ndarray) or n in needed}
    bare["list_length"] = 0
    if name == "slots":  # a list is what the convention is about
        bare["sparse_indices"] = fields["sparse_indices"]
    result = k.run(**bare, workspace=None, capacity=0)
    assert result.ok, result


def test_zero_keys_need_no_cache():
    k = kernel(NAME)
    case = make_case(k, Shape(lens_q=(2,), lens_kv=(0,), group=2))
    outputs = case.outputs()
    fields = {**case.inputs(), **case.sizes(), **outputs, "key": None, "key_rope": None}
    assert k.run(**fields).ok
    assert not outputs["attention_out"].any() and np.isneginf(outputs["softmax_lse"]).all()


# ---- lists --------------------------------------------------------------------------------------

STRICT = [  # base, list of one row, what is refused: entry, value, rule; None: fine
    ("bsnd", (0, 5, 19, 3, -1, -1), None),
    ("bsnd", (-1, -1, -1, -1, -1, -1), None),
    ("bsnd", (0, 1, 2, 3, 4, 5), None),
    ("bsnd", (0, 20, 1, -1, -1, -1), (1, 20, "AT_MOST")),
    ("bsnd", (0, 1, 2, INT_MAX, -1, -1), (3, INT_MAX, "AT_MOST")),
    ("bsnd", (0, 1, -2, -1, -1, -1), (2, -2, "AT_LEAST")),
    ("bsnd", (INT_MIN, -1, -1, -1, -1, -1), (0, INT_MIN, "AT_LEAST")),
    ("bsnd", (7, 1, 7, -1, -1, -1), (2, 7, "UNIQUE")),
    ("bsnd", (3, 1, 0, 2, 9, 3), (5, 3, "UNIQUE")),
    ("slots", (-1, 3, -1, 39, 0, -1), None),
    ("slots", (-1, 3, -1, 40, 0, -1), (3, 40, "AT_MOST")),
    ("slots", (-1, 3, -5, 0, -1, -1), (2, -5, "AT_LEAST")),
    ("slots", (-1, 3, -1, -1, 3, -1), (4, 3, "UNIQUE")),
]


@pytest.mark.parametrize("base_name,ids,want", STRICT)
def test_strict_lists(base_name, ids, want):
    """Refused only where strict_lists asks for it, with list and entry named."""
    k = kernel(NAME)
    _, fields = base(base_name)
    lists = np.full_like(fields["sparse_indices"], -1)
    lists[0, 1, 1] = ids
    fields = {**fields, "sparse_indices": lists}
    if base_name == "slots":
        fields["sparse_lengths"] = np.full_like(fields["sparse_lengths"], 6)
    before = fields["attention_out"].tobytes()
    result = k.run(**fields, strict_lists=1)
    if want is None:
        assert result.ok, result
        return
    entry, value, rule = want
    assert result.status_name == "HL_ERR_INDEX" and result.argument == "SPARSE_INDICES"
    rows_of_lists = 1 * 2 + 1  # row 1, kv head 1
    assert result.position == (rows_of_lists, entry)
    assert (result.value, result.rule) == (value, rule)
    assert fields["attention_out"].tobytes() == before
    assert k.run(**fields).ok


def test_strict_lists_look_at_padding_and_ends_as_little_as_the_kernel():
    """Rows that are padding, and ids behind sparse_lengths, are not part of the call."""
    k = kernel(NAME)
    _, fields = base("bsnd")
    lists = np.full_like(fields["sparse_indices"], INT_MIN)
    lists[0, :2] = -1
    lists[1, :1] = -1
    assert k.run(**{**fields, "sparse_indices": lists}, strict_lists=1).ok
    _, fields = base("slots")
    lists = np.full_like(fields["sparse_indices"], INT_MIN)
    lists[..., :3] = -1
    lengths = np.full_like(fields["sparse_lengths"], 3)
    call = {**fields, "sparse_indices": lists, "sparse_lengths": lengths}
    assert k.run(**call, strict_lists=1).ok
    assert not k.run(**{**call, "sparse_lengths": lengths + 1}, strict_lists=1).ok


@pytest.mark.parametrize("value", [-1, 7, INT_MAX, INT_MIN])
def test_sparse_lengths_out_of_range(value):
    """Entries of a list that count: 0 .. list_length."""
    k = kernel(NAME)
    _, fields = base("slots")
    lengths = fields["sparse_lengths"].copy()
    lengths[1, 0, 1] = value
    before = fields["attention_out"].tobytes()
    result = k.run(**{**fields, "sparse_lengths": lengths})
    assert result.status_name == "HL_ERR_LENGTH" and result.argument == "SPARSE_LENGTHS", result
    assert result.value == value and result.limit == (0 if value < 0 else 6)
    assert fields["attention_out"].tobytes() == before


# ---- whatever metadata holds --------------------------------------------------------------------

NASTY = st.one_of(st.integers(-3, 40), st.sampled_from([INT_MIN, INT_MAX, -1, 0, 1, 1 << 24]))


def acceptable(a: Any, fields: dict[str, Any]) -> bool:
    """The documented rules for lengths, ends and needed blocks, once more, in Python."""
    ok, before = True, [0, 0]
    tnd_q, tnd_kv = a.layout_query == TND, a.layout_kv == TND
    for b in range(fields["batch"]):
        n = int(a.actual_seq_lengths_query[b])
        ok &= (before[0] if tnd_q else 0) <= n <= fields["seq_q"]
        m = int(a.actual_seq_lengths_kv[b])
        paged = a.layout_kv == PA_BSND
        most = fields["max_blocks"] * fields["block_size"] if paged else fields["seq_kv"]
        ok &= (before[1] if tnd_kv else 0) <= m <= most
        before = [n, m]
        if ok and paged:
            needed = a.block_table[b, : -(-m // fields["block_size"])]
            ok &= bool(((needed >= 0) & (needed < fields["num_blocks"])).all())
    return ok


@settings(max_examples=150)
@given(data=st.data())
def test_any_metadata_is_refused_or_right(data):
    """Nonsense in lengths, tables and lists, between guard pages: refused exactly when the rules
    say so, otherwise the oracle's numbers."""
    k = kernel(NAME)
    layout = data.draw(st.sampled_from((BSND, TND, PA_BSND)))
    shape = dataclasses.replace(
        PAGED,
        layout_kv=layout,
        layout_q=TND if layout == TND else BSND,
        pad_q=1,
        seed=data.draw(st.integers(0, 99)),
    )
    clean = make_case(k, dataclasses.replace(shape, lists="none"))
    case = make_case(k, shape)
    for name in ("query", "query_rope", "key", "key_rope"):  # any row may now be read
        getattr(clean.args, name)[...] = np.random.default_rng(1).standard_normal(
            getattr(clean.args, name).shape
        )
    a = clean.args
    a.sparse_indices = case.args.sparse_indices
    for array in (
        a.actual_seq_lengths_query,
        a.actual_seq_lengths_kv,
        a.block_table,
        a.sparse_indices,
    ):
        for _ in range(0 if array is None else data.draw(st.integers(0, 2))):
            array.reshape(-1)[data.draw(st.integers(0, array.size - 1))] = data.draw(NASTY)
    if a.layout_kv == PA_BSND:  # entries that are not needed may be anything
        a.block_table[:, -1] = data.draw(NASTY)
    sizes = clean.sizes()
    if acceptable(a, sizes):
        isa = data.draw(st.sampled_from(("scalar", best_in(NAME))))
        check(a, run_guarded(k, clean, Way(isa)), isa)
        return
    with Arena() as arena:
        fields = {n: arena.place(x) for n, x in clean.inputs().items()} | sizes
        outputs = clean.outputs(arena)
        arena.protect()
        result = in_child(lambda: k.run(**fields, **outputs, workspace=np.zeros(1 << 16, np.uint8)))
        assert result.status_name in ("HL_ERR_LENGTH", "HL_ERR_BLOCK_ID") and result.error_text
        assert all((x.view(np.uint8) == 0xFF).all() for x in outputs.values())


# ---- merge_parts --------------------------------------------------------------------------------


def parts_call() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    outs = [rng.standard_normal((1, 2, 6, 7)).astype(np.float32) for _ in range(2)]
    stats = [rng.random((1, 2, 2, 3)).astype(np.float32) + 1 for _ in range(4)]
    made = [np.full((1, 2, 2, 3), np.nan, np.float32) for _ in range(3)]
    return {
        "out": outs,
        "max": stats[:2],
        "sum": stats[2:],
        "parts": 2,
        "batch": 1,
        "seq_q": 2,
        "heads_q": 6,
        "heads_kv": 2,
        "attention_out": np.full((1, 2, 6, 7), np.nan, np.float32),
        "softmax_max": made[0],
        "softmax_sum": made[1],
        "softmax_lse": made[2],
    }


BAD_PARTS = [
    ({"parts": 0}, "SHAPE", "PARTS"),
    ({"parts": -1}, "SHAPE", "PARTS"),
    *(({n: -1}, "SHAPE", n.upper()) for n in ("batch", "seq_q", "heads_q", "heads_kv")),
    ({"heads_kv": 4}, "SHAPE", "HEADS_Q"),
    ({"attention_out": None}, "NULL", "ATTENTION_OUT"),
    *(({n: None}, "NULL", "PARTS") for n in ("out", "max", "sum")),
    *((lambda c, n=n: {n: [c[n][0], 0]}, "NULL", "PARTS") for n in ("out", "max", "sum")),
    (lambda c: {"out": [c["out"][0].ctypes.data + 2, c["out"][1]]}, "ALIGN", "PARTS"),
    (lambda c: {"attention_out": c["attention_out"].ctypes.data + 1}, "ALIGN", "ATTENTION_OUT"),
    (lambda c: {"attention_out": c["out"][1].ctypes.data}, "ALIAS", "ATTENTION_OUT"),
    (lambda c: {"softmax_lse": c["attention_out"].ctypes.data}, "ALIAS", ""),
    ({"out_f32": 2}, "SHAPE", "OUT_F32"),
    ({"batch": INT_MAX, "seq_q": INT_MAX, "heads_q": 65536 * 2}, "SHAPE", "ATTENTION_OUT"),
]


@pytest.mark.parametrize("change,status,argument", BAD_PARTS)
def test_merge_parts_refuses(change, status, argument):
    k = kernel(NAME)
    call = parts_call()
    assert k.merge_parts(**call).ok and not np.isnan(call["softmax_lse"]).any()
    call = parts_call()
    before = [
        call[n].tobytes() for n in ("attention_out", "softmax_max", "softmax_sum", "softmax_lse")
    ]
    result = k.merge_parts(**{**call, **(change(call) if callable(change) else change)})
    assert result.status_name == f"HL_ERR_{status}", result
    assert not argument or result.argument == argument, result
    assert result.error_text
    assert before == [
        call[n].tobytes() for n in ("attention_out", "softmax_max", "softmax_sum", "softmax_lse")
    ]


@pytest.mark.parametrize("name", ["out", "max", "sum"])
def test_merge_parts_lists_lie_apart_and_aligned(name):
    """They are read while results are written: an output over one of them would lead anywhere."""
    k = kernel(NAME)
    call = parts_call()
    memory = np.zeros(call["attention_out"].nbytes + 8, np.uint8)
    memory[:16].view(np.int64)[:] = [part.ctypes.data for part in call[name]]
    made = k.struct(k.Parts, call)
    error = k.Error()

    def refused(at: int) -> tuple[str, str]:
        setattr(made, name, at)
        found = k.result(k._c_merge_parts(ctypes.byref(made), ctypes.byref(error)), error)
        return found.status_name, found.argument

    assert refused(memory.ctypes.data + 1) == ("HL_ERR_ALIGN", "PARTS")
    made.attention_out = memory.ctypes.data
    assert refused(memory.ctypes.data) == ("HL_ERR_ALIAS", "ATTENTION_OUT")
    assert np.isnan(call["softmax_max"]).all()


def test_merge_parts_outputs_lie_apart():
    """Even where each of them is one part's own."""
    k, call = kernel(NAME), parts_call()
    call |= {"parts": 1, "out": call["out"][:1], "max": call["max"][:1], "sum": call["max"][:1]}
    call["softmax_max"] = call["softmax_sum"] = call["max"][0]
    result = k.merge_parts(**call)
    assert (result.status_name, result.argument) == ("HL_ERR_ALIAS", "SOFTMAX_MAX")


# ---- arithmetic ---------------------------------------------------------------------------------

FAR = 2**62


@functools.cache
def trapping(which: str) -> bind.Kernel:
    """A kernel in plain C that ends the process where a type cannot hold a result."""
    flags = ("-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    return bind.load(which, flags=flags, defines=("HL_ISA_ONLY_SCALAR",))


def test_steps_of_an_absent_query_rope_may_be_anything():
    _, fields = base("joined")
    fields |= {"query_rope_stride": (FAR, FAR, FAR), "strict_lists": 1}
    fields["sparse_indices"] = np.full_like(fields["sparse_indices"], -1)
    assert fields.get("query_rope") is None
    assert in_child(lambda: trapping(text(NAME)).plan(**fields)[1].error_text) == ""


def test_the_threshold_of_a_padding_row_may_lie_past_any_key():
    """Row 2 of 3, where one is in use, of 2^31 - 1 keys: S2 - S1 + i + 1 is 2^31 + 1."""
    fields = {
        **dict.fromkeys(("query", "key", "value", "attention_out"), 0),
        "query": 1 << 20,
        "key": 1 << 40,
        "attention_out": 1 << 21,
        "batch": 1,
        "seq_q": 3,
        "seq_kv": INT_MAX,
        "heads_q": 1,
        "heads_kv": 1,
        "sparse_mode": 3,
        "scale_value": 1.0,
        "actual_seq_lengths_query": ints(1),
        "sparse_indices": ints(-1, -1, -1),
        "list_length": 1,
        "strict_lists": 1,
    }
    assert in_child(lambda: trapping(text(NAME)).plan(**fields)[1].error_text) == ""


def test_strides_that_append_refuses_are_not_multiplied():
    k = trapping(helpers_decode.text("hl_incre_flash_attention_f16_i8_d32"))
    rows = np.zeros((2, 1, 2, 32), np.float16)
    cache = np.zeros((2, 4, 2, 32), np.int8)
    call = {
        "key": rows,
        "value": rows,
        "key_cache": cache,
        "value_cache": cache.copy(),
        "positions": ints(0, 0),
        "antiquant_scale": np.ones(128, np.float16),
        "batch": 2,
        "rows": 1,
        "heads_kv": 2,
        "seq_kv": 4,
    }
    lowest = {"key_stride": (-(2**63), 0, 0)}
    assert in_child(lambda: k.append(**call).ok)
    result = in_child(lambda: k.append(**call, **lowest))
    assert (result.status_name, result.argument) == ("HL_ERR_SHAPE", "KEY_STRIDE")


# ---- the sentence -------------------------------------------------------------------------------


def test_sentence_in_any_room():
    """Cut at any size, always ended, nothing behind the end touched."""
    k = kernel(NAME)
    _, fields = base("paged")
    table = fields["block_table"].copy()
    table[1, 2] = INT_MIN
    error = k.Error()
    args = k.args(**{**fields, "block_table": table})
    assert k._c_plan(ctypes.byref(k.Plan()), ctypes.byref(args), ctypes.byref(error))
    whole = k.error_text(error)
    assert whole == f"block_table[1][2] must be at least 0; it is {INT_MIN}"
    with Arena("right") as arena:
        for size in range(1, len(whole) + 3):
            room = arena.room((size,), np.uint8)
            k._c_text(ctypes.byref(error), room.ctypes.data_as(ctypes.c_char_p), size)
            assert bytes(room).split(b"\0")[0].decode() == whole[: size - 1]
            assert 0 in room
        nothing = arena.room((0,), np.uint8)
        k._c_text(ctypes.byref(error), ctypes.cast(nothing.ctypes.data, ctypes.c_char_p), 0)


def test_without_text_the_numbers_stay():
    """HL_NO_TEXT: no sentence, the same refusals."""
    quiet = bind.load(text(NAME), defines=("HL_NO_TEXT",))
    for bad in TABLE[::5]:
        _, fields = base(bad.base)
        change = bad.change(fields) if callable(bad.change) else bad.change
        result = refuse(quiet, {**fields, **change}, bad)
        assert result.error_text == ""


def test_what_a_header_was_not_generated_with():
    """No rope, no slots, one layout, one instruction set: the options must be zero."""
    small = spec.parse_header(
        table("f32_80", layout_q=["BSND"], layout_kv=["BSND"], isa=["scalar"], dk=4, dv=4)
    )
    k = bind.load(small)
    case = make_case(k, Shape(lens_kv=(5,), lists="blocks"))
    fields = {**case.inputs(), **case.sizes(), **case.outputs()}
    assert k.run(**fields).ok
    some = np.zeros(64, np.float32)
    for change, argument in (
        ({"query_rope": some}, "QUERY_ROPE"),
        ({"key_rope": some}, "KEY_ROPE"),
        ({"index_kind": 1}, "INDEX_KIND"),
        ({"sparse_lengths": np.zeros(1, np.int32)}, "SPARSE_LENGTHS"),
        ({"layout_query": TND}, "LAYOUT_QUERY"),
        ({"layout_kv": PA_BSND}, "LAYOUT_KV"),
        ({"isa": 3}, "ISA"),
        ({"isa": 4}, "ISA"),
    ):
        result = k.run(**{**fields, **change}, workspace=np.zeros(1 << 16, np.uint8))
        assert (result.status_name, result.argument) == ("HL_ERR_UNSUPPORTED", argument)
