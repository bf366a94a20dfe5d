"""(kernel, instruction set with matrix tiles) -> sizes of its block of keys, and their reasons."""

from dataclasses import dataclass
from types import SimpleNamespace

TILE = 16  # rows of a tile, each of 64 bytes
SUB = 32  # keys and heads of a unit of the matrix unit: 2 x 2 tiles, 4 accumulators of 8 registers
BLOCK = 256  # keys: their values, 32 channels at a time, are 16 KiB and stay in L1
MARGIN = 8  # powers of 2 that a weight may grow to before the maximum is raised: raising is dear
PANEL_AHEAD = 32  # records between one that is decoded and the one that is asked for meanwhile
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
class MatrixTile:
    """How one kernel's block of keys is computed on tiles of 16 rows of 64 bytes."""

    o_stride: int  # floats from one head's O to the next
    dv_tail: bool  # dv is not a whole number of vectors
    why: dict[str, str]
    memory: dict[str, int]  # floats that k, v and (for each head) q and s need
    parts: int
    nope: int  # columns of 32 channels
    columns: int  # and with the rotary ones
    direct: bool  # tiles of K may be loaded where they are stored
    value_direct: bool
    few: bool  # up to 16 heads have a way of their own; else words are used for them
    value_groups: int  # columns of 32 channels of the value
    at: object  # pieces of the block's memory: bytes from w->k
    quads_a_column: int  # slices woven in behind each column of a unit
    pairs_a_column: int
    weigh_from: int
    fetch_lines: int
    panel: object  # records: rows of bfloat16 that they are decoded to, None else
    exp2: str  # of weights
    decodes: bool
    asks: bool
    ahead_c: str
    block: int = BLOCK
    window: int = 2 * BLOCK  # keys whose rows are known at a time: these and the next block's
    few_ahead: int = BLOCK
    head_pad: int = 2 * TILE
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
    def decoder_parameter(self):
        return ", ki_decoder *decoder" if self.panel else ""

    @property
    def decoder(self):
        return ", decoder" if self.panel else ""

    @property
    def decoder_argument(self):
        return ", &decoder" if self.panel else ""

    @property
    def query_words(self):
        """What reads 16-bit rows as they are stored: those of Q, and of the cache if it has any."""
        return "ki_query_words" if self.panel else "ki_words"

    @property
    def key_words(self):
        """What reads a column of a row: of Q first; of the cache's last."""
        made = [SimpleNamespace(name="ki_key_words", of="ki_words", what="key")]
        if self.panel:
            query = SimpleNamespace(name="ki_q_words", of="ki_query_words", what="row of Q")
            made.insert(0, query)
        return made

    @property
    def own(self):
        """Records: rows that are decoded at a time, those of two blocks."""
        return 2 * self.block if self.panel else 0

    @property
    def padded_c(self):
        """Heads up to one tile, or to pairs of tiles."""
        return "plan->group <= 16 ? 16 : (plan->group + 31) / 32 * 32"

    @property
    def block_c(self):
        return str(self.block)

    @property
    def shape_lines(self):
        """For people."""
        few = "; up to 16 heads: 16 keys x 16 heads in three chains" if self.few else ""
        return (f"tiles of {TILE} x 32: units of {self.sub} keys x {self.sub} heads{few}",)

    @property
    def o_row(self):
        """Bytes of a row of O."""
        return 4 * self.o_stride

    @property
    def value_channels(self):
        return 32 * self.value_groups

    @property
    def half_row(self):
        """Floats from a head's even channels to its odd ones, where a tile holds both."""
        return self.o_stride // 2

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


def panel_of(kernel, columns, parts, at):
    """Records: rows of the block as bfloat16 in whole columns, and those of the next block. They
    are decoded in pieces, a tile of channels or the rotary ones, between products."""
    if kernel.record is None:
        return None
    tile, scales = kernel.record.tile, kernel.record.count("scale")
    row = columns * 64 * parts
    return SimpleNamespace(
        at=at,
        part=columns * 64,
        row=row,
        floats=2 * BLOCK * row // 4,
        pieces=scales + (1 if kernel.rope else 0),
        rope_at=-(-kernel.dk // 32) * 64,
        ragged=tile % 32 != 0 or kernel.dk % 32 != 0,
        padded=kernel.dk % 32 != 0 or kernel.rope % 32 != 0,
        ahead=PANEL_AHEAD,
    )


def tile(kernel, isa):
    """The tiles of one kernel."""
    parts = PARTS[kernel.dtype]
    nope, rope = -(-kernel.dk // 32), -(-kernel.rope // 32)
    columns = nope + rope
    groups = -(-kernel.dv // 32)
    many_at, many_bytes = pieces(
        {
            "keys": SUB * 64 * columns * parts,
            "scores": 4 * 1024,
            "pairs": 2 * 2048 * parts,
            "values": BLOCK * 64 * parts,
        }
    )
    few_at, few_bytes = pieces(
        {
            "keys": TILE * 64 * columns,
            "chains": 1024 * len(CHAINS),
            "rows": TILE * BLOCK * 4,
            "weights": BLOCK // TILE * 2048,
            "copies": 2 * 4 * 1024,
        }
    )
    weigh_from = min(2, columns - 1)
    k_bytes = max(many_bytes, few_bytes)
    panel = panel_of(kernel, columns, parts, k_bytes)
    return MatrixTile(
        o_stride=32 * groups + 16,  # rows 2 KiB apart would share their cache sets
        dv_tail=kernel.dv % isa.lanes != 0,
        why={
            "registers": "2 x 2 tiles of 16 x 16 sums in 4 of 8 registers: 4 loads, 4 products",
            "block": f"{BLOCK} keys a block: 32 channels of their values are "
            f"{BLOCK * 64 * parts // 1024} KiB and stay in the first-level cache",
            "channels": f"{SUB} keys a unit: their tiles are {many_at['scores'] // 1024} KiB, "
            "and heads pass by from the second-level cache",
        },
        memory={
            "q": TILE * columns * parts,
            "k": -(-k_bytes // 4) + (panel.floats if panel else 0),
            "v": 0,
            "s": BLOCK * 2 * parts // 4,
        },
        parts=parts,
        nope=nope,
        columns=columns,
        direct=parts == 1
        and (panel is not None or (kernel.dk % 32 == 0 and kernel.rope % 32 == 0)),
        value_direct=parts == 1 and (panel is not None or kernel.dv % 32 == 0),
        few=parts == 1,
        value_groups=groups,
        at=SimpleNamespace(**(few_at | many_at)),
        quads_a_column=-(-8 * parts // columns),
        pairs_a_column=-(-32 // (columns - weigh_from)),
        weigh_from=weigh_from,
        fetch_lines=max(1, kernel.dk * 2 // FETCH_BYTES),
        panel=panel,
        exp2="hl_exp2_amx" if kernel.math == "builtin" else "vexp2",
        decodes=kernel.decodes,
        asks=kernel.decodes,
        ahead_c=str(BLOCK),
        window=(3 if kernel.decodes else 2) * BLOCK,
    )


def least_heads(kernel):
    """Query heads on a kv head from which on tiles are a help; fewer take the words."""
    return 1 if PARTS.get(kernel.dtype, 1) == 1 else 17
