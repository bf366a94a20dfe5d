"""Kernels on AMX tiles: what the tests of all instruction sets do not reach. Two ways through a
block of keys (up to 16 heads and more), a maximum that is raised late, rows that are read in place
or copied, and who may use tiles.

Where the machine has no tiles they are emulated (tests/helpers_tiles.py); what counts instructions
or takes permission away is only for the emulator.
"""

import dataclasses
import functools
import itertools
import re
import threading

import helpers_tiles
import numpy as np
import pytest
from helpers import (
    BF16,
    FEW_HEADS,
    ISAS_HERE,
    TILES,
    assert_same,
    bound_of,
    check,
    check_stats,
    header,
    isas_in,
    kernel,
    last_place,
    same_bits,
    text,
)
from helpers_cases import Case, Shape, Way, make_case, run, run_guarded
from oracle import BSND, PA_BSND, TND, sparse_flash_attention

from gen import bind

pytestmark = pytest.mark.skipif("amx" not in ISAS_HERE, reason="no x86-64 Linux with AVX-512")

BF16_NAMES = ("bf16_whole", "bf16_joined", "bf16_half", "bf16_tails")
F16_NAMES = ("f16_whole", "f16_tails")
NAMES = BF16_NAMES + F16_NAMES
DEEPSEEK = "hl_sparse_flash_attention_bf16_d512_rope64"
DEEPSEEK_F16 = "hl_sparse_flash_attention_f16_d512_rope64"
SUB, BLOCK = 32, 256  # keys of a unit of many heads, and of a block
GROUPS = (*range(1, 37), 47, 48, 49, 63, 64, 65, 127, 128)
KEYS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 513)
MANY = (17, 40)  # heads: one pair of tiles, and two, both with padding


@pytest.fixture
def emulated():
    """The emulator with its counts at 0; real tiles count nothing."""
    if not TILES.emulated:
        pytest.skip("this machine has tiles of its own")
    with helpers_tiles.during("granted") as tiles:
        tiles.reset()
        yield tiles


def groups_that_run(name: str, *groups: int) -> tuple[int, ...]:
    """Those of the groups that are computed on tiles."""
    return tuple(g for g in groups if name not in F16_NAMES or g > FEW_HEADS)


def listed(case: Case, ids: np.ndarray) -> Case:
    """The same call of one row with a list."""
    return case.changed(sparse_indices=ids.astype(np.int32).reshape(1, 1, 1, -1))


# ---- every shape --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_groups_and_key_counts(name):
    """Every number of heads with three numbers of keys, every number of keys with many of heads, by
    turns as a list."""
    k = kernel(name)
    for i, group in enumerate(groups_that_run(name, *GROUPS)):
        for j in range(3):
            n = KEYS[(3 * i + j) % len(KEYS)]
            case = make_case(k, Shape(lens_kv=(max(n, 1),), group=group, value=j == 1, seed=i))
            if (i + j) % 2 and n:
                case = listed(case, np.random.default_rng(i).permutation(n))
            elif n == 0:
                case = make_case(k, Shape(lens_kv=(0,), group=group, seed=i))
            try:
                check(case.args, run(k, case, "amx"), "amx")
            except AssertionError as error:
                raise AssertionError(f"{group} heads, {n} keys: {error}") from error


@pytest.mark.parametrize("name", [DEEPSEEK, DEEPSEEK_F16])
@pytest.mark.parametrize("group", [1, 3, 8, 12, 16, 40, 64, 128])
def test_the_shipped_shape(name, group):
    """A list over pages, and the same keys in place."""
    k = kernel(name)
    for layout in (PA_BSND, BSND):
        shape = Shape(lens_kv=(300,), group=group, layout_kv=layout, block_size=16, seed=group)
        case = make_case(k, shape)
        if layout == PA_BSND:
            case = listed(case, np.random.default_rng(group).permutation(300)[:290])
        check(case.args, run(k, case, "amx"), "amx", strict=group >= 8)


def test_float16_with_few_heads_takes_the_words():
    """Three times the products are worth it where many heads share them, not where memory is the
    limit: plan says so, and the bits are those of AVX-512."""
    k = kernel("f16_whole")
    for group in (1, 8, 15, 16, 17, 32):
        case = make_case(k, Shape(lens_q=(2,), lens_kv=(50,), heads_kv=2, group=group, seed=group))
        fields = {**case.inputs(), **case.sizes(), **case.outputs(), "isa": k.isas()["amx"]}
        plan, result = k.plan(**fields)
        assert result.ok, result.error_text
        words = group <= FEW_HEADS
        assert plan.args.isa == k.isas()["avx512" if words else "amx"]
        if words:
            assert_same(run(k, case, "amx"), run(k, case, "avx512"))
            assert_same(run(k, case), run(k, case, "avx512"))


# ---- the bound ----------------------------------------------------------------------------------


def one_channel_scores(name: str, levels: np.ndarray, factors: np.ndarray, **more) -> Case:
    """A call whose scores are levels[key] * factors[head], in powers of 2, on top of small noise.
    Both have to fit the type."""
    k = kernel(name)
    shape = Shape(lens_kv=(len(levels),), group=len(factors), value=True, joined_q=k.rope > 0,
                  joined_k=k.rope > 0, seed=5, **more)  # fmt: skip
    case = make_case(k, shape)
    case.args.query[..., 0] = factors[:, None].T
    case.args.key[..., 0] = levels[None, :, None]
    case.args.query[..., 1:] *= np.asarray(0.25, case.dtype)
    case.args.key[..., 1:] *= np.asarray(0.25, case.dtype)
    return case.changed(scale_value=float(np.log(2.0)))


@pytest.mark.parametrize("group", [4, 20])
def test_the_bound_of_rounded_weights_is_reached(group):
    """Weights just above and just below the middle between two bfloat16 numbers, with values of
    both signs: the error is near what bound_of allows, so that a kernel that loses one bit more
    cannot hide behind it."""
    k = kernel("bf16_joined")
    levels = np.zeros(65)
    case = one_channel_scores("bf16_joined", levels, np.ones(group))
    a = case.args
    a.query[...] = 0.0
    a.key[...] = 0.0
    a.query[..., :3] = 1.0  # a score is the sum of three bfloat16 numbers: exact enough
    middle = np.log2(1 + 2.0**-8) - 1
    for j in range(1, 65):
        want = middle + (1e-5 if j % 2 else -1e-5)
        for channel in range(3):
            part = np.asarray(want, BF16)
            a.key[0, j, 0, channel] = part
            want -= float(part)
        a.value[0, j, 0] = 1.0 if j % 2 else -1.0
    a.value[0, 0] = 0.0
    case.extra["out_f32"] = 1
    got = run(k, case, "amx")["attention_out"].astype(np.float64)
    exact = sparse_flash_attention(a).out
    bound = bound_of(a, exact, case.dtype, "amx") - last_place(case.dtype) * abs(exact)
    ratio = abs(got - exact) / bound
    assert ratio.min() > 0.8 and ratio.max() <= 1.0, ratio


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_not_far_below_their_bound(name):
    """Of ordinary numbers, without the rounding of the result: that they are rounded weights'."""
    k = kernel(name)
    group = 20
    case = make_case(k, Shape(lens_q=(2,), lens_kv=(64,), group=group, value=True, seed=3))
    case.extra["out_f32"] = 1
    got = run(k, case, "amx")["attention_out"].astype(np.float64)
    exact = sparse_flash_attention(case.args).out
    bound = bound_of(case.args, exact, case.dtype, "amx") - last_place(case.dtype) * abs(exact)
    ratio = abs(got - exact) / bound
    least = 0.01 if case.dtype == BF16 else 5e-4  # float16: its bound is that of the worst scores
    assert np.median(ratio) > least, np.median(ratio)
    assert ratio.max() <= 1.0


@pytest.mark.parametrize("parts", ["aligned", "random"])
def test_float16_statistics_keep_the_limit_of_all_others(parts):
    """docs/numerics.md: max, sum and LSE are within 1e-5 and 16 u of the score's size, on every
    instruction set. float16 in two parts must not leave out small times small, up to 2^-16 of a
    score's terms: numbers whose small parts are as large as can be, and of one sign; and ordinary
    rows."""
    k = kernel("f16_tails")
    case = make_case(k, Shape(lens_kv=(33,), group=20, spread="equal", seed=53))
    if parts == "aligned":
        for tensor in ("query", "query_rope", "key", "key_rope"):
            getattr(case.args, tensor)[...] = 1 + 2.0**-8
    limits, cases = [], [case]
    if parts == "random":
        shapes = (dataclasses.replace(case.shape, seed=seed) for seed in range(40))
        cases = [make_case(k, shape) for shape in shapes]
    for one in cases:
        got, want = run(k, one, "amx")["softmax_max"], sparse_flash_attention(one.args).max
        size = (
            abs(one.args.scale_value)
            * sum(
                np.einsum("bshc,btnc->bsht", abs(q.astype(np.float64)), abs(x.astype(np.float64)))
                for q, x in (
                    (one.args.query, one.args.key),
                    (one.args.query_rope, one.args.key_rope),
                )
            ).max(axis=-1)[:, None]
        )
        allowed = 1e-5 * abs(want) + 2.0**-20 * size
        limits.append((abs(got - want) / np.maximum(allowed, 1e-30)).max())
    assert max(limits) <= 1.0, max(limits)


@pytest.mark.parametrize("name", ["bf16_small", "bf16_sleef", "bf16_libm"])
def test_powers_of_two_above_0(name):
    """A late maximum needs 2^x up to 2^8, which tests/test_exp2.py does not look at."""
    way = re.search(r"\w+weigh_pair_amx\(.*?p0 = (\w+)\(s0\)", text(name), re.DOTALL)[1]
    lib = {"bf16_small": (), "bf16_sleef": ("-lsleef", "-lm"), "bf16_libm": ("-lm",)}[name]
    source = f"""
        HL_KERNEL_AMX void loop(float *x, int n) {{
            for (int i = 0; i < n; i += 16) _mm512_storeu_ps(x + i, {way}(_mm512_loadu_ps(x + i)));
        }}
        void powers(float *x, int n);
        void powers(float *x, int n) {{ loop(x, n); }}"""
    x = np.linspace(-126, 8.5, 1 << 20, dtype=np.float32)
    x[:9] = np.arange(9)
    got = x.copy()
    library = bind.load(text(name), libs=lib, extra=source).library
    library.powers(got.ctypes.data_as(bind.ctypes.c_void_p), len(got))
    want = np.exp2(x.astype(np.float64))
    assert (abs(got - want) <= 2.0**-22 * want).all()
    assert (got[:9] == want[:9]).all()


# ---- a maximum that is raised late --------------------------------------------------------------


def climbs() -> dict[str, np.ndarray]:
    """Levels of 600 keys (two blocks and a part of one; subs of 32), in powers of 2."""
    j = np.arange(600)
    sub, rng = j // SUB, np.random.default_rng(4)
    return {
        "blocks": 20.0 * (j // BLOCK),
        "subs": 12.0 * sub,
        "just below": 7.5 * (sub % 2) + 7.5 * (sub // 2 % 2),
        "at the margin": np.array([0, 8, 16, 16.5, 8, 24])[sub % 6] + 0.0,
        "just above": 8.5 * sub,
        "last key of a sub": 10.0 * sub + 9.0 * (j % SUB == SUB - 1),
        "first key of a sub": 10.0 * sub + 9.0 * (j % SUB == 0),
        "up and down": rng.integers(-20, 20, 19)[sub] + 0.0,
        "falling": 150 - 8.0 * sub,
        "far": 1000.0 * (sub % 3) - 500.0 * (sub % 2),
        "only the last": 200.0 * (j == 599),
        "from far below": np.where(j < 40, -30000.0, 9.0 * (sub % 4)),
        "every key": 0.5 * (j % 200),
    }


FACTORS = {  # of each head
    "all heads": lambda h: np.ones(len(h)),
    "one head": lambda h: (h == 2) * 1.0,
    "half of them": lambda h: (h % 2) * 1.0,
    "all different": lambda h: np.array([1, 0, -1, 0.5, -0.25, 2, 0.125])[h % 7],
}


def climbing_cases(name: str, group: int) -> list[tuple[str, Case]]:
    """Calls in which m has to be raised again and again."""
    made = []
    for (what, levels), (who, factor) in itertools.product(climbs().items(), FACTORS.items()):
        case = one_channel_scores(name, levels, factor(np.arange(group)))
        made.append((f"{what}, {who}, {group} heads", case))
    return made


def climb(k: bind.Kernel, name: str, group: int) -> None:
    for what, case in climbing_cases(name, group):
        try:
            check(case.args, run(k, case, "amx"), "amx")
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error


@pytest.mark.parametrize("name", ["bf16_joined", "bf16_tails", "f16_tails"])
@pytest.mark.parametrize("group", [3, 12, 33])
def test_growing_scores(name, group):
    if groups_that_run(name, group):
        climb(kernel(name), name, group)
    else:
        climb(kernel(name), name, 64)


# What is done when m is raised, and what the text becomes without it: (kernel, heads, text, new).
WORD = r"\s*hl_v\w+_avx512\("
DEFECTS = {
    "weights in flight are not rescaled": (
        "bf16_joined", 33, r"hl_scale_pairs_amx\(words,\s*hl_vset_avx512\(factor\[r\]\)\)", "words"
    ),
    "only the large parts of them": (
        "f16_tails", 33, r"(j < [^;]*)\* PARTS(; \+\+j\) \{ /\* the block's weights)", r"\1\2"
    ),
    "O of many heads is not rescaled": (
        "bf16_joined", 33, r"if \(t->alpha\[h\] != 1\.0f\)", "if (t->alpha[h] > 2.0f)"
    ),
    "O of few heads is not rescaled": (
        "bf16_joined", 3, r"if \(t->alpha\[h\] != 1\.0f\)", "if (t->alpha[h] > 2.0f)"
    ),
    "l of many heads is not rescaled": (
        "bf16_joined", 33,
        r"(x->t->l \+ h,\s*hl_vfma_avx512\(hl_vload_avx512\(x->t->l \+ h\),) alpha,",
        r"\1 hl_vset_avx512(1.0f),",
    ),
    "the rounded sum of many heads is not rescaled": (
        "bf16_joined", 33,
        r"(x->t->mass \+ h,\s*hl_vfma_avx512\(hl_vload_avx512\(x->t->mass \+ h\),) alpha,",
        r"\1 hl_vset_avx512(1.0f),",
    ),
    "of two raises in a block one is forgotten": (
        "bf16_joined", 33,
        r"hl_vmul_avx512\(hl_vload_avx512\(x->t->alpha \+ h\), alpha\)", "alpha"
    ),
    "l of few heads is not rescaled": (
        "bf16_joined", 3,
        r"hl_vset_avx512\(t->l\[h\]\),\s*hl_vset_avx512\(t->alpha\[h\]\)",
        "hl_vset_avx512(t->l[h]), hl_vset_avx512(1.0f)",
    ),
    "the rounded sum of few heads is not rescaled": (
        "bf16_joined", 3,
        r"hl_vset_avx512\(t->mass\[h\]\),\s*hl_vset_avx512\(t->alpha\[h\]\)",
        "hl_vset_avx512(t->mass[h]), hl_vset_avx512(1.0f)",
    ),
    "weights with the old maximum stay": (
        "bf16_joined", 33, r"\n    \w+weigh_half_amx\(x, half\);\n\}", "\n}"
    ),
    "the largest score is that of the last rescale": (
        "bf16_joined", 33, r"(x->t->top \+ h,\s*)hl_vmax_avx512\(", r"\1hl_vadd_avx512("
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DEFECTS)
def test_growing_scores_notice(what):
    """The control: with one step left out of the header's text the same calls fail."""
    name, group, old, new = DEFECTS[what]
    wrong, count = re.subn(old, new, text(name))
    assert count == 1, f"{what}: the text has {count} such places"
    k = bind.load(wrong, flags=("-O1",))
    k.dtype = kernel(name).dtype
    with pytest.raises(AssertionError, match="heads: "):
        climb(k, name, group)


@pytest.mark.parametrize("name", ["bf16_joined", "f16_tails"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e3, 1e5, 1e10, 1e30])
def test_scores_of_any_size(name, sign, size):
    """What scale_value makes of ordinary scores, in both signs."""
    k = kernel(name)
    for group in groups_that_run(name, 3, 20):
        case = make_case(k, Shape(lens_kv=(300,), group=group, seed=8))
        case = case.changed(scale_value=sign * size)
        check(case.args, run(k, case, "amx"), "amx")


# ---- the same bits ------------------------------------------------------------------------------


@functools.cache
def never_in_place(name: str) -> bind.Kernel:
    """The kernel with its two questions whether rows lie evenly answered with no."""
    wrong, count = re.subn(
        r"(HL_WORD_AMX int32_t \w+_(?:value_)?in_place_amx\([^;{]*\)\n\{)",
        r"\1\n    if (row != NULL) return 0;", text(name),
    )  # fmt: skip
    assert count == 2
    made = bind.load(wrong)
    made.dtype = kernel(name).dtype
    return made


@pytest.mark.parametrize("name", ["bf16_whole", "bf16_joined"])
@pytest.mark.parametrize("group", [1, 8, 9, 16, 17, 40])
def test_rows_in_place_are_copied_rows(name, group):
    """The same memory, read where it is and copied."""
    k = kernel(name)
    for n in (16, 31, 32, 33, 64, 100, 256, 300):
        for value in (False, True):
            case = make_case(k, Shape(lens_kv=(n,), group=group, value=value, seed=n))
            assert_same(run(never_in_place(name), case, "amx"), run(k, case, "amx"))


def test_rows_in_place_are_read_where_they_lie():
    """The control: there are fewer instructions than words' worth of copies to see, so the panel is
    looked at. With rows in place nothing has been written to it."""
    k = kernel("bf16_joined")
    case = make_case(k, Shape(lens_kv=(32,), group=20, joined_k=True, seed=1))
    fields = {**case.inputs(), **case.sizes(), **case.outputs(), "isa": k.isas()["amx"]}
    written = []
    for one in (k, never_in_place("bf16_joined")):
        workspace = np.full(k.workspace_bytes(**fields), 0xA5, np.uint8)
        assert one.run(**fields, workspace=workspace).ok
        written.append(int((workspace != 0xA5).sum()))
    # all of the panel but one tile, in which Q^T was turned before
    assert written[1] > written[0] + (4 - 1) * 1024 * 0.95, written


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [1, 8, 12, 17, 40])
def test_where_keys_lie_changes_no_bit(name, group):
    """Rows at one distance, a list that names the same keys, rows with gaps, all batches in one
    (TND), pages of several sizes in any order: the same keys in the same order."""
    k = kernel(name)
    for n in (33, 100, 290):
        base = make_case(k, Shape(lens_kv=(n,), group=group, value=True, seed=n))
        want = run(k, base, "amx")
        a = base.args
        assert_same(run(k, listed(base, np.arange(n)), "amx"), want)
        tensors = [t for t in ("key", "key_rope", "value") if getattr(a, t) is not None]
        spaced = {t: np.repeat(getattr(a, t), 2, axis=1) for t in tensors}
        strides = {f"{t}_stride": (0, 2 * x.shape[-1], 0) for t, x in spaced.items()}
        outputs = base.outputs()
        fields = {**base.inputs(), **base.sizes(), **outputs, **spaced, **strides}
        assert k.run(**fields, isa=k.isas()["amx"]).ok
        assert_same(outputs, want)
        ends = {"actual_seq_lengths_query": np.array([1], np.int32),
                "actual_seq_lengths_kv": np.array([n], np.int32)}  # fmt: skip
        flat = {t: getattr(a, t)[0] for t in (*tensors, "query")}
        if a.query_rope is not None:
            flat["query_rope"] = a.query_rope[0]
        tnd = base.changed(**flat, **ends, layout_query=TND, layout_kv=TND)
        got = run(k, tnd, "amx")
        assert same_bits(got["attention_out"][0], want["attention_out"][0, 0])
        for size in (1, 16, 48):
            assert_same(run(k, in_pages(base, tensors, size), "amx"), want)


def in_pages(base: Case, tensors: list[str], size: int) -> Case:
    """The keys of a BSND case of one batch, in pages that lie in another order."""
    n = base.args.key.shape[1]
    pages = -(-n // size)
    place = np.random.default_rng(size).permutation(pages)
    changes = {"block_table": place[None].astype(np.int32), "layout_kv": PA_BSND,
               "actual_seq_lengths_kv": np.array([n], np.int32)}  # fmt: skip
    for tensor in tensors:
        rows = getattr(base.args, tensor)[0]
        pool = np.full((pages * size, *rows.shape[1:]), np.nan, rows.dtype)
        at = place[np.arange(n) // size] * size + np.arange(n) % size
        pool[at] = rows
        changes[tensor] = pool.reshape(pages, size, *rows.shape[1:])
    return base.changed(**changes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [3, 12, 20])
def test_rope_and_value_apart_or_not(name, group):
    k = kernel(name)
    base = make_case(k, Shape(lens_kv=(70,), group=group, seed=2))
    want = run(k, base, "amx")
    apart = base.changed(value=np.ascontiguousarray(base.args.key[..., : k.dv]))
    assert_same(run(k, apart, "amx"), want)
    if k.rope:
        a = base.args
        joined = base.changed(
            query=np.concatenate([a.query, a.query_rope], -1), query_rope=None,
            key=np.concatenate([a.key, a.key_rope], -1), key_rope=None,
        )  # fmt: skip
        assert_same(run(k, joined, "amx"), want)
        assert_same(run(k, joined.changed(value=apart.args.value), "amx"), want)


@pytest.mark.parametrize("name", ["bf16_whole", "f16_whole"])
def test_the_other_heads_change_no_bit_of_one(name):
    """A head's result is the same at any place among the same number of heads; heads that only pad
    a tile leak nothing."""
    k = kernel(name)
    for group in groups_that_run(name, 5, 12, 20, 47):
        case = make_case(k, Shape(lens_kv=(90,), group=group, seed=group))
        want = run(k, case, "amx")["attention_out"]
        order = np.random.default_rng(0).permutation(group)
        changes = {"query": case.args.query[:, :, order].copy()}
        changes["query_rope"] = case.args.query_rope[:, :, order].copy()
        got = run(k, case.changed(**changes), "amx")["attention_out"]
        assert same_bits(got, np.ascontiguousarray(want[:, :, order]))


# ---- tiles are released -------------------------------------------------------------------------


def test_tiles_are_released_after_every_call():
    for name, group in itertools.product(("bf16_tails", "f16_tails"), (3, 12, 20)):
        k = kernel(name)
        case = make_case(k, Shape(lens_q=(2,), lens_kv=(300,), group=group, seed=1))
        fields = {**case.inputs(), **case.sizes(), **case.outputs(), "isa": k.isas()["amx"]}
        for change in ({}, {"batch": -1}, {"scale_value": np.nan}, {"isa": 99}, {"seq_q": 0}):
            k.run(**{**fields, **change}, workspace=np.zeros(1 << 20, np.uint8))
            assert TILES.configured() == 0, (name, group, change)
        plan, _ = k.plan(**fields, chunk_keys=128)
        partials = np.zeros(plan.split_bytes, np.uint8)
        plan, result = k.plan(
            **fields, chunk_keys=128, partials=partials, partials_bytes=partials.nbytes
        )
        assert result.ok and plan.n_merges
        workspace = np.zeros(plan.task_bytes, np.uint8)
        for i in range(-1, plan.n_tasks + 1):
            k.task(plan, i, workspace)
            assert TILES.configured() == 0, (name, group, i)
        for i in range(-1, plan.n_merges + 1):
            k.merge(plan, i)
            assert TILES.configured() == 0, (name, group, i)


CONFIGURE = r"""
void configure(const void *shapes);
void configure(const void *shapes)
{
    __asm__ volatile("ldtilecfg (%0)" : : "r"(shapes) : "memory");
}
"""


def test_tiles_of_the_caller_do_not_matter():
    """The ABI makes tiles the caller's to save: a call may come while some are in use, of any shape
    and with anything in them. Its result is the same; the caller's are gone."""
    library = bind.load(text("bf16_whole"), flags=("-O1",), extra=CONFIGURE)
    library.dtype = kernel("bf16_whole").dtype
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    shapes[16:32:2] = 12
    shapes[48:56] = 3
    for group in (3, 12, 20):
        case = make_case(library, Shape(lens_kv=(300,), group=group, seed=1))
        want = run(library, case, "amx")
        assert library.isas()["amx"]  # asks for permission
        library.library.configure(shapes.ctypes.data_as(bind.ctypes.c_void_p))
        assert TILES.configured() == 1
        assert TILES.clobber() or not TILES.emulated
        assert_same(run(library, case, "amx"), want)
        assert TILES.configured() == 0


# ---- who may use tiles --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["absent", "refused"])
def test_without_permission_plan_falls_back(emulated, mode):
    """Silently, to the bits of AVX-512. Who insists is told."""
    k = kernel("bf16_whole")
    amx = k.constants["HL_ISA_AMX"]
    for group in (3, 20):
        case = make_case(k, Shape(lens_q=(2,), lens_kv=(50,), group=group, seed=1))
        fields = {**case.inputs(), **case.sizes(), **case.outputs()}
        on_tiles, want = run(k, case), run(k, case, "avx512")
        assert k.plan(**fields)[0].args.isa == amx
        with helpers_tiles.during(mode) as tiles:
            tiles.reset()
            assert set(k.isas()) == set(isas_in("bf16_whole")) - {"amx"}
            plan, result = k.plan(**fields)
            assert result.ok and plan.args.isa == k.constants["HL_ISA_AVX512"]
            assert_same(run(k, case), want)
            outputs = case.outputs()
            refused = {**fields, **outputs, "isa": amx}
            result = k.run(**refused, workspace=np.zeros(1 << 20, np.uint8))
            assert (result.status_name, result.argument) == ("HL_ERR_UNSUPPORTED", "ISA")
            assert result.value == amx and re.match(r"isa \w.* it is 5$", result.error_text)
            assert all((x.view(np.uint8) == 0xFF).all() for x in outputs.values())
            made = tiles.counts()
            assert made.pop("requests") > 0 and not any(made.values()), made
        assert_same(run(k, case), on_tiles)


def test_a_header_without_tiles_asks_for_none(emulated):
    """HL_NO_TILES; and float32, which has none."""
    no_tiles = bind.load(text("bf16_whole"), flags=("-O1",), defines=("HL_NO_TILES",))
    no_tiles.dtype = kernel("bf16_whole").dtype
    case = make_case(no_tiles, Shape(lens_kv=(50,), group=20, seed=1))
    assert set(no_tiles.isas()) == {"avx512"}
    result = no_tiles.run(
        **case.inputs(), **case.sizes(), **case.outputs(), isa=no_tiles.constants["HL_ISA_AMX"],
        workspace=np.zeros(1 << 20, np.uint8),
    )  # fmt: skip
    assert result.status_name == "HL_ERR_UNSUPPORTED"
    check(case.args, run(no_tiles, case), "avx512")
    small = kernel("f32_small")
    run(small, make_case(small, Shape(lens_kv=(9,), group=20)))
    assert not any(emulated.counts().values()), emulated.counts()


def test_tiles_alone():
    """HL_ISA_ONLY_AMX: the words of AVX-512 come along, as plan may take them; nothing else."""
    for name, group in (("bf16_whole", 3), ("bf16_whole", 20), ("f16_whole", 20), ("f16_whole", 3)):
        k = bind.load(text(name), defines=("HL_ISA_ONLY_AMX",))
        k.dtype = kernel(name).dtype
        assert set(k.isas()) == {"avx512", "amx"}
        case = make_case(k, Shape(lens_kv=(50,), group=group, seed=1))
        want = run(kernel(name), case, "amx")
        assert_same(run(k, case, "amx"), want)
        assert_same(run(k, case), want)
        if TILES.emulated:
            with helpers_tiles.during("refused"):
                assert set(k.isas()) == {"avx512"}
                assert_same(run(k, case), run(kernel(name), case, "avx512"))


def test_permission_is_asked_for_by_plan_and_not_by_task(emulated):
    k = kernel("bf16_whole")
    case = make_case(k, Shape(lens_q=(3,), lens_kv=(50,), group=3, seed=1))
    plan, _ = k.plan(**case.inputs(), **case.sizes(), **case.outputs())
    assert emulated.counts()["requests"] > 0
    emulated.reset()
    k.execute(plan)
    made = emulated.counts()
    assert made["requests"] == 0 and made["tdpbf16ps"] > 0


# ---- how much work ------------------------------------------------------------------------------


def columns_of(k: bind.Kernel) -> tuple[int, int]:
    """32 channels at a time: of the scores (nope and rope apart), and of the values."""
    return -(-k.dk // 32) + -(-k.rope // 32), -(-k.dv // 32)


def subs_of(n: int, step: int) -> int:
    """Steps of so many keys, block by block."""
    return sum(-(-min(BLOCK, n - at) // step) for at in range(0, n, BLOCK))


def counted(emulated, name: str, group: int, n: int) -> dict[str, int]:
    k = kernel(name)
    case = make_case(k, Shape(lens_kv=(n,), group=group, seed=1))
    emulated.reset()
    run(k, case, "amx")
    made = emulated.counts()
    assert made["violations"] == 0
    return made


WORK = ["bf16_whole", "bf16_tails", "f16_tails", "f16_whole", DEEPSEEK, DEEPSEEK_F16]


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("group", [17, 32, 33, 128])
@pytest.mark.parametrize("n", [1, 32, 256, 290])
def test_the_work_of_many_heads(emulated, name, group, n):
    """For 32 keys and 32 heads, 2 x 2 tiles: 4 products a column (float16: 4 times as many for the
    scores, 3 times for the values), as many loads as products in bfloat16 (two of K or V, two of Q
    or P) and fewer in float16, and no more stores than there are tiles of results."""
    split = header(name).kernels[0].dtype == "f16"
    made = counted(emulated, name, group, n)
    scores, values = columns_of(kernel(name))
    head_pairs, subs, blocks = -(-group // 32), subs_of(n, SUB), -(-n // BLOCK)
    units = subs * head_pairs
    assert made["tdpbf16ps"] == 4 * units * (4 * scores + 3 * values if split else scores + values)
    o_tiles = 4 * head_pairs * values
    most = units * (scores + values) * (10 if split else 4)
    assert made["tileloadd"] + made["tileloaddt1"] <= most + o_tiles * (blocks - 1)
    assert made["tilestored"] == 4 * units + o_tiles * blocks
    assert made["tilezero"] == 4 * units + o_tiles
    assert made["ldtilecfg"] == made["tilerelease"] == blocks


@pytest.mark.parametrize("name", ["bf16_whole", "bf16_half", "bf16_tails", DEEPSEEK])
@pytest.mark.parametrize("group", [1, 8, 9, 16])
@pytest.mark.parametrize("n", [1, 16, 17, 256, 290])
def test_the_work_of_few_heads(emulated, name, group, n):
    """For 16 keys: one product a column of scores; one a column of values, two from 9 heads on
    (even and odd channels). Each tile of K and of V is loaded once, which is what memory has to
    deliver; O goes out and in once a block."""
    made = counted(emulated, name, group, n)
    scores, values = columns_of(kernel(name))
    steps, blocks, halves = subs_of(n, 16), -(-n // BLOCK), 1 if group <= 8 else 2
    assert made["tdpbf16ps"] == steps * (scores + halves * values)
    assert made["tileloaddt1"] == steps * (scores + values)  # what is read once: K and V
    width = 4 if group <= 8 else 2  # columns of values that share a load of P
    passes = values // width + bin(values % width).count("1")
    o_tiles = halves * values
    assert made["tileloadd"] == (
        steps * scores  # Q
        + steps * passes * halves  # P
        + o_tiles * (blocks - 1)
    )
    assert made["tilestored"] == 3 * steps + o_tiles * blocks  # three chains of scores
    assert made["ldtilecfg"] == 2 * blocks and made["tilerelease"] == blocks


# ---- threads ------------------------------------------------------------------------------------


def test_threads_with_different_shapes():
    """Two calls at once, of few heads and of many, of another kernel: tiles belong to a thread."""
    cases = []
    calls = (("bf16_whole", 3), ("bf16_tails", 40), ("f16_tails", 20), ("bf16_half", 12))
    for name, group in calls:
        case = make_case(kernel(name), Shape(lens_q=(2,), lens_kv=(290,), group=group, seed=1))
        cases.append((kernel(name), case, run(kernel(name), case, "amx")))
    wrong = []

    def work(at: int) -> None:
        k, case, want = cases[at]
        for _ in range(5):
            got = run(k, case, "amx")
            if not all(same_bits(got[n], want[n]) for n in want) or TILES.configured():
                wrong.append(at)

    for pair in itertools.combinations(range(4), 2):
        threads = [threading.Thread(target=work, args=(at,)) for at in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ---- rules that are exact -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [1, 8, 12, 17, 40])
def test_one_key_gives_its_value(name, group):
    """Exactly, whatever its weight was rounded to; and so do keys that are all the same, at least
    where their weights add up without rounding."""
    k = kernel(name)
    for scale in (1.0, -37.7, 1e-9):
        case = make_case(k, Shape(lens_kv=(1,), group=group, value=True, seed=1))
        case = case.changed(scale_value=scale)
        got = run(k, case, "amx")
        want = np.broadcast_to(case.args.value[:, :1], got["attention_out"].shape)
        assert same_bits(got["attention_out"], want.copy())
        check_stats(case.args, got, sparse_flash_attention(case.args), "amx")
        for n in (2, 16, 33, 64):
            case = make_case(k, Shape(lens_kv=(n,), group=group, value=True, seed=1))
            key, value = (np.repeat(x[:, :1], n, 1) for x in (case.args.key, case.args.value))
            changes = {"key": key, "value": value, "scale_value": scale}
            if k.rope:
                changes["key_rope"] = np.repeat(case.args.key_rope[:, :1], n, 1)
            same = case.changed(**changes)
            got = run(k, same, "amx")
            want = np.broadcast_to(value[:, :1], got["attention_out"].shape)
            assert same_bits(got["attention_out"], want.copy())
            check_stats(same.args, got, sparse_flash_attention(same.args), "amx")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [3, 12, 20])
def test_nan_rows(name, group):
    """A NaN in a key: all heads. In a query: that head. In a value: that channel of all heads (and
    up to 16 heads its neighbour). Among the first and the last of a sub and of a block."""
    k = kernel(name)
    n = 290
    clean = make_case(k, Shape(lens_kv=(n,), group=group, value=True, seed=6))
    before = run(k, clean, "amx")
    for at in (0, 1, 31, 32, 255, 256, 288, 289):
        key = clean.args.key.copy()
        key[0, at, 0, 1] = np.nan
        got = run(k, clean.changed(key=key), "amx")
        assert all(np.isnan(x.astype(np.float64)).all() for x in got.values()), at
        value = clean.args.value.copy()
        value[0, at, 0, 4] = np.nan
        got = run(k, clean.changed(value=value), "amx")
        bad = np.isnan(got["attention_out"].astype(np.float64))
        few = group <= FEW_HEADS and clean.dtype == BF16
        hit = [4, 5] if few else [4]
        assert bad[..., hit].all() and bad.sum() == len(hit) * group
        good = [c for c in range(k.dv) if c not in hit]
        for output in before:
            one, two = (x[output] for x in (before, got))
            if output == "attention_out":
                one, two = (np.ascontiguousarray(x[..., good]) for x in (one, two))
            assert same_bits(one, two), output
    for head in (0, group - 1):
        query = clean.args.query.copy()
        query[0, 0, head, 2] = np.nan
        got = run(k, clean.changed(query=query), "amx")
        others = [h for h in range(group) if h != head]
        assert np.isnan(got["attention_out"][0, 0, head].astype(np.float64)).all()
        assert same_bits(got["attention_out"][0, 0, others], before["attention_out"][0, 0, others])
        assert same_bits(got["softmax_lse"][..., others], before["softmax_lse"][..., others])
        assert np.isnan(got["softmax_lse"][..., head]).all()


@pytest.mark.parametrize("group", [3, 12, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_stays_in_its_channel(group, bad):
    """As on every other instruction set; but up to 16 heads, where words of V are two channels, it
    reaches the other one of its word (docs/numerics.md)."""
    k = kernel("bf16_whole")
    case = make_case(k, Shape(lens_kv=(40,), group=group, value=True, seed=6))
    case.args.value[0, 7, 0, 4] = bad
    got, want = run(k, case, "amx")["attention_out"], sparse_flash_attention(case.args).out
    finite = np.isfinite(want)
    if group <= FEW_HEADS:
        finite = np.repeat(finite[..., ::2] & finite[..., 1::2], 2, axis=-1)
    assert (np.isfinite(got.astype(np.float64)) == finite).all()


@pytest.mark.parametrize("name", ["bf16_joined", "bf16_half"])
@pytest.mark.parametrize("group", [3, 12, 20])
def test_scores_of_minus_infinity(name, group):
    """Keys with an infinite channel: a head sees each as -infinity (weight 0) or +infinity (NaN),
    wherever it is, also where a whole sub or block has nothing else."""
    k = kernel(name)
    for lo, hi in ((0, 1), (5, 6), (0, 32), (0, 64), (32, 64), (0, 256), (256, 299), (17, 290)):
        case = make_case(k, Shape(lens_kv=(300,), group=group, value=True, seed=6))
        case.args.query[..., 1] = -abs(case.args.query[..., 1])
        case.args.key[0, lo:hi, 0, 1] = np.inf
        case = case.changed(scale_value=abs(case.args.scale_value))
        check(case.args, run(k, case, "amx"), "amx")
        case.args.query[..., group - 1, 1] *= -1
        got, want = run(k, case, "amx"), sparse_flash_attention(case.args)
        bad = np.isnan(want.out)
        assert bad[0, 0, group - 1].all() and not bad[0, 0, : group - 1].any()
        assert (np.isnan(got["attention_out"].astype(np.float64)) == bad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flush", ["left", "right"])
def test_guard_pages(name, flush):
    """Tiles load 16 rows of 64 bytes: of whole columns in place, of others copied, never a byte
    more than there is, at either end of any tensor."""
    k = kernel(name)
    for group in groups_that_run(name, 1, 8, 12, 17, 33):
        for n, strides, value in (
            (1, False, True),
            (15, True, False),
            (16, False, True),
            (17, False, False),
            (32, False, True),
            (33, True, True),
            (64, False, False),
            (257, False, True),
        ):
            joined = {"joined_q": k.rope > 0 and n % 2 == 0, "joined_k": k.rope > 0 and n % 3 == 0}
            shape = Shape(lens_kv=(n,), group=group, value=value, seed=n, **joined)
            case = make_case(k, shape)
            check(case.args, run_guarded(k, case, Way("amx", flush, strides=strides)), "amx")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_seen_is_not_used(name):
    """Rows behind the end of a batch, of a page and of a list are NaN; with zeros there the bits
    are the same."""
    k = kernel(name)
    for group in groups_that_run(name, 3, 12, 20):
        for layout, lists in ((BSND, "none"), (PA_BSND, "none"), (PA_BSND, "blocks")):
            shape = Shape(lens_q=(2, 1), lens_kv=(45, 70), group=group, layout_kv=layout, pad_kv=9,
                          pad_q=1, block_size=48, lists=lists, list_length=20, sparse_mode=3,
                          seed=group)  # fmt: skip
            case = make_case(k, shape)
            want = run(k, case, "amx")
            check(case.args, want, "amx")
            tensors = ("query", "query_rope", "key", "key_rope")
            found = {t: getattr(case.args, t) for t in tensors if getattr(case.args, t) is not None}
            assert np.isnan(found["key"]).any()
            zeros = {t: np.nan_to_num(x, nan=0.0) for t, x in found.items()}
            assert_same(run(k, case.changed(**zeros), "amx"), want)
