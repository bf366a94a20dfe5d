"""The kernels of quantised caches that tests run: the shipped ones, and odd ones of tests' own."""

import functools
from pathlib import Path
from typing import Any

import oracle
from helpers import record_from
from oracle_records import Form

from gen import bind, render, spec
from gen.formats import RECORDS
from gen.records import parse_record

ROOT = Path(__file__).resolve().parent.parent
OP = "sparse_flash_attention_antiquant"
SHIPPED = {
    "i8_656": "bf16_i8_656_d512_rope64",
    "fp8_656": "bf16_fp8_656_d512_rope64_slots",
    "fp8_v4": "bf16_fp8_v4_d448_rope64_slots",
}


def field(name: str, kind: str, count: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "count": count}


def pad(count: int) -> dict[str, Any]:
    return {"name": "pad", "count": count}


# No tile, no section and no number of scales is a whole vector; rope has a type of its own.
OWN = {
    "odd": (
        "bf16",
        {
            "fields": [field("nope", "i8", 33), pad(3), field("rope", "f16", 5),
                       field("scale", "bf16", 4), pad(6)],
            "tile": 10,
        },
    ),
    "norope": (
        "f16", {"fields": [field("nope", "e4m3", 48), field("scale", "f16", 3)], "tile": 16},
    ),
    "after": (
        "f16",
        {
            "fields": [field("nope", "i8", 20), field("rope", "query", 3)],
            "behind": [pad(1), field("scale", "e8m0", 3)],
            "page_multiple": 64,
            "tile": 8,
        },
    ),
    "wide": (
        "bf16",
        {
            "fields": [field("nope", "e4m3", 16), field("rope", "f32", 4),
                       field("scale", "f32", 3)],
            "tile": 7,
        },
    ),
}  # fmt: skip


FORMS = {
    **{name: Form(oracle.RECORDS[name], bind.DTYPES["bf16"]) for name in SHIPPED},
    **{name: Form(record_from(table), bind.DTYPES[dtype]) for name, (dtype, table) in OWN.items()},
}


@functools.cache
def text(name: str) -> str:
    """The header's C text."""
    if name in SHIPPED:
        return (ROOT / "include" / f"hl_{OP}_{SHIPPED[name]}.h").read_text()
    dtype, table = OWN[name]
    record = parse_record({"name": f"{name}_record", **table})
    records = {**RECORDS, record.name: record}
    asked = {"op": OP, "dtype": dtype, "kv": record.name}
    return render.render_header(spec.parse_header(asked, "", records))


@functools.cache
def kernel(name: str) -> bind.Kernel:
    """Compiled, once for the whole run."""
    return bind.load(text(name), flags=("-O1",))
