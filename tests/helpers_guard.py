"""What the guard-page sweep calls: sizes round every tile, and every option of an operator in turn.

A job is one call, made on each instruction set with its buffers flush left and flush right against
pages that may not be touched; helpers_memory.survey runs many of them to a child.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers_cases
import helpers_decode
import helpers_every as every
import helpers_fusion
from helpers import ROOT, same_bits
from helpers_memory import Survey
from oracle import BSND, PA_BSND, TND

from gen import tiling, train
from gen.isa import ISAS

FULL = os.environ.get("HEADLIGHT_GUARD") == "full"
COUNTS = ROOT / "build" / "guard"
CHECKED = 1500  # keys x heads x rows of a call that is held against the oracle: larger ones only
# against themselves, for which a checked one of the same way stands


@dataclass(frozen=True)
class Job:
    """A call, the instruction sets that make it, and which of the ways to make it."""

    name: str
    shape: Any
    isas: tuple[str, ...]
    way: int = 0
    checked: bool = False

    def __call__(self) -> int:
        call, calls = every.call_of(self.name, self.shape), 0
        for isa in self.isas:
            seen: dict[str, Any] = {}
            for side, flush in enumerate(("right", "left")):
                got = call.guarded(isa, flush, **ways(self.name, self.way + 7 * side))
                for name in seen.keys() & got.keys():
                    if name == "dropout_state" and not got["attention_out"].size:
                        continue  # a plan without tasks has nobody to write it
                    assert same_bits(seen[name], got[name]), f"{isa}: {name} depends on its place"
                seen |= got
                calls += 1
            if self.checked:
                call.check(seen, isa)
        return calls


def ways(name: str, i: int) -> dict[str, Any]:
    """The i-th way to make a call. Two that differ by 7 chunk the keys alike."""
    of = every.description(name)
    way: dict[str, Any] = {"strides": i % 5 == 4, "by_task": i % 3 == 1}
    if of.trains:
        return way if of.backward else {**way, "stats": i % 8 != 5}
    return {
        **way,
        "partials": i % 2 == 1,
        "chunk_keys": (0, 128, 256)[i % 7 % 3],
        "stats": i % 8 != 5,
    }


# ---- tiles ---------------------------------------------------------------------------------------


def tile_of(name: str, isa: str) -> Any:
    of = every.description(name)
    return (train if of.trains else tiling).tile(of, ISAS[isa])


def keys_past(name: str, isa: str) -> int:
    """One more than two tiles of keys."""
    tile = tile_of(name, isa)
    return 2 * max(tile.block, getattr(tile, "keys", 0)) + 1


def rows_past(name: str, isa: str) -> int:
    """One more than two tasks of queries; of few query rows, all there may be."""
    of = every.description(name)
    if of.trains:
        return 2 * tile_of(name, isa).queries + 1
    return 16 if of.decodes else 9


def groups(name: str, isa: str) -> tuple[int, ...]:
    """Heads on a kv head, one number for each way through a block."""
    if every.description(name).trains:
        return (1,)
    if ISAS[isa].tiles:
        return (1, 17)
    few = getattr(tile_of(name, isa), "few", 0)
    return (1, 4) if few == "all" else (1, 4, few + 1)


# ---- options -------------------------------------------------------------------------------------


def options(name: str, i: int) -> dict[str, Any]:
    """Fields of the operator's Shape, each in a cycle of its own, so that many pairs meet."""
    of = every.description(name)
    if of.trains:
        return train_options(of, i)
    return decode_options(name, of, i) if of.decodes else sparse_options(of, i)


def pick(i: int, *values: Any) -> Any:
    return values[i % len(values)]


def sparse_options(of: Any, i: int) -> dict[str, Any]:
    layout = PA_BSND if "BSND" not in of.layout_kv else pick(i, BSND, PA_BSND, TND)
    query = pick(i // 3, BSND, TND) if layout == PA_BSND else layout
    kinds = ("none", "blocks", "none", "blocks") + ("slots",) * ("slots" in of.features)
    lists = pick(i // 2, *kinds)
    return {
        "layout_q": query,
        "layout_kv": layout,
        "block_size": pick(i, 16, 1, 7, 128, 3),
        "spare_blocks": pick(i, 0, 0, 2),
        "lists": lists,
        "sparse_block_size": 1 if lists == "slots" else pick(i, 1, 2, 1, 8),
        "sparse_mode": 0 if lists == "slots" else pick(i, 0, 3, 3),
        "list_lengths": lists == "slots" and i % 3 == 0,
        "joined_q": of.rope > 0 and i % 4 == 1,
        "joined_k": of.rope > 0 and i % 5 == 1,
        "value": i % 2 == 1,
        "sinks": pick(i, "none", "plain", "none", "infinite"),
        "lengths_given": i % 3 != 1,
    }


def decode_options(name: str, of: Any, i: int) -> dict[str, Any]:
    layout_q, layout_kv = pick(i, *helpers_decode.PAIRS)
    paged = layout_kv in helpers_decode.PAGED
    pages = paged and "pages" in of.features and i % 3 == 0
    alike = helpers_decode.formats_of(name) == ("", "") and of.dv <= of.dk
    return {
        "layout_q": layout_q,
        "layout_kv": layout_kv,
        "room": pick(i, 0, 0, 1),
        "lengths": pick(i, "none", "one", "each"),
        "padding": pick(i // 2, None, 0, 3),
        "block_size": pick(i, 16, 1, 7, 128, 3),
        "spare_blocks": pick(i, 0, 2, 0),
        "pages": pages,
        "slots": paged and not pages and "slots" in of.features and i % 2 == 0,
        "value": not alike or i % 4 != 1,
        "pse": pick(i, "none", "one", "each", "none"),
        "mask": pick(i // 2, "none", "each", "one"),
        "mask_rows": i % 3 == 0,
        "window": pick(i, 0, 5, 0, 40) if "window" in of.features else 0,
        "softcap": pick(i, 0.0, 5.0) if "softcap" in of.features else 0.0,
        "alibi": "alibi" in of.features and i % 3 == 1,
        "sinks": pick(i, "none", "plain", "none") if "sinks" in of.features else "none",
        "antiquant": i % 3,
        "antiquant_f32": i % 4 < 2,
        "offset": i % 5 < 3,
        "quant": pick(i, "none", "channel", "none", "none", "tensor"),
        "quant_offset": i % 2 == 0,
        "quant_bf16": i % 7 < 3,
    }


def train_options(of: Any, i: int) -> dict[str, Any]:
    layout = pick(i, *helpers_fusion.LAYOUTS)
    mode = pick(i, 0, 1, 2, 3, 4, 6, 7 if layout == TND else 5)
    kinds = ("inner", "outer", "slope") if "pse_types" in of.features else ("inner",)
    kind = pick(i // 2, *kinds)
    pse = "none" if mode in (7, 8) else pick(i // 3, "full", "none", "one_row")
    types = {"inner": helpers_fusion.INNER, "outer": helpers_fusion.OUTER}
    return {
        "layout": layout,
        "mode": mode,
        "mask": pick(i // 3, "given", "formula", "none") if mode < 7 else "formula",
        "mask_batch": layout != TND and i % 2 == 0,
        "mask_heads": layout != TND and i % 4 == 0,
        "hidden": pick(i, 0.0, 0.3),
        "wider": pick(i, 0, 0, 3),
        "band": pick(i, None, (20, 3), None, (90, -4)),
        "pse": "slope" if pse != "none" and kind == "slope" else pse,
        "pse_type": types.get(kind, helpers_fusion.SLOPE),
        "softcap": pick(i, 0.0, 5.0) if "softcap" in of.features else 0.0,
        "sinks": pick(i, "none", "plain") if "sinks" in of.features else "none",
        "keep_prob": pick(i, 0.0, 0.7, 0.0),
        "bits": i % 2 == 0,
        "stats_width": pick(i, 8, 1),
        "stats_order": i % 2 if layout == TND else 0,
        "pad_q": i % 2,
        "pad_kv": i // 2 % 2,
        "unused": i // 4 % 2,
    }


def shape(name: str, i: int, keys: int, rows: int, heads: int, **more: Any) -> Any:
    """A call of one batch with the i-th options; `more` as in every.sized."""
    of, chosen = every.description(name), {**options(name, i), "seed": i, **more}
    if of.trains:
        kind = helpers_fusion.Shape
        batch = {"lens_q": (rows,), "lens_kv": (keys,)}
    elif of.decodes:
        kind, batch = helpers_decode.Shape, {"lens": (keys,), "seq_q": rows}
    else:
        kind, batch = helpers_cases.Shape, {"lens_q": (rows,), "lens_kv": (keys,)}
        chosen.setdefault("list_length", max(keys - i % 3, 0) if i % 2 else keys + 3)
    return kind(**{**batch, "group": heads, **chosen})


# ---- sweeps --------------------------------------------------------------------------------------


def job(name: str, isas: Iterable[str], i: int, keys: int, rows: int, heads: int, **more) -> Job:
    made = shape(name, i, keys, rows, heads, **more)
    return Job(name, made, tuple(isas), i, i % 8 == 0 and keys * rows * heads <= CHECKED)


def by_keys(name: str, isas: Iterable[str]) -> Iterator[Job]:
    """0 .. 2 * tile + 1 keys, on each way through a block, dense and by list."""
    for isa in isas:
        for g, heads in enumerate(groups(name, isa)):
            for n in range(keys_past(name, isa) + 1):
                yield job(name, (isa,), n + 1000 * g, n, 1 + n % 2, heads)


def by_rows(name: str, isas: Iterable[str]) -> Iterator[Job]:
    """0 .. 2 * task + 1 rows, or as many as there may be."""
    for isa in isas:
        first = 1 if every.description(name).decodes else 0
        for n in range(first, rows_past(name, isa) + 1):
            yield job(name, (isa,), n, 1 + n % 7, n, 1)


def by_heads(name: str, isas: Iterable[str]) -> Iterator[Job]:
    """1 .. 67 heads on a kv head: every mixture of score tiles, one more than two units of 32."""
    for n in range(1, 68):
        yield job(name, isas, n, 2 + n % 19, 1 + n % 2, n)


def by_kv_heads(name: str, isas: Iterable[str]) -> Iterator[Job]:
    if every.description(name).record and "BSND" not in every.description(name).layout_kv:
        return  # pages with scales behind them have one
    for n in range(1, 6):
        yield job(name, isas, n, 9 + n, 2, 1 + n % 3, heads_kv=n)


def by_batches(name: str, isas: Iterable[str]) -> Iterator[Job]:
    """0 .. 6 batches of different lengths, some of them empty."""
    of = every.description(name)
    for n in range(7):
        lens = tuple((0, 17, 3, 40, 1, 0)[:n])
        rows = tuple((2, 1, 0, 3, 1, 2)[:n])
        for i in range(0, 30, 6):
            made = shape(name, n + i, 1, 1, 2)
            if of.decodes:
                some = {"lens": lens, "lengths": "each", "seq_q": 1 + i % 3}
            elif of.trains and made.layout != TND:
                some = {"lens_q": rows[:1] * n, "lens_kv": (17,) * n}
            else:
                some = {"lens_q": rows, "lens_kv": lens}
            if n == 0 and not of.trains:
                some["block_size"] = 16
            yield Job(name, dataclasses.replace(made, **some), tuple(isas), n + i, i % 4 == 0)


def paged(name: str) -> dict[str, Any] | None:
    """What makes a call of a header paged; None for those that are never."""
    of = every.description(name)
    if of.trains:
        return None
    if of.decodes:
        return {"layout_q": BSND, "layout_kv": PA_BSND, "pages": False, "slots": False}
    return {"layout_q": BSND, "layout_kv": PA_BSND, "list_lengths": False}


def by_pages(name: str, isas: Iterable[str]) -> Iterator[Job]:
    """Pages of 1 .. 130 tokens, the last one full, or with one token, or one token short."""
    if (more := paged(name)) is None:
        return
    for size in range(1, 131):
        n = (size % 3 + 1) * size + size % 3 - 1
        yield job(name, isas, size, n, 1, 1 + size % 3, block_size=size, **more)


def by_lists(name: str, isas: Iterable[str]) -> Iterator[Job]:
    """Lists of 0 .. 130 entries."""
    of = every.description(name)
    if of.trains or of.decodes:
        return
    for n in range(131):
        for kind in ("blocks", "slots") if "slots" in of.features else ("blocks",):
            mode = {"sparse_mode": 0, "sparse_block_size": 1} if kind == "slots" else {}
            yield job(name, isas, n, 90, 2, 1 + n % 5, lists=kind, list_length=n, **mode)


def at_random(name: str, isas: Iterable[str], count: int, seed: int = 1) -> Iterator[Job]:
    """Calls of all kinds, several batches and kv heads among them."""
    for i, made in enumerate(every.shapes(name, seed, count)):
        yield Job(name, made, tuple(isas), i, i % 10 == 0)


SWEEPS = (by_keys, by_rows, by_heads, by_kv_heads, by_batches, by_pages, by_lists)


def jobs(name: str, isas: Iterable[str]) -> list[Job]:
    """Everything for a header."""
    isas = tuple(isas)
    made = [job for sweep in SWEEPS for job in sweep(name, isas)]
    return made + list(at_random(name, isas, 200))


# ---- counts --------------------------------------------------------------------------------------


def note(what: str, name: str, isa: str, made: Survey) -> None:
    """Fails if anything was wrong, or nothing was done; of a full sweep the count goes to
    build/guard, for the summary."""
    assert not made.wrong, f"{len(made.wrong)} jobs:\n" + "\n".join(made.wrong)
    assert made.calls > 0
    if not FULL:
        return
    COUNTS.mkdir(parents=True, exist_ok=True)
    line = {"what": what, "name": name, "isa": isa, "calls": made.calls}
    (COUNTS / f"{what}-{name}-{isa}.json").write_text(json.dumps(line))


def summary() -> str:
    """Calls by operator and instruction set, of the last runs."""
    counts: dict[tuple[str, str], int] = {}
    lines = [json.loads(path.read_text()) for path in sorted(Path(COUNTS).glob("*.json"))]
    for line in lines:
        key = (line["what"], line["isa"])
        counts[key] = counts.get(key, 0) + line["calls"]
    whats, isas = (sorted({key[i] for key in counts}) for i in range(2))
    table = [["calls", *isas]]
    table += [[what, *(str(counts.get((what, isa), "")) for isa in isas)] for what in whats]
    table.append(["all", *(str(sum(counts.get((w, isa), 0) for w in whats)) for isa in isas)])
    return "\n".join(" | ".join(cell.rjust(10) for cell in row) for row in table)


if __name__ == "__main__":
    print(summary())
