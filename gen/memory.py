"""Named slices of workspace and partials -> offsets, sizes, and the macros that add them up.

Every size is `per_head * padded heads + per_row * rows of O + fixed` floats, the largest over the
header's instruction sets, so that one figure holds whichever of them runs.
"""

from dataclasses import dataclass

from gen.int8 import Int8Tile
from gen.matrix import MatrixTile

ALIGN = 64  # a cache line: the start is moved up to it inside
LINE = ALIGN // 4
ROW = 8  # floats of an hl_row, where pointers are widest
TILE_HEADS = 16  # up to so many heads tiles have just the rows that are needed; else pairs of tiles


def line(floats):
    return (floats + LINE - 1) // LINE * LINE


@dataclass(frozen=True)
class Slice:
    """One named piece of the workspace, in floats."""

    field: str
    per_head: int  # of the padded heads
    per_row: int  # of the rows of O
    fixed: int
    why: str
    cast: str = ""

    @property
    def size_c(self):
        terms = []
        if self.per_head:
            terms.append(f"{self.per_head} * heads" if self.per_head != 1 else "heads")
        if self.per_row:
            terms.append(f"{self.per_row} * rows")
        if self.fixed:
            terms.append(str(self.fixed))
        return " + ".join(terms) or "0"

    def floats(self, padded, rows):
        return self.per_head * padded + self.per_row * rows + self.fixed


@dataclass(frozen=True)
class Memory:
    """The memory of one kernel."""

    pad: int  # heads are padded to a multiple of this
    tiles: bool  # more than TILE_HEADS heads have rows of O for the padding too
    slices: tuple[Slice, ...]
    o_stride: int
    own: int  # records: rows that are decoded at a time, at most
    align: int = ALIGN
    line: int = LINE

    @property
    def stats(self):
        """Numbers that a partial result keeps for each head."""
        return 5 if self.tiles else 3

    def padded(self, group):
        return -(-group // self.pad) * self.pad

    def rows(self, group):
        return self.padded(group) if self.tiles and group > TILE_HEADS else group

    def _padded_c(self, group, cast):
        return f"((({cast}){group} + {self.pad - 1}) / {self.pad} * {self.pad})"

    @property
    def padded_c(self):
        return self._padded_c("group", "ptrdiff_t")

    @property
    def rows_c(self):
        return f"group > {TILE_HEADS} ? heads : group" if self.tiles else "group"

    def _rows_macro(self, group, cast, padded):
        exact = f"({cast}){group}"
        return f"({group} > {TILE_HEADS} ? {padded} : {exact})" if self.tiles else exact

    @property
    def workspace_macro(self):
        per_head = sum(s.per_head for s in self.slices)
        per_row = sum(s.per_row for s in self.slices)
        fixed = sum(s.fixed for s in self.slices)
        padded = self._padded_c("(group)", "size_t")
        rows = self._rows_macro("(group)", "size_t", padded)
        heads = f"({self.align} + 4 * ({per_head} * {padded} \\\n"
        return f"{heads}     + {per_row} * {rows} + {fixed}))"

    def workspace_bytes(self, group):
        padded, rows = self.padded(group), self.rows(group)
        return self.align + 4 * sum(s.floats(padded, rows) for s in self.slices)

    @property
    def partial_c(self):
        """Floats of one partial result: m, l, alpha, (top, mass,) seen, O."""
        return f"{self.stats} * heads + {LINE} + {self.o_stride} * rows"

    @property
    def partial_bytes_c(self):
        padded = self._padded_c("p.group", "uint64_t")
        rows = self._rows_macro("p.group", "uint64_t", padded)
        return f"4 * ({self.stats} * {padded} + {LINE} + {self.o_stride}u * {rows})"

    @property
    def floats_a_head(self):
        """Of one partial result, at most: statistics are padded most in a group of one head, rows
        of O in one of TILE_HEADS + 1."""
        group = TILE_HEADS + 1 if self.tiles else 1
        return self.stats * self.pad + LINE + -(-self.rows(group) * self.o_stride // group)

    @property
    def partials_macro(self):
        return (
            f"({self.align} + 4 * (size_t)(r) * (size_t)(c) * (size_t)(h) * {self.floats_a_head})"
        )

    def partials_bytes(self, rows, heads, chunks):
        return self.align + 4 * rows * chunks * heads * self.floats_a_head


def plan(tiles):
    """The slices of a kernel whose instruction sets have these tiles: {isa: Tile}."""
    tiles = tuple(tiles.values())
    if isinstance(tiles[0], Int8Tile):
        return int8_plan(tiles)
    matrices = any(isinstance(t, MatrixTile) for t in tiles)
    o_stride = line(max(t.o_stride for t in tiles))
    window = max(t.window for t in tiles)
    q, k, v, s = (max(t.memory[name] for t in tiles) for name in ("q", "k", "v", "s"))
    state = (
        ("m", "running maxima, in log2 units"),
        ("l", "running sums"),
        ("alpha", "factors of the last rescale"),
    )
    if matrices:
        state += (
            ("top", "largest scores, where m may lie below them"),
            ("mass", "sums of the weights as V meets them, where they are rounded"),
        )
    slices = [
        Slice("q", q, 0, 0, "Q^T in panels, or Q in rows"),
        Slice("k", 0, 0, line(k), "the block's keys as float32"),
        Slice("v", 0, 0, line(v), "the block's values, where they are apart"),
        Slice("s", s, 0, 0, "S^T, then P^T"),
        Slice("row", 0, 0, line(ROW * window), "where keys lie, known ahead", "(hl_row *)(void *)"),
    ]
    own = max(t.own for t in tiles)
    if own:
        why = "where they lie once they are decoded"
        slices.append(Slice("own", 0, 0, line(ROW * own), why, "(hl_row *)(void *)"))
    if any(getattr(t, "decodes", False) for t in tiles):
        slices.append(Slice("shift", 1, 0, 0, "what offsets of codes add to scores"))
        slices.extend(Slice(f"one.{f}", 1, 0, 0, f"{why}, of one row") for f, why in state)
        if matrices:
            slices.append(Slice("one.seen", 0, 0, LINE, "1 once a key was taken"))
            slices.append(Slice("one.o", 0, o_stride, 0, "O of one row"))
    for name in ("state", "other"):
        slices.extend(Slice(f"{name}.{f}", 1, 0, 0, why) for f, why in state)
        slices.append(Slice(f"{name}.seen", 0, 0, LINE, "1 once a key was taken"))
        slices.append(Slice(f"{name}.o", 0, o_stride, 0, "O, not yet divided by l"))
    return Memory(max(t.head_pad for t in tiles), matrices, tuple(slices), o_stride, own)


@dataclass(frozen=True)
class Int8Memory(Memory):
    """That of a kernel of whole numbers: heads are not padded, and no row is split."""

    def _padded_c(self, group, cast):
        return f"({cast}){group}"

    @property
    def partials_macro(self):
        return "((size_t)0)"

    def partials_bytes(self, rows, heads, chunks):
        return 0


def int8_plan(tiles):
    """Widest numbers first: every slice is whole cache lines, so that each starts on one."""
    most = {name: max(t.memory[name] for t in tiles) for name in tiles[0].memory}
    floats = "(float *)(void *)"
    slices = (
        Slice("o", 0, most["o"], 0, "sums of weighted codes, in 64 bits", "(int64_t *)(void *)"),
        Slice("sum", 0, most["sum"], 0, "those of the last keys, in 32", "(int32_t *)(void *)"),
        Slice("q", 0, most["q"], 0, "Q in 16 bits", "(int16_t *)(void *)"),
        Slice("m", 0, most["m"], 0, "lanes of running maxima, sums, what they rounded off", floats),
        Slice("s", 0, 0, line(most["s"]), "scores, then weights, of some queries", floats),
        Slice("out", 0, 0, line(most["out"]), "a row of the result as float32", floats),
        Slice("row", 0, 0, line(ROW * most["row"]), "where the keys lie", "(hl_row *)(void *)"),
    )
    return Int8Memory(1, False, slices, 0, 0)
