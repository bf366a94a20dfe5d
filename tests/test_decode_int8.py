"""incre_flash_attention with int8 queries, keys and values, against its oracle."""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import WORDS_HERE
from helpers_cases import Way
from helpers_memory import Arena, in_child
from helpers_runner import QEMU, need_aarch64, play, program, record
from oracle_decode_int8 import F32, Row, Scales, attend, quantised, result, to_codes

from gen import bind, spec
from gen.refusal import Refusal

BSND, PA_BSND, BSH, BNSD, PA_BNSD = 0, 2, 3, 4, 5
PAGED, BY_HEAD = (PA_BSND, PA_BNSD), (BNSD, PA_BNSD)
PAIRS = (*((x, x) for x in (BSND, BSH, BNSD)), *((x, PA_BSND) for x in (BSND, BSH, BNSD)))
PAIRS += ((BNSD, PA_BNSD),)
BF16 = np.dtype(ml_dtypes.bfloat16)
OP = "incre_flash_attention"
EVERY = ["window", "slots", "pages"]
# Odd, so that every vector has a tail; whole vectors; values wider than keys.
SPECS: dict[str, dict[str, Any]] = {
    "odd": {"dk": 33, "dv": 19, "features": EVERY},
    "whole": {"dk": 128},
    "wide": {"dk": 9, "dv": 70, "features": ["window"]},
}
ALL = tuple(SPECS)


@functools.cache
def text(name: str) -> str:
    return bind.header_text(spec.parse_header({"op": OP, "dtype": "i8", **SPECS[name]}))


@functools.cache
def kernel(name: str) -> bind.Kernel:
    return bind.load(text(name))


def by_pair(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name,isa", [(n, isa) for n in names for isa in WORDS_HERE])


@dataclass(frozen=True)
class Shape:
    """One call. Keys of batch b are rows begin .. begin + lens[b] - 1 of its cache."""

    lens: tuple[int, ...] = (8,)
    rows: int = 1
    heads_kv: int = 1
    group: int = 1
    layout_q: int = BSND
    layout_kv: int = BSND
    room: int = 0  # cache rows behind the longest length
    padding: int | None = None
    block_size: int = 16
    table: str = "blocks"  # slots, pages
    value: bool = True  # has a tensor of its own
    pse: str = "none"  # one, each
    mask: str = "none"
    mask_rows: bool = False
    hidden: float = 0.4
    window: int = 0
    scales: Scales = field(default_factory=Scales)
    quant: str = "none"  # tensor, channel
    quant_bf16: bool = False
    seed: int = 0

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass
class Case:
    """Numbers in the order that the oracle has them: caches [B][W][N2][channels]."""

    shape: Shape
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    pse: np.ndarray | None
    mask: np.ndarray | None
    quant_scale: np.ndarray | None
    quant_offset: np.ndarray | None

    @property
    def width(self) -> int:
        return self.key.shape[1]

    def begin(self, b: int) -> int | None:
        """The first row of a batch's keys; None: it sees none."""
        s = self.shape
        if s.padding is None or s.layout_kv in PAGED:
            return 0
        begin = self.width - max(s.padding, 0) - s.lens[b]
        return begin if begin >= 0 else None

    def row(self, b: int, i: int, h: int) -> Row:
        """What the oracle says of one query."""
        s = self.shape
        begin, n = self.begin(b), s.lens[b]
        j = np.arange(n if begin is not None else 0)
        own = n - s.rows + i
        j = j[j <= own]
        if s.window:
            j = j[j > own - s.window]
        at = j + (begin or 0)
        if self.mask is not None:
            mask = self.mask[b % len(self.mask)][i % self.mask.shape[1]]
            at = at[mask[at] == 0]
        pse = None if self.pse is None else self.pse[b % len(self.pse), h, i, at]
        kv = h // s.group
        k, v = self.key[b, at, kv], self.value[b, at, kv]
        return attend(self.query[b, i, h], k, v, pse, s.scales)

    def rows(self) -> dict[tuple[int, int, int], Row]:
        s = self.shape
        return {
            (b, i, h): self.row(b, i, h)
            for b in range(len(s.lens))
            for i in range(s.rows)
            for h in range(s.heads_kv * s.group)
        }


def make_case(name: str, s: Shape) -> Case:
    rng = np.random.default_rng(s.seed)
    dk, dv = SPECS[name]["dk"], SPECS[name].get("dv", SPECS[name]["dk"])
    b, n1, width = len(s.lens), s.heads_kv * s.group, max(s.lens) + s.room
    if s.layout_kv in PAGED and s.table != "slots":
        width = -(-width // s.block_size) * s.block_size

    def codes(*shape: int) -> np.ndarray:
        return rng.integers(-128, 128, shape).astype(np.int8)

    key = codes(b, width, s.heads_kv, dk)
    pse = mask = scale = offset = None
    if s.pse != "none":
        shape = (b if s.pse == "each" else 1, n1, s.rows, width + 3)
        pse = rng.standard_normal(shape).astype(np.float16)
    if s.mask != "none":
        shape = (b if s.mask == "each" else 1, s.rows if s.mask_rows else 1, width + 5)
        mask = ((rng.random(shape) < s.hidden) * rng.integers(1, 256, shape)).astype(np.uint8)
    if s.quant != "none":
        count = n1 * dv if s.quant == "channel" else 1
        kind = BF16 if s.quant_bf16 else np.dtype(F32)
        scale = rng.uniform(1, 30, count).astype(kind)
        offset = rng.uniform(-20, 20, count).astype(kind)
    value = codes(b, width, s.heads_kv, dv) if s.value else key[..., :dv]
    query = codes(b, s.rows, n1, dk)
    return Case(s, query, key, value, pse, mask, scale, offset)


def laid_out(tensor: np.ndarray, layout: int) -> np.ndarray:
    order = tensor.swapaxes(1, 2) if layout in BY_HEAD else tensor
    return np.ascontiguousarray(order)


def fields_of(name: str, case: Case, isa: str, place: Any = lambda x: x) -> dict[str, Any]:
    """The fields of the call but its output; place: puts an array where it is to lie."""
    s, rng = case.shape, np.random.default_rng(case.shape.seed + 1)
    k = kernel(name)
    b = len(s.lens)
    made: dict[str, Any] = {
        "query": laid_out(case.query, s.layout_q),
        "batch": b,
        "seq_q": s.rows,
        "heads_q": s.heads_kv * s.group,
        "heads_kv": s.heads_kv,
        "layout_query": s.layout_q,
        "layout_kv": s.layout_kv,
        "actual_seq_lengths": np.array(s.lens, np.int32),
        "window": s.window,
        "scale_value": s.scales.scale_value,
        "dequant_scale1": np.array([s.scales.dequant1], F32),
        "quant_scale1": np.array([s.scales.quant1], F32),
        "dequant_scale2": np.array([s.scales.dequant2], F32),
        "isa": k.isas()[isa],
    }
    if s.padding is not None:
        made["kv_padding_size"] = np.array([s.padding], np.int32)
    tensors = {"key": case.key, **({"value": case.value} if s.value else {})}
    if s.layout_kv not in PAGED:
        made["seq_kv"] = case.width
        made |= {n: laid_out(t, s.layout_kv) for n, t in tensors.items()}
    else:
        made |= paged(s, tensors, case.width, rng, place)
    if case.pse is not None:
        made |= {"pse_shift": case.pse, "pse_batch": len(case.pse)}
        made["pse_width"] = case.pse.shape[-1]
    if case.mask is not None:
        made |= {"atten_mask": case.mask, "mask_batch": len(case.mask)}
        made |= {"mask_rows": case.mask.shape[1], "mask_width": case.mask.shape[2]}
    if case.quant_scale is not None:
        made |= {"quant_scale2": case.quant_scale, "quant_offset2": case.quant_offset}
        made["quant_per_channel"] = int(s.quant == "channel")
        made["quant_bf16"] = int(s.quant_bf16)
    return {n: place(x) if isinstance(x, np.ndarray) else x for n, x in made.items()}


def paged(
    s: Shape, tensors: dict[str, np.ndarray], width: int, rng: np.random.Generator, place: Any
) -> dict[str, Any]:
    """Rows of each batch in blocks of a pool, in any order; what no length names is nonsense."""
    b = len(s.lens)
    per = 1 if s.table == "slots" else s.block_size
    entries = -(-width // per)
    blocks = -(-b * entries * per // s.block_size) + 2
    places = blocks * s.block_size // per
    table = rng.permutation(places)[: b * entries].reshape(b, entries).astype(np.int32)
    made: dict[str, Any] = {"block_size": s.block_size, "max_blocks": entries}
    pools = {}
    for name, tensor in tensors.items():
        pool = rng.integers(-128, 128, (places, per, *tensor.shape[2:])).astype(np.int8)
        full = np.zeros((b, entries * per, *tensor.shape[2:]), np.int8)
        full[:, :width] = tensor
        pool[table.reshape(-1)] = full.reshape(b * entries, per, *tensor.shape[2:])
        pools[name] = pool.reshape(blocks, s.block_size, *tensor.shape[2:])
    for i, n in enumerate(s.lens):
        table[i, -(-n // per) :] = 1 << 30
    if s.table == "pages":
        for name, pool in pools.items():
            flat = [
                place(laid_out(pool[at][None], s.layout_kv)[0]) if at < blocks else 16
                for at in table.reshape(-1)
            ]
            made[f"{name}_pages"] = flat
        return made
    made |= {name: laid_out(pool, s.layout_kv) for name, pool in pools.items()}
    return {
        **made,
        "block_table": table,
        "num_blocks": blocks,
        "index_kind": int(s.table == "slots"),
    }


def output_of(name: str, case: Case, f32: bool) -> tuple[tuple[int, ...], np.dtype]:
    s, dv = case.shape, kernel(name).dv
    shape = (len(s.lens), s.rows, s.heads_kv * s.group, dv)
    if s.layout_q == BNSD:
        shape = (shape[0], shape[2], shape[1], dv)
    kind = np.int8 if s.quant != "none" else F32 if f32 else np.float16
    return shape, np.dtype(kind)


def run(name: str, case: Case, isa: str, f32: bool = False, **more: Any) -> np.ndarray:
    """One call; its output as [B][S1][N1][DV]."""
    shape, kind = output_of(name, case, f32)
    out = np.full(shape, 99, kind)
    fields = {**fields_of(name, case, isa), "attention_out": out, "out_f32": int(f32), **more}
    result = kernel(name).run(**fields)
    assert result.ok, f"{result.error_text} ({case.shape})"
    return out.swapaxes(1, 2) if case.shape.layout_q == BNSD else out


def check(case: Case, got: np.ndarray) -> None:
    """Every element lies between what the oracle has as least and most: nearly always one number,
    the same bits."""
    s = case.shape
    for (b, i, h), row in case.rows().items():
        ends = result(row, s.scales)
        with np.errstate(all="ignore"):
            if s.quant == "none":
                ends = tuple(x.astype(got.dtype) for x in ends)
            else:
                of = slice(h * len(row.low), (h + 1) * len(row.low))
                numbers = (case.quant_scale, case.quant_offset)
                numbers = (x[of] if s.quant == "channel" else x for x in numbers)
                scale, offset = numbers
                ends = tuple(quantised(x, scale, offset) for x in ends)
        found = got[b, i, h]
        if s.quant == "none" and row.nan:
            assert np.isnan(found).all(), (b, i, h, s)
            continue
        good = (found >= np.minimum(*ends)) & (found <= np.maximum(*ends))
        assert good.all(), (b, i, h, found[~good], [x[~good] for x in ends], s)


@functools.lru_cache(maxsize=8)
def prepared(name: str, s: Shape) -> Case:
    return make_case(name, s)


def check_call(name: str, s: Shape, isa: str, **more: Any) -> np.ndarray:
    case = prepared(name, s)
    got = run(name, case, isa, f32=s.quant == "none" and s.seed % 2 == 0, **more)
    check(case, got)
    return got


# ---- everything that selects keys ---------------------------------------------------------------


def test_every_instruction_set_is_present():
    for name in ALL:
        assert tuple(kernel(name).isas()) == WORDS_HERE


@by_pair(*ALL)
def test_every_number_of_keys(name, isa):
    for n in (*range(0, 20), *range(30, 35), *range(62, 68), *range(126, 131), 200):
        check_call(name, Shape(lens=(n,), group=1 + n % 5, seed=n), isa)


@by_pair(*ALL)
@pytest.mark.parametrize("layouts", PAIRS)
def test_every_layout(name, isa, layouts):
    q, kv = layouts
    for table in ("blocks", *(SPECS[name].get("features", ())[1:] if kv in PAGED else ())):
        s = Shape(
            lens=(37, 5, 0),
            rows=3,
            heads_kv=2,
            group=3,
            layout_q=q,
            layout_kv=kv,
            room=2,
            block_size=5,
            table=table,
            pse="each",
            mask="each",
            mask_rows=True,
            seed=q * 7 + kv,
        )
        check_call(name, s, isa)
        check_call(name, dataclasses.replace(s, rows=1, mask_rows=False, pse="one"), isa)


@by_pair(*ALL)
def test_rows_and_heads(name, isa):
    """The later rows of which see no key of the second batch's, or few; from multi-head to
    multi-query."""
    for rows in range(1, 17):
        s = Shape(lens=(41, 7), rows=rows, heads_kv=2, group=1 + rows % 3, seed=rows)
        check_call(name, s, isa)
    for group in (*range(1, 10), 16, 33, 64):
        check_call(name, Shape(lens=(19,), group=group, seed=group), isa)


@by_pair("odd", "wide")
def test_windows(name, isa):
    for window in (1, 2, 5, 40, 1000):
        for rows in (1, 3):
            s = Shape(lens=(40, 3), rows=rows, group=2, window=window, mask="one", seed=window)
            check_call(name, s, isa)


@by_pair(*ALL)
def test_left_padding(name, isa):
    for padding in (-3, 0, 1, 4, 5, 100):
        s = Shape(lens=(36, 9), rows=2, group=2, room=4, padding=padding, seed=padding + 5)
        check_call(name, dataclasses.replace(s, pse="each", mask="each"), isa)
        check_call(name, dataclasses.replace(s, layout_kv=PA_BSND), isa)


@by_pair(*ALL)
def test_masks(name, isa):
    for mask in ("one", "each"):
        for rows, own in ((1, False), (4, False), (4, True)):
            for hidden in (0.05, 0.95, 1.0):
                s = Shape(
                    lens=(70, 11), rows=rows, group=2, mask=mask, mask_rows=own, hidden=hidden
                )
                check_call(name, s, isa)


@by_pair("odd", "whole")
def test_values_in_the_first_channels_of_the_keys(name, isa):
    for layout in (BSND, PA_BSND):
        s = Shape(lens=(50, 20), rows=3, heads_kv=2, group=3, layout_kv=layout, value=False)
        check_call(name, s, isa)


# ---- numbers ------------------------------------------------------------------------------------


@by_pair(*ALL)
def test_a_single_key_is_exact(name, isa):
    """P = 1: the weight's code is that of quant_scale1, whatever the score."""
    for quant in (127.0, 1.0, 0.5, 1.5, 2.5, 126.5, 126.49999, 127.5, 1e30, -3.5, -128.5, -1e30, 0):
        s = Shape(lens=(1,), group=3, scales=Scales(quant1=quant, dequant2=0.125))
        case = make_case(name, s)
        got = run(name, case, isa, f32=True)
        weight = to_codes(np.array(F32(quant), np.float64))
        want = F32(weight * case.value[:, 0].astype(np.int64)) * F32(0.125)
        assert np.array_equal(got[:, 0], np.repeat(want, 3, axis=1)), quant


@by_pair(*ALL)
def test_equal_scores_are_exact(name, isa):
    """P = 1 / n as float32 has it, then times quant_scale1, as float32 has that."""
    for n in (2, 3, 7, 64, 100, 254, 255, 1000):
        for quant in (127.0, 1000.0, -500.0, 127.0 * n):
            s = Shape(lens=(n,), group=5, scales=Scales(quant1=quant, dequant2=1.0))
            case = make_case(name, s)
            case.query[...] = 0
            got = run(name, case, isa, f32=True)
            weight = to_codes((F32(1) / F32(n) * F32(quant)).astype(np.float64))
            want = weight * case.value[0, :, 0].astype(np.int64).sum(axis=0)
            assert np.array_equal(got[0, 0], np.repeat(F32(want)[None], 5, axis=0)), (n, quant)


@by_pair(*ALL)
def test_scores_are_rounded_to_float16(name, isa):
    """Two keys whose sums differ, and whose float16 do not: equal weights."""
    case = make_case(name, Shape(lens=(2,), scales=Scales(1.0, 100.0, 1.0, 1.0)))
    case.query[...] = 0
    case.key[...] = 0
    case.query[..., :2] = (127, 1)
    case.key[0, :, 0, :2] = ((17, 0), (17, 1))  # 2159 and 2160: float16 steps by 2
    case.query[..., 1] = 1
    got = run(name, case, isa, f32=True)
    x = np.array([2159, 2160], np.float16).astype(np.float64)
    p = np.exp(x - x.max())
    weights = to_codes(p / p.sum() * 100)
    assert x[0] == x[1] and weights.tolist() == [50, 50]
    assert np.array_equal(got[0, 0, 0], weights @ case.value[0, :, 0].astype(np.int64))


@by_pair(*ALL)
def test_scales_of_every_size(name, isa):
    """Scores from all alike to one that has all the weight; most weights 0, or none; infinite."""
    for i, dequant1 in enumerate((1e-30, 1e-5, 1e-4, 1e-3, 0.05, 1.0, -1e-3, 0.0, 3e38)):
        for quant1 in (127.0, 20.0, 1e6, -127.0, 3e38):
            for scale in (0.0, 0.3, -2.0):
                c = Scales(dequant1, quant1, 0.01, scale)
                s = Shape(lens=(90,), rows=2, group=2, scales=c, seed=i)
                check_call(name, s, isa)


def test_the_oracle_is_nearly_always_sure():
    """The checks above would mean little if its bounds were wide."""
    for dequant1 in (1e-5, 1e-4, 1e-3):
        case = make_case("whole", Shape(lens=(300,), group=40, scales=Scales(dequant1)))
        rows = case.rows().values()
        sure = [np.array_equal(row.low, row.high) for row in rows]
        assert np.mean(sure) > 0.9, dequant1


@by_pair(*ALL)
def test_results_of_int8(name, isa):
    for quant in ("tensor", "channel"):
        for bf16 in (False, True):
            for layout in (BSND, BNSD):
                s = Shape(
                    lens=(40, 0, 3),
                    rows=2,
                    heads_kv=2,
                    group=2,
                    layout_q=layout,
                    layout_kv=layout,
                    quant=quant,
                    quant_bf16=bf16,
                    scales=Scales(dequant2=1e-3),
                )
                got = check_call(name, s, isa)
                assert len(np.unique(got)) > 20


@by_pair(*ALL)
def test_float16_results_are_those_of_float32_rounded(name, isa):
    case = make_case(name, Shape(lens=(33,), rows=3, group=4, scales=Scales(dequant2=3.3e-3)))
    f32 = run(name, case, isa, f32=True)
    assert np.array_equal(run(name, case, isa), f32.astype(np.float16))
    case.shape.scales.dequant2 = 1e30
    with np.errstate(over="ignore"):
        f32 = run(name, case, isa, f32=True)
        assert np.array_equal(run(name, case, isa), f32.astype(np.float16))


@by_pair(*ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_without_a_weight_makes_its_own_row_nan(name, isa, bad):
    case = make_case(name, Shape(lens=(40, 40), rows=2, group=3, pse="each"))
    case.pse[1, 2, 0, 7] = bad
    got = run(name, case, isa, f32=True)
    check(case, got)
    assert np.isnan(got[1, 0, 2]).all() and np.isnan(got).sum() == got.shape[-1]
    case.mask = np.zeros((2, 2, case.width), np.uint8)
    case.mask[1, 0, 7] = 1
    check(case, run(name, case, isa, f32=True))


@by_pair(*ALL)
def test_a_score_of_minus_infinity_has_no_weight(name, isa):
    case = make_case(name, Shape(lens=(40,), rows=2, group=3, pse="each"))
    case.pse[..., 3:30] = -np.inf
    case.pse[0, 1] = -np.inf
    got = run(name, case, isa, f32=True)
    check(case, got)
    assert (got[0, :, 1] == 0).all() and (got[0, :, 0] != 0).any()


@by_pair("wide")
def test_sums_past_32_bits(name, isa):
    """200000 keys whose weights and values are all as large as codes get: 2^31.6. They are one
    block, named again and again."""
    k, n = kernel(name), 200000
    size, dv = 500, SPECS[name]["dv"]
    for weight, quant in ((127, 1e9), (-128, -1e9)):
        key = np.zeros((1, size, 1, k.dk), np.int8)
        value = np.full((1, size, 1, dv), -128, np.int8)
        out = np.zeros((1, 1, 2, dv), F32)
        k.run(
            query=np.ones((1, 1, 2, k.dk), np.int8),
            key=key,
            value=value,
            attention_out=out,
            out_f32=1,
            batch=1,
            heads_q=2,
            heads_kv=1,
            layout_kv=PA_BSND,
            num_blocks=1,
            block_size=size,
            max_blocks=n // size,
            block_table=np.zeros((1, n // size), np.int32),
            actual_seq_lengths=np.array([n], np.int32),
            dequant_scale1=np.ones(1, F32),
            quant_scale1=np.array([quant], F32),
            dequant_scale2=np.ones(1, F32),
            isa=k.isas()[isa],
        ).check()
        assert (out == F32(weight * -128 * n)).all()


@by_pair("whole")
def test_long_caches_lose_no_key(name, isa):
    """Half a million keys: one with more weight than all others together, which are alike."""
    n = 1 << 19
    case = make_case(name, Shape(lens=(n,), scales=Scales(1e-3, 127.0, 1.0, 1.0)))
    case.query[...] = 1
    case.key[...] = 0
    case.key[0, n // 3] = 127  # 128 * 127 / 1000 = 16.26 above the others
    got = run(name, case, isa, f32=True)
    e = np.exp(float(np.float16(F32(128 * 127) * F32(1e-3))))
    weight = to_codes(np.array(127 * e / (e + n - 1)))
    assert 100 < weight < 127
    assert np.array_equal(got[0, 0, 0], weight * case.value[0, n // 3, 0].astype(F32))


@by_pair("whole")
def test_small_weights_are_not_lost_beside_a_large_one(name, isa):
    """Half a million keys of weight 2^-30 behind one of weight 1: together 2^-11, and P is just
    below the middle between two codes, where it would be above without them."""
    n = 1 << 19
    case = make_case(name, Shape(lens=(n,)))
    case.query[...] = 1
    case.key[...] = 0
    case.key[0, 0] = 127
    s = case.shape.scales
    s.dequant1, s.scale_value, s.dequant2 = 20.8 / (128 * 127), 1.0, 1.0
    e = np.exp(-float(np.float16(F32(128 * 127) * F32(s.dequant1))))
    s.quant1 = 126.5 * (1 + 0.7 * e * (n - 1))
    assert to_codes(np.array(s.quant1)) == 127
    assert to_codes(np.array(s.quant1 / (1 + e * (n - 1)))) == 126
    got = run(name, case, isa, f32=True)
    assert np.array_equal(got[0, 0, 0], 126 * case.value[0, 0, 0].astype(F32))


# ---- how it is called ---------------------------------------------------------------------------


@by_pair(*ALL)
def test_a_call_reads_and_writes_what_it_names(name, isa):
    """Every tensor between forbidden pages, inputs read-only, workspace of exactly its size."""
    for seed in range(12):
        s = any_shape(name, seed)
        case = make_case(name, s)
        with Arena("left" if seed % 3 else "right") as arena:
            fields = fields_of(name, case, isa, arena.place)
            out = arena.room(*output_of(name, case, False))
            arena.protect()
            made = in_child(lambda f=fields, o=out: guarded(name, {**f, "attention_out": o}), s)
            assert made.ok, made.error_text
            arena.check()
            check(case, (out.swapaxes(1, 2) if s.layout_q == BNSD else out).copy())


def any_shape(
    name: str, seed: int, tables: tuple[str, ...] = ("blocks", "slots", "pages")
) -> Shape:
    rng = np.random.default_rng(seed)
    q, kv = PAIRS[seed % len(PAIRS)]
    tables = [t for t in tables if t == "blocks" or t in SPECS[name].get("features", ())]
    return Shape(
        lens=tuple(rng.integers(0, 90, 2).tolist()),
        rows=int(rng.integers(1, 5)),
        heads_kv=int(rng.integers(1, 3)),
        group=int(rng.integers(1, 10)),
        layout_q=q,
        layout_kv=kv,
        block_size=int(rng.integers(1, 9)),
        table=str(rng.choice(tables)) if kv in PAGED else "blocks",
        pse=str(rng.choice(["none", "one", "each"])),
        mask=str(rng.choice(["none", "one", "each"])),
        mask_rows=bool(seed % 2),
        quant=str(rng.choice(["none", "tensor", "channel"])),
        scales=Scales(dequant1=float(rng.choice([1e-5, 1e-4, 1e-3]))),
        seed=seed,
    )


@dataclass
class Recorded:
    """A case as other processors are given it."""

    name: str
    case: Case

    def fields(self, arrays: bool) -> dict[str, Any]:
        fields = fields_of(self.name, self.case, "scalar")
        del fields["isa"]
        return {n: x for n, x in fields.items() if isinstance(x, np.ndarray) == arrays}

    def inputs(self) -> dict[str, Any]:
        return self.fields(True)

    def sizes(self) -> dict[str, Any]:
        return self.fields(False)

    def outputs(self, stats: bool) -> dict[str, np.ndarray]:
        shape, kind = output_of(self.name, self.case, False)
        return {"attention_out": np.zeros(shape, kind)}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("isa", ["scalar", "neon"])
def test_aarch64(name, isa):
    """Compiled for it and run by qemu."""
    need_aarch64()
    k = kernel(name)
    cases = [make_case(name, any_shape(name, seed, ("blocks", "slots"))) for seed in range(70)]
    number = k.constants[f"HL_ISA_{isa.upper()}"]
    ways = [Way(flush="left" if i % 2 else "right", by_task=i % 3 == 0) for i in range(len(cases))]
    calls = [
        record(k, Recorded(name, case), way, number) for case, way in zip(cases, ways, strict=True)
    ]
    _, results = play((*QEMU, str(program(text(name), k.name))), calls)
    for case, got in zip(cases, results, strict=True):
        out = got["attention_out"]
        check(case, out.swapaxes(1, 2) if case.shape.layout_q == BNSD else out)


def guarded(name: str, fields: dict[str, Any]) -> bind.Result:
    k = kernel(name)
    with Arena("right") as arena:
        workspace = arena.room((k.workspace_bytes(**fields),), np.uint8)
        made = k.run(**fields, workspace=workspace)
        arena.check()
        return made


@by_pair("odd", "whole")
def test_a_row_depends_on_its_own_inputs_alone(name, isa):
    """Tasks in any order on any thread; a batch by itself; blocks anywhere; partials or not."""
    s = Shape(lens=(150, 70), rows=2, heads_kv=2, group=3, scales=Scales(1e-4))
    case = make_case(name, s)
    want = run(name, case, isa, f32=True)
    k = kernel(name)
    out = np.zeros(output_of(name, case, True)[0], F32)
    fields = {**fields_of(name, case, isa), "attention_out": out, "out_f32": 1}
    plan, made = k.plan(**fields, partials=np.zeros(64, np.uint8), partials_bytes=64)
    assert made.ok and plan.n_tasks == 4 and plan.n_merges == 0 and plan.split_bytes == 0
    k.execute(plan, order=(3, 1, 0, 2), workers=2)
    assert np.array_equal(out, want)
    for layout in (PA_BSND, PA_BNSD):
        q = BNSD if layout == PA_BNSD else BSND
        other = dataclasses.replace(s, layout_q=q, layout_kv=layout, block_size=7)
        moved = dataclasses.replace(case, shape=other)
        assert np.array_equal(run(name, moved, isa, f32=True), want)
    alone = dataclasses.replace(
        case,
        shape=dataclasses.replace(s, lens=s.lens[1:]),
        query=case.query[1:],
        key=case.key[1:],
        value=case.value[1:],
    )
    assert np.array_equal(run(name, alone, isa, f32=True), want[1:])


def test_instruction_sets_agree_but_for_weights_between_two_codes():
    case = make_case("whole", Shape(lens=(200,), rows=2, group=8, scales=Scales(3e-5)))
    sure = [np.array_equal(row.low, row.high) for row in case.rows().values()]
    results = [run("whole", case, isa, f32=True).reshape(16, -1) for isa in WORDS_HERE]
    for got in results[1:]:
        assert np.array_equal(got[sure], results[0][sure])


@pytest.mark.parametrize("scale", ["dequant_scale1", "quant_scale1", "dequant_scale2"])
def test_scales_are_needed_and_finite(scale):
    k, case = kernel("odd"), make_case("odd", Shape())
    fields = fields_of("odd", case, "scalar")
    fields["attention_out"] = np.zeros(output_of("odd", case, False)[0], np.float16)
    assert k.run(**fields).ok
    made = k.run(**{**fields, scale: None})
    assert (made.status_name, made.argument) == ("HL_ERR_NULL", scale.upper())
    assert made.rule == "NOT_NULL"
    for bad in (np.nan, np.inf, -np.inf):
        made = k.run(**{**fields, scale: np.array([bad], F32)})
        assert (made.status_name, made.argument, made.rule) == (
            "HL_ERR_VALUE",
            scale.upper(),
            "FINITE",
        )
    made = k.run(**{**fields, "batch": 0, scale: None, "actual_seq_lengths": None})
    assert made.ok


@pytest.mark.parametrize(
    "argument,value",
    [
        ("antiquant_scale", np.ones(2, F32)),
        ("antiquant_offset", np.ones(2, F32)),
        ("antiquant_mode", 1),
        ("sinks", np.ones(1, F32)),
        ("alibi_slopes", np.ones(1, F32)),
        ("softcap", 1.0),
        ("softmax_max", np.ones(8, F32)),
        ("softmax_lse", np.ones(8, F32)),
    ],
)
def test_what_it_does_not_have_is_refused(argument, value):
    k, case = kernel("odd"), make_case("odd", Shape())
    fields = fields_of("odd", case, "scalar")
    fields["attention_out"] = np.zeros(output_of("odd", case, False)[0], np.float16)
    made = k.run(**{**fields, argument: value})
    assert (made.status_name, made.argument) == ("HL_ERR_UNSUPPORTED", argument.upper())


def test_other_kernels_refuse_its_scales():
    other = bind.load(spec.parse_header({"op": OP, "dtype": "f32", "dk": 8, "isa": ["scalar"]}))
    x = np.zeros((1, 1, 1, 8), F32)
    fields = {"query": x, "key": x, "value": x, "attention_out": x.copy(), "batch": 1, "seq_kv": 1}
    assert other.run(**fields).ok
    made = other.run(**fields, quant_scale1=np.ones(1, F32))
    assert (made.status_name, made.argument) == ("HL_ERR_UNSUPPORTED", "QUANT_SCALE1")


@pytest.mark.parametrize(
    "change,what",
    [
        ({"features": ["stats"]}, "normalised"),
        ({"features": ["sinks"]}, "without a value"),
        ({"features": ["softcap"]}, "float16"),
        ({"features": ["alibi"]}, "float16"),
        ({"kv": "e4m3"}, "not known"),
        ({"kv": "bf16"}, "not known"),
        ({"isa": ["amx"]}, "tiles take bf16 only"),
        ({"op": "sparse_flash_attention"}, "not known"),
    ],
)
def test_what_cannot_be_generated(change, what):
    with pytest.raises(Refusal, match=f"(?s){what}.*fix: "):
        spec.parse_header({"op": OP, "dtype": "i8", "dk": 16, **change})


def test_the_name_says_it_all():
    header = spec.parse_header({"op": OP, "dtype": "i8", "dk": 64, "dv": 32, "features": EVERY})
    assert header.name == "hl_incre_flash_attention_i8_d64x32_window_slots_pages"
    again = spec.parse_header(spec.names.parse(header.name))
    assert again.kernels == header.kernels and again.digest == header.digest


@by_pair(*ALL)
def test_append_takes_codes(name, isa):
    """New rows are codes already: they are copied, and there is no scale to give."""
    k, rng = kernel(name), np.random.default_rng(5)
    new = {
        n: rng.integers(-128, 128, (2, 3, 2, c)).astype(np.int8)
        for n, c in (("key", k.dk), ("value", k.dv))
    }
    caches = {f"{n}_cache": np.zeros((2, 9, 2, x.shape[-1]), np.int8) for n, x in new.items()}
    positions = np.array([4, 0], np.int32)
    fields = {"batch": 2, "rows": 3, "heads_kv": 2, "seq_kv": 9, "positions": positions}
    fields |= {**new, **caches, "isa": k.isas()[isa]}
    k.append(**fields).check()
    for n, rows in new.items():
        want = np.zeros_like(caches[f"{n}_cache"])
        want[0, 4:7], want[1, :3] = rows
        assert np.array_equal(caches[f"{n}_cache"], want)
    for argument, value in (("numbers_f32", 1), ("antiquant_scale", np.ones(2, F32))):
        made = k.append(**{**fields, argument: value})
        assert (made.status_name, made.argument) == ("HL_ERR_UNSUPPORTED", argument.upper())


def test_memory_does_not_depend_on_lengths():
    k = kernel("whole")
    macro = k.constants if isinstance(k.constants, dict) else {}
    assert macro  # the header was read
    sizes = set()
    for n in (1, 100000):
        case = make_case("whole", Shape(lens=(n,), group=4))
        fields = fields_of("whole", case, "scalar")
        fields["attention_out"] = np.zeros(output_of("whole", case, False)[0], np.float16)
        sizes.add(k.workspace_bytes(**fields))
    assert len(sizes) == 1
