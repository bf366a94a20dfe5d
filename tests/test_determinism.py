"""The bits of a row depend on its inputs, chunk_keys and the instruction set: on nothing else.

Each test has its negative control: something that does count must change bits in the same set-up.
"""

import ctypes
import dataclasses

import numpy as np
import pytest
from helpers import assert_same, best_in, by_pair, by_way, check, isas_in, kernel, same_bits, text
from helpers_cases import POINTERS, Case, Shape, make_case, run
from helpers_memory import in_child
from oracle import PA_BSND, TND

from gen import bind

SMALL = ("f32_small", "bf16_small")
LONG = Shape(
    lens_q=(3, 0, 2, 1),
    lens_kv=(500, 9, 129, 900),
    heads_kv=2,
    group=3,
    layout_q=TND,
    layout_kv=PA_BSND,
    block_size=16,
    sparse_mode=3,
    lists="blocks",
    list_length=300,
    sinks="plain",
    seed=17,
)


def differs(x: dict, y: dict) -> bool:
    """Some output has some other bit."""
    return not all(same_bits(x[name], y[name]) for name in x)


def execute(
    k,
    case: Case,
    isa: str,
    *,
    order=None,
    workers: int = 1,
    partials: bool = False,
    chunk_keys: int = 128,
) -> dict[str, np.ndarray]:
    """plan, tasks in an order on some threads, merges."""
    outputs = case.outputs()
    fields = {
        **case.inputs(),
        **case.sizes(),
        **outputs,
        "isa": k.isas()[isa],
        "chunk_keys": chunk_keys,
    }
    plan, result = k.plan(**fields)
    assert result.ok, result.error_text
    if partials:
        room = np.full(plan.split_bytes, 0xFF, np.uint8)
        plan, result = k.plan(**fields, partials=room, partials_bytes=room.nbytes)
        assert result.ok and plan.n_merges > 0, result.error_text
    tasks = np.random.default_rng(order).permutation(plan.n_tasks) if order is not None else None
    k.execute(plan, None if tasks is None else tasks.tolist(), workers)
    return outputs


@by_way(*SMALL)
@pytest.mark.parametrize("lists", ["none", "blocks", "slots"])
def test_threads_task_order_and_partials(name, isa, group, lists):
    k = kernel(name)
    mode = 0 if lists == "slots" else 3
    case = make_case(k, dataclasses.replace(LONG, group=group, lists=lists, sparse_mode=mode))
    want = run(k, case, isa, chunk_keys=128)
    for workers in (1, 2, 3, 5, 8, 16):
        for partials in (False, True):
            got = execute(k, case, isa, order=workers, workers=workers, partials=partials)
            assert_same(got, want)
    assert differs(run(k, case, isa, chunk_keys=256), want), "the control did not change a bit"


@by_pair("f32_small", also=("bf16_small",))
def test_a_hundred_repeats(name, isa):
    k = kernel(name)
    case = make_case(k, LONG)
    want = execute(k, case, isa, partials=True)
    for order in range(100):
        assert_same(execute(k, case, isa, order=order, partials=True, workers=4), want)


def one_batch(case: Case, b: int) -> Case:
    """Batch b of a paged TND call on its own."""
    a = case.args
    ends = [0, *a.actual_seq_lengths_query]
    rows = slice(ends[b], ends[b + 1])
    changes = {
        "actual_seq_lengths_query": np.array([ends[b + 1] - ends[b]], np.int32),
        "actual_seq_lengths_kv": a.actual_seq_lengths_kv[b : b + 1].copy(),
        "block_table": a.block_table[b : b + 1].copy(),
    }
    for name in ("query", "query_rope", "sparse_indices"):
        changes[name] = getattr(a, name)[rows].copy()
    return case.changed(**changes)


def batches(case: Case, order: list[int]) -> Case:
    """The batches of a paged TND call in another order (or some of them, or some twice)."""
    parts = [one_batch(case, b).args for b in order]
    changes = {
        name: np.concatenate([getattr(p, name) for p in parts])
        for name in (
            "query",
            "query_rope",
            "sparse_indices",
            "block_table",
            "actual_seq_lengths_kv",
        )
    }
    ends = np.cumsum([p.actual_seq_lengths_query[0] for p in parts], dtype=np.int32)
    return case.changed(actual_seq_lengths_query=ends, **changes)


@by_way(*SMALL)
def test_the_batch_around_a_row(name, isa, group):
    k = kernel(name)
    case = make_case(k, dataclasses.replace(LONG, group=group))
    want = run(k, case, isa, chunk_keys=128)
    ends = [0, *case.args.actual_seq_lengths_query]
    for order in ([0], [2], [3], [3, 2, 1, 0], [2, 2, 0, 3, 1, 0]):
        got = run(k, batches(case, order), isa, chunk_keys=128)
        at = 0
        for b in order:
            n = ends[b + 1] - ends[b]
            mine, whole = slice(at, at + n), slice(ends[b], ends[b + 1])
            assert same_bits(got["attention_out"][mine], want["attention_out"][whole])
            for stat in ("softmax_max", "softmax_sum", "softmax_lse"):
                assert same_bits(got[stat][:, mine], want[stat][:, whole])
            at += n
    turned = batches(case, [0, 1, 2, 3])
    turned.args.sparse_indices[...] = turned.args.sparse_indices[:, ::-1]
    assert differs(run(k, turned, isa, chunk_keys=128), want), "the control did not change a bit"


@by_way("bf16_small")
def test_where_pages_lie(name, isa, group):
    """The same pages anywhere in a larger pool."""
    k = kernel(name)
    case = make_case(k, dataclasses.replace(LONG, group=group))
    want = run(k, case, isa)
    a = case.args
    for seed in range(5):
        rng = np.random.default_rng(seed)
        place = rng.permutation(a.key.shape[0] + 7)[: a.key.shape[0]].astype(np.int32)
        used = (a.block_table >= 0) & (a.block_table < a.key.shape[0])
        table = np.where(used, place[np.where(used, a.block_table, 0)], np.int32(2**31 - 1))
        changes = {"block_table": table.astype(np.int32)}
        for tensor in ("key", "key_rope"):
            old = getattr(a, tensor)
            pool = np.full((len(place) + 7, *old.shape[1:]), np.nan, old.dtype)
            pool[place] = old
            changes[tensor] = pool
        assert_same(run(k, case.changed(**changes), isa), want)


@by_way(*SMALL)
def test_alignment(name, isa, group):
    """Every buffer at every offset that its elements allow."""
    k = kernel(name)
    shape = dataclasses.replace(LONG, lens_q=(1, 0, 1, 1), lens_kv=(40, 9, 129, 150), group=group)
    case = make_case(k, shape)
    want = run(k, case, isa, chunk_keys=128)
    for offset in range(0, 68, 2):
        outputs = {n: shifted(array, offset) for n, array in case.outputs().items()}
        fields = {n: shifted(array, offset) for n, array in case.inputs().items()}
        size = k.workspace_bytes(
            **fields, **case.sizes(), **outputs, isa=k.isas()[isa], chunk_keys=128
        )
        workspace = shifted(np.full(size, 0xFF, np.uint8), offset + offset // 2 % 3)
        result = k.run(
            **fields,
            **case.sizes(),
            **outputs,
            isa=k.isas()[isa],
            chunk_keys=128,
            workspace=workspace,
        )
        assert result.ok, result.error_text
        assert_same(outputs, want)


def shifted(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy that starts `offset` bytes (rounded to its element) behind a 64-byte line."""
    offset = offset // array.itemsize * array.itemsize
    memory = np.empty(array.nbytes + 192, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    assert copy.ctypes.data % 64 == offset % 64
    return copy


@by_way("bf16_small")
def test_what_the_workspace_held_before(name, isa, group):
    k = kernel(name)
    case = make_case(k, dataclasses.replace(LONG, group=group))
    seen = []
    for byte in (0x00, 0xFF, 0x7F, 0x3C):
        fields = {**case.inputs(), **case.sizes(), "isa": k.isas()[isa], "chunk_keys": 128}
        outputs = case.outputs()
        plan, _ = k.plan(**fields, **outputs)
        partials = np.full(plan.split_bytes, byte, np.uint8)
        workspace = np.full(k.workspace_bytes(**fields, **outputs), byte, np.uint8)
        assert k.run(
            **fields,
            **outputs,
            partials=partials,
            partials_bytes=partials.nbytes,
            workspace=workspace,
        ).ok
        seen.append(outputs)
    for other in seen[1:]:
        assert_same(other, seen[0])


@by_way("f32_small", "bf16_small", "f16_small")
def test_memory_that_no_row_sees(name, isa, group):
    """Zeros instead of NaN in every row that nothing names."""
    k = kernel(name)
    case = make_case(k, dataclasses.replace(LONG, group=group))
    changes = {
        n: np.nan_to_num(getattr(case.args, n), nan=0.0)
        for n in POINTERS
        if n in ("query", "query_rope", "key", "key_rope")
    }
    assert np.isnan(case.args.key).any(), "nothing to hide: the control has no NaN"
    assert_same(run(k, case.changed(**changes), isa), run(k, case, isa))


def test_a_plan_is_plain_data():
    """A copy of the bytes works as well as the plan."""
    k, best = kernel("bf16_small"), best_in("bf16_small")
    case = make_case(k, LONG)
    want, outputs = run(k, case, best, chunk_keys=128), case.outputs()
    plan, result = k.plan(
        **case.inputs(), **case.sizes(), **outputs, chunk_keys=128, isa=k.isas()[best]
    )
    assert result.ok
    copy = type(plan)()
    ctypes.memmove(ctypes.addressof(copy), ctypes.addressof(plan), ctypes.sizeof(plan))
    ctypes.memset(ctypes.addressof(plan), 0xFF, ctypes.sizeof(plan))
    k.execute(copy)
    assert_same(outputs, want)


@pytest.mark.parametrize("group", [3, 17])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_openmp_changes_no_bit(threads, group):
    """The same header compiled with -fopenmp, long rows split over its threads."""
    serial, isas = kernel("bf16_small"), isas_in("bf16_small")
    case = make_case(serial, dataclasses.replace(LONG, group=group))
    want = {isa: run(serial, case, isa, chunk_keys=128) for isa in isas}
    parallel = bind.load(
        text("bf16_small"),
        flags=("-O2", "-fopenmp"),
        extra="#include <omp.h>\nvoid set_threads(int n);\n"
        "void set_threads(int n) { omp_set_num_threads(n); }",
    )
    parallel.dtype = serial.dtype

    def calls() -> dict[str, dict[str, np.ndarray]]:
        parallel.library.set_threads(threads)
        return {isa: run(parallel, case, isa, chunk_keys=128) for isa in isas}

    got = in_child(calls)
    for isa in isas:
        assert_same(got[isa], want[isa])


@pytest.mark.parametrize("flags", [("-O0",), ("-O3",), ("-O2", "-std=c99")])
@pytest.mark.parametrize("name", ["f32_small", "bf16_small"])
def test_compiler_flags_stay_inside_the_bound(name, flags):
    """Other flags may change bits, not correctness."""
    k = bind.load(text(name), flags=flags)
    for group in (3, 17):
        case = make_case(kernel(name), dataclasses.replace(LONG, group=group))
        for isa in isas_in(name):
            check(case.args, run(k, case, isa, chunk_keys=128), isa)
