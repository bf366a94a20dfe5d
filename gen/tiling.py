"""(kernel, instruction set) -> tile sizes, each with its reason beside it."""

from dataclasses import dataclass

from gen import matrix

AHEAD = 8  # rows of 1 KiB: enough to cover a miss, too few to crowd the fill buffers
FEW_CHANNELS = 192  # of 12 .. 24 keys and 16 heads: 9 .. 18 + 12 KiB, with room for the rows
L1_BYTES = 16 * 1024  # what a slice of a Q panel may take of the first-level cache


@dataclass(frozen=True)
class RowTile:
    """A value tile that reads values where they are stored."""

    heads: int
    vecs: int
    tail: bool = False  # the last channels, fewer than a vector

    @property
    def name(self):
        return "n" if self.tail else str(self.vecs)


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel on one instruction set. Strides in floats."""

    block: int  # keys loaded, scored and summed at a time
    ahead: int  # rows that are asked for before they are loaded
    rows: tuple[int, ...]  # keys of a score tile, largest first
    vecs: tuple[int, ...]  # vectors of heads of a score tile
    value_heads: tuple[int, ...]  # heads of a value tile, largest first
    value_vecs: tuple[int, ...]  # vectors of channels of a value tile
    channels: int  # channels of one slice of the score product
    k_stride: int
    v_stride: int
    o_stride: int
    few_keys: int  # keys loaded at a time when there are few heads
    few_channels: int  # of a slice then
    few_block: int  # and keys of a block then
    few: int | str  # up to so many heads values are read in place; "all", "none"
    row_tiles: tuple  # RowTile: heads and vectors of such a value tile
    dk_tail: bool  # dk is not a whole number of vectors
    dv_tail: bool
    why: dict[str, str]
    head_pad: int  # heads are padded to a multiple of this in the workspace
    memory: dict[str, int]  # floats that k, v and (for each head) q and s need

    @property
    def shape_lines(self):
        """For people."""
        return (
            f"score tiles {self.rows} keys x {self.vecs} vectors of heads",
            f"value tiles {self.value_heads} heads x {self.value_vecs} vectors of channels",
        )

    @property
    def padded_c(self):
        """Heads up to whole vectors."""
        return f"(plan->group + {self.head_pad - 1}) / {self.head_pad} * {self.head_pad}"

    @property
    def row_heads(self):
        return sorted({t.heads for t in self.row_tiles}, reverse=True)

    @property
    def block_c(self):
        if self.few == "all":
            return str(self.few_block)
        if self.few == "none":
            return str(self.block)
        return f"plan->group <= {self.few} ? {self.few_block} : {self.block}"

    @property
    def few_indent(self):
        return "" if self.few == "all" else "    "


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
        "few": "all",
        "few_keys": 4,
        "row_tiles": ((4, 2), (4, 1), (1, 4), (1, 1)),
        "few_block": 16,
        "block": 16,
        "why": "4 x 2 numbers fit the 16 float registers of a small core with room for operands",
    },
    "neon": {
        "rows": (8, 1),
        "vecs": (2, 1),
        "value_heads": (8, 1),
        "value_vecs": (2, 1),
        "few": 16,
        "few_keys": 16,
        "row_tiles": ((8, 2), (8, 1), (1, 4), (1, 1)),
        "few_block": 64,
        "block": 64,
        "why": "8 x 2 accumulators, 2 vectors and a broadcast of 32 registers",
    },
    "avx2": {
        "rows": (6, 1),
        "vecs": (2, 1),
        "value_heads": (4, 1),
        "value_vecs": (3, 1),
        "few": 16,
        "few_keys": 24,
        "row_tiles": ((8, 1), (4, 2), (4, 1), (1, 4), (1, 1)),
        "few_block": 48,
        "block": 96,
        "why": "6 x 2 accumulators, 2 vectors and a broadcast fill 15 of 16 registers",
    },
    "avx512": {
        "rows": (12, 4, 1),
        "vecs": (2, 1),
        "value_heads": (8, 4, 1),
        "value_vecs": (3, 2, 1),
        "few": 32,
        "few_keys": 12,
        "row_tiles": ((16, 1), (4, 4), (4, 1), (1, 8), (1, 1)),
        "few_block": 48,
        "block": 96,
        "why": "12 x 2 accumulators take 24 of 32 registers: 14 loads for 24 FMA",
    },
}


def row_tiles(shapes, dv, lanes):
    """Only the tiles that this many channels can use, and those for what is left over."""
    tiles = [RowTile(heads, vecs) for heads, vecs in shapes if vecs * lanes <= dv]
    if dv % lanes:
        heads = sorted({heads for heads, _ in shapes}, reverse=True)
        tiles.extend(RowTile(h, 1, tail=True) for h in heads)
    return tuple(tiles)


def even_slices(channels, most, lanes):
    """Channels of a slice when they are cut into as few even slices of at most `most` as can be."""
    return round_up(-(-channels // -(-channels // most)), lanes)


def few_reason(few):
    """When values are read where they are stored, and why."""
    if few == "all":
        return "values are always read where they are stored: workspace is dear on small targets"
    return (
        f"up to {few} heads read values where they are stored: for so few the float32 copy costs "
        "more to write than it saves"
    )


def tile(kernel, isa):
    """The tile sizes of one kernel on one instruction set."""
    if isa.tiles:
        return matrix.tile(kernel, isa)
    registers = REGISTERS[isa.name]
    lanes = isa.lanes
    block = registers["block"]
    panel = registers["vecs"][0] * lanes
    slices = max(1, -(-kernel.d * panel * 4 // L1_BYTES)) if isa.name != "scalar" else 1
    channels = round_up(-(-kernel.d // slices), lanes)
    k_stride = max(round_up(kernel.dk, lanes), kernel.dk + round_up(kernel.rope, lanes))
    k_stride = round_up(max(k_stride, kernel.d), lanes)
    v_stride = round_up(kernel.dv, lanes)
    few_only = registers["few"] == "all"
    return Tile(
        block=block,
        ahead=AHEAD,
        rows=registers["rows"],
        vecs=registers["vecs"],
        value_heads=registers["value_heads"],
        value_vecs=registers["value_vecs"],
        channels=channels,
        k_stride=k_stride,
        v_stride=v_stride,
        o_stride=round_up(kernel.dv, lanes),
        few=registers["few"],
        few_keys=registers["few_keys"],
        few_block=registers["few_block"],
        few_channels=even_slices(kernel.d, FEW_CHANNELS, lanes),
        row_tiles=row_tiles(registers["row_tiles"], kernel.dv, lanes),
        dk_tail=kernel.dk % lanes != 0,
        dv_tail=kernel.dv % lanes != 0,
        why={
            "registers": registers["why"],
            "block": f"{block} keys a block: P of a tile of heads stays in the first-level cache",
            "channels": f"{channels} channels of {panel} heads are "
            f"{channels * panel * 4 // 1024} KiB: they stay in the first-level cache",
            "few": few_reason(registers["few"]),
        },
        head_pad=lanes,
        memory={
            "q": kernel.d,
            "k": (registers["few_keys"] if few_only else block) * k_stride,
            "v": 0 if few_only else block * v_stride,
            "s": block,
        },
    )
