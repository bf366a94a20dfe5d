"""Caches of records for the bench: normal rows, quantised with NumPy, and what they decode to."""

import functools
from typing import Any

import measure as m
import ml_dtypes
import numpy as np

from gen.formats import CODE_LIMIT, Plan, layout

BLOCK_SIZE = 64  # of pages, where scales lie behind a page's rows
E4M3 = ml_dtypes.float8_e4m3fn
NUMBERS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "i8": np.int8,
           "e4m3": E4M3}


def quantised(rows: np.ndarray, plan: Plan) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The fields of each row as bytes, and the numbers that they stand for."""
    record = plan.record
    nope, kind = rows[:, : record.count("nope")], record.field("nope").type
    tiles = np.arange(0, nope.shape[1], record.tile)
    scale = np.maximum.reduceat(abs(nope), tiles, axis=1) / np.float32(CODE_LIMIT[kind])
    if record.field("scale").type == "e8m0":
        code = np.ceil(np.log2(scale)).astype(np.int32) + 127
        scale, stored = np.exp2(code - 127).astype(np.float32), code.astype(np.uint8)
    else:
        scale = scale.astype(NUMBERS[record.field("scale").type])
        stored, scale = scale, scale.astype(np.float32)
    wide = np.repeat(scale, record.tile, axis=1)[:, : nope.shape[1]]
    codes = (np.rint(nope / wide) if kind == "i8" else nope / wide).astype(NUMBERS[kind])
    fields = {"nope": codes, "scale": stored}
    decoded = [codes.astype(np.float32) * wide]
    if record.field("rope"):
        rope = rows[:, nope.shape[1] :].astype(NUMBERS[plan.place("rope").type.name])
        fields["rope"] = rope
        decoded.append(rope.astype(np.float32))
    parts = {name: np.ascontiguousarray(x).view(np.uint8) for name, x in fields.items()}
    return parts, np.concatenate(decoded, axis=1)


def put(memory: np.ndarray, plan: Plan, parts: dict[str, np.ndarray], behind: bool) -> None:
    for place in plan.places:
        if place.behind == behind and place.field.name in parts:
            memory[..., place.at : place.at + place.bytes] = parts[place.field.name].reshape(
                *memory.shape[:-1], -1)


@functools.cache
def cache(record: Any, dtype: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """[rows][1][bytes], or [pages][bytes of a page]; and the numbers, [rows][1][channels]."""
    plan = layout(record, dtype)
    width = record.count("nope") + record.count("rope")
    decoded = m.allocate((rows, 1, width), np.float32)
    pages = rows // BLOCK_SIZE
    body = BLOCK_SIZE * (plan.bytes + plan.behind)
    page = -(-body // record.page_multiple) * record.page_multiple
    memory = (m.allocate((pages, page), np.uint8) if plan.behind
              else m.allocate((rows, 1, plan.bytes), np.uint8))
    for start in range(0, rows, 4096):
        part = m.rng().standard_normal((min(4096, rows - start), width), np.float32)
        parts, decoded[start : start + len(part), 0] = quantised(part, plan)
        if not plan.behind:
            put(memory[start : start + len(part), 0], plan, parts, behind=False)
            continue
        held = memory[start // BLOCK_SIZE : (start + len(part)) // BLOCK_SIZE]
        tokens = BLOCK_SIZE * plan.bytes
        put(held[:, :tokens].reshape(len(held), BLOCK_SIZE, -1), plan, parts, behind=False)
        scales = held[:, tokens:body].reshape(len(held), BLOCK_SIZE, -1)
        put(scales, plan, parts, behind=True)
    return memory, decoded
