"""fusion_attention and its gradients on AMX tiles: what the tests of all instruction sets do not
say. Sizes at the edges of tiles, units, steps, panels and tasks; that tiles are released, how much
work they are, and results that are exact; and maxima that are raised late.

Where the machine has no tiles they are emulated (tests/helpers_tiles.py).
"""

import dataclasses
import itertools
import re
from typing import Any

import helpers_tiles
import numpy as np
import pytest
from helpers import ISAS_HERE, TILES, assert_same, same_bits
from helpers_fusion import (
    FORWARD,
    GRAD_TILE_SPECS,
    TILE_SPECS,
    Case,
    Shape,
    Way,
    check,
    check_call,
    check_grad,
    check_grads,
    check_guarded,
    execute,
    expected,
    expected_grads,
    fields_of,
    grad_fields,
    header,
    in_floats,
    kernel,
    make_case,
    make_grad_case,
    prepared_grad,
    rows_of,
    run,
    run_grad,
    run_grad_guarded,
    text,
)
from oracle import BSND, TND
from oracle_fusion import BNSD, NO_LIMIT

from gen import bind, spec
from gen.isa import ISAS
from gen.train import tile

SUB = 32  # keys of a unit, queries of a group
NAMES = tuple(TILE_SPECS)
GRADS = tuple(GRAD_TILE_SPECS)
SMALL = (*NAMES[:3], "f16_whole", "f16_tails")
ROUNDED = NAMES[:4]  # bf16
PARTS = NAMES[4:]  # f16: two parts of bfloat16 for each number
pytestmark = pytest.mark.skipif("amx" not in ISAS_HERE, reason="no x86-64 Linux with AVX-512")
by_name = pytest.mark.parametrize("name", NAMES)
by_grad = pytest.mark.parametrize("name", GRADS)
by_small = pytest.mark.parametrize("name", SMALL)


@pytest.fixture
def emulated():
    """The emulator with its counts at 0; real tiles count nothing."""
    if not TILES.emulated:
        pytest.skip("this machine has tiles of its own")
    with helpers_tiles.during("granted") as tiles:
        tiles.reset()
        yield tiles


def sizes_of(name: str) -> Any:
    """What the generator chose for tiles."""
    return tile(header(name).kernels[0], ISAS["amx"])


def some(shape: Shape, **changes: object) -> Shape:
    return dataclasses.replace(shape, **changes)


# ---- who takes tiles ----------------------------------------------------------------------------


@by_small
@pytest.mark.parametrize("mode", ["absent", "refused"])
def test_without_permission_plan_falls_back(emulated, name, mode):
    """To the bits of AVX-512; who insists is told."""
    k = kernel(name)
    case = make_case(k, Shape(lens_q=(50,), lens_kv=(70,), group=2, mode=3, mask="formula"))
    want = run(k, case, "avx512")
    amx = k.constants["HL_ISA_AMX"]
    with helpers_tiles.during(mode) as tiles:
        tiles.reset()
        assert "amx" not in k.isas()
        assert_same(run(k, case), want)
        refused = {**fields_of(k, case), **case.outputs(), "isa": amx}
        result = k.run(**refused, workspace=np.zeros(1 << 22, np.uint8))
        assert (result.status_name, result.argument) == ("HL_ERR_UNSUPPORTED", "ISA")
        made = tiles.counts()
        assert made.pop("requests") > 0 and not any(made.values()), made
    check(case, run(k, case), "amx")


@by_small
def test_tiles_are_released(name):
    """After the one call and each task, also of those that have no key and no query."""
    k = kernel(name)
    queries = sizes_of(name).queries
    for hide in ("nothing", "bytes", "keys"):
        lens_kv = (40, 0, 20) if hide != "keys" else (0, 0, 0)
        shape = Shape(lens_q=(queries + 1, 3, 0), lens_kv=lens_kv, layout=TND, heads_kv=2)
        if hide == "bytes":
            shape = some(shape, mode=1, mask="given", hidden=1.1)
        case = make_case(k, shape)
        fields = {**fields_of(k, case, "amx"), **case.outputs()}
        assert k.run(**fields).ok and TILES.configured() == 0
        plan, _ = k.plan(**fields)
        assert plan.queries == queries and plan.n_tasks > 4
        workspace = np.zeros(plan.task_bytes, np.uint8)
        for i in range(plan.n_tasks):
            k.task(plan, i, workspace)
            assert TILES.configured() == 0
        check(case, run(k, case, "amx"), "amx")


# ---- how much work ------------------------------------------------------------------------------


def units_of(case: Case, last: int) -> int:
    """Units of 32 keys of a group up to query `last` whose rows are causal, as mode 2 has them."""
    return -(-min(last // case.shape.group + 1, case.shape.lens_kv[0]) // SUB)


@by_name
@pytest.mark.parametrize("group", [1, 5])
def test_the_work(emulated, name, group):
    """A group of 32 queries computes the units of 32 keys that one of its rows sees, and no others;
    tiles of V are turned once for a task."""
    k, sizes = kernel(name), sizes_of(name)
    for n in (33, 150):
        shape = Shape(lens_q=(n,), lens_kv=(n,), group=group, mode=2, mask="formula", seed=1)
        case = make_case(k, shape)
        emulated.reset()
        run(k, case, "amx")
        made = emulated.counts()
        queries, units = n * group, 0
        for first in range(0, queries, SUB):
            units += units_of(case, min(first + SUB, queries) - 1)
        scores, values = (4, 3) if name in PARTS else (1, 1)  # products of parts
        assert made["tdpbf16ps"] == 4 * units * (scores * sizes.columns + values * sizes.groups)
        assert made["violations"] == 0
        tasks = -(-queries // sizes.queries)
        assert made["ldtilecfg"] == made["tilerelease"] == tasks
        # operands: A is read once for each product of two; of two parts, the smaller once more
        # where it meets both of B's, and never more
        scores, values = (3, 2) if name in PARTS else (1, 1)
        assert made["tileloaddt1"] == 2 * units * (scores * sizes.columns + values * sizes.groups)


# ---- edges --------------------------------------------------------------------------------------


@by_name
def test_keys_at_the_edges_of_tiles_units_steps_and_panels(name):
    """One over and one under each, without a mask, causal, and from the middle of a unit on."""
    sizes = sizes_of(name)
    edges = {1, 15, 17, 31, 32, 33, sizes.block - 1, sizes.block, sizes.block + 1}
    if sizes.panel <= 256:
        edges |= {sizes.panel, sizes.panel + 1}
    for n in sorted(edges):
        base = Shape(lens_q=(5,), lens_kv=(n,), group=3, spread="growing", seed=n)
        check_call(name, base, "amx")
        check_call(name, some(base, mode=3, mask="formula"), "amx")
        check_call(name, some(base, lens_q=(33,), mode=4, mask="formula", band=(20, 3)), "amx")


@by_name
def test_queries_at_the_edges_of_tiles_groups_and_tasks(name):
    queries = sizes_of(name).queries
    edges = [(1, 1), (15, 1), (16, 1), (17, 1), (31, 1), (32, 1), (33, 1), (5, 13)]
    edges += [(queries // 16, 16), (queries // 16 + 1, 16), (queries // 64 + 1, 65)]
    for rows, group in edges:
        shape = Shape(lens_q=(rows,), lens_kv=(40,), group=group, mode=3, mask="formula", seed=rows)
        check_call(name, shape, "amx")


@pytest.mark.parametrize("name", ["bf16_tails", "bf16_whole"])
def test_several_panels(name):
    """More keys than a panel has, of which the last is short, seen in part by several groups."""
    panel = sizes_of(name).panel
    for mode, band, q in ((1, None, 9), (3, None, 40), (4, (panel + 30, -panel + 60), 70)):
        shape = Shape(lens_q=(q,), lens_kv=(panel + 40,), mode=mode, mask="formula", band=band)
        check_call(name, some(shape, spread="growing", seed=mode), "amx")


@pytest.mark.parametrize("name", SMALL)
def test_between_guard_pages(name):
    """Odd lengths against both ends of memory, packed, with gaps, and side by side."""
    for (q, kv), flush in itertools.product(((33, 47), (70, 130)), ("left", "right")):
        for layout, strides in ((BSND, True), (BNSD, False), (TND, False)):
            shape = Shape(lens_q=(q,), lens_kv=(kv,), heads_kv=2, group=2, layout=layout, mode=3,
                          mask="formula", keep_prob=0.7 if strides else 0.0, seed=q)  # fmt: skip
            check_guarded(name, shape, Way("amx", flush, strides, by_task=strides))


@by_small
def test_all_modes_and_bytes_over_several_steps(name):
    """Bytes that hide single keys, units, steps and all; every mode by its formula."""
    base = Shape(lens_q=(70,), lens_kv=(300,), heads_kv=1, group=2, seed=7)
    for mode in range(9):
        layout = TND if mode > 6 else BSND
        shape = some(base, mode=mode, layout=layout, mask="formula", band=(90, 40))
        check_call(name, shape, "amx")
    k = kernel(name)
    for hidden in (slice(32, 64), slice(0, 33), slice(60, 200), slice(1, 299), slice(250, 300)):
        case = make_case(k, some(base, mode=1, mask="given", hidden=0.4))
        case.args.atten_mask[..., hidden] = 1
        case.args.atten_mask[..., 3:5, hidden] = 0
        check(case, run(k, case, "amx"), "amx")


# ---- the bound ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUNDED)
def test_errors_are_not_far_below_their_bound(name):
    """That what is allowed to tiles is what rounded weights are, and no more."""
    k = kernel(name)
    case = in_floats(make_case(k, Shape(lens_q=(20,), lens_kv=(64,), group=2, seed=3)))
    known = expected(case.args)
    got = rows_of(case, run(k, case, "amx"))["attention_out"].astype(np.float64)
    allowed = 2.0**-8 / (1 - 2.0**-8) * known.size.spread
    ratio = abs(got - known.want.out) / allowed
    assert np.median(ratio) > 0.01 and ratio.max() <= 1.01
    words = rows_of(case, run(k, case, "avx512"))["attention_out"].astype(np.float64)
    assert abs(words - known.want.out).max() < 0.01 * abs(got - known.want.out).max()


@pytest.mark.parametrize("name", PARTS)
def test_float16_is_not_far_from_exact(name):
    """Two parts: errors in float32 results are some 2^-17 of a value, far below a place of float16,
    and above those of AVX-512."""
    k = kernel(name)
    case = in_floats(make_case(k, Shape(lens_q=(40,), lens_kv=(200,), group=2, seed=3)))
    known = expected(case.args)
    got = rows_of(case, run(k, case, "amx"))["attention_out"].astype(np.float64)
    ratio = abs(got - known.want.out) / (2.0**-16 * known.size.value)
    assert ratio.max() < 1.0 and np.median(ratio) > 1e-4
    words = rows_of(case, run(k, case, "avx512"))["attention_out"].astype(np.float64)
    assert abs(words - known.want.out).max() < abs(got - known.want.out).max()


PART_DEFECTS = {  # what is left out of the header's text
    "the smaller part of Q, K or V": (
        r"hl_part_amx\(hl_halves_amx\(from, n\), part\)",
        r"hl_part_amx(hl_halves_amx(from, part ? 0 : n), part)",
    ),
    "the smaller part of P": (
        r"(storeu_si512\(s \+ 32, )\w+left_amx\(p0, p1\)",
        r"\1_mm512_setzero_si512()",
    ),
    "the product of the smaller parts of scores": (r"x->all = 1", "x->all = 0"),
    "P in two parts, of which V meets one": (r"p\.part = 128", "p.part = 0"),
}


def cancelling(k: Any) -> Case:
    """Scores whose larger parts cancel, so that those of the smaller parts are 3e-3 of them: both
    are 1 and 3 u in q, 1 and -3 u or -1 and -3 u in k, u = 2^-10."""
    case, u = make_case(k, Shape(lens_q=(5,), lens_kv=(70,), seed=5)), 2.0**-10
    half = np.arange(k.dk) < k.dk // 2
    query, key = np.full_like(case.args.query, 1 + 3 * u), np.empty_like(case.args.key)
    key[...] = np.where(half, -1 - 3 * u, 1 - 3 * u)
    key[:, 1::2] *= np.float16(0.5)
    return case.changed(query=query, key=key, scale_value=1.0)


@pytest.mark.parametrize("name", PARTS)
def test_scores_whose_larger_parts_cancel(name):
    """All four products of parts are there: max and sum are as exact as anywhere."""
    k = kernel(name)
    check(cancelling(k), run(k, cancelling(k), "amx"), "amx")


@pytest.mark.parametrize("what", PART_DEFECTS)
def test_parts_are_needed(what):
    """The control: with one part left out of the header's text calls fail that are fine with it, by
    more than results in float32 may be off."""
    old, new = PART_DEFECTS[what]
    name = "f16_tails"
    wrong, count = re.subn(old, new, text(name))
    assert count == 1, f"{what}: the text has {count} such places"
    k = bind.load(wrong, flags=("-O1",))
    k.dtype = kernel(name).dtype
    long = in_floats(make_case(k, Shape(lens_q=(64,), lens_kv=(400,), seed=5)))
    for case in (long, cancelling(k)):
        check(case, run(kernel(name), case, "amx"), "amx")
    with pytest.raises(AssertionError):
        for case in (long, cancelling(k)):
            check(case, run(k, case, "amx"), "amx")


@pytest.mark.parametrize("spread", ["normal", "growing", "huge", "cancel"])
@by_small
def test_errors_of_long_rows(name, spread):
    """Enough elements for the error rule to need no slack; max, sum and LSE with them."""
    shape = Shape(lens_q=(64,), lens_kv=(400,), group=2, spread=spread, seed=5)
    check_call(name, shape, "amx", strict=spread in ("normal", "growing"))


# ---- results that are exact ---------------------------------------------------------------------


@by_small
def test_one_key_gives_its_value(name):
    """Exactly, whatever its weight was rounded to; so do keys that are all the same."""
    k = kernel(name)
    for n, scale in itertools.product((1, 16, 33, 150), (1.0, -37.7, 1e-9)):
        case = make_case(k, Shape(lens_q=(9,), lens_kv=(n,), group=4, seed=n))
        a = case.args
        key, value = (np.repeat(x[:, :1], n, axis=1) for x in (a.key, a.value))
        same = case.changed(key=key, value=value, scale_value=scale)
        got = run(k, same, "amx")
        want = np.broadcast_to(value[:, :1], got["attention_out"].shape)
        assert same_bits(got["attention_out"], want.copy()), (n, scale)
        check(same, got, "amx")


# ---- a maximum that is raised late --------------------------------------------------------------


def climbs() -> dict[str, np.ndarray]:
    """Levels of 600 keys, several steps of any size, in powers of 2."""
    j = np.arange(600)
    sub, rng = j // SUB, np.random.default_rng(4)
    return {
        "steps": 20.0 * (j // 64),
        "units": 12.0 * sub,
        "just below": 7.5 * (sub % 2) + 7.5 * (sub // 2 % 2),
        "at the margin": np.array([0, 8, 16, 16.5, 8, 24])[j // 64 % 6] + 0.0,
        "last key of a step": 10.0 * (j // 64) + 9.0 * (j % 64 == 63),
        "first key of a step": 10.0 * (j // 64) + 9.0 * (j % 64 == 0),
        "up and down": rng.integers(-20, 20, 19)[sub] + 0.0,
        "falling": 150 - 8.0 * sub,
        "far": 1000.0 * (sub % 3) - 500.0 * (sub % 2),
        "only the last": 200.0 * (j >= 598),
        "from far below": np.where(j < 70, -30000.0, 9.0 * (sub % 4)),
        "every key": 0.5 * (j % 200),
    }


FACTORS = (  # of each query
    lambda h: np.ones(len(h)),
    lambda h: (h % 3 == 2) * 1.0,
    lambda h: np.array([1, 0, -1, 0.5, -0.25, 2, 0.125])[h % 7],
)


@pytest.mark.parametrize("what", climbs())
@by_small
def test_growing_scores(name, what):
    """Every step that rescales what is there, for all queries of a group and for some."""
    k = kernel(name)
    for i, factor in enumerate(FACTORS):
        rest = {"mode": 3, "mask": "formula"} if i == 1 else {"keep_prob": 0.5} if i == 2 else {}
        case = make_case(k, Shape(lens_q=(20,), lens_kv=(600,), group=2, seed=i, **rest))
        a = case.args
        for tensor in (a.query, a.key):
            tensor[..., 1:] *= np.asarray(0.25, case.dtype)
        a.query[..., 0] = factor(np.arange(40)).reshape(1, 20, 2)
        a.key[..., 0] = climbs()[what][None, :, None]
        case = case.changed(scale_value=float(np.log(2.0)))
        check(case, run(k, case, "amx"), "amx")


# ---- numbers that are not finite ----------------------------------------------------------------


@by_small
def test_keys_and_values_that_a_row_does_not_see_may_be_nan(name):
    """The rows that do not see them are those of the call with other numbers there, whatever step,
    panel or task they are in."""
    k = kernel(name)
    rng = np.random.default_rng(9)
    for mode, drop in itertools.product((1, 3), (0.0, 0.8)):
        shape = Shape(lens_q=(70,), lens_kv=(200,), group=2, mode=mode, hidden=0.1, keep_prob=drop,
                      mask="given" if mode == 1 else "formula", seed=mode)  # fmt: skip
        case, at = make_case(k, shape), (5, 40, 63, 64, 130, 199) if mode == 1 else (140, 150, 199)
        a = case.args
        for tensor in (a.key, a.value):
            tensor[...] = rng.standard_normal(tensor.shape)
        sees = np.arange(200) <= np.arange(70)[:, None] + 130
        if mode == 1:
            a.atten_mask[..., at] = rng.random((70, len(at))) < 0.9
            sees = a.atten_mask[0, 0] == 0
        clean = ~sees[:, at].any(axis=1)
        assert 0 < clean.sum() < 70
        want = run(k, case, "amx")["attention_out"]
        for side, bad in itertools.product(("key", "value"), (np.nan, np.inf)):
            if side == "value" or np.isnan(bad):
                other = getattr(a, side).copy()
                other[:, at] = bad
                got = run(k, case.changed(**{side: other}), "amx")["attention_out"]
                assert same_bits(got[:, clean], want[:, clean]), (mode, side, bad)
                if not drop:
                    assert not np.isfinite(got[:, ~clean].astype(np.float32)).any()


@by_small
def test_infinite_values_stay(name):
    """Infinite with their sign and NaN where the oracle has them, in two parts too."""
    k = kernel(name)
    case = make_case(k, Shape(lens_q=(20,), lens_kv=(70,), group=2, mode=3, mask="formula", seed=3))
    for key, channel, x in ((55, 3, np.inf), (60, 5, -np.inf), (61, 6, np.nan)):
        case.args.value[:, key, 0, channel] = x
    got = rows_of(case, run(k, case, "amx"))["attention_out"].astype(np.float64)
    want = expected(case.args).want.out
    odd = ~np.isfinite(want)
    assert 0 < odd.sum() < odd.size
    assert np.array_equal(got[odd], want[odd], equal_nan=True) and np.isfinite(got[~odd]).all()


@by_small
def test_bias_softcap_and_sinks_on_tiles(name):
    """What changes scores between the products and the weights."""
    base = Shape(lens_q=(40,), lens_kv=(150,), group=2, mode=3, mask="formula", seed=4)
    features = TILE_SPECS[name].get("features", ())
    for change in (
        {"pse": "full"},
        {"pse": "one_row", "keep_prob": 0.9},
        *([{"softcap": 3.0}, {"softcap": 1.0, "pse": "full"}] if "softcap" in features else []),
        *([{"sinks": "plain"}, {"sinks": "infinite"}] if "sinks" in features else []),
    ):
        for spread in ("normal", "growing"):
            check_call(name, some(base, spread=spread, **change), "amx")


# ---- bits ---------------------------------------------------------------------------------------


@by_small
def test_where_keys_lie_changes_no_bit(name):
    """In place where rows lie side by side, with gaps, and far apart: loaded or copied."""
    k = kernel(name)
    case = in_floats(make_case(k, Shape(lens_q=(40,), lens_kv=(100,), seed=3)))
    want = run(k, case, "amx")
    check(case, want, "amx")
    for apart in (2, 3):
        spaced, strides = {}, {}
        for tensor in ("key", "value"):
            x = getattr(case.args, tensor)
            spaced[tensor] = np.repeat(x, apart, axis=1)
            strides[f"{tensor}_stride"] = (0, apart * x[0, 0].size, 0)
        assert_same(run(k, case, "amx", **spaced, **strides), want, apart)


@by_small
def test_tasks_and_rows_around_a_row_change_no_bit(name):
    """A call of several tasks, and its rows in calls of their own that begin anywhere."""
    k, queries = kernel(name), sizes_of(name).queries
    rows = queries // 8 + 9
    shape = Shape(lens_q=(rows,), lens_kv=(rows + 20,), group=8, mode=3, mask="formula", seed=2)
    case = in_floats(make_case(k, shape))
    whole = rows_of(case, run(k, case, "amx"))
    for cut in (1, 33, rows - 2):
        for part, first in ((slice(0, cut), 0), (slice(cut, rows), cut)):
            alone = case.changed(
                query=case.args.query[:, part].copy(),
                sparse_mode=0,
                band=1,
                pre_tokens=NO_LIMIT,
                next_tokens=first + 20,
            )
            got = rows_of(alone, run(k, alone, "amx"))
            assert_same(got, {n: x[part] for n, x in whole.items()}, cut)


@by_small
def test_threads_with_different_shapes(name):
    """Tasks of many shapes at once: tiles belong to a thread."""
    k = kernel(name)
    shape = Shape(lens_q=(90, 7, 33), lens_kv=(150, 60, 1), heads_kv=3, group=3, layout=TND)
    case = in_floats(make_case(k, shape))
    want = run(k, case, "amx")
    for order in (1, 2):
        assert_same(execute(k, case, "amx", order=order, workers=3), want, order)


# ---- gradients ----------------------------------------------------------------------------------


@by_grad
def test_gradients_at_the_edges_of_units_steps_panels_and_tasks(name):
    sizes = sizes_of(name)
    edges = {1, 31, 32, 33, sizes.block - 1, sizes.block, sizes.block + 1}
    for n in sorted(edges):
        base = Shape(lens_q=(5,), lens_kv=(n,), group=3, seed=n)
        check_grad(name, base, "amx")
        check_grad(name, some(base, lens_q=(n,), mode=3, mask="formula"), "amx")
        check_grad(name, some(base, lens_q=(33,), mode=4, mask="formula", band=(20, 3)), "amx")
    rows = max(sizes.queries, sizes.panel) // 13 + 3
    for q, kv, group in ((rows, 40, 13), (5, sizes.keys + 9, 2), (20, sizes.panel + 33, 1)):
        if max(q * group, kv) < 600:
            shape = Shape(lens_q=(q,), lens_kv=(kv,), group=group, mode=3, mask="formula", seed=q)
            check_grad(name, shape, "amx")


@by_grad
def test_gradients_with_everything_else(name):
    base = Shape(lens_q=(40, 40), lens_kv=(150, 150), heads_kv=2, group=2, seed=4)
    for change in (
        {"keep_prob": 0.7},
        {"pse": "full", "mode": 3, "mask": "formula"},
        {"mode": 1, "mask": "given", "hidden": 0.9},
        {"mode": 1, "mask": "given", "hidden": 0.3, "keep_prob": 0.5, "pse": "full"},
        {"layout": TND, "lens_q": (40, 0, 7), "lens_kv": (60, 5, 0), "pad_q": 2, "pad_kv": 3},
        {"layout": BNSD, "spread": "growing"},
    ):
        check_grad(name, some(base, **change), "amx")


@by_grad
def test_gradients_where_the_scale_is_negative(name):
    """What is hidden, which is -inf, stays so; and scales near 0 and large ones."""
    shape = Shape(lens_q=(40,), lens_kv=(150,), group=2, mode=3, mask="formula", seed=6)
    grad = make_grad_case(name, shape, "amx")
    for factor in (-1.0, 1e-12, -30.0):
        case = grad.case.changed(scale_value=factor * grad.case.args.scale_value)
        forward = run(kernel(FORWARD[name]), case, "amx")
        other = dataclasses.replace(grad, case=case, forward=forward)
        check_grads(other, run_grad(kernel(name), other, "amx"), "amx", expected_grads(other))


@by_grad
def test_the_work_of_gradients(emulated, name):
    """Tasks of queries compute the units of 32 keys that a group of 32 queries sees, three products
    each; tasks of keys those of queries, with four."""
    k, sizes = kernel(name), sizes_of(name)
    both = sizes.columns + sizes.groups
    for n, group in ((33, 1), (90, 2)):
        shape = Shape(lens_q=(n,), lens_kv=(n,), group=group, mode=2, mask="formula", seed=1)
        grad = make_grad_case(name, shape, "amx")
        fields = {**grad_fields(k, grad, "amx"), **grad.outputs()}
        plan, _ = k.plan(**fields)
        emulated.reset()
        run_grad(k, grad, "amx")
        made, queries = emulated.counts(), n * group
        products = 0
        for first in range(0, queries, SUB):
            units = units_of(grad.case, min(first + SUB, queries) - 1)
            products += 4 * units * (both + sizes.columns)
        for key in range(0, n, SUB):
            units = -(-(queries - key * group // SUB * SUB) // SUB)
            products += 4 * units * 2 * both
        assert made["tdpbf16ps"] == products and made["violations"] == 0
        assert made["ldtilecfg"] == made["tilerelease"] == plan.n_tasks
        workspace = np.zeros(plan.task_bytes, np.uint8)
        for i in range(plan.n_tasks):
            k.task(plan, i, workspace)
            assert TILES.configured() == 0


@by_grad
def test_gradients_between_guard_pages(name):
    for flush, strides in (("left", True), ("right", False)):
        shape = Shape(lens_q=(33,), lens_kv=(70,), heads_kv=2, group=2, mode=3, mask="formula")
        grad = make_grad_case(name, shape, "amx")
        got = run_grad_guarded(kernel(name), grad, Way("amx", flush, strides, by_task=strides))
        assert_same(got, run_grad(kernel(name), grad, "amx"), flush)


@by_grad
def test_nan_reaches_the_gradients_of_what_meets_it(name):
    """Rows 0 .. 29 and keys 0 .. 59 see each other, and the others: NaN in a row, a key, a value or
    a gradient of the first kind leaves every bit of the second. And none gets lost."""
    k = kernel(name)
    shape = Shape(lens_q=(70,), lens_kv=(150,), group=2, mode=1, mask="given", seed=3)
    grad = make_grad_case(name, shape, "amx")
    mask = grad.case.args.atten_mask
    mask[...] = (np.arange(70)[:, None] < 30) != (np.arange(150) < 60)
    forward = run(kernel("bf16_128" if name == "bf16_128_grad" else "bf16_tails"), grad.case, "amx")
    grad = dataclasses.replace(grad, forward=forward)
    want = run_grad(k, grad, "amx")
    behind = {"dquery": 30, "dkey": 60, "dvalue": 60}
    for bad in (np.nan, np.inf):
        for side, at in (("query", 3), ("key", 5), ("value", 40), ("dout", 29), ("sum", 7)):
            if side == "dout":
                dout = grad.dout.copy()
                dout[:, at] = bad
                other = dataclasses.replace(grad, dout=dout)
            elif side == "sum":  # a NaN of nothing but ones: rounding must not turn it over
                total = forward["softmax_sum"].copy()
                total[:, :, at].view(np.uint32)[...] = 0xFFFFFFFF
                other = dataclasses.replace(grad, forward={**forward, "softmax_sum": total})
            else:
                tensor = getattr(grad.case.args, side).copy()
                tensor[:, at] = bad
                other = dataclasses.replace(grad, case=grad.case.changed(**{side: tensor}))
            got = run_grad(k, other, "amx")
            for out, first in behind.items():
                assert same_bits(got[out][:, first:], want[out][:, first:]), (side, out, bad)
            reached = [np.isnan(got[out].astype(np.float32)).any() for out in ("dquery", "dkey")]
            assert all(reached), (side, bad)
            if side == "sum":
                assert np.isnan(got["dvalue"][:, :60].astype(np.float32)).all()


@by_grad
def test_tasks_of_gradients_in_any_order(name):
    """On threads, whatever their workspace held before: the bits of the one call."""
    k = kernel(name)
    shape = Shape(lens_q=(90, 7, 33), lens_kv=(150, 60, 1), heads_kv=3, group=3, layout=TND)
    grad = make_grad_case(name, shape, "amx")
    want = run_grad(k, grad, "amx")
    for order in (1, 2):
        outputs = grad.outputs()
        plan, result = k.plan(**grad_fields(k, grad, "amx"), **outputs)
        assert result.ok, result.error_text
        tasks = np.random.default_rng(order).permutation(plan.n_tasks).tolist()
        k.execute(plan, tasks, 3)
        assert_same(outputs, want, order)
    for byte in (0x00, 0xFF):
        outputs = grad.outputs()
        fields = {**grad_fields(k, grad, "amx"), **outputs}
        workspace = np.full(k.workspace_bytes(**fields), byte, np.uint8)
        assert k.run(**fields, workspace=workspace).ok
        assert_same(outputs, want, byte)


# One step alone; steps of all sizes behind each other, of one group and of several.
WOVEN = (
    Shape(lens_q=(20,), lens_kv=(30,), seed=5),
    Shape(lens_q=(300,), lens_kv=(40,), seed=1),
    Shape(lens_q=(40,), lens_kv=(300,), group=3, mode=3, mask="formula", seed=2),
    Shape(lens_q=(150,), lens_kv=(150,), group=2, mode=4, mask="formula", band=(70, 9), seed=3),
    Shape(lens_q=(70,), lens_kv=(150,), mode=1, mask="given", hidden=0.5, keep_prob=0.6, seed=4),
)


def weave(name: str, k: Any) -> None:
    """Gradients of all of these, against the oracle and its plain implementation."""
    for shape in WOVEN:
        grad, known = prepared_grad(name, shape)
        check_grads(grad, run_grad(k, grad, "amx"), "amx", known, strict=not shape.keep_prob)


@by_grad
def test_gradients_beside_products(name):
    """P and dS of a step are made while products of others are, in the memory of its own scores."""
    weave(name, kernel(name))


GRAD_DEFECTS = {  # what is left out of the header's text
    "dP of a step is overwritten before it is read": (r"\n +\w+reach_amx\(x, r\);", ""),
    "what is left of a step is not weighed": (r"\n +\w+reach_amx\(x, x->pieces\);", ""),
    "two steps have their scores in one place": (r"w->s \+ pipe->turn \* STEP", "w->s + 0 * STEP"),
    "the last unit of a panel is not stored": (
        r"(1 - pipe->turn\],) NULL,\s*(&pipe->x\);)\s*\w+flush_amx\(&pipe->x\);",
        r"\1 NULL, \2",
    ),
    "a step begins before its last unit is stored": (
        r"flush_amx\(x\);(\s*\w+start_amx\(plan)",
        r"reach_amx(x, 0);\1",
    ),
    "dS has the words of P": (r"u->s \+ \(of_value \? 0 : 32\)", "u->s"),
    "keys that are hidden keep their scores": (
        r"if \(!t->whole\) \{\s*\w+hide_amx(?=\(a, t, w->low)",
        "if (0) {\n            (void)",
    ),
}


@pytest.mark.parametrize("what", GRAD_DEFECTS)
def test_gradients_beside_products_notice(what):
    """The control: with one step left out of the header's text the same calls fail."""
    old, new = GRAD_DEFECTS[what]
    name = "bf16_128_grad"
    wrong, count = re.subn(old, new, text(name))
    assert count == 1, f"{what}: the text has {count} such places"
    k = bind.load(wrong, flags=("-O1",))
    k.dtype = kernel(name).dtype
    with pytest.raises(AssertionError):
        weave(name, k)


@by_grad
def test_rows_around_a_row_change_no_bit_of_its_gradient(name):
    """dQ of rows in a call of their own, which begins anywhere; of keys dK and dV likewise."""
    k, rows = kernel(name), 100
    shape = Shape(lens_q=(rows,), lens_kv=(rows + 20,), group=3, mode=3, mask="formula", seed=2)
    grad = make_grad_case(name, shape, "amx")
    in_floats(grad.case)
    whole = run_grad(k, grad, "amx")
    a = grad.case.args
    for cut in (1, 33, 98):
        for rows_in_call, first in ((slice(0, cut), 0), (slice(cut, rows), cut)):
            band = {"sparse_mode": 0, "band": 1, "pre_tokens": NO_LIMIT}
            part = grad.case.changed(
                query=a.query[:, rows_in_call].copy(), next_tokens=first + 20, **band
            )
            forward = {n: x[:, :, rows_in_call].copy() for n, x in grad.forward.items()
                       if n in ("softmax_max", "softmax_sum")}  # fmt: skip
            forward["attention_out"] = grad.forward["attention_out"][:, rows_in_call].copy()
            alone = dataclasses.replace(
                grad, case=part, dout=grad.dout[:, rows_in_call].copy(), forward=forward
            )
            got = run_grad(k, alone, "amx")
            assert same_bits(got["dquery"], whole["dquery"][:, rows_in_call]), (cut, first)
        for keys, first in ((slice(0, cut), 0), (slice(cut, rows + 20), cut)):
            band = {"sparse_mode": 0, "band": 1, "pre_tokens": NO_LIMIT}
            part = grad.case.changed(
                key=a.key[:, keys].copy(), value=a.value[:, keys].copy(),
                next_tokens=20 - first, **band,
            )  # fmt: skip
            got = run_grad(k, dataclasses.replace(grad, case=part), "amx")
            for name_ in ("dkey", "dvalue"):
                assert same_bits(got[name_], whole[name_][:, keys]), (name_, cut, first)


def test_the_work_beside_products_fits():
    """Pieces of P and dS are spread over columns of products that they can stand beside, for any
    widths: at most a fifth is left for the end of a step, and they do not end before two thirds."""
    for dk, dv in itertools.product((16, 64, 128, 192, 256, 576), (16, 64, 128, 512)):
        if dv > dk:
            continue
        table = {**TILE_SPECS["bf16_128"], "op": "fusion_attention_grad", "dk": dk, "dv": dv}
        sizes = tile(spec.parse_kernel(table), ISAS["amx"])
        both = sizes.columns + sizes.groups
        for rate, sums in ((sizes.rate_queries, sizes.columns), (sizes.rate_keys, both)):
            share = rate * (both + sums - 1) / SUB
            assert 0.8 <= share <= 1.5 or rate == 1, (dk, dv, rate, share)


def test_wide_rows_of_float16_take_words():
    """Two parts of them would not fit beside each other: who asks for tiles is told."""
    for dk, dv, fits in ((576, 512, True), (768, 768, False), (768, 128, True)):
        table = {"op": "fusion_attention", "dtype": "f16", "dk": dk, "dv": dv}
        assert ("amx" in spec.parse_kernel(table).isa) == fits, (dk, dv)
        assert "amx" in spec.parse_kernel({**table, "dtype": "bf16"}).isa
    with pytest.raises(spec.Refusal, match="two parts of rows of 768 and 768 channels"):
        spec.parse_kernel({**table, "dv": 768, "isa": ["avx512", "amx"]})
    with pytest.raises(spec.Refusal, match="tiles take bf16 only in fusion_attention_grad"):
        spec.parse_kernel({**table, "op": "fusion_attention_grad", "isa": ["avx512", "amx"]})


def test_steps_are_all_there():
    """The control for TILE_SPECS: every size of step, keys in place and copied."""
    for names in (ROUNDED, NAMES):
        assert {sizes_of(name).block for name in names} == {64, 128, 256}
    assert {sizes_of(name).block for name in PARTS} == {64, 128}
    assert {TILE_SPECS[name]["dk"] % SUB == 0 for name in NAMES} == {True, False}
