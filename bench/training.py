"""The operators of prefill and training (fusion_attention, fusion_attention_grad): their shapes,
their tensors, the arguments of a call, and a reference for one kv head.

A selection is dense, causal, "band of W" (the last W keys up to a row's own) or "prefix of N"
(causal, and N keys that all rows see).
"""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
from tensors import Shape, Tensors, allocate, normal_once, tensors

from gen import bind, render, spec
from gen.isa import ISAS

PREFIX = f"hl_{spec.TRAIN}_"
GRADIENT = "grad_"
CAUSAL = 3  # sparse modes: right-down causal, band, prefix
BAND, PREFIXED = 4, 6
TABLE_KEYS = 4096


# ---- shapes -------------------------------------------------------------------------------------


def prompt(keys: int, heads: int = 8, kv_heads: int = 8, selection: str = "causal") -> Shape:
    """As many rows as keys."""
    return Shape(heads, kv_heads, keys, keys, selection, keys, value=True)


PROMPTS = [prompt(1024), prompt(4096)]
GROUPED = [prompt(1024, 32), prompt(4096, 32)]
LATENT = Shape(128, 1, 4096, 4096, "causal", 64)  # a chunk of a prompt over what was there before
FULL = prompt(TABLE_KEYS, selection="dense")
MASKED = [prompt(TABLE_KEYS, selection=kind) for kind in ("band of 256", "prefix of 2048")]
SHAPES = {
    "bf16_d128": [*PROMPTS, *GROUPED, FULL, *MASKED],
    "bf16_d64": PROMPTS,
    "f32_d128": PROMPTS,
    "bf16_d576x512": [LATENT],
    "f32_d64_pse_types_softcap_sinks": [prompt(1024)],
    "grad_bf16_d128": PROMPTS,
    "grad_f32_d128": PROMPTS,
    "grad_f32_d64_pse_types_softcap": [prompt(1024)],
}
# In little, for quick runs; and for plain C, which is a fallback.
QUICK = [
    prompt(160, 4, 2),
    prompt(160, 4, 2, "band of 40"),
    Shape(4, 2, 200, 200, "dense", 33, True),
]
SCALAR = prompt(256)


def is_prompt(shape: Shape) -> bool:
    """Whether it is what every library has: causal, as many rows as keys."""
    return shape.selection == "causal" and shape.rows == shape.keys


def in_little(shape: Shape, keys: int) -> Shape:
    """The same with so many rows and keys."""
    return replace(shape, rows=keys, keys=keys, cache_keys=keys)


def pairs(shape: Shape) -> int:
    """Pairs of row and key that count, for one head."""
    low, high = bounds(shape)
    return int((high - low).sum())


def bounds(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """The first key that each row sees, and the one behind its last."""
    i = np.arange(shape.rows)
    end = shape.keys - shape.rows + i + 1
    kind, _, width = shape.selection.partition(" of ")
    if kind == "dense":
        return np.zeros_like(i), np.full_like(i, shape.keys)
    if kind == "prefix":
        return np.zeros_like(i), np.clip(int(width), end, shape.keys)
    if kind == "band":
        return np.maximum(end - int(width), 0), end
    return np.zeros_like(i), end


def tiles(shape: Shape, rows: int, keys: int) -> float:
    """The share of tiles of so many rows and keys, from the first ones on, that hold a pair."""
    low, high = bounds(shape)
    touched = 0
    for i in range(0, shape.rows, rows):
        begin, end = low[i : i + rows].min(), high[i : i + rows].max()
        touched += -(-end // keys) - begin // keys
    return touched / (-(-shape.rows // rows) * -(-shape.keys // keys))


def grain(kernel: spec.Kernel, isa: str) -> tuple[int, int]:
    """Queries (rows times heads of a group) and keys that an instruction set computes together, and
    leaves out together."""
    tile = render.tiles_of(kernel)[ISAS[isa]]
    return (tile.sub, tile.sub) if ISAS[isa].tiles else (tile.queries, tile.block)


def flops(kernel: spec.Kernel, shape: Shape) -> int:
    """Of two products, backward of five: scores, dP, dV, dQ, dK; those that are computed twice
    count once."""
    deep, wide = (3, 2) if kernel.backward else (1, 1)
    return 2 * shape.heads * (deep * kernel.dk + wide * kernel.dv) * pairs(shape)


def bytes_of(kernel: spec.Kernel, shape: Shape) -> int:
    """Of all tensors, each read or written once."""
    size = bind.DTYPES[kernel.dtype].itemsize
    q, k = shape.rows * shape.heads * kernel.dk, shape.keys * shape.kv_heads * kernel.dk
    out = shape.rows * shape.heads * kernel.dv
    v = shape.keys * shape.kv_heads * kernel.dv if shape.value else 0
    return size * (2 * (q + k + v + out) if kernel.backward else q + k + v + out)


# ---- calls --------------------------------------------------------------------------------------


@functools.cache
def tensors_of(kernel: spec.Kernel, shape: Shape) -> Tensors:
    return tensors(shape, kernel.dk, kernel.dv, bind.DTYPES[kernel.dtype])


def common(shape: Shape, t: Tensors) -> dict[str, Any]:
    """What both directions are told."""
    made: dict[str, Any] = {
        "query": t.query, "key": t.key, "value": t.key if t.value is None else t.value,
        "batch": 1, "seq_q": shape.rows, "seq_kv": shape.keys, "heads_q": shape.heads,
        "heads_kv": shape.kv_heads, "scale_value": t.scale, "stats_width": 1,
    }  # fmt: skip
    if t.value is None:  # values are the first channels of keys
        made["value_stride"] = (0, shape.kv_heads * t.key.shape[-1], t.key.shape[-1])
    kind, _, width = shape.selection.partition(" of ")
    if kind == "band":
        made |= {"sparse_mode": BAND, "band": 1, "pre_tokens": int(width) - 1, "next_tokens": 0}
    elif kind == "prefix":
        made |= {"sparse_mode": PREFIXED, "prefix": np.array([int(width)], np.int64)}
    elif kind == "causal":
        made["sparse_mode"] = CAUSAL
    return made | {"mask_from_mode": int(kind != "dense")}


@functools.cache
def forward_kernel(dtype: str, dk: int, dv: int, features: tuple[str, ...]) -> bind.Kernel:
    table = {"op": spec.TRAIN, "dtype": dtype, "dk": dk, "dv": dv, "features": features}
    return bind.load(spec.parse_header(table))


@functools.cache
def forward(kernel: spec.Kernel, shape: Shape) -> dict[str, np.ndarray]:
    """What the way back is given: results of the forward kernel, and the gradient of its output."""
    made = forward_kernel(kernel.dtype, kernel.dk, kernel.dv, kernel.features)
    rows = shape.rows, shape.heads
    results = {
        "attention_out": allocate((*rows, kernel.dv), made.dtype),
        "softmax_max": allocate((shape.heads, shape.rows), np.float32),
        "softmax_sum": allocate((shape.heads, shape.rows), np.float32),
    }
    made.run(**common(shape, tensors_of(kernel, shape)), **results).check()
    return results | {"dout": normal_once("dout", *rows, kernel.dv, made.dtype)}


def outputs(kernel: spec.Kernel, shape: Shape) -> dict[str, np.ndarray]:
    """Memory for what a call writes."""
    dtype = bind.DTYPES[kernel.dtype]
    if not kernel.backward:
        return {"attention_out": allocate((shape.rows, shape.heads, kernel.dv), dtype)}
    return {
        "dquery": allocate((shape.rows, shape.heads, kernel.dk), dtype),
        "dkey": allocate((shape.keys, shape.kv_heads, kernel.dk), dtype),
        "dvalue": allocate((shape.keys, shape.kv_heads, kernel.dv), dtype),
    }


def fields(kernel: spec.Kernel, shape: Shape) -> dict[str, Any]:
    """The arguments of a call but its results and its instruction set."""
    made = common(shape, tensors_of(kernel, shape))
    return made | (forward(kernel, shape) if kernel.backward else {})


# ---- the reference ------------------------------------------------------------------------------


@functools.cache
def reference(kernel: spec.Kernel, shape: Shape) -> dict[str, np.ndarray]:
    """In float64, of the heads of the first kv head: the results by their names."""
    t = tensors_of(kernel, shape)
    k = t.key[:, 0].astype(np.float64)
    v = k[:, : kernel.dv] if t.value is None else t.value[:, 0].astype(np.float64)
    low, high = bounds(shape)
    j = np.arange(shape.keys)
    hidden = (j < low[:, None]) | (j >= high[:, None])
    group = shape.heads // shape.kv_heads
    sums: dict[str, Any] = {"dkey": 0, "dvalue": 0}
    apart: dict[str, list[np.ndarray]] = {"attention_out": [], "dquery": []}
    for h in range(group):
        q = t.query[:, h].astype(np.float64)
        p = q @ k.T * t.scale
        p[hidden] = -np.inf
        np.exp(p - p.max(axis=-1, keepdims=True), out=p)
        p /= p.sum(axis=-1, keepdims=True)
        out = p @ v
        apart["attention_out"].append(out)
        if kernel.backward:
            dout = normal_once("dout", shape.rows, shape.heads, kernel.dv, t.query.dtype)
            dout = dout[:, h].astype(np.float64)
            sums["dvalue"] = sums["dvalue"] + p.T @ dout
            ds = dout @ v.T
            ds -= (dout * out).sum(axis=-1, keepdims=True)
            ds *= p * t.scale
            apart["dquery"].append(ds @ k)
            sums["dkey"] = sums["dkey"] + ds.T @ q
    if not kernel.backward:
        return {"attention_out": np.stack(apart["attention_out"], axis=1)}
    return {"dquery": np.stack(apart["dquery"], axis=1)} | {
        name: total[:, None] for name, total in sums.items()
    }


def error(kernel: spec.Kernel, shape: Shape, got: dict[str, np.ndarray]) -> float:
    """The largest of the results' errors, relative to the L2 norm of each."""
    worst = 0.0
    for name, want in reference(kernel, shape).items():
        off = got[name][:, : want.shape[1]].astype(np.float64) - want
        worst = max(worst, float(np.linalg.norm(off) / np.linalg.norm(want)))
    return worst
