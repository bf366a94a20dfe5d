"""Measures how far the shipped kernels are from float64: the table of docs/numerics.md.

    build/venv/bin/python bench/errors.py
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

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


def main() -> int:
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for name in KERNELS:
        for spread in SPREADS:
            for keys in KEYS:
                print(f"| {' | '.join(measure(name, spread, keys))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
