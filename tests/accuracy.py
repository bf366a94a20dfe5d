"""Every shipped header against float64: each element of each output within a bound that is known
before the call, and how tight that bound is.

    build/venv/bin/python tests/accuracy.py                  # make accuracy: to 131072 keys
    build/venv/bin/python tests/accuracy.py --only f32_d64 --longest 2048

With u = 2^-24, v half a unit in the last place of the output, p the weights, n the keys seen, S the
size of the largest score before its terms cancelled (max |scale| sum |q k|, and what is added):

    |o - exact| <= v |o| + 2 (delta + epsilon + gamma) sum p |v|
    delta   = (channels + 8) u S     a score, summed in any order, scaled, less the maximum
    epsilon = 3 u                    2^x
    gamma   = (chain(n) + 8) u       the longest chain of sums that O and l go through

Weights are off by a factor within e^+-(delta + epsilon), and so is their sum, which the 2 is for.
On tiles weights are rounded to bfloat16 as well (helpers.tile_error).

That has to hold whatever signs roundings have; they have all signs. "Likely" is what they come to
then, six standard deviations of it: a score is off by 0.5 sqrt(channels) u |q o k|, each key by
itself, and a sum by u sqrt(chain) of its size. It is no theorem, but asserted too.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers  # noqa: E402
import helpers_decode  # noqa: E402
import helpers_every as every  # noqa: E402
import helpers_fusion  # noqa: E402
import numpy as np  # noqa: E402
import oracle  # noqa: E402
import oracle_decode  # noqa: E402
import oracle_fusion  # noqa: E402
from oracle_decode import by_row  # noqa: E402

from gen import bind  # noqa: E402
from gen.isa import ISAS  # noqa: E402

U = 2.0**-24
EPSILON = 3.0  # units of U: 2^x is within 1.23 units in the last place, each at most 2 U
CHUNK = 2048
SPREADS = ("normal", "flat", "huge", "dominant", "equal", "growing", "falling", "cancel", "tiny")
LONG_SPREADS = ("normal", "flat", "cancel")
LENGTHS = (1, 17, 300, 2048, 16384, 131072)
MOST_BYTES = 1 << 27  # of keys in float32: longer calls are for narrower headers
STATS = ("max", "sum", "lse")


@dataclass
class Truth:
    """A call in float64, all arrays by (row, head): results, those of the plain implementation, and
    what errors are relative to."""

    exact: np.ndarray
    plain: np.ndarray
    stats: dict[str, np.ndarray]
    size: helpers.Sizes
    terms: int  # products in a score
    tile: np.ndarray  # what tiles add to the error; zeros elsewhere
    dtype: np.dtype
    likely: "Likely"


@dataclass
class Likely:
    """Of each element, in units of U: what scores' roundings do to it; sqrt(sum p^2 v^2)."""

    scores: np.ndarray
    weights: np.ndarray

    def put(
        self, at: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, p: Any
    ) -> None:
        """Some queries that see the same keys: s their scores (-infinity: not seen), p their
        weights. A score's own last places count three times: scaled, less the maximum, and the
        factor, which is off for all keys alike."""
        q, k, v = (np.nan_to_num(x.astype(np.float64)) for x in (q, k, v))
        s = np.where(np.isfinite(s), s, 0.0)
        norm = np.sqrt((q * q) @ (k * k).T)
        sigma = p * (0.5 * np.sqrt(q.shape[-1]) * norm + 3 * abs(s) + 3)
        o = p @ v
        apart = [
            np.sqrt(np.maximum(w @ (v * v) - 2 * o * (w @ v) + o * o * w.sum(axis=1)[:, None], 0))
            for w in (sigma * sigma, p)
        ]
        most = abs(s).max(axis=1, initial=0.0)[:, None]
        self.scores[at] = 6 * apart[0] + 3 * most * apart[1]
        self.weights[at] = np.sqrt((p * p) @ (v * v))


def chain(keys: np.ndarray, isa: str, trains: bool) -> np.ndarray:
    """Roundings in a row that a weight can meet on its way into O or l. Words: those of its block
    (16 to 96 keys); 4 for each block behind it, whose factor is a 2^x and a product; 6 for each
    chunk that is merged behind. Tiles add key by key to a running O, and rescale exactly."""
    if ISAS[isa].tiles:
        return keys if trains else np.minimum(keys, CHUNK) + 6 * np.ceil(keys / CHUNK)
    if trains:
        return np.minimum(keys, 96) + 4 * np.ceil(keys / 96)
    blocks = np.ceil(np.minimum(keys, CHUNK) / 16)
    return np.minimum(keys, 96) + 4 * blocks + 6 * np.ceil(keys / CHUNK)


def bounds(t: Truth, isa: str, trains: bool) -> dict[str, np.ndarray]:
    """Of each element of attention_out, and of max, sum and lse."""
    delta = (t.terms + 8) * U * t.size.score
    weight = delta + (EPSILON + chain(t.size.keys, isa, trains) + 8) * U
    some = 2 * weight * np.exp(np.minimum(2 * weight, 50.0))
    made = {"out": stored(t, some[..., None] * t.size.value)}
    if t.stats:
        size = {n: np.where(np.isfinite(x), abs(x), 0.0) for n, x in t.stats.items()}
        made["max"] = delta + 3 * U * size["max"] + 1e-37
        made["sum"] = some * size["sum"] + 1e-37
        made["lse"] = weight + 3 * U * (size["max"] + size["lse"]) + 1e-7
    return made


def likely(t: Truth, isa: str, trains: bool) -> np.ndarray:
    """Of each element of attention_out."""
    links = 6 * np.sqrt(chain(t.size.keys, isa, trains) + 8)[..., None]
    return stored(t, U * (t.likely.scores + links * (abs(t.exact) + t.likely.weights)))


def stored(t: Truth, error: np.ndarray) -> np.ndarray:
    """With what tiles and the output's type add."""
    error = error + t.tile
    error = error + helpers.last_place(t.dtype) * (abs(t.exact) + error)
    return error + 2 * helpers.floor_of(t.dtype) + t.size.keys.max(initial=0.0) * 2.0**-120


def truth(call: every.Call, isa: str) -> Truth:
    """What the oracle of the call's operator says; on tiles of records as they are rounded."""
    module, case = every.of_operator(call.name), call.case
    if module is helpers:
        return sparse_truth(call, isa)
    known, a = call.known, case.args
    if module is helpers_decode:
        dtype = np.dtype(np.float32) if case.extra.get("out_f32") else case.dtype
        stats = {n: getattr(known.want, n).swapaxes(1, 2) for n in STATS} if call.stats else {}
        tile = helpers_decode.tile_error(a, isa, known.size)
        exact = known.want.exact
        soft = Likely(np.zeros(exact.shape), np.zeros(exact.shape))
        for r in oracle_decode.rows(a):
            s = oracle_decode.scores(r, a, np.float64)
            at = (r.b, r.i, r.heads)
            soft.put(at, a.scale * r.q.astype(np.float64), r.k_size, r.v, s, softmax(s))
        return Truth(exact, known.plain, stats, known.size, a.dk, tile, dtype, soft)
    dtype = np.dtype(np.float32) if case.extra.get("out_f32") else case.dtype
    stats = {n: getattr(known.want, n) for n in STATS}
    tile = np.zeros(1)
    if ISAS[isa].tiles:
        tile = 2.0**-8 / (1 - 2.0**-8) * known.size.spread
    terms = a.query.shape[-1]
    soft = Likely(*(np.zeros(known.want.out.shape) for _ in range(2)))
    for p in oracle_fusion.parts(a):
        weights = oracle_fusion.probabilities(p, a, np.float64)
        s = np.where(p.seen, oracle_fusion.scores(p, a), -np.inf)
        soft.put((p.rows, p.h), a.scale * p.q.astype(np.float64), p.k, p.v, s, weights)
    return Truth(known.want.out, known.plain, stats, known.size, terms, tile, dtype, soft)


def sparse_truth(call: every.Call, isa: str) -> Truth:
    a = helpers.as_computed(call.case.args, isa)
    want, size = oracle.sparse_flash_attention(a), helpers.sizes(a)
    heads = (len(size.keys), a.heads_q)
    size = dataclasses.replace(size, score=size.score.reshape(heads), keys=size.keys.reshape(heads))
    exact, plain = (x.reshape(*heads, -1) for x in (want.out, oracle.plain(a)))
    stats = {n: by_query(getattr(want, n), a).reshape(heads) for n in STATS}
    terms = a.query.shape[-1] + (0 if a.query_rope is None else a.query_rope.shape[-1])
    tile = helpers.tile_error(a, isa, size)
    if helpers.on_tiles(a, isa) and a.query.dtype == np.float16:
        terms *= 4  # products of parts
    dtype = np.dtype(np.float32) if call.case.extra.get("out_f32") else call.case.dtype
    soft, group = Likely(np.zeros(exact.shape), np.zeros(exact.shape)), a.heads_q // a.heads_kv
    for r in oracle.rows(a):
        q = float(np.float32(a.scale_value)) * r.q.astype(np.float64)
        s = q @ r.k.astype(np.float64).T
        at = (r.row, slice(r.n2 * group, (r.n2 + 1) * group))
        soft.put(at, q, r.k, r.v, s, softmax(s))
    return Truth(exact, plain, stats, size, terms, tile, dtype, soft)


def softmax(s: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        p = np.exp(s - s.max(axis=1, keepdims=True, initial=-np.inf))
        return np.nan_to_num(p / p.sum(axis=1, keepdims=True))


def by_query(stat: np.ndarray, a: Any) -> np.ndarray:
    """[..][N2][S1][G] with the query before the head."""
    return np.moveaxis(stat, -3, -2)


def found(call: every.Call, isa: str, kernel: bind.Kernel | None = None) -> dict[str, np.ndarray]:
    """What the kernel (or another with the same arguments) makes of a call, as Truth has it."""
    module, a, got = every.of_operator(call.name), call.case.args, call.outputs()
    result = (kernel or call.kernel).run(**call.fields(isa), **got)
    assert result.ok, result.error_text
    if module is helpers_fusion:
        rows = helpers_fusion.rows_of(call.case, got)
        return {"out": rows["attention_out"], **{n: rows[f"softmax_{n}"] for n in STATS}}
    if module is helpers_decode:
        made = {"out": by_row(got["attention_out"], a.layout_query)}
        stats = {n: got[f"softmax_{n}"].swapaxes(1, 2) for n in STATS} if call.stats else {}
        return made | stats
    heads = (int(np.prod(a.query.shape[:-2])), a.heads_q)
    made = {n: by_query(got[f"softmax_{n}"], a).reshape(heads) for n in STATS}
    return {"out": got["attention_out"].reshape(*heads, -1), **made}


@dataclass
class Tightness:
    """Errors of one output of one call in units of its bounds: largest, and in the middle."""

    call: str
    isa: str
    output: str
    worst: float
    middle: float
    likely_worst: float
    likely_middle: float


def measure(
    call: every.Call, isa: str, label: str, kernel: bind.Kernel | None = None
) -> list[Tightness]:
    """Of every output of a call."""
    if call.grads:
        return measure_grads(call, isa, label)
    t, got = truth(call, isa), found(call, isa, kernel)
    trains = every.description(call.name).trains
    hard, made = bounds(t, isa, trains), []
    for output, bound in hard.items():
        exact = t.exact if output == "out" else t.stats[output]
        x = got[output].astype(np.float64)
        usual = np.isfinite(exact)
        assert ((x == exact) | usual | (np.isnan(x) & np.isnan(exact))).all(), (label, output)
        error = np.where(usual, abs(x - np.where(usual, exact, 0.0)), 0.0)
        less = likely(t, isa, trains) if output == "out" else bound
        made.append(tightness(label, isa, output, error, bound, less))
    rule(t, got["out"].astype(np.float64), label)
    return made


def tightness(label: str, isa: str, output: str, error: np.ndarray, *pair: np.ndarray) -> Tightness:
    ratios = [error / bound for bound in pair]
    values = [f(r) if r.size else 0.0 for r in ratios for f in (np.max, np.median)]
    return Tightness(label, isa, output, *map(float, values))


def rule(t: Truth, got: np.ndarray, label: str) -> None:
    """At most twice, on average half as much again, what the plain implementation is off: in the
    tensors' own type, with FlashAttention's slack; of few elements that may be exact by luck, four
    roundings of a score's size."""
    usual = np.isfinite(t.exact)
    error, plain = (np.where(usual, abs(x - t.exact), 0.0) for x in (got, t.plain.astype(float)))
    slack = helpers.absolute_slack(t.exact, t.dtype)
    slack += 4 * U * (1 + t.size.score.max(initial=0.0)) * t.size.value.max(initial=0.0)
    assert error.max(initial=0.0) <= 2 * plain.max(initial=0.0) + slack, label
    assert error.sum() <= 1.5 * plain.sum() + slack * error.size, label


def measure_grads(call: every.Call, isa: str, label: str) -> list[Tightness]:
    """Gradients: within the bound of helpers_fusion.grad_bounds, which grows with every count."""
    grad, known, made = call.case, call.known, []
    got = call.run(isa)
    helpers_fusion.check_grads(grad, got, isa, known)
    for name, x in helpers_fusion.grad_rows(grad.case.args, got).items():
        exact, bound = getattr(known.want, name), getattr(known.bound, name)
        other = abs(getattr(known.plain, name).astype(np.float64) - exact)
        dtype = got[name].dtype
        bound = bound + 2 * other.max(initial=0.0) * ISAS[isa].tiles
        bound = bound + helpers.last_place(dtype) * (abs(exact) + bound) + 2.0**-120
        bound = bound + 2 * helpers.floor_of(dtype)
        error = np.nan_to_num(abs(x.astype(np.float64) - exact))
        made.append(tightness(label, isa, name, error, bound, bound))
    return made


def calls(name: str, lengths: tuple[int, ...], seed: int = 1) -> Iterator[tuple[str, every.Call]]:
    """Every spread at every length that the header's rows leave room for: few heads and, where they
    take another way, many; the output in its own type and as float32."""
    of = every.description(name)
    width = of.dk + of.rope + of.dv
    for keys in lengths:
        if 4 * keys * width > MOST_BYTES or (of.backward and keys > CHUNK):
            continue
        for i, spread in enumerate(SPREADS if keys <= CHUNK else LONG_SPREADS):
            heads = 33 if i % 3 == 0 and keys <= CHUNK and not of.trains else 2
            rows = 20 if of.backward else 2 if keys <= CHUNK else 1
            call = every.sized(name, keys, rows, heads, seed + i, spread=spread)
            case = call.case.case if of.backward else call.case
            if i % 2 == 0:
                case.extra["out_f32"] = 1
            yield f"{spread} {keys}", call


def table(rows: list[tuple[str, Tightness]]) -> str:
    """A line for each header and output: the largest error over its bound, and the middle one of
    the spread that is most like a model's."""
    lines = ["| header | output | worst | middle | likely: worst | middle |",
             "|---|---|---:|---:|---:|---:|"]  # fmt: skip
    for key in dict.fromkeys((name, t.output) for name, t in rows):
        mine = [t for name, t in rows if (name, t.output) == key]
        usual = [t for t in mine if t.call.startswith("normal") and t.call != "normal 1"] or mine
        numbers = (
            max(t.worst for t in mine),
            float(np.median([t.middle for t in usual])),
            max(t.likely_worst for t in mine),
            float(np.median([t.likely_middle for t in usual])),
        )
        lines.append(f"| {' | '.join(key)} | {' | '.join(f'{x:.1e}' for x in numbers)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="parts of headers' names")
    parser.add_argument("--isas", nargs="*", default=[])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    chosen = parser.parse_args()
    lengths = tuple(n for n in LENGTHS if n <= chosen.longest)
    rows, wrong = [], 0
    for name in every.HEADERS:
        if chosen.only and not any(part in name for part in chosen.only):
            continue
        for label, call in calls(name, lengths):
            for isa in every.isas_in(name):
                if chosen.isas and isa not in chosen.isas:
                    continue
                if ISAS[isa].tiles and int(label.split()[1]) > CHUNK and helpers.TILES.emulated:
                    continue  # hours
                for t in measure(call, isa, label):
                    rows.append((name.removeprefix("hl_"), t))
                    if not max(t.worst, t.likely_worst) <= 1.0:
                        wrong += 1
                        print(
                            f"{name} {isa} {label} {t.output}: {t.worst:.3g} of its bound,"
                            f" {t.likely_worst:.3g} of what is likely"
                        )
        own = [(n, t) for n, t in rows if f"hl_{n}" == name]
        print(f"{name}: {len(own)} outputs, {wrong} beyond their bound so far")
        print(table(own), flush=True)
    return int(wrong != 0)


if __name__ == "__main__":
    sys.exit(main())
