"""The decode operator (incre_flash_attention): its shapes, what was promised of them, its caches in
every format and layout, and the arguments of a call."""

import functools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from tensors import (
    SCORE_DEVIATION,
    Shape,
    Tensors,
    allocate,
    exact,
    normal_once,
    pages,
)

from gen import bind, spec
from gen.formats import Stored

PREFIX = f"hl_{spec.DECODE}_"
I4_LARGEST = 7  # of the codes -8 .. 7: as far on both sides of zero
PAGED = ("PA_BSND", "PA_BNSD")
HEADS_FIRST = ("BNSD", "PA_BNSD")


# ---- shapes -------------------------------------------------------------------------------------


def gqa(keys: int, layout: str = "BSND", block: int = 0, **more: Any) -> Shape:
    """32 query heads on 8 of the cache."""
    return Shape(32, 8, keys, keys, value=True, layout=layout, block=block, **more)


def gqa_shapes(*places: tuple[str, int]) -> list[Shape]:
    return [gqa(keys, *place) for place in places for keys in (4096, 16384)]


PLAIN = ("BSND", 0), ("BNSD", 0)
PAGES = ("PA_BSND", 16), ("PA_BSND", 128)
ROWS = gqa(16384, selection="causal", rows=8)  # a draft of eight tokens
BATCH = gqa(2048, batch=8)
SMALL = Shape(4, 4, 256, 256, value=True)  # of a small model: a call of microseconds
MLA = [Shape(16, 1, keys, keys) for keys in (2048, 8192, 32768)]
F32, LATENT = "f32_d64_stats_sinks_window_softcap_alibi", "bf16_d576x512_stats"
SHAPES = {
    "bf16_d128": [*gqa_shapes(*PLAIN, *PAGES, ("PA_BNSD", 128)), ROWS, BATCH],
    "f16_d128": gqa_shapes(*PLAIN),
    "bf16_i8_d128": [*gqa_shapes(*PLAIN, *PAGES), ROWS, BATCH],
    "bf16_e4m3_d128": gqa_shapes(*PLAIN),
    "bf16_i4_32_d128": gqa_shapes(*PLAIN),
    F32: [SMALL],
    LATENT: MLA,
    "f16_i8_d32": [Shape(4, 4, 64, 64, value=True)],
}
# The same kernels in little, for quick runs.
QUICK = [
    Shape(8, 2, 160, 160, value=True, layout="BNSD", batch=2),
    Shape(8, 2, 160, 160, value=True, layout="PA_BSND", block=16),
    Shape(8, 2, 160, 160, "causal", rows=3, value=True),
]


def promised() -> dict[tuple[str, Shape, str], float]:
    """(kernel without PREFIX, shape, instruction set or "best") -> share of R that was promised."""
    made: dict[tuple[str, Shape, str], float] = {}
    for keys in (4096, 16384):
        for layout, exact_share, i8_share in (("BSND", 68, 62), ("BNSD", 75, 70)):
            made["f16_d128", gqa(keys, layout), "amx"] = exact_share / 100
            made["bf16_d128", gqa(keys, layout), "amx"] = 0.75
            made["bf16_i8_d128", gqa(keys, layout), "amx"] = i8_share / 100
            made["bf16_d128", gqa(keys, layout), "avx512"] = 0.48
    made |= {(LATENT, shape, "amx"): 0.60 for shape in MLA}
    made["bf16_d128", ROWS, "amx"] = 0.50
    made[F32, SMALL, "best"] = 0.65
    return made


PROMISED = promised()


# ---- caches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Keys or values as an engine appends them, token by token."""

    rows: np.ndarray  # [tokens][kv_heads][width], elements as strides count them
    numbers: np.ndarray  # what they stand for: [tokens][kv_heads][channels]
    scale: np.ndarray | None = None  # [kv_heads][channels] in the query's type, or one number
    mode: str = ""  # of the scale: CHANNEL, TENSOR


@functools.cache
def cache(stored: Stored, side: str, tokens: int, heads: int, channels: int, dtype: Any) -> Cache:
    """Normal numbers, rounded to how they are stored."""
    if stored.packed:
        return packed(normal_once(side, tokens, heads, channels, np.float32), stored)
    if stored.is_codes:
        return coded(normal_once(side, tokens, heads, channels, np.float32), stored, dtype)
    rows = normal_once(side, tokens, heads, channels, dtype)
    return Cache(rows, rows)


def coded(numbers: np.ndarray, stored: Stored, dtype: Any) -> Cache:
    """int8 with a scale for each channel, FP8 with one for all, as engines have them."""
    per_channel = stored.type == "i8"
    size = np.abs(numbers).max(axis=0 if per_channel else None)
    scale = np.atleast_1d(size / (127 if per_channel else 448)).astype(dtype)
    wide = scale.astype(np.float32)
    made = allocate(numbers.shape, np.uint8)
    codes = made.view(np.int8 if per_channel else ml_dtypes.float8_e4m3fn)
    back = allocate(numbers.shape, np.float32)
    for part in (slice(i, i + 1024) for i in range(0, len(numbers), 1024)):
        scaled = numbers[part] / wide
        codes[part] = np.clip(np.rint(scaled), -127, 127) if per_channel else scaled.clip(-448, 448)
        back[part] = codes[part].astype(np.float32) * wide
    return Cache(made, back, scale, "CHANNEL" if per_channel else "TENSOR")


def packed(numbers: np.ndarray, stored: Stored) -> Cache:
    """Two codes a byte, then float16 scales of groups of channels, in the same row."""
    tokens, heads, channels = numbers.shape
    if channels % stored.group:
        raise ValueError(f"{channels} channels; fix: a multiple of {stored.group}")
    made = allocate((tokens, heads, stored.width(channels)), np.uint8)
    back = allocate(numbers.shape, np.float32)
    for part in (slice(i, i + 1024) for i in range(0, tokens, 1024)):
        groups = numbers[part].reshape(-1, heads, channels // stored.group, stored.group)
        scale = (np.abs(groups).max(axis=-1, keepdims=True) / I4_LARGEST).astype(np.float16)
        wide = scale.astype(np.float32)
        codes = np.clip(np.rint(groups / wide), -8, 7).astype(np.int8)
        back[part] = (codes * wide).reshape(back[part].shape)
        nibbles = codes.reshape(-1, heads, channels).view(np.uint8) & 15
        made[part, :, : channels // 2] = nibbles[..., ::2] | nibbles[..., 1::2] << 4
        made[part, :, stored.scales_at(channels) :] = np.ascontiguousarray(scale[..., 0]).view(
            np.uint8
        )
    return Cache(made, back)


@functools.cache
def table(tokens: int, batch: int, block: int) -> np.ndarray:
    """[batch][blocks]: where the blocks of all sequences lie, in no order."""
    return pages(tokens, block).reshape(batch, -1)


def placed(rows: np.ndarray, shape: Shape) -> np.ndarray:
    """Rows [tokens][kv_heads][width] in a shape's layout; the result has the same three sizes, but
    only as much memory, not as axes."""
    tokens, heads, width = rows.shape
    if shape.layout == "BSND":
        return rows
    made = allocate(rows.shape, rows.dtype)
    if shape.layout in PAGED:
        ids = table(tokens, shape.batch, shape.block).reshape(-1)
        blocks = rows.reshape(-1, shape.block, heads, width)
    else:
        ids = np.arange(shape.batch)
        blocks = rows.reshape(shape.batch, -1, heads, width)
    if shape.layout in HEADS_FIRST:
        blocks = blocks.swapaxes(1, 2)
    made.reshape(blocks.shape)[ids] = blocks
    return made


@functools.cache
def placed_once(
    stored: Stored, side: str, shape: Shape, channels: int, dtype: Any
) -> tuple[np.ndarray, Cache]:
    held = cache(stored, side, shape.batch * shape.keys, shape.kv_heads, channels, dtype)
    return placed(held.rows, shape), held


@dataclass(frozen=True)
class Decoding(Tensors):
    """Tensors of the decode operator. Of several sequences: one after another. key and value:
    see `placed`; key_held, value_held: token by token."""

    key_held: Cache | None = None
    value_held: Cache | None = None


def tensors(kernel: spec.Kernel, shape: Shape) -> Decoding:
    """The tensors of a shape."""
    dtype = bind.DTYPES[kernel.dtype]
    rows = shape.batch * shape.rows
    query = normal_once("query", rows, shape.heads, kernel.dk, dtype)
    key, key_held = placed_once(kernel.stored_key, "key", shape, kernel.dk, dtype)
    value = value_held = None
    if shape.value:
        value, value_held = placed_once(kernel.stored_value, "value", shape, kernel.dv, dtype)
    return Decoding(
        query, key, value, None, kernel.dv, SCORE_DEVIATION / kernel.dk**0.5,
        key_held=key_held, value_held=value_held,
    )  # fmt: skip


@functools.cache
def reference(kernel: spec.Kernel, shape: Shape) -> np.ndarray:
    """[batch * rows][heads][dv] in float64, over what the cache stands for."""
    t = tensors(kernel, shape)
    group = shape.heads // shape.kv_heads
    made = np.empty((shape.batch, shape.rows, shape.heads, kernel.dv))
    queries = t.query.reshape(shape.batch, shape.rows, shape.heads, -1)
    for b in range(shape.batch):
        tokens = slice(b * shape.keys, (b + 1) * shape.keys)
        for n in range(shape.kv_heads):
            heads = slice(n * group, (n + 1) * group)
            k = t.key_held.numbers[tokens, n]
            v = t.value_held.numbers[tokens, n] if t.value_held else k[:, : kernel.dv]
            made[b, :, heads] = exact(
                queries[b][:, heads], k, v, t.scale, shape.selection == "causal"
            )
    return made.reshape(-1, shape.heads, kernel.dv)


def cache_bytes(kernel: spec.Kernel, shape: Shape) -> int:
    """Of the rows that a call reads."""
    sides = [(kernel.stored_key, kernel.dk)]
    sides += [(kernel.stored_value, kernel.dv)] if shape.value else []
    row = sum(stored.width(channels) * stored.element for stored, channels in sides)
    return shape.batch * shape.keys * shape.kv_heads * row


# ---- arguments ----------------------------------------------------------------------------------


def fields(shape: Shape, t: Decoding, constants: dict[str, int]) -> dict[str, Any]:
    """The arguments of a call but its output and its instruction set."""
    of_query = shape.layout.removeprefix("PA_")
    if of_query == "BNSD" and shape.rows > 1:
        raise NotImplementedError("several rows in BNSD; fix: lay the query out in heads first")
    made: dict[str, Any] = {
        "query": t.query, "key": t.key, "value": t.value, "batch": shape.batch,
        "seq_q": shape.rows, "heads_q": shape.heads, "heads_kv": shape.kv_heads,
        "layout_query": constants[f"HL_LAYOUT_{of_query}"],
        "layout_kv": constants[f"HL_LAYOUT_{shape.layout}"], "scale_value": t.scale,
    }  # fmt: skip
    if shape.layout in PAGED:
        ids = table(len(t.key), shape.batch, shape.block)
        made |= {
            "block_table": ids, "num_blocks": ids.size, "max_blocks": ids.shape[1],
            "block_size": shape.block,
            "actual_seq_lengths": np.full(shape.batch, shape.keys, np.int32),
        }  # fmt: skip
    else:
        made["seq_kv"] = shape.keys
    return made | antiquant(t, constants)


def antiquant(t: Decoding, constants: dict[str, int]) -> dict[str, Any]:
    """Scales of the sides that have some: K's numbers, then V's."""
    sides = [held for held in (t.key_held, t.value_held) if held and held.scale is not None]
    if not sides:
        return {}
    return {
        "antiquant_scale": np.concatenate([held.scale.reshape(-1) for held in sides]),
        "antiquant_mode": constants[f"HL_ANTIQUANT_{sides[0].mode}"],
    }
