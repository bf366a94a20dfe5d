"""Named slices of workspace and partials -> offsets, sizes, and the macros that add them up.

Every size is `per_head * padded heads + per_group * group + fixed` floats, the largest over the
header's instruction sets, so that one figure holds whichever of them runs.
"""

from dataclasses import dataclass

ALIGN = 64  # a cache line: the start is moved up to it inside
LINE = ALIGN // 4


def line(floats):
    return (floats + LINE - 1) // LINE * LINE


@dataclass(frozen=True)
class Slice:
    """One named piece of the workspace, in floats."""

    field: str
    per_head: int  # of the heads padded to whole vectors
    per_group: int  # of the exact heads
    fixed: int
    why: str
    cast: str = ""

    @property
    def size_c(self):
        terms = []
        if self.per_head:
            terms.append(f"{self.per_head} * heads" if self.per_head != 1 else "heads")
        if self.per_group:
            terms.append(f"{self.per_group} * (ptrdiff_t)group")
        if self.fixed:
            terms.append(str(self.fixed))
        return " + ".join(terms) or "0"

    def floats(self, padded, group):
        return self.per_head * padded + self.per_group * group + self.fixed


@dataclass(frozen=True)
class Memory:
    """The memory of one kernel."""

    lanes: int
    slices: tuple[Slice, ...]
    o_stride: int
    align: int = ALIGN
    line: int = LINE

    def _padded(self, group):
        return f"(((ptrdiff_t){group} + {self.pad - 1}) / {self.pad} * {self.pad})"

    @property
    def pad(self):
        return self.lanes

    @property
    def padded_c(self):
        return self._padded("group")

    def _sum(self, group):
        per_head = sum(s.per_head for s in self.slices)
        per_group = sum(s.per_group for s in self.slices)
        fixed = sum(s.fixed for s in self.slices)
        padded = f"(((size_t)({group}) + {self.pad - 1}) / {self.pad} * {self.pad})"
        return per_head, per_group, fixed, padded

    @property
    def workspace_macro(self):
        per_head, per_group, fixed, padded = self._sum("group")
        return (
            f"({self.align} + 4 * ({per_head} * {padded} + {per_group} * (size_t)(group)"
            f" + {fixed}))"
        )

    def workspace_bytes(self, group):
        padded = -(-group // self.pad) * self.pad
        return self.align + 4 * sum(s.floats(padded, group) for s in self.slices)

    @property
    def partial_c(self):
        """Floats of one partial result: m, l, alpha, seen, O."""
        return f"3 * heads + {LINE} + {self.o_stride} * (ptrdiff_t)group"

    @property
    def partial_bytes_c(self):
        padded = f"(((uint64_t)p.group + {self.pad - 1}) / {self.pad} * {self.pad})"
        return f"4 * (3 * {padded} + {LINE} + {self.o_stride}u * (uint64_t)p.group)"

    @property
    def partials_macro(self):
        return (
            f"({self.align} + 4 * (size_t)(r) * (size_t)(chunks) * (size_t)(heads)"
            f" * (3 * {self.pad} + {LINE} + {self.o_stride}))"
        )

    def partials_bytes(self, rows, heads, chunks):
        return self.align + 4 * rows * chunks * heads * (3 * self.pad + LINE + self.o_stride)


def plan(kernel, tiles):
    """The slices of a kernel whose instruction sets have these tiles: {isa: Tile}."""
    lanes = max(isa.lanes for isa in tiles)
    o_stride = line(max(t.o_stride for t in tiles.values()))
    block = max(max(t.block, t.few_block) for t in tiles.values())
    window = max(t.window for t in tiles.values())
    k = max(0 if t.few == "all" else t.block * t.k_stride for t in tiles.values())
    v = max(0 if t.few == "all" else t.block * t.v_stride for t in tiles.values())
    q = max(kernel.d, *(t.q_stride for t in tiles.values()))
    state = (
        ("m", "running maxima, in log2 units"),
        ("l", "running sums"),
        ("alpha", "factors of the last rescale"),
    )
    slices = [
        Slice("q", q, 0, 0, "Q^T in panels, or Q in rows"),
        Slice("k", 0, 0, line(k), "the block's keys as float32"),
        Slice("v", 0, 0, line(v), "the block's values, where they are apart"),
        Slice("s", block, 0, 0, "S^T, then P^T"),
        Slice("row", 0, 0, line(6 * window), "where keys lie, known ahead", "(hl_row *)(void *)"),
    ]
    for name in ("state", "other"):
        slices.extend(Slice(f"{name}.{f}", 1, 0, 0, why) for f, why in state)
        slices.append(Slice(f"{name}.seen", 0, 0, LINE, "1 once a key was taken"))
        slices.append(Slice(f"{name}.o", 0, o_stride, 0, "O, not yet divided by l"))
    return Memory(lanes=lanes, slices=tuple(slices), o_stride=o_stride)
