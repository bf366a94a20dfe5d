"""What a plan says: tasks, bytes, defaults; and that the macros for static memory say the same."""

import ctypes

import numpy as np
import pytest
from helpers import SHIPPED_RECORDS, best_in, by_pair, kernel, shipped, text
from helpers_cases import Shape, make_case, run
from oracle import BSND, PA_BSND, TND

from gen import bind

INT64_MAX = 2**63 - 1


def planned(k, case, **more):
    """The plan of a case with fresh outputs."""
    plan, result = k.plan(**{**case.inputs(), **case.sizes(), **case.outputs(), **more})
    assert result.ok, result.error_text
    return plan


@pytest.mark.parametrize("layout", [BSND, TND, PA_BSND])
def test_tasks_and_chunks(layout):
    """A task for each row and kv head; with partials one for each chunk of the longest row."""
    k = kernel("f32_small")
    shape = Shape(
        lens_q=(2, 3),
        lens_kv=(300, 260),
        heads_kv=2,
        group=3,
        layout_q=TND if layout == TND else BSND,
        layout_kv=layout,
        pad_q=1,
        block_size=4,
        spare_blocks=0,
    )
    case = make_case(k, shape)
    rows = 6 if layout == TND else 8
    plan = planned(k, case, chunk_keys=128)
    keys = 560 if layout == TND else 300
    assert (plan.n_tasks, plan.n_merges, plan.group) == (2 * rows, 0, 3)
    assert plan.chunks == -(-keys // 128)
    assert plan.work == rows * keys * 6 * (k.dk + k.rope + k.dv)
    room = np.zeros(plan.split_bytes, np.uint8)
    split = planned(k, case, chunk_keys=128, partials=room, partials_bytes=room.nbytes)
    assert (split.n_tasks, split.n_merges) == (2 * rows * plan.chunks, 2 * rows)
    assert split.task_bytes == plan.task_bytes
    short = planned(k, case, chunk_keys=1024, partials=room, partials_bytes=0)
    assert (short.chunks, short.split_bytes, short.n_merges) == (1, 0, 0)


def test_defaults_are_filled_in():
    k = kernel("f32_small")
    case = make_case(k, Shape(lens_kv=(20,), group=3))
    plan = planned(k, case, heads_kv=0, sparse_block_size=0)
    best = k.isas()[best_in("f32_small")]
    assert (plan.args.heads_kv, plan.args.sparse_block_size, plan.args.isa) == (1, 1, best)
    assert plan.args.chunk_keys > 0 and plan.args.chunk_keys % 128 == 0
    stride = plan.args.query_stride
    assert (stride.batch, stride.row, stride.head) == (3 * k.dk, 3 * k.dk, k.dk)
    assert np.isclose(plan.scale_log2, case.args.scale_value * np.log2(np.e), rtol=1e-6)
    outputs = case.outputs()
    fields = {**case.inputs(), **case.sizes(), **outputs, "heads_kv": 0, "sparse_block_size": 0}
    assert k.run(**fields).ok
    assert outputs["attention_out"].tobytes() == run(k, case)["attention_out"].tobytes()


def test_attention_mode_2_is_the_only_one():
    k = kernel("f32_small")
    case = make_case(k, Shape(lens_kv=(20,), group=3))
    want = run(k, case)["attention_out"].tobytes()
    assert run(k, case, attention_mode=2)["attention_out"].tobytes() == want


def test_work_stays_at_the_top_instead_of_wrapping():
    """An estimate for callers who want to refuse: huge but legal sizes, nothing is touched."""
    k = kernel("f32_small")
    lens = np.array([1], np.int32)
    plan, result = k.plan(
        query=4096,
        query_rope=4096,
        key=1 << 50,
        key_rope=1 << 51,
        attention_out=1 << 60,
        actual_seq_lengths_query=lens,
        batch=1,
        seq_q=2**31 - 1,
        seq_kv=2**31 - 1,
        heads_q=64,
        scale_value=1.0,
    )
    assert result.ok, result.error_text
    assert plan.work == min(INT64_MAX, (2**31 - 1) ** 2 * 64 * (k.dk + k.rope + k.dv))
    plan, result = k.plan(
        query=4096,
        query_rope=4096,
        key=1 << 50,
        key_rope=1 << 51,
        attention_out=1 << 60,
        actual_seq_lengths_query=lens,
        batch=1,
        seq_q=2**31 - 1,
        seq_kv=1000,
        heads_q=64,
        scale_value=1.0,
    )
    assert result.ok and plan.work == (2**31 - 1) * 1000 * 64 * (k.dk + k.rope + k.dv)


MACROS = """
size_t macro_workspace(int32_t group);
size_t macro_partials(int64_t rows, int64_t heads, int64_t chunks);
size_t macro_workspace(int32_t group)
{{
    /* A constant expression: it has to serve as the size of a static array. */
    static unsigned char one[{macro}_WORKSPACE_BYTES(1)];
    static unsigned char many[{macro}_WORKSPACE_BYTES(128)];
    static unsigned char parts[{macro}_PARTIALS_BYTES(2, 128, 3)];
    return group == 1 ? sizeof one : group == 128 ? sizeof many
        : group < 0 ? sizeof parts : (size_t){macro}_WORKSPACE_BYTES(group);
}}
size_t macro_partials(int64_t rows, int64_t heads, int64_t chunks)
{{
    return (size_t){macro}_PARTIALS_BYTES(rows, heads, chunks);
}}
"""


PAGES = {  # 500 keys, as every record has them
    "layout_kv": PA_BSND,
    "block_table": np.zeros((2, 5), np.int32),
    "block_size": 100,
    "max_blocks": 5,
    "num_blocks": 1,
}


@pytest.mark.parametrize(
    "name", ["f32_small", "f16_small", "bf16_259", *shipped(), *SHIPPED_RECORDS]
)
def test_macros_hold_what_plans_ask_for(name):
    """Workspace to the byte; partials at least, as the macro knows no head grouping."""
    k = kernel(name)
    built = bind.load(text(name), flags=("-O0",), extra=MACROS.format(macro=k.macro))
    workspace, partials = built.library.macro_workspace, built.library.macro_partials
    workspace.restype = partials.restype = ctypes.c_size_t
    partials.argtypes = (ctypes.c_int64,) * 3
    heads = 1 if k.record is not None and k.record.behind else 2
    for isa in k.isas().values():
        for group in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 127, 128, 1000, 65536):
            sizes = {
                "query": 4096,
                "query_rope": 4096 if k.rope else None,
                "key": 1 << 50,
                "key_rope": 1 << 51 if k.rope else None,
                "attention_out": 1 << 60,
                "batch": 2,
                "seq_q": 3,
                "seq_kv": 500,
                "heads_q": heads * group,
                "heads_kv": heads,
                "scale_value": 1.0,
                "chunk_keys": 128,
                "isa": isa,
            }
            if k.record is not None:
                del sizes["key_rope"]
                sizes |= PAGES
            plan, result = k.plan(**sizes)
            assert result.ok, result.error_text
            assert plan.task_bytes == workspace(group) and plan.chunks == 4
            assert plan.split_bytes <= partials(6, heads * group, 4), (group, isa)


@by_pair("bf16_small")
def test_workspace_does_not_grow_with_the_context(name, isa):
    k = kernel(name)
    for group in (4, 20):
        cases = (make_case(k, Shape(lens_kv=(n,), group=group)) for n in (1, 100, 3000))
        sizes = {
            k.workspace_bytes(**case.inputs(), **case.sizes(), **case.outputs(), isa=k.isas()[isa])
            for case in cases
        }
        assert len(sizes) == 1 and 0 not in sizes
