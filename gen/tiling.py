"""(kernel, instruction set) -> tile sizes, each with its reason beside it."""

from dataclasses import dataclass

L1_BYTES = 16 * 1024  # what a slice of a Q panel may take of the first-level cache


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel on one instruction set. Strides in floats."""

    block: int  # keys loaded, scored and summed at a time
    rows: tuple[int, ...]  # keys of a score tile, largest first
    vecs: tuple[int, ...]  # vectors of heads of a score tile
    value_heads: tuple[int, ...]  # heads of a value tile, largest first
    value_vecs: tuple[int, ...]  # vectors of channels of a value tile
    channels: int  # channels of one slice of the score product
    k_stride: int
    v_stride: int
    o_stride: int
    why: dict[str, str]


def round_up(n, step):
    return (n + step - 1) // step * step


# instruction set -> register tiles. A tile of r rows and c vectors needs r * c accumulators, c
# streamed vectors and one broadcast; the more of them, the fewer loads there are for each FMA.
REGISTERS = {
    "scalar": {
        "rows": (4, 1),
        "vecs": (2, 1),
        "value_heads": (4, 1),
        "value_vecs": (2, 1),
        "block": 16,
        "why": "4 x 2 numbers fit the 16 float registers of a small core with room for operands",
    },
    "neon": {
        "rows": (8, 1),
        "vecs": (2, 1),
        "value_heads": (8, 1),
        "value_vecs": (2, 1),
        "block": 64,
        "why": "8 x 2 accumulators, 2 vectors and a broadcast of 32 registers",
    },
    "avx2": {
        "rows": (6, 1),
        "vecs": (2, 1),
        "value_heads": (6, 4, 1),
        "value_vecs": (2, 1),
        "block": 96,
        "why": "6 x 2 accumulators, 2 vectors and a broadcast fill 15 of 16 registers",
    },
    "avx512": {
        "rows": (12, 4, 1),
        "vecs": (2, 1),
        "value_heads": (8, 4, 1),
        "value_vecs": (3, 2, 1),
        "block": 96,
        "why": "12 x 2 accumulators take 24 of 32 registers: 14 loads for 24 FMA",
    },
}


def tile(kernel, isa):
    """The tile sizes of one kernel on one instruction set."""
    registers = REGISTERS[isa.name]
    lanes = isa.lanes
    block = registers["block"]
    panel = registers["vecs"][0] * lanes
    slices = max(1, -(-kernel.d * panel * 4 // L1_BYTES)) if isa.name != "scalar" else 1
    channels = -(-kernel.d // slices)
    k_stride = max(round_up(kernel.dk, lanes), kernel.dk + round_up(kernel.rope, lanes))
    return Tile(
        block=block,
        rows=registers["rows"],
        vecs=registers["vecs"],
        value_heads=registers["value_heads"],
        value_vecs=registers["value_vecs"],
        channels=channels,
        k_stride=round_up(max(k_stride, kernel.d), lanes),
        v_stride=round_up(kernel.dv, lanes),
        o_stride=round_up(kernel.dv, lanes),
        why={
            "registers": registers["why"],
            "block": f"{block} keys a block: P of a tile of heads stays in the first-level cache, O moves once",
            "channels": f"{channels} channels of {panel} heads are "
            f"{channels * panel * 4 // 1024} KiB: they stay in the first-level cache",
        },
    )
