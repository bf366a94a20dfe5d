"""Decoding on AMX tiles: what the tests of all instruction sets do not say. Which calls take tiles,
that they are released, how much work they are, and results that are exact; and maxima that are
raised late, on every instruction set.

Where the machine has no tiles they are emulated (tests/helpers_tiles.py).
"""

import itertools
from typing import Any

import helpers_tiles
import numpy as np
import pytest
from helpers import ISAS_HERE, TILES, assert_same, same_bits
from helpers_decode import (
    SPECS,
    Case,
    Shape,
    by_pair,
    check,
    execute,
    expected,
    fields_of,
    header,
    in_floats,
    isas_in,
    kernel,
    make_case,
    run,
    tile_error,
    tiles_take,
)
from oracle import BSND, PA_BSND

from gen import bind
from gen.isa import ISAS

BLOCK, SUB = 256, 32  # keys of a block of tiles, and of a unit of many queries
ON_TILES = tuple(name for name in SPECS if "amx" in header(name).kernels[0].isa)
needs_tiles = pytest.mark.skipif("amx" not in ISAS_HERE, reason="no x86-64 Linux with AVX-512")
# Query heads on a kv head and rows: up to 8 queries, up to 16, and more.
WAYS = ((1, 1), (3, 1), (2, 4), (1, 8), (9, 1), (3, 5), (1, 16), (17, 1), (6, 3), (3, 16))


@pytest.fixture
def emulated():
    """The emulator with its counts at 0; real tiles count nothing."""
    if not TILES.emulated:
        pytest.skip("this machine has tiles of its own")
    with helpers_tiles.during("granted") as tiles:
        tiles.reset()
        yield tiles


def planned(k: bind.Kernel, case: Case, isa: str) -> str:
    """The instruction set that plan chooses where one is asked for."""
    fields = {**fields_of(k, case, isa), **case.outputs(stats=k.stats)}
    plan, result = k.plan(**fields)
    assert result.ok, result.error_text
    return next(name for name, number in k.isas().items() if number == plan.args.isa)


# ---- who takes tiles ----------------------------------------------------------------------------


@needs_tiles
@pytest.mark.parametrize("name", ON_TILES)
def test_what_changes_scores_of_many_queries_takes_the_words(name):
    """There is no place for it in the products of more than 16 queries: plan says AVX-512, with its
    bits. Masks, windows and sinks change no score."""
    k, features = kernel(name), SPECS[name]["features"]
    changes: list[tuple[bool, dict[str, Any]]] = [
        (False, {}),
        (False, {"mask": "each", "mask_rows": True}),
        (True, {"pse": "one"}),
        *([(False, {"window": 9})] if "window" in features else []),
        *([(False, {"sinks": "plain"})] if "sinks" in features else []),
        *([(True, {"alibi": True})] if "alibi" in features else []),
        *([(True, {"softcap": 3.0})] if "softcap" in features else []),
    ]
    for (group, rows), (changes_scores, change) in itertools.product(WAYS, changes):
        shape = Shape(lens=(40,), heads_kv=2, group=group, seq_q=rows, seed=group, **change)
        case = make_case(k, shape)
        words = changes_scores and group * rows > 16
        assert planned(k, case, "amx") == ("avx512" if words else "amx")
        assert tiles_take(case.args) != words
        if words:
            assert_same(run(k, case, "amx"), run(k, case, "avx512"), change)


@needs_tiles
@pytest.mark.parametrize("mode", ["absent", "refused"])
def test_without_permission_plan_falls_back(emulated, mode):
    """To the bits of AVX-512, also where heads take turns; who insists is told."""
    k = kernel("bf16_heads")
    for heads_kv, group, rows in ((1, 3, 2), (2, 20, 1), (9, 1, 2)):
        case = make_case(k, Shape(lens=(150,), heads_kv=heads_kv, group=group, seq_q=rows, seed=1))
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
        check(case.args, run(k, case), "amx")


@needs_tiles
def test_tiles_are_released():
    """After the one call, each task and each merge, whichever way the queries take."""
    for name, (group, rows) in itertools.product(("bf16_all", "bf16_heads"), WAYS):
        k = kernel(name)
        case = make_case(k, Shape(lens=(150, 0), heads_kv=8, group=group, seq_q=rows, seed=1))
        fields = {**fields_of(k, case, "amx"), **case.outputs(), "chunk_keys": 128}
        assert k.run(**fields).ok and TILES.configured() == 0
        plan, _ = k.plan(**fields)
        partials = np.zeros(plan.split_bytes, np.uint8)
        plan, _ = k.plan(**fields, partials=partials, partials_bytes=partials.nbytes)
        workspace = np.zeros(plan.task_bytes, np.uint8)
        for i in range(plan.n_tasks):
            k.task(plan, i, workspace)
            assert TILES.configured() == 0
        for i in range(plan.n_merges):
            k.merge(plan, i)
            assert TILES.configured() == 0


# ---- how much work ------------------------------------------------------------------------------


def steps_of(n: int, step: int) -> int:
    """Steps of so many keys, block by block."""
    return sum(-(-min(BLOCK, n - at) // step) for at in range(0, n, BLOCK))


def products_of(k: bind.Kernel, queries: int, keys: int) -> int:
    """Of `keys` that all queries see."""
    scores, values = -(-k.dk // 32), -(-k.dv // 32)
    if queries > 16:
        return 4 * steps_of(keys, SUB) * -(-queries // 32) * (scores + values)
    return steps_of(keys, 16) * (scores + values * (1 if queries <= 8 else 2))


@needs_tiles
@pytest.mark.parametrize("name", ON_TILES)
@pytest.mark.parametrize("group,rows", WAYS)
def test_the_work(emulated, name, group, rows):
    """All rows of a kv head share the keys that all see: one product a column for 16 keys and up to
    16 queries. A row's own keys, the last ones, cost a step of the same kind each row; a head has
    no more work where heads take turns."""
    k = kernel(name)
    for heads_kv, n in ((1, 33), (1, 290), (9, 150)):
        shape = Shape(lens=(n,), heads_kv=heads_kv, group=group, seq_q=rows, seed=1)
        case = make_case(k, shape)
        emulated.reset()
        run(k, case, "amx")
        made = emulated.counts()
        queries, common = group * rows, n - rows + 1
        own = (rows - 1) * products_of(k, queries, 1)
        assert made["tdpbf16ps"] == heads_kv * (products_of(k, queries, common) + own)
        assert made["violations"] == 0
        blocks = heads_kv * (-(-common // BLOCK) + rows - 1)
        assert made["tilerelease"] == blocks
        if queries <= 16:  # what memory has to deliver: K and V, each of their tiles once
            steps = steps_of(common, 16) + rows - 1
            columns = -(-k.dk // 32) + -(-k.dv // 32)
            assert made["tileloaddt1"] == heads_kv * steps * columns


# ---- the bound ----------------------------------------------------------------------------------


@needs_tiles
@pytest.mark.parametrize("name", ON_TILES)
@pytest.mark.parametrize("group,rows", [(3, 1), (3, 4), (20, 1)])
def test_errors_are_not_far_below_their_bound(name, group, rows):
    """That what is allowed to tiles is what rounded weights are, and no more."""
    k = kernel(name)
    case = in_floats(make_case(k, Shape(lens=(64,), seq_q=rows, group=group, seed=3)))
    known = expected(case.args)
    got = run(k, case, "amx")["attention_out"].astype(np.float64)
    ratio = abs(got - known.want.exact) / tile_error(case.args, "amx", known.size)
    assert np.median(ratio) > 0.01 and ratio.max() <= 1.01
    words = run(k, case, "avx512")["attention_out"].astype(np.float64)
    assert abs(words - known.want.exact).max() < 0.01 * abs(got - known.want.exact).max()


# ---- results that are exact ---------------------------------------------------------------------


@needs_tiles
@pytest.mark.parametrize("name", ON_TILES)
def test_one_key_gives_its_value(name):
    """Exactly, whatever its weight was rounded to; so do keys that are all the same, also where a
    row's own keys are merged behind those that all rows see."""
    k = kernel(name)
    for (group, rows), scale in itertools.product(WAYS, (1.0, -37.7, 1e-9)):
        for n in {rows, 16 + rows, 33, 64} | ({1} if rows == 1 else set()):
            case = make_case(k, Shape(lens=(n,), group=group, seq_q=rows, seed=n))
            a = case.args
            value = a.value[:, :1] if a.value is not None else a.key[:, :1, :, : k.dv]
            same = case.changed(
                key=np.repeat(a.key[:, :1], n, 1), value=np.repeat(value, n, 1), scale_value=scale
            )
            got = run(k, same, "amx")
            want = np.broadcast_to(value, got["attention_out"].shape)
            assert same_bits(got["attention_out"], want.copy()), (group, rows, n)
            check(same.args, got, "amx")


@by_pair("f32_all", "f16_none", "bf16_all", "bf16_mla", "bf16_tails")
def test_large_scores_that_cancel_leave_the_rest(name, isa):
    """Two channels of a hundred thousand and more with opposite signs, all numbers multiples of
    2^-5 and every sum exact in float32, in whatever order: not a bit is different from the same
    call without them."""
    k = kernel(name)
    rng = np.random.default_rng(3)
    for group, rows in ((3, 1), (3, 4), (33, 1)):
        case = in_floats(make_case(k, Shape(lens=(300,), group=group, seq_q=rows, seed=2)))
        a = case.args
        for tensor, unit in ((a.query, 2.0**-2), (a.key, 2.0**-3)):
            tensor[...] = rng.integers(-4, 5, tensor.shape) * unit
        for tensor in (a.query, a.key):
            tensor[..., :2] = 0
        value = a.key[..., : k.dv] if a.value is None else a.value
        case = case.changed(scale_value=0.5, value=value.copy())
        want = run(k, case, isa)
        check(case.args, want, isa)
        query, key = a.query.copy(), a.key.copy()
        query[..., :2] = 256.0
        size = rng.integers(-255, 256, key.shape[:-1]) * 2.0
        key[..., 0], key[..., 1] = size, -size
        assert_same(run(k, case.changed(query=query, key=key), isa), want, (group, rows))


# ---- a maximum that is raised late --------------------------------------------------------------


def climbs() -> dict[str, np.ndarray]:
    """Levels of 600 keys (two blocks of tiles and a part of one), in powers of 2."""
    j = np.arange(600)
    sub, rng = j // SUB, np.random.default_rng(4)
    return {
        "blocks": 20.0 * (j // BLOCK),
        "subs": 12.0 * sub,
        "just below": 7.5 * (sub % 2) + 7.5 * (sub // 2 % 2),
        "at the margin": np.array([0, 8, 16, 16.5, 8, 24])[sub % 6] + 0.0,
        "last key of a sub": 10.0 * sub + 9.0 * (j % SUB == SUB - 1),
        "first key of a sub": 10.0 * sub + 9.0 * (j % SUB == 0),
        "up and down": rng.integers(-20, 20, 19)[sub] + 0.0,
        "falling": 150 - 8.0 * sub,
        "far": 1000.0 * (sub % 3) - 500.0 * (sub % 2),
        "only the last": 200.0 * (j >= 598),
        "from far below": np.where(j < 40, -30000.0, 9.0 * (sub % 4)),
        "every key": 0.5 * (j % 200),
    }


FACTORS = (  # of each query
    lambda h: np.ones(len(h)),
    lambda h: (h % 3 == 2) * 1.0,
    lambda h: np.array([1, 0, -1, 0.5, -0.25, 2, 0.125])[h % 7],
)


def climbing_case(name: str, shape: Shape, levels: np.ndarray, factor: Any) -> Case:
    """A call whose scores are levels[key] * factor(query), in powers of 2, over small noise."""
    k = kernel(name)
    case = make_case(k, shape)
    a = case.args
    for tensor in (a.query, a.key):
        tensor[..., 1:] *= np.asarray(0.25, case.dtype)
    queries = np.arange(a.seq_q * a.heads_q).reshape(a.seq_q, a.heads_q)
    a.query[..., 0] = factor(queries.reshape(-1)).reshape(queries.shape)
    a.key[..., 0] = levels[None, :, None]
    return case.changed(scale_value=float(np.log(2.0)))


@by_pair("f32_all", "f16_none", "bf16_all", "bf16_tails")
@pytest.mark.parametrize("group,rows", [(3, 1), (1, 8), (3, 4), (20, 1), (3, 11)])
def test_growing_scores(name, isa, group, rows):
    """Every step that rescales what is there: between blocks, within one, between chunks, between
    the keys that all rows see and a row's own (the last ones, and those that only a mask gives
    it)."""
    for i, (what, levels) in enumerate(climbs().items()):
        masked = i % 2 == 1 and rows > 1
        shape = Shape(
            lens=(600,),
            group=group,
            seq_q=rows,
            mask="one" if masked else "none",
            mask_rows=masked,
            hidden=0.03,
            seed=i,
        )
        case = climbing_case(name, shape, levels, FACTORS[i % 3])
        for chunk_keys in (0, 128 if i % 4 == 0 else 512):
            try:
                check(case.args, run(kernel(name), case, isa, chunk_keys=chunk_keys), isa)
            except AssertionError as error:
                raise AssertionError(f"{what}, {group} heads, {rows} rows: {error}") from error


# ---- numbers that are not finite, and keys that a row does not see ------------------------------


@needs_tiles
@pytest.mark.parametrize("name", ["bf16_all", "bf16_tails", "bf16_heads"])
def test_keys_that_a_row_does_not_see_may_be_nan(name):
    """Keys and values of NaN that a row's mask, window or place hides from it, in every way through
    a block: the rows that do not see them are those of the call with other numbers there."""
    k = kernel(name)
    n = 70
    for (group, rows), layout in itertools.product(WAYS, (BSND, PA_BSND)):
        if rows == 1:
            continue
        shape = Shape(lens=(n,), group=group, seq_q=rows, layout_kv=layout, block_size=16,
                      mask="one", mask_rows=True, hidden=0.1, seed=rows)  # fmt: skip
        case = make_case(k, shape)
        mask = case.args.atten_mask
        mask[0, :, [5, 40, 69]] = 1
        mask[0, rows - 1, [5, 40, 69]] = 0  # that the last row alone sees
        rng = np.random.default_rng(rows)
        for tensor in (case.args.key, case.args.value):
            tensor[...] = rng.standard_normal(tensor.shape)
        want = run(k, case, "amx")["attention_out"]
        for side in ("key", "value"):
            bad = getattr(case.args, side).copy()
            rows_of = bad.reshape(-1, *bad.shape[2:])
            for j in (5, 40, 69):
                at = j
                if layout == PA_BSND:
                    at = int(case.args.block_table[0, j // 16]) * 16 + j % 16
                rows_of[at] = np.nan
            got = run(k, case.changed(**{side: bad}), "amx")["attention_out"]
            assert np.isnan(got[:, -1].astype(np.float32)).all()
            assert same_bits(got[:, :-1], want[:, :-1]), (group, rows, side)


@needs_tiles
@pytest.mark.parametrize("name", ON_TILES)
def test_where_keys_lie_changes_no_bit(name):
    """In place, with gaps, in pages of several sizes: tiles are loaded or copied."""
    k = kernel(name)
    for group, rows in WAYS:
        shape = Shape(lens=(100,), heads_kv=2, group=group, seq_q=rows, seed=rows)
        case = in_floats(make_case(k, shape))
        want = run(k, case, "amx")
        check(case.args, want, "amx")
        a = case.args
        spaced = {t: np.repeat(getattr(a, t), 2, axis=1) for t in ("key", "value")}
        strides = {f"{t}_stride": (0, 2 * x[0, 0].size, 0) for t, x in spaced.items()}
        assert_same(run(k, case, "amx", **spaced, **strides), want, "gaps")
        for size in (1, 16, 48):
            pages = -(-100 // size)
            place = np.random.default_rng(size).permutation(pages)
            changes: dict[str, Any] = {"block_table": place[None].astype(np.int32)}
            changes |= {"layout_kv": PA_BSND, "actual_seq_lengths": np.array([100], np.int32)}
            at = place[np.arange(100) // size] * size + np.arange(100) % size
            for tensor in ("key", "value"):
                pool = np.full((pages * size, *getattr(a, tensor).shape[2:]), np.nan, case.dtype)
                pool[at] = getattr(a, tensor)[0]
                changes[tensor] = pool.reshape(pages, size, *pool.shape[1:])
            assert_same(run(k, case.changed(**changes), "amx"), want, size)


@needs_tiles
@pytest.mark.parametrize("name", ["bf16_all", "bf16_mla"])
def test_threads_with_different_shapes(name):
    """Tasks of many shapes at once: tiles belong to a thread."""
    k = kernel(name)
    for group, rows in WAYS:
        shape = Shape(lens=(150, 60, 1), heads_kv=2, group=group, seq_q=rows, seed=group)
        case = in_floats(make_case(k, shape))
        want = run(k, case, "amx", chunk_keys=128)
        for partials in (False, True):
            got = execute(k, case, "amx", order=rows, workers=3, partials=partials)
            assert_same(got, want, (group, rows, partials))


def test_ways_are_all_there():
    """The control for WAYS: up to 8 queries, up to 16 and more, of one row and of several."""
    kinds = {(sum(g * r > most for most in (8, 16)), r > 1) for g, r in WAYS}
    assert len(kinds) == 6
    assert all(ISAS[isa].tiles == (isa == "amx") for isa in isas_in("bf16_all"))
