"""Measures how far the shipped kernels are from float64, and what caches of records cost: the
tables of docs/numerics.md and of the README.

    build/venv/bin/python bench/errors.py
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import measure as m  # noqa: E402
import oracle  # noqa: E402

from gen import bind  # noqa: E402

KERNELS = ("bf16_d512_rope64", "f16_d512_rope64", "bf16_d128_rope64", "f32_d64")
KEYS = (2048, 32768)
SPREADS = (1.7, 8.0)  # standard deviation of the scores: a trained model's; nearly one key alone
HEADS = 16
COLUMNS = ("kernel", "spread", "keys", "float32 out", "worst element", "own type", "plain", "LSE")


def relative(x: np.ndarray, want: np.ndarray) -> float:
    """The error of x in the L2 norm, relative."""
    return float(np.linalg.norm(x.astype(np.float64) - want) / np.linalg.norm(want))


def measure(name: str, spread: float, keys: int) -> list[str]:
    """One kernel on one problem: the worst of its instruction sets here."""
    kernel = bind.load(ROOT / "include" / f"hl_sparse_flash_attention_{name}.h")
    width = kernel.dk + kernel.rope
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((1, n, h, width), np.float32).astype(kernel.dtype)
            for n, h in ((1, HEADS), (keys, 1)))
    args = oracle.Args(query=q, key=k, scale_value=spread / width**0.5, dv=kernel.dv)
    want, plain = oracle.sparse_flash_attention(args), oracle.plain(args)
    sizes = replace(args, value=abs(k[..., : kernel.dv]))  # for sum p |v|, which errors scale with
    weight = oracle.sparse_flash_attention(sizes).out
    errors = []
    for isa in kernel.isas().values():
        call = {"query": q, "key": k, "scale_value": args.scale_value, "isa": isa}
        own, wide = kernel.attend(**call), kernel.attend(**call, out_f32=1)
        element = np.max(abs(wide.out.astype(np.float64) - want.out) / weight) * 2**24
        lse = np.max(abs(wide.outputs["softmax_lse"] - want.lse))
        errors.append((relative(wide.out, want.out), element, relative(own.out, want.out), lse))
    wide, element, own, lse = map(max, zip(*errors, strict=True))
    return [name, f"{spread}", f"{keys}", f"{wide:.1e}", f"{element:.1f}", f"{own:.2e}",
            f"{relative(plain, want.out):.2e}", f"{lse:.1e}"]


# ---- caches of records ---------------------------------------------------------------------------


def latents(kind: str, keys: int, width: int) -> np.ndarray:
    """Rows as a model might make them. normal: standard normal numbers. outliers: 8 of the channels
    are ten times as large, and one number in a thousand is twenty times as large."""
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((keys, width), np.float32)
    if kind == "outliers":
        rows[:, rng.choice(width, 8, replace=False)] *= 10
        rows[rng.random(rows.shape) < 1e-3] *= 20
    return rows


def of_cache(name: str, kind: str, power_of_2: int, keys: int = 2048) -> list[str]:
    """One kind of cache, written by the header's own routine, against the bf16 rows that it is made
    of: attention in float64 over both, so that nothing but the cache is seen."""
    made = m.build(ROOT / "include" / f"hl_sparse_flash_attention_antiquant_{name}.h")
    kernel, width, dk = made.kernel, made.dk, made.kernel.dk
    rows = latents(kind, keys, width).astype(kernel.dtype)
    decoded = np.zeros((keys, width), np.float32)
    shared = {"rows": keys, "records": m.build_cache(made, keys),
              "block_size": m.BLOCK_SIZE if made.record.behind else 0}
    kernel.quantise_rows(nope=rows, power_of_2=power_of_2, **shared).check()
    kernel.dequantise_rows(nope=decoded, numbers_f32=1, **shared).check()
    q = np.random.default_rng(3).standard_normal((128, width))
    plain, coded = rows.astype(np.float64), decoded.astype(np.float64)
    scale = SPREADS[0] / np.std(q @ plain.T)

    def attention(k: np.ndarray) -> np.ndarray:
        s = scale * (q @ k.T)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        return p @ k[:, : kernel.dv] / p.sum(axis=1, keepdims=True)

    want, got = attention(plain), attention(coded)
    cosine = np.sum(want * got, axis=1) / (np.linalg.norm(want, axis=1)
                                           * np.linalg.norm(got, axis=1))
    label = name.split("_d")[0].removeprefix("bf16_") + (", powers of 2" if power_of_2 else "")
    size = made.record.bytes + made.record.behind
    return [label, f"{size}", kind, f"{relative(coded[:, :dk], plain[:, :dk]):.1e}",
            f"{relative(got, want):.1e}", f"{cosine.mean():.5f}"]


CACHES = (("bf16_i8_656_d512_rope64", 0), ("bf16_i8_656_d512_rope64", 1),
          ("bf16_fp8_656_d512_rope64_slots", 0), ("bf16_fp8_656_d512_rope64_slots", 1),
          ("bf16_fp8_v4_d448_rope64_slots", 0))
CACHE_COLUMNS = ("record", "bytes a token", "latents", "error of the rows", "of the output",
                 "cosine")


def main() -> int:
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for name in KERNELS:
        for spread in SPREADS:
            for keys in KEYS:
                print(f"| {' | '.join(measure(name, spread, keys))} |")
    print(f"\n| {' | '.join(CACHE_COLUMNS)} |\n|{' --- |' * len(CACHE_COLUMNS)}")
    for name, power_of_2 in CACHES:
        for kind in ("normal", "outliers"):
            print(f"| {' | '.join(of_cache(name, kind, power_of_2))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
