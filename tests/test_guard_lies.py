"""The controls of tests/test_guard.py: a call that says more of a buffer than there is dies of it,
or is refused. Every pointer of every operator, at both ends, on every instruction set."""

import ctypes
import dataclasses
from functools import partial
from typing import Any

import helpers_cases
import helpers_decode
import helpers_every as every
import helpers_fusion
import numpy as np
import pytest
from helpers import same_bits
from helpers_cases import STATS
from helpers_fusion import OUTER
from helpers_guard import FULL
from helpers_memory import Arena, Died, in_child, survey
from oracle import PA_BSND, TND

from gen import bind

# Of each operator small calls that look at the first and the last element of every buffer they are
# given; together they are given every one that the operator has.
PLAIN = helpers_cases.Shape(
    lens_q=(2, 2), lens_kv=(9, 9), heads_kv=2, group=3, value=True, sinks="plain"
)
LISTED = dataclasses.replace(PLAIN, lists="blocks", list_length=9, value=False)
PAGED = dataclasses.replace(LISTED, layout_kv=PA_BSND, block_size=3, spare_blocks=0)
SLOTS = dataclasses.replace(PAGED, lists="slots", list_lengths=True)
ENDS = dataclasses.replace(PLAIN, layout_q=TND, layout_kv=TND)
STEP = helpers_decode.Shape(
    lens=(9, 9), seq_q=2, heads_kv=2, group=3, pse="each", mask="each", mask_rows=True, hidden=0.0,
    padding=0, offset=True, quant="channel",
)  # fmt: skip
STEP_PAGED = dataclasses.replace(
    STEP, layout_kv=PA_BSND, block_size=3, spare_blocks=0, quant="none", antiquant=2, padding=None
)
TRAIN = helpers_fusion.Shape(
    lens_q=(8, 8), lens_kv=(9, 9), heads_kv=2, group=2, mask="given", mask_batch=True,
    mask_heads=True, pse="full", keep_prob=0.7, bits=True, stats_width=1, sinks="plain",
)  # fmt: skip
TRAIN_ENDS = dataclasses.replace(TRAIN, layout=TND, mask="none", pse="none", stats_width=8)
PREFIX = dataclasses.replace(TRAIN, mode=5, mask="formula", pse="none", bits=False, keep_prob=0.0)
EXTRA = {"alibi": True, "window": 9, "softcap": 5.0}


# A slice by default: a header of each operator, on the best instruction set and the plainest.
SLICE = (
    "hl_sparse_flash_attention_bf16_d512_rope64_slots",
    "hl_sparse_flash_attention_antiquant_bf16_fp8_v4_d448_rope64_slots",
    "hl_incre_flash_attention_bf16_i8_d128",
    "hl_fusion_attention_f32_d64_pse_types_softcap_sinks",
    "hl_fusion_attention_grad_f32_d64_pse_types_softcap",
)
SOME = [(name, every.isas_in(name)[-1]) for name in SLICE]
BY_PAIR = pytest.mark.parametrize("name,isa", every.pairs() if FULL else SOME)


def shapes_of(name: str) -> list[Any]:
    of = every.description(name)
    if of.trains:
        sinks = "plain" if "sinks" in of.features else "none"
        outer = {"pse_type": OUTER} if "pse_types" in of.features else {}
        return [dataclasses.replace(s, sinks=sinks, **outer) for s in (TRAIN, TRAIN_ENDS, PREFIX)]
    if of.decodes:
        more = {key: x for key, x in EXTRA.items() if key in of.features}
        more |= {"sinks": "plain"} if "sinks" in of.features else {}
        return [dataclasses.replace(shape, **more) for shape in (STEP, STEP_PAGED)]
    made = [PAGED] + [SLOTS] * ("slots" in of.features)
    if "BSND" in of.layout_kv:
        return [PLAIN, LISTED, ENDS, *made]
    return [dataclasses.replace(shape, heads_kv=1) for shape in made]


def honest(name: str, shape: Any) -> every.Call:
    """The call of a shape, with lists that name every key, or as many slots."""
    call = every.call_of(name, shape)
    lists = getattr(getattr(call.case, "args", None), "sparse_indices", None)
    if lists is not None:
        a = call.case.args
        keys = shape.lens_kv[0]
        lists[...] = np.arange(keys)
        if a.index_kind == helpers_cases.SLOTS:  # those at both ends of the pool among them
            lists[...] = np.linspace(0, a.key.shape[0] * shape.block_size - 1, keys)
            a.sparse_lengths[...] = keys
    return call


def placed(arena: Arena, call: every.Call, isa: str) -> dict[str, Any]:
    """All fields of the call, buffers in the arena; inputs read-only."""
    fields = {**call.fields(isa), **call.outputs(arena)}
    for name, array in call.inputs().items():
        fields[name] = arena.place(array)
    arena.protect()
    return fields


def made_by(call: every.Call, fields: dict[str, Any], **lies: Any) -> bind.Result:
    """The one-call function on a workspace between guard pages, fields of some buffers not true."""
    with Arena("right") as arena:
        room = arena.room((call.kernel.workspace_bytes(**fields),), np.uint8)
        return call.kernel.run(**{**fields, **lies}, workspace=room)


def dies(call: every.Call, fields: dict[str, Any], **lies: Any) -> bool:
    """Whether a signal ends it; False where it is refused."""
    try:
        result = in_child(partial(made_by, call, fields, **lies))
    except Died:
        return True
    assert not result.ok, f"{lies}: neither noticed nor refused"
    return False


# What a call may look at before it reads: lengths that decrease, ids that are too large.
MAY_BE_REFUSED = (
    "actual_seq_lengths", "actual_seq_lengths_query", "actual_seq_lengths_kv", "actual_seq_qlen",
    "actual_seq_kvlen", "block_table", "sparse_lengths", "kv_padding_size", "prefix",
)  # fmt: skip


def unread(call: every.Call, shape: Any, name: str, flush: str) -> bool:
    """What the call is given and does not look at: lengths where lists name slots, numbers behind
    the first of eight, what fills a record up."""
    of = every.description(call.name)
    if getattr(shape, "lists", "") == "slots":
        return name in ("actual_seq_lengths_kv", "block_table")
    if call.grads and name in ("softmax_max", "softmax_sum"):
        return shape.stats_width > 1 and flush == "right"
    return bool(of.record) and name == "value"


def step_of(call: every.Call, name: str, array: np.ndarray) -> int:
    """Bytes by which a buffer is moved: an element; of records as much as they are aligned to."""
    record = every.description(call.name).record
    if name == "key" and record is not None:
        return call.case.args.record.align(call.case.args.query.dtype)
    return array.itemsize


@BY_PAIR
def test_every_buffer_is_guarded(name, isa):
    """Each buffer moved by one element into the forbidden page before it, or behind it."""
    every.kernel(name)
    seen = set()
    for shape in shapes_of(name):
        call = honest(name, shape)
        for flush, side in (("right", 1), ("left", -1)):
            with Arena(flush) as arena:
                fields = placed(arena, call, isa)
                assert in_child(partial(made_by, call, fields)).ok, shape
                arena.check()
                buffers = {n: a for n, a in fields.items() if isinstance(a, np.ndarray)}
                for n, array in buffers.items():
                    if unread(call, shape, n, flush):
                        continue
                    moved = array.ctypes.data + side * step_of(call, n, array)
                    died = dies(call, fields, **{n: moved})
                    assert died or n in MAY_BE_REFUSED, f"{n} {flush}: refused ({shape})"
                    seen.add(n)
    pointers = {f.name for f in call.kernel.header.structs[f"{call.kernel.op}_args"] if f.stars}
    missing = pointers - seen - absent(name)
    assert not missing, f"not one call has {missing}"


def absent(name: str) -> set[str]:
    """Pointers that a header has no use for, or that stand elsewhere."""
    of = every.description(name)
    made = {"partials", "key_pages", "value_pages", "key_dequant_scale", "value_dequant_scale"}
    made |= {"dequant_scale1", "quant_scale1", "dequant_scale2"}  # int8 queries: none is shipped
    if of.record:
        made |= {"key_rope", "value"}
    if not of.trains and not of.decodes:
        made |= set() if of.rope else {"query_rope", "key_rope"}
        made |= set() if "slots" in of.features else {"sparse_lengths"}
    if of.decodes:
        made |= set() if "alibi" in of.features else {"alibi_slopes"}
        made |= set() if "i8" in of.kv else {"antiquant_scale", "antiquant_offset"}
        made |= set(() if every.kernel(name).stats else STATS)
    if "sinks" not in of.features and (of.trains or of.decodes):
        made |= {"sinks"}
    return made


@BY_PAIR
def test_a_workspace_that_is_too_small_is_noticed(name, isa):
    """One byte less is refused before anything is written, and so are partials; a line of what was
    said kills the call, the task and the merge."""
    k = every.kernel(name)
    call = honest(name, shapes_of(name)[-1])
    fields = {**call.fields(isa), **call.outputs()}
    need = k.workspace_bytes(**fields)
    with Arena("right") as arena:
        room = arena.room((need,), np.uint8)
        short = k.run(**fields, workspace=room, capacity=need - 1)
        assert (short.status_name, short.limit) == ("HL_ERR_WORKSPACE", need)
        assert (room == 0xFF).all()
        assert all((x.view(np.uint8) == 0xFF).all() for x in call.outputs().values())
        less = arena.room((64,), np.uint8)
        with pytest.raises(Died):
            in_child(lambda: k.run(**fields, workspace=less, capacity=need))
        plan, result = k.plan(**fields)
        assert result.ok and plan.n_tasks > 0
        small = arena.room((64,), np.uint8)
        with pytest.raises(Died):
            in_child(lambda: k.task(plan, 0, small))
    if k.merges:
        partials_too_small(name, isa)


def partials_too_small(name: str, isa: str) -> None:
    """Rows that are split over tasks, their results in memory that is not all there."""
    k, more = every.kernel(name), {}
    if "BSND" not in every.description(name).layout_kv:
        more = {"layout_kv": PA_BSND}
    call = every.sized(name, 300, 1, 2, **more)
    fields = {**call.fields(isa), **call.outputs(), "chunk_keys": 128}
    need = k.plan(**fields)[0].split_bytes
    with Arena("right") as arena:
        room = arena.room((need,), np.uint8)
        fields["partials"] = room
        _, result = k.plan(**fields, partials_bytes=need - 1)
        assert (result.status_name, result.limit) == ("HL_ERR_WORKSPACE", need)
        plan, result = k.plan(**fields, partials_bytes=need)
        assert result.ok and plan.n_merges > 0
        workspace = np.zeros(plan.task_bytes, np.uint8)
        last = plan.n_tasks - 1
        in_child(lambda: k.task(plan, last, workspace))
        with Arena("right") as less:
            plan, result = k.plan(
                **{**fields, "partials": less.room((need // 2,), np.uint8)}, partials_bytes=need
            )
            assert result.ok
            with pytest.raises(Died):
                in_child(lambda: k.task(plan, last, workspace))
            with pytest.raises(Died):
                in_child(lambda: k.merge(plan, plan.n_merges - 1))


# ---- structs, alignments -------------------------------------------------------------------------


@BY_PAIR
def test_structs_are_buffers_too(name, isa):
    """args is read-only, a plan too while its tasks run, and no byte beside them is read; error is
    written within its bounds."""
    k = every.kernel(name)
    call = honest(name, shapes_of(name)[-1])
    want = call.run(isa)

    def run(flush: str) -> dict[str, np.ndarray]:
        with Arena(flush) as arena, Arena(flush) as plans:
            outputs = call.outputs()
            args = k.args(**call.fields(isa), **outputs)
            place = arena.place(np.frombuffer(bytes(args), np.uint8)).ctypes.data
            error = arena.room((ctypes.sizeof(k.Error),), np.uint8).ctypes.data
            plan = plans.room((ctypes.sizeof(k.Plan),), np.uint8, read_only=True)
            arena.protect()
            assert k._c_plan(plan.ctypes.data, place, error) == 0
            made = k.Plan.from_buffer_copy(plan)
            workspace = np.zeros(made.task_bytes, np.uint8)
            plans.protect()
            for i in range(made.n_tasks):
                k._c_task(plan.ctypes.data, i, workspace.ctypes.data)
            for i in range(made.n_merges if k.merges else 0):
                k._c_merge(plan.ctypes.data, i)
            arena.check()
            plans.check()
            assert k._c_plan(plan.ctypes.data, 0, error) != 0  # no args: error says so
            return outputs

    for flush in ("left", "right"):
        got = in_child(partial(run, flush))
        assert all(same_bits(got[n], want[n]) for n in got)


@BY_PAIR
def test_a_workspace_of_any_alignment(name, isa):
    """Wherever in a cache line it begins, no byte behind it is written; the same bits."""
    k = every.kernel(name)
    call = honest(name, shapes_of(name)[0])
    want = call.run(isa)
    fields = call.fields(isa)
    need = k.workspace_bytes(**fields, **call.outputs())

    def run(skew: int) -> dict[str, np.ndarray]:
        with Arena("right") as arena:
            outputs = call.outputs()
            room = arena.room((need + skew,), np.uint8)
            room[need:] = 0x5A
            assert k.run(**fields, **outputs, workspace=room[:need]).ok
            assert (room[need:] == 0x5A).all(), f"{skew}: written behind the workspace"
            arena.check()
            return outputs

    def job(skew: int) -> int:
        got = run(skew)
        assert all(same_bits(got[n], want[n]) for n in got), skew
        return 1

    made = survey([partial(job, skew) for skew in (*range(1, 64, 7), 32, 60, 63)])
    assert not made.wrong, made.wrong[0]
