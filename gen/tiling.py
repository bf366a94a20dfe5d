"""(kernel, instruction set) -> tile sizes, each with its reason beside it."""

from dataclasses import dataclass

from gen import int8, matrix
from gen.formats import TYPES, layout
from gen.isa import FORMAT_WORDS

AHEAD = 8  # rows of 1 KiB: enough to cover a miss, too few to crowd the fill buffers
RECORDS_AHEAD = 24  # records are smaller and decoding takes its time: 5 % with lists
LEAN_BYTES = 20 * 1024  # of rows that stay in the first-level cache from score to value
LINE_BYTES = 64
L1_BYTES = 16 * 1024  # what a slice of a Q panel may take of the first-level cache


@dataclass(frozen=True)
class DotTile:
    """Dot products of some heads with some keys, a vector of channels at a time."""

    heads: int
    keys: int
    once: int  # keys whose rows are read side by side
    parts: int  # sums of which a dot product is made: so many do not wait for each other
    runs: tuple  # Run: the loops over a row's sections

    def sum(self, head, row, pair=0, second=0):
        """The sum that a vector belongs to: the pair-th pair's first or second."""
        part = (2 * pair + second) % self.parts
        return f"s{head}_{row}" + "xyzwabcd"[part] * (self.parts > 1)

    @property
    def sums(self):
        return [
            self.sum(h, r, part // 2, part % 2)
            for h in range(self.heads)
            for r in range(self.once)
            for part in range(self.parts)
        ]

    def total(self, head, row):
        """All sums of a dot product, added."""
        terms = [self.sum(head, row, part // 2, part % 2) for part in range(self.parts)]
        while len(terms) > 1:
            terms = [f"vadd({x}, {y})" for x, y in zip(terms[::2], terms[1::2], strict=True)]
        return terms[0]

    @property
    def holds_keys(self):
        """Whether the keys' numbers stay in registers while Q's pass by, or the other way about:
        whichever are fewer."""
        return self.once <= self.heads

    @property
    def title(self):
        """For the reader of the product."""
        heads = f"{self.heads} head{'s' if self.heads > 1 else ''}"
        together = "all at once" if self.once == self.keys else f"{self.once} at a time"
        return f"{heads} by {self.keys} keys, {together}"

    @property
    def asks(self):
        """Whether it asks for lines of later rows."""
        return any(run.lines.any for run in self.runs)

    @property
    def meanwhile(self):
        """For the reader of the product: which lines it asks for."""
        if not self.asks:
            return ""
        but = "; but for those that value tiles ask for" if self.runs[0].lines.apart else ""
        return f" Meanwhile lines of later\n * keys (next) are asked for, if there are any{but}."

    def kept(self, load):
        """A load whose number is used for several keys: GCC would load it again for each."""
        return f"vkeep({load})" if self.once > 1 else load


@dataclass(frozen=True)
class Lines:
    """Where the cache lines start that a tile asks for, of later rows."""

    always: tuple[int, ...]
    apart: tuple[int, ...]  # only where values are apart from keys
    shared: bool  # some of a row's lines are asked for by score tiles, some by value tiles

    @property
    def any(self):
        return bool(self.always or self.apart)

    @classmethod
    def of(cls, channels, line, share, second=False):
        """Of every two lines `share`: the first, or the second, or both. line 0: none."""
        if not line:
            return cls((), (), shared=False)
        starts = tuple(range(0, channels, line))
        mine = starts if share == 2 else starts[second::2] if share == 1 else ()
        return cls(mine, tuple(at for at in starts if at not in mine), share > 0)


@dataclass(frozen=True)
class Rest:
    """What a section has behind its pairs: n channels, a vector or fewer."""

    start: int
    n: int
    whole: bool

    def of(self, k, pointer):
        """The word that loads it."""
        if self.whole:
            return f"{k.load}({pointer} + {self.start})"
        return f"{k.load_n}({pointer} + {self.start}, {self.n})"


@dataclass(frozen=True)
class Section:
    """The channels of a row that lie together: first those in pairs of vectors, then what is left
    over."""

    number: int
    field: str  # of hl_row
    start: int  # of the section in Q's rows
    channels: int
    paired: int  # channels in whole pairs of vectors
    rests: tuple  # Rest: one more whole vector, and a part of one


@dataclass(frozen=True)
class Run:
    """One loop over the channels of a section; or of both, which halves the code."""

    sections: tuple
    pairs: tuple  # (first channel, number) of the pairs that a turn of the inner loop takes
    turn: int  # channels of such a turn
    step: int  # and of the outer loop's, which asks for lines
    lines: Lines

    @property
    def both(self):
        return len(self.sections) > 1

    def either(self, values):
        """A section's own number, in C."""
        return f"rope ? {values[1]} : {values[0]}" if self.both else str(values[0])

    @property
    def paired(self):
        return self.either([section.paired for section in self.sections])

    @property
    def start(self):
        return self.either([f"q + {s.start}" if s.start else "q" for s in self.sections])

    def of_row(self, name, number):
        """Where its channels of a row lie, in C."""
        fields = [f"{name}{number}->{section.field}" for section in self.sections]
        return f"({self.either(fields)})" if self.both else fields[0]

    @property
    def apart(self):
        """When it asks for the lines that value tiles ask for else, in C."""
        return "rope || apart" if self.both else "apart"


@dataclass(frozen=True)
class RowTile:
    """A value tile that reads values where they are stored: channels start, start + channels, ..
    in front of end."""

    heads: int
    name: str  # its vectors; "n": the last channels, fewer than one
    start: int
    channels: int
    end: int
    vecs: tuple[int, ...] = (0,)
    pairs: tuple = ()  # (channel, its vector, the other's) of each pair of vectors
    tail: int = 0  # channels, where they are fewer than a vector
    lines: "Lines" = None

    @property
    def later(self):
        """For how many rows of a block it asks for later ones, in C."""
        return "later" if self.lines.shared else "b->value_apart ? later : 0"

    @property
    def title(self):
        """For the reader of the product."""
        if self.tail:
            return "the last channels of a row"
        return f"{len(self.vecs)} vector{'s' if len(self.vecs) > 1 else ''} of channels"


@dataclass(frozen=True)
class CodeTile:
    """Products of some heads with codes, which are read where they are stored."""

    heads: int
    keys: int
    once: int  # keys whose rows are read side by side
    vecs: tuple[int, ...]  # vectors of channels of a value tile
    groups: tuple  # one head: tiles of channels whose sums are formed side by side

    @property
    def channels(self):
        return len(self.vecs)

    def kept(self, load):
        """A load whose number is used for several keys: GCC would load it again for each."""
        return f"vkeep({load})" if self.once > 1 else load

    @property
    def title(self):
        """For the reader of the product."""
        return f"{self.heads} head{'s' if self.heads > 1 else ''} by {self.keys} keys"


@dataclass(frozen=True)
class Codes:
    """Few heads: sums are of codes, tile by tile, and scales come in where a tile ends; weights are
    scaled instead of values."""

    most: int  # up to so many heads
    lean_block: int  # keys of a block with up to `lean` heads
    widen: int  # codes that are widened at a time; 0: they are read in place
    c_type: str  # of what is read
    load: str
    weights_at: int  # floats in front of scaled weights, where widened rows are
    ahead: int  # keys between one that is scored and the one that is asked for meanwhile
    lines: tuple  # bytes of a tile of channels at which lines start
    rest: tuple  # and bytes of what is behind the codes
    tiles: tuple  # CodeTile, most heads first
    step: int  # floats from one tile's weights to the next
    rope_at: int  # of rotary channels in a row of Q
    rope: str  # the word that loads them
    rope_n: str
    rope_whole: int  # of them in whole vectors
    rope_rest: int

    @property
    def said(self):
        """For people."""
        how = f"widened to bfloat16, {self.widen} at a time" if self.widen else "read in place"
        return f"up to {self.most} heads: sums of codes, {how}"


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel on one instruction set. Strides in floats."""

    lanes: int
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
    o_columns: int  # of them are channels, up to a whole vector
    decodes: bool
    own_only: bool  # rows of the cache are only read to be decoded: they are asked for then
    own: int  # rows that are decoded at a time, where few heads read decoded ones
    window: int  # keys whose rows are known at a time: two blocks, or two times what is ahead
    few: int | str  # up to so many heads rows are read in place; "all"
    few_block: int  # keys of a block then
    lean_block: int  # and with up to `lean` heads: rows stay near until they are read as values
    lean: int
    few_ahead: int  # keys between one that is scored and the one that is asked for meanwhile
    dots: int  # scores of a tile of dot products
    dot_tiles: tuple  # DotTile, most heads first
    row_tiles: tuple  # RowTile, in the order of channels
    sections: tuple  # Section
    q_stride: int  # of Q's rows then
    paired: int  # value channels that vpair takes even and odd apart; 0 where it keeps the order
    dv_tail: bool
    codes: Codes | None  # records that few heads read where they are stored
    ragged: bool  # channels that are written with one scale are not whole vectors
    ragged_pairs: bool  # nor pairs of them
    rope_ragged: bool  # rotary channels are not whole vectors
    why: dict[str, str]
    lift: int  # column of O behind its channels: what offsets of V add to all of them
    panel: bool  # a block's rows are written as float32 for some number of heads
    head_pad: int  # heads are padded to a multiple of this in the workspace
    memory: dict[str, int]  # floats that k, v and (for each head) q and s need
    dense: bool = False  # scores of a panel lie by themselves

    @property
    def shape_lines(self):
        """For people."""
        codes = (self.codes.said,) if self.codes else ()
        return (
            *codes,
            f"score tiles {self.rows} keys x {self.vecs} vectors of heads",
            f"value tiles {self.value_heads} heads x {self.value_vecs} vectors of channels",
            "few heads: dot products of "
            + ", ".join(f"{t.heads} x {t.keys}" for t in self.dot_tiles)
            + " heads x keys",
        )

    @property
    def padded_c(self):
        """Heads up to whole vectors."""
        return f"(plan->group + {self.head_pad - 1}) / {self.head_pad} * {self.head_pad}"

    decoder_argument = ""  # of tiles only

    @property
    def one_padded_c(self):
        """Decoding: the heads of one query row up to whole vectors."""
        return self.padded_c.replace("plan->group", "g->heads")

    @property
    def one_vector(self):
        """Whether one head's tile of scores is one vector."""
        return self.dots == self.dot_tiles[-1].keys == self.lanes > 1

    @property
    def swaps(self):
        """Distances over which lanes are swapped until each has seen all."""
        return [n for n in (1, 2, 4, 8) if n < self.lanes]

    @property
    def block_c(self):
        few = str(self.few_block)
        lean = self.codes.lean_block if self.codes else self.lean_block
        if lean != self.few_block:
            near = " && !k_value_apart(a)" if self.decodes else ""  # else no row is read twice
            few = f"plan->group <= {self.lean}{near} ? {lean} : {few}"
        return few if self.few == "all" else f"plan->group > {self.few} ? {self.block} : {few}"

    @property
    def asks(self):
        """Whether blocks say which rows are to be asked for: not those of records."""
        return not self.own_only

    @property
    def ahead_c(self):
        """Rows between the one in use and the one that is asked for."""
        if self.few == "all":
            return str(self.few_ahead)
        return f"plan->group > {self.few} ? {self.ahead} : {self.few_ahead}"

    @property
    def few_indent(self):
        return "" if self.few == "all" else "    "


def round_up(n, step):
    return (n + step - 1) // step * step


# instruction set -> register tiles. A tile of r rows and c vectors needs r * c accumulators, c
# streamed vectors and one broadcast; the more of them, the fewer loads there are for each FMA.
#
# Few heads. dots: (heads, keys, rows side by side, sums of a dot product). Heads x keys are whole
# vectors of sums, for vsums; heads x rows x sums are chains enough to hide the latency of an FMA.
# One head waits for memory: AVX-512 reads its rows one after another, as hardware follows one
# stream better than four (41 -> 36 ns a key); AVX2 would then wait for its loads.
# leaves: of two lines of later rows, how many value tiles ask for. With one head every second, so
# that misses are under way in both products; with two all, as the score loop is the fuller one;
# with more none: misses hide behind the arithmetic of scores.
# few_ahead: rows between use and asking; 16 to 48 measure the same, 8 are too few.
# few_block: keys whose S stays near. With 64 AVX2 loses 17 points: something aliases.
REGISTERS = {
    "scalar": {
        "rows": (4, 1),
        "vecs": (2, 1),
        "value_heads": (4, 1),
        "value_vecs": (2, 1),
        "few": "all",
        "few_ahead": 8,  # the window is dear on small targets, which seldom have caches to fill
        "lean": 0,
        "leaves": {},
        "dots": ((4, 2, 2, 1), (2, 4, 4, 1), (1, 8, 8, 1)),
        "few_block": 16,
        "block": 16,
        "why": "8 sums fit the 16 float registers of a small core with room for operands",
    },
    "neon": {
        "rows": (8, 1),
        "vecs": (2, 1),
        "value_heads": (8, 1),
        "value_vecs": (2, 1),
        "few": 16,
        "few_ahead": 24,
        "lean": 3,
        "leaves": {1: 1, 2: 2},
        "dots": ((4, 4, 4, 1), (2, 8, 4, 2), (1, 16, 4, 2)),
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
        "few_ahead": 24,
        "lean": 3,
        "leaves": {1: 1, 2: 2},
        "dots": ((4, 2, 2, 1), (2, 4, 4, 1), (1, 8, 4, 2)),
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
        "few_ahead": 24,
        "lean": 3,
        "leaves": {1: 1, 2: 2},
        "dots": ((4, 4, 4, 1), (2, 8, 8, 1), (1, 16, 1, 4)),
        "few_block": 96,
        "block": 96,
        "why": "12 x 2 accumulators take 24 of 32 registers: 14 loads for 24 FMA",
    },
}


def sections_of(kernel, lanes):
    """How a row's channels are cut into pairs of vectors, a vector, and the rest."""
    made = []
    start = 0
    parts = [("key", kernel.dk), ("rope", kernel.rope)]
    for field, channels in parts[: 2 if kernel.rope else 1]:
        pair = 2 * lanes
        paired = channels // pair * pair
        rests = tuple(
            Rest(c, min(lanes, channels - c), channels - c >= lanes)
            for c in range(paired, channels, lanes)
        )
        made.append(
            Section(
                number=len(made),
                field=field,
                start=start,
                channels=channels,
                paired=paired,
                rests=rests,
            )
        )
        start += round_up(channels, lanes)
    return tuple(made)


def run_of(sections, most, pair, line, leaves):
    """A loop over sections: what a turn takes has to divide them all."""

    def divides(channels):
        return all(section.paired % channels == 0 for section in sections)

    turn = next(n * pair for n in range(most, 0, -1) if divides(n * pair))
    step = next(n for n in (max(turn, 2 * line), turn) if divides(n))
    return Run(
        sections=sections,
        pairs=tuple((at, i) for i, at in enumerate(range(0, turn, pair))),
        turn=turn,
        step=step,
        lines=Lines.of(step, line, 2 - leaves),
    )


def dot_tiles(registers, sections, dv, pair, line):
    """Score tiles. With one head a loop of its own for each section is worth 5 %; with more, one
    loop for both is as fast or faster, and what compilers make of it without optimisation fits
    the stack."""
    made = []
    for heads, keys, once, parts in registers["dots"]:
        most = max(1, parts // 2)
        leaves = registers["leaves"].get(heads, 0) if sections[0].paired <= dv else 0
        if heads > 1:
            runs = [run_of(sections, most, pair, line, leaves)]
        else:
            runs = [run_of(sections[:1], most, pair, line, leaves)]
            runs += [run_of((s,), most, pair, line, 0) for s in sections[1:]]
        made.append(DotTile(heads, keys, once, parts, tuple(runs)))
    return tuple(made)


def value_lines(channels, line, leaves):
    """What a value tile asks for: what score tiles leave; where values are apart, all."""
    if leaves == 0 and line:
        return Lines(tuple(range(0, channels, line)), (), shared=False)
    return Lines.of(channels, line, leaves, second=True)


def row_tiles(dots, dv, lanes, line, leaves):
    """Value tiles for the heads of each score tile: as many sums as that has, in even shares of
    the channels; then what is left over."""
    made = []
    pair = 2 * lanes
    for heads, keys, *_ in dots:
        rest = value_lines(lanes, line, 0)
        pairs = dv // pair
        most = max(1, keys // 2)
        turns = -(-pairs // most)
        each = -(-pairs // turns) if turns else 0
        at = 0
        while at < pairs:
            n = min(each, pairs - at)
            times = (pairs - at) // n
            made.append(
                RowTile(
                    heads,
                    name=str(2 * n),
                    start=at * pair,
                    channels=n * pair,
                    end=(at + times * n) * pair,
                    vecs=tuple(range(2 * n)),
                    pairs=tuple((i * pair, 2 * i, 2 * i + 1) for i in range(n)),
                    lines=value_lines(n * pair, line, leaves.get(heads, 0)),
                )
            )
            at += times * n
        at *= pair
        if at + lanes <= dv:
            made.append(RowTile(heads, "1", at, lanes, at + lanes, lines=rest))
            at += lanes
        if at < dv:
            made.append(RowTile(heads, "n", at, lanes, dv, tail=dv - at, lines=rest))
    return tuple(made)


def key_read(kernel):
    """What the products read keys as: a record is float32 by then."""
    return TYPES["f32" if kernel.record else kernel.stored_key.read_as]


def value_read(kernel):
    return TYPES["f32" if kernel.record else kernel.stored_value.read_as]


def paired_of(kernel, isa):
    """Channels of O that come with even and odd ones apart."""
    pair = 2 * isa.lanes
    return kernel.dv // pair * pair if value_read(kernel).name in isa.even_odd else 0


def decoded(kernel):
    """Whether few heads read rows from where they are decoded."""
    return bool(kernel.record) or kernel.stored_key.packed or kernel.stored_value.packed


def lines_of(kernel, fmt):
    """Elements of a line that products ask for; 0: rows are asked for before they are decoded."""
    return 0 if decoded(kernel) else LINE_BYTES // fmt.bytes


def lean_block(kernel):
    """Keys of a block that stay in the first-level cache between their two uses."""
    row = kernel.d * key_read(kernel).bytes
    if kernel.decodes:
        row += kernel.dv * value_read(kernel).bytes
    return max(16, LEAN_BYTES // row // 16 * 16)


# Up to so many heads sums are of codes: more share the work of decoding them.
CODES_MOST = {"i8": 8, "e4m3": 4}
CODES_ISAS = ("avx2", "avx512")
# Codes that are numbers after two instructions are read in place; of others the block is first
# widened to bfloat16, which is half as much to write as float32. widen: codes a word takes.
CODES_WIDE = {"i8": 0, "e4m3": 4}
CODES_LEAN = 16 * 1024  # bytes of widened rows that stay in the first-level cache, for `lean` heads
CODES_ONCE = {"avx2": {4: 2, 2: 2, 1: 2}, "avx512": {4: 4, 2: 4, 1: 1}}


def codes_of(kernel, isa, registers):
    """The tiles of a record whose channels are whole vectors; None for others."""
    record, lanes = kernel.record, isa.lanes
    if record is None or isa.name not in CODES_ISAS:
        return None
    plan = layout(record, kernel.dtype)
    rope = plan.place("rope")
    whole = record.tile % (2 * lanes) == 0 and kernel.dk % record.tile == 0
    kind = plan.place("nope").type.name
    widen = CODES_WIDE[kind] * lanes
    if not whole or kernel.dv != kernel.dk or (widen and kernel.dk % widen != 0):
        return None
    count = record.count("scale")
    made = []
    for heads, keys, *_ in registers["dots"]:
        vecs = next(n for n in range(keys, 0, -1) if record.tile % (n * lanes) == 0)
        chains = [tuple(range(t, min(t + 4, count))) for t in range(0, count, 4)]
        once = CODES_ONCE[isa.name][heads]
        made.append(CodeTile(heads, keys, once, tuple(range(vecs)), tuple(chains)))
    behind = tuple(at for at in range(kernel.dk, plan.bytes, LINE_BYTES))
    rope_words = FORMAT_WORDS[rope.type.name] if rope else {"load": "", "load_n": ""}
    return Codes(
        most=CODES_MOST[kind],
        ahead=registers["few_ahead"],
        lines=tuple(range(0, record.tile, LINE_BYTES)),
        rest=(*behind, plan.bytes - 1),
        tiles=tuple(made),
        step=registers["few_block"] * max(t.heads for t in made),
        lean_block=min(registers["few_block"], max(16, CODES_LEAN // (2 * kernel.dk) // 16 * 16))
        if widen
        else registers["few_block"],
        widen=widen,
        c_type="uint16_t" if widen else "uint8_t",
        load=FORMAT_WORDS["bf16" if widen else kind]["load"],
        weights_at=registers["few_block"] * (-(-kernel.dk // 2)) if widen else 0,
        rope_at=round_up(kernel.dk, lanes),
        rope=rope_words["load"],
        rope_n=rope_words["load_n"],
        rope_whole=kernel.rope // lanes * lanes,
        rope_rest=kernel.rope % lanes,
    )


def ragged(kernel, step):
    """Whether channels that are written with one scale end within a step."""
    if kernel.decodes:
        return any(n % step != 0 for n in together(kernel))
    tile = kernel.record.tile if kernel.record else step
    return tile % step != 0 or kernel.dk % step != 0


def together(kernel):
    """Counts of channels that lie together in a row of a decode operator's cache: all of a head, or
    those of a group."""
    sides = ((kernel.stored_key, kernel.dk), (kernel.stored_value, kernel.dv))
    counts = [channels for _, channels in sides]
    for side, channels in sides:
        if side.packed:
            counts += [min(side.group, channels), channels % side.group]
    return counts


RECORD_REASON = "records are decoded once for all heads, and read as float32 from then on"


def few_reason(few):
    """When rows are read where they are stored, and why."""
    if few == "all":
        return "rows are always read where they are stored: workspace is dear on small targets"
    return (
        f"up to {few} heads read rows where they are stored, channels in the lanes: a float32 copy "
        "costs more to write than it saves, and no lane is idle"
    )


def tile(kernel, isa):
    """The tile sizes of one kernel on one instruction set."""
    if isa.tiles:
        return matrix.tile(kernel, isa)
    if kernel.integer:
        return int8.tile(kernel, isa)
    registers = REGISTERS[isa.name]
    lanes = isa.lanes
    block = registers["block"]
    dots = registers["dots"]
    sections = sections_of(kernel, lanes)
    window = 2 * max(block, registers["few_block"] + registers["few_ahead"])
    if kernel.decodes:  # rows of a block, of the next one, and what is asked for meanwhile
        window = max(window, 3 * max(block, registers["few_block"]))
    of_value = lines_of(kernel, value_read(kernel))
    values = row_tiles(dots, kernel.dv, lanes, of_value, registers["leaves"])
    panel = registers["vecs"][0] * lanes
    slices = max(1, -(-kernel.d * panel * 4 // L1_BYTES)) if isa.name != "scalar" else 1
    channels = round_up(-(-kernel.d // slices), lanes)
    k_stride = max(round_up(kernel.dk, lanes), kernel.dk + round_up(kernel.rope, lanes))
    k_stride = round_up(max(k_stride, kernel.d), lanes)
    v_stride = round_up(kernel.dv, lanes)
    few_only = registers["few"] == "all"
    codes = codes_of(kernel, isa, registers)
    own = registers["few_block"] if decoded(kernel) else 0
    own_k = own if kernel.record or kernel.stored_key.packed else 0
    own_v = own if not kernel.record and kernel.stored_value.packed else 0
    o_columns = round_up(kernel.dv, lanes)
    lifts = not kernel.record and kernel.decodes and kernel.stored_value.is_codes
    q_stride = round_up(kernel.dk, lanes) + round_up(kernel.rope, lanes)
    return Tile(
        lanes=lanes,
        block=block,
        ahead=RECORDS_AHEAD if kernel.record else AHEAD,
        window=window,
        rows=registers["rows"],
        vecs=registers["vecs"],
        value_heads=registers["value_heads"],
        value_vecs=registers["value_vecs"],
        channels=channels,
        k_stride=k_stride,
        v_stride=v_stride,
        o_stride=o_columns + (lanes if lifts else 0),
        o_columns=o_columns,
        decodes=kernel.decodes,
        own_only=bool(kernel.record),
        lift=o_columns,
        panel=not few_only or bool(own),
        own=own,
        few=registers["few"],
        few_block=registers["few_block"],
        few_ahead=registers["few_ahead"],
        lean_block=min(registers["few_block"], lean_block(kernel)),
        lean=registers["lean"],
        dots=dots[0][0] * dots[0][1],
        dot_tiles=dot_tiles(
            registers, sections, kernel.dv, 2 * lanes, lines_of(kernel, key_read(kernel))
        ),
        row_tiles=values,
        sections=sections,
        q_stride=q_stride,
        paired=paired_of(kernel, isa),
        dv_tail=kernel.dv % lanes != 0,
        codes=codes,
        ragged=ragged(kernel, lanes),
        ragged_pairs=ragged(kernel, 2 * lanes),
        rope_ragged=kernel.rope % lanes != 0,
        why={
            "registers": registers["why"],
            "block": f"{block} keys a block: P of a tile of heads stays in the first-level cache",
            "channels": f"{channels} channels of {panel} heads are "
            f"{channels * panel * 4 // 1024} KiB: they stay in the first-level cache",
            "few": RECORD_REASON if own else few_reason(registers["few"]),
        },
        head_pad=lanes,
        memory={
            "q": max(kernel.d, q_stride),
            "k": max(0 if few_only else block, own_k) * k_stride,
            "v": 0 if kernel.record else max(0 if few_only else block, own_v) * v_stride,
            "s": max(block, registers["few_block"]),
        },
    )
