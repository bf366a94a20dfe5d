"""(kernel, instruction set) -> tile sizes, each with its reason beside it."""

from dataclasses import dataclass
from types import SimpleNamespace

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
    memory: dict[str, int]  # floats that k, v and (for each head) s need at least
    matrix: object = None  # Matrix, where the block of keys is computed on tiles

    @property
    def padded_c(self):
        """Heads up to whole vectors, or whole pairs of tiles."""
        if self.matrix:
            return "plan->group <= 16 ? 16 : (plan->group + 31) / 32 * 32"
        return f"(plan->group + {self.head_pad - 1}) / {self.head_pad} * {self.head_pad}"

    @property
    def row_heads(self):
        return sorted({t.heads for t in self.row_tiles}, reverse=True)

    @property
    def block_c(self):
        if self.matrix:
            return str(self.block)
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


SUB = 32  # keys and heads of a unit of the matrix unit: 2 x 2 tiles, 4 accumulators of 8 registers
MATRIX_BLOCK = 256  # keys: their values, 32 channels at a time, are 16 KiB and stay in L1
MARGIN = 8  # powers of 2 that a weight may grow to before the maximum is raised: raising is dear
FETCH_BYTES = 192  # every third line: the hardware brings its neighbours

# Parts of bfloat16 that a number is made of: float16 has 11 bits, two times 8 hold them exactly.
PARTS = {"bf16": 1, "f16": 2}

# The accumulators of a unit: C += A B with A two tiles of keys (heads), B two of heads (channels).
DOTS = tuple(
    SimpleNamespace(c=2 * i + j, a=4 + i, b=6 + j, score_at=1024 * i + 2048 * j, o_at=o_at)
    for i, j, o_at in (
        (0, 0, ""),
        (0, 1, " + 64"),
        (1, 0, " + 16 * ROW"),
        (1, 1, " + 16 * ROW + 64"),
    )
)
# Up to 16 heads: three chains hide the latency of a product, 52 cycles for every 16.
CHAINS = tuple(
    SimpleNamespace(c=i, a=3 + i, b=6 + i % 2, q_at=1024 * i, at=1024 * i, at_float=256 * i)
    for i in range(3)
)


@dataclass(frozen=True)
class Matrix:
    """How one kernel's block of keys is computed on tiles of 16 rows of 64 bytes."""

    parts: int
    nope: int  # columns of 32 channels
    columns: int  # and with the rotary ones
    direct: bool  # tiles of K may be loaded where they are stored
    value_direct: bool
    few: bool  # up to 16 heads have a way of their own; else words are used for them
    value_groups: int  # columns of 32 channels of the value
    o_row: int  # bytes of a row of O
    at: object  # pieces of the block's memory: bytes from w->k
    bytes: int  # of all pieces
    quads_a_column: int  # slices woven in behind each column of a unit
    pairs_a_column: int
    weigh_from: int
    fetch_lines: int
    exp2: str  # of weights
    sub: int = SUB
    margin: int = MARGIN
    dots: tuple = DOTS
    chains: tuple = CHAINS
    chain_bytes: int = 1024 * len(CHAINS)
    fetch_bytes: int = FETCH_BYTES
    fetch_step: int = FETCH_BYTES // 64
    few_tiles_8: int = 5  # accumulators and P: as many rows as heads need
    few_tiles_16: int = 6

    @property
    def value_channels(self):
        return 32 * self.value_groups

    @property
    def half_row(self):
        """Floats from a head's even channels to its odd ones, where a tile holds both."""
        return self.o_row // 8

    @property
    def few_shapes(self):
        """Value tiles: up to 8 heads have even and odd channels in one tile, up to 16 in two."""
        shapes = []
        for most, widths in ((8, (4, 2, 1)), (16, (2, 1))):
            step = 1 if most == 8 else 2
            for width in widths:
                if width > self.value_groups:
                    continue
                values = [
                    SimpleNamespace(
                        tile=(5 + i % 3) if most == 8 else 6 + i,
                        at=1024 * i,
                        column=i,
                        dots=[SimpleNamespace(c=step * i + e, a=4 + e) for e in range(step)],
                    )
                    for i in range(width)
                ]
                shapes.append(
                    SimpleNamespace(
                        name=f"{most}x{width}",
                        most=most,
                        heads="up to 8 heads" if most == 8 else "9 to 16 heads",
                        width=width,
                        row=self.o_row // 2 if most == 8 else self.o_row,
                        p_bytes=1024 * step,
                        o_step=64 * step,
                        tiles=[SimpleNamespace(tile=i, o_at=64 * i) for i in range(step * width)],
                        weights=[SimpleNamespace(tile=4 + e, at=1024 * e) for e in range(step)],
                        values=values,
                    )
                )
        return shapes


def pieces(sizes):
    """name: bytes, one behind the other -> name: offset, and the sum."""
    at, end = {}, 0
    for name, size in sizes.items():
        at[name] = end
        end += size
    return at, end


def matrix(kernel, o_stride):
    """The tiles of one kernel."""
    parts = PARTS[kernel.dtype]
    nope, rope = -(-kernel.dk // 32), -(-kernel.rope // 32)
    columns = nope + rope
    groups = -(-kernel.dv // 32)
    few = parts == 1
    many_at, many_bytes = pieces(
        {
            "keys": SUB * 64 * columns * parts,
            "scores": 4096,
            "pairs": 2 * 2048 * parts,
            "values": MATRIX_BLOCK * 64 * parts,
        }
    )
    few_at, few_bytes = pieces(
        {
            "keys": 16 * 64 * columns,
            "chains": 1024 * len(CHAINS),
            "rows": 16 * MATRIX_BLOCK * 4,
            "weights": MATRIX_BLOCK // 16 * 2048,
            "copies": 2 * 4 * 1024,
        }
    )
    weigh_from = min(2, columns - 1)
    return Matrix(
        parts=parts,
        nope=nope,
        columns=columns,
        direct=parts == 1 and kernel.dk % 32 == 0 and kernel.rope % 32 == 0,
        value_direct=parts == 1 and kernel.dv % 32 == 0,
        few=few,
        value_groups=groups,
        o_row=4 * o_stride,
        at=SimpleNamespace(**(few_at | many_at)),
        bytes=max(many_bytes, few_bytes),
        quads_a_column=-(-8 * parts // columns),
        pairs_a_column=-(-32 // (columns - weigh_from)),
        weigh_from=weigh_from,
        fetch_lines=max(1, kernel.dk * 2 // FETCH_BYTES),
        exp2="hl_exp2_amx" if kernel.math == "builtin" else "vexp2",
    )


def matrix_tile(kernel, isa):
    """A Tile of which only what all instruction sets share is filled in, and its Matrix."""
    o_stride = round_up(kernel.dv, 32) + 16  # rows 2 KiB apart would share their cache sets
    m = matrix(kernel, o_stride)
    lanes = isa.lanes
    return Tile(
        block=MATRIX_BLOCK,
        ahead=0,
        rows=(),
        vecs=(2,),
        value_heads=(),
        value_vecs=(),
        channels=0,
        k_stride=0,
        v_stride=0,
        o_stride=o_stride,
        few="none",
        few_keys=0,
        few_block=0,
        few_channels=0,
        row_tiles=(),
        dk_tail=kernel.dk % lanes != 0,
        dv_tail=kernel.dv % lanes != 0,
        why={
            "registers": "2 x 2 tiles of 16 x 16 sums in 4 of 8 registers: 4 loads, 4 products",
            "block": f"{MATRIX_BLOCK} keys a block: 32 channels of their values are "
            f"{MATRIX_BLOCK * 64 * m.parts // 1024} KiB and stay in the first-level cache",
            "channels": f"{SUB} keys a unit: their tiles are {m.at.scores // 1024} KiB, and heads "
            "pass by from the second-level cache",
        },
        head_pad=32,
        memory={"k": -(-m.bytes // 4), "v": 0, "s": MATRIX_BLOCK * 2 * m.parts // 4},
        matrix=m,
    )


def least_heads(kernel):
    """Query heads on a kv head from which on tiles are a help; fewer take the words."""
    return 1 if PARTS.get(kernel.dtype, 1) == 1 else 17


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
        return matrix_tile(kernel, isa)
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
            "k": (registers["few_keys"] if few_only else block) * k_stride,
            "v": 0 if few_only else block * v_stride,
            "s": block,
        },
    )
