"""The operators for training and prefill on matrix tiles: sizes, and their reasons.

Queries in groups of 32, which is 2 x 2 tiles wide; keys in units of 32, in steps that are weighed
together, in panels that all groups of a task share."""

from dataclasses import dataclass, field
from types import SimpleNamespace

from gen.matrix import PARTS

ROWS_OF = {"bf16": "bfloat16", "f16": "float16"}
LARGEST = {"bf16": "0x7f7f", "f16": "0x7bff"}  # the bits of a finite number
TILE = 1024  # bytes: 16 rows of 64
SUB = 32  # keys of a unit, queries of a group
MARGIN = 8  # powers of 2 that a weight may grow to before the maximum is raised: raising is dear
L1_BYTES = 44 * 1024  # of 48 KiB: two steps' scores, a group's Q^T and O^T
STEPS = (64, 128)  # keys of a step: below, O^T is loaded and stored for too few products
WIDE_STEP = 256  # where O^T does not fit the first-level cache, it is moved half as often
PANEL_BYTES = 576 * 1024  # K and V^T of a panel, of 2 MiB of the second-level cache,
TASK_BYTES = 832 * 1024  # beside Q^T and O^T of a task
L2_BYTES = 1792 * 1024  # what the smallest panel and task may take: two parts of wide rows do not
PANELS = (256, 2048)
GRAD_PANELS = (128, 1024)  # of which rows and their transposes are kept
GRAD_TASKS = (128, 256)
QUERIES = (128, 512)  # the more, the less often V is turned; but tasks are to run beside each other

# The accumulators of a unit: C += A B with A two tiles of rows, B two of queries; rows of C are 32
# numbers, of both tiles of B.
DOTS = tuple(
    SimpleNamespace(c=2 * i + j, a=4 + i, b=6 + j, at=2048 * i + 64 * j)
    for i in range(2)
    for j in range(2)
)


@dataclass(frozen=True)
class TrainMatrixTile:
    """How one kernel's blocks are computed on tiles of 16 rows of 64 bytes."""

    queries: int  # of a task
    block: int  # keys of a step
    panel: int  # keys whose tiles are made once for all queries of a task
    columns: int  # of 32 channels of the key
    groups: int  # the same of the value
    pairs: int  # of keys that are weighed behind each column of a product
    o_stride: int  # floats of a row of O when it is finished
    dv_tail: bool
    exp2: str
    why: dict[str, str]
    slices: dict[str, int]
    sub: int = SUB
    margin: int = MARGIN
    dots: tuple = DOTS
    decodes: bool = False
    lanes: int = 16
    grad: bool = False
    keys: int = 0  # gradients: of a task of keys
    rate_queries: int = 0  # gradients: pieces of two rows by 16 columns behind a column of products
    rate_keys: int = 0
    parts: int = 1
    dtype: str = "bf16"
    numbers: dict[str, str] = field(
        default_factory=lambda: {
            "top": "largest scores, where m may lie below them",
            "mass": "sums of the weights as V meets them, rounded",
        }
    )

    @property
    def shape_lines(self):
        """For people."""
        return (
            f"units of {SUB} keys x {SUB} queries, 2 x 2 tiles",
            f"steps of {self.block} keys, panels of {self.panel}",
        )

    @property
    def numbered(self):
        """Queries that something is known of at a time: those of a task, or of a panel."""
        return max(self.queries, self.panel) if self.grad else self.queries

    @property
    def k_stride(self):
        """Floats of a row of dO, where its numbers are made."""
        return SUB * self.groups

    @property
    def o_columns(self):
        return SUB * self.groups

    @property
    def rows_of(self):
        return ROWS_OF[self.dtype]

    @property
    def largest(self):
        return LARGEST[self.dtype]

    @property
    def column_bytes(self):
        """32 channels of 32 rows."""
        return self.parts * 2 * TILE

    @property
    def group_bytes(self):
        """Q^T of 32 queries."""
        return self.columns * self.column_bytes

    @property
    def value_bytes(self):
        """V^T of a unit of keys."""
        return self.groups * self.column_bytes

    @property
    def task_groups(self):
        return self.queries // SUB

    @property
    def units(self):
        return self.panel // SUB


def largest(least, most, each, room):
    """The largest power of two times `least`, up to `most`, of which `room` bytes hold all."""
    while least < most and 2 * least * each <= room:
        least *= 2
    return least


def step_of(columns, groups, parts):
    """Keys that are weighed together. With two parts O^T is moved for three times as many products:
    half of it may be elsewhere."""
    room = L1_BYTES - columns * parts * 2 * TILE - groups * 4 * TILE // parts
    if room < 2 * 4 * SUB * STEPS[0]:
        return WIDE_STEP
    return STEPS[1] if room >= 2 * 4 * SUB * STEPS[1] else STEPS[0]


def fits(dtype, dk, dv):
    """Whether the smallest panel and task of outputs stay in the second-level cache."""
    columns, groups = -(-dk // SUB), -(-dv // SUB)
    panel = PANELS[0] * 64 * PARTS[dtype] * (columns + groups)
    return panel + QUERIES[0] * (64 * PARTS[dtype] * columns + 128 * groups) <= L2_BYTES


def exp2_of(kernel):
    """2^x for weights that meet V rounded."""
    return "hl_exp2_amx" if kernel.math == "builtin" else "vexp2"


def tile(kernel, isa):
    """The tiles of one kernel."""
    return grad_tile(kernel, isa) if kernel.backward else forward_tile(kernel, isa)


def rate_of(products, sums):
    """Pieces of P and dS behind each column of products: a unit has so many columns of them, and as
    many pieces as rows. While the first unit is summed, nothing can be weighed; what is left over
    is weighed when the sums begin."""
    return max(1, round(SUB / (products + sums - 1)))


def grad_tile(kernel, isa):
    """The tiles of gradients: a task of queries meets panels of keys, one of keys those of
    queries."""
    columns, groups = -(-kernel.dk // SUB), -(-kernel.dv // SUB)
    both = columns + groups
    # S of two steps and dP of one, the group's two panels, and the sums of one of two gradients
    room = L1_BYTES - both * 2 * TILE - columns * 4 * TILE
    step = STEPS[1] if room >= 3 * 4 * SUB * STEPS[1] else STEPS[0]
    panel = largest(*GRAD_PANELS, 128 * both, PANEL_BYTES)
    task = largest(*GRAD_TASKS, 192 * both, TASK_BYTES)
    return TrainMatrixTile(
        queries=task,
        keys=task,
        grad=True,
        block=step,
        panel=panel,
        columns=columns,
        groups=groups,
        pairs=0,
        rate_queries=rate_of(both, columns),
        rate_keys=rate_of(both, both),
        o_stride=SUB * columns,
        dv_tail=kernel.dv % isa.lanes != 0,
        exp2=exp2_of(kernel),
        why={
            "registers": "2 x 2 tiles of 16 x 16 sums in 4 of 8 registers: 4 loads, 4 products",
            "block": f"{task} columns by panels of {panel} rows, whose tiles are "
            f"{panel * 128 * both // 1024} KiB of the second-level cache",
            "channels": f"{step} rows a step: S of two steps and dP of one are "
            f"{step * SUB * 12 // 1024} KiB, for 32 columns",
        },
        slices={
            "panel_k": task * columns * 16,
            "panel_v": task * groups * 16,
            "k": panel * columns * 16,
            "v": panel * groups * 16,
            "turned_k": panel * columns * 16,
            "turned_v": panel * groups * 16,
            "s": 2 * step * SUB,
            "ds": step * SUB,
            "kept": step * SUB,
            "slope": step * SUB if "softcap" in kernel.features else 0,
            "out_k": task * columns * SUB,
            "out_v": task * groups * SUB,
            "row": SUB * max(columns, groups, step // SUB),
        },
    )


def forward_tile(kernel, isa):
    """The tiles of outputs."""
    columns, groups = -(-kernel.dk // SUB), -(-kernel.dv // SUB)
    parts = PARTS[kernel.dtype]
    step = step_of(columns, groups, parts)
    panel = largest(*PANELS, 64 * parts * (columns + groups), PANEL_BYTES)
    queries = largest(*QUERIES, 64 * parts * columns + 128 * groups, TASK_BYTES)
    kilobytes = panel * 64 * parts * (columns + groups) // 1024
    return TrainMatrixTile(
        queries=queries,
        block=step,
        panel=panel,
        columns=columns,
        groups=groups,
        pairs=-(-SUB // 2 // (columns + groups)),
        parts=parts,
        dtype=kernel.dtype,
        o_stride=SUB * groups,
        dv_tail=kernel.dv % isa.lanes != 0,
        exp2=exp2_of(kernel),
        why={
            "registers": "2 x 2 tiles of 16 x 16 sums in 4 of 8 registers: 4 loads, 4 products",
            "block": f"{queries} queries by panels of {panel} keys, whose tiles are "
            f"{kilobytes} KiB of the second-level cache",
            "channels": f"{step} keys a step: two steps' scores are {2 * step * SUB * 4 // 1024} "
            "KiB, beside Q^T and O^T of 32 queries",
        },
        slices={
            "q": queries * columns * 16 * parts,
            "k": panel * columns * 16 * parts,
            "v": panel * groups * 16 * parts,
            "s": 2 * step * SUB,
            "o": queries * groups * SUB,
            "row": max(step, 16 * -(-kernel.dk // 16)),
        },
    )
