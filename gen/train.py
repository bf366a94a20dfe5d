"""The operators for training and prefill: sizes of their tiles, their memory, and what templates
may ask about them. Many query rows see the same keys, so queries are packed once for a task, keys
once for a block, and both products run at the speed of FMA."""

from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

from gen import train_matrix
from gen.decode_view import TO_FLOAT, listed

ALIGN = 64  # a cache line: the start is moved up to it inside
LINE = ALIGN // 4
L1_BYTES = 16 * 1024  # what a slice of a packed panel may take of the first-level cache

# queries: of a task, over all heads of the kv head. The more of them, the less often keys are
# converted; they, their scores and results have to stay in the second-level cache.
# block: keys of a block; a multiple of the rows of a score tile.
SIZES = {
    "scalar": {"rows": (4, 1), "vecs": (2, 1), "value_rows": (4, 1), "value_vecs": (2, 1)},
    "neon": {"rows": (8, 1), "vecs": (2, 1), "value_rows": (8, 1), "value_vecs": (2, 1)},
    "avx2": {"rows": (6, 1), "vecs": (2, 1), "value_rows": (4, 1), "value_vecs": (3, 1)},
    "avx512": {
        "rows": (12, 4, 1),
        "vecs": (2, 1),
        "value_rows": (8, 4, 1),
        "value_vecs": (3, 2, 1),
    },
}
WHY = {
    "scalar": "8 sums fit the 16 float registers of a small core with room for operands",
    "neon": "8 x 2 accumulators, 2 vectors and a broadcast of 32 registers",
    "avx2": "6 x 2 accumulators, 2 vectors and a broadcast fill 15 of 16 registers",
    "avx512": "12 x 2 accumulators take 24 of 32 registers: 14 loads for 24 FMA",
}
QUERIES = 144  # an odd number of cache lines: rows of S do not share their cache sets
BLOCK = 96
# The same for gradients: queries or keys of a task; keys or queries that they meet at once. The
# more of the first, the less often rows come from far away; what a task packs, loads and sums has
# to stay in the second-level cache: 540 KiB for 128 channels.
GRAD_TASK = 192
GRAD_BLOCK = 96
SMALL = 16  # both, where memory is dear: headers for small targets alone


def round_up(n, step):
    return -(-n // step) * step


@dataclass(frozen=True)
class TrainTile:
    """Sizes of one kernel on one instruction set. Strides in floats."""

    lanes: int
    queries: int
    block: int
    rows: tuple[int, ...]  # keys of a score tile, largest first
    vecs: tuple[int, ...]  # vectors of queries of a score tile
    value_heads: tuple[int, ...]  # queries of a value tile, largest first
    value_vecs: tuple[int, ...]  # vectors of channels of a value tile
    channels: int  # of one slice of the score product
    k_stride: int
    o_stride: int
    o_columns: int
    dv_tail: bool
    why: dict[str, str]
    slices: dict[str, int]  # floats of each named piece of workspace
    decodes: bool = False
    exp2: str = "vexp2"
    ahead: int = 8  # rows that are asked for before they are loaded
    numbers = MappingProxyType({})  # what it keeps of each query beside NUMBERS
    grad: bool = False
    keys: int = 0  # gradients: of a task of keys
    k_columns: int = 0
    dense: bool = False  # scores of a panel lie by themselves: GCC keeps 12 addresses of others
    rows_step: int = 1  # rows that panels meet begin and end at multiples of it in their block

    @property
    def shape_lines(self):
        """For people."""
        return (
            f"score tiles {self.rows} keys x {self.vecs} vectors of queries",
            f"value tiles {self.value_heads} queries x {self.value_vecs} vectors of channels",
        )


def row_stride(channels, lanes):
    """Of rows that a product reads a few channels of, all of them again and again: not a multiple
    of 256 bytes, or few sets of the first-level cache would have to hold them all."""
    stride = round_up(channels, lanes)
    return stride + LINE if lanes > 1 and stride % (4 * LINE) == 0 else stride


def tile(kernel, isa):
    """The tile sizes of one kernel."""
    if isa.tiles:
        return train_matrix.tile(kernel, isa)
    return grad_tile(kernel, isa) if kernel.backward else forward_tile(kernel, isa)


def channels_of(kernel, isa):
    """Of one slice of a panel."""
    panel = SIZES[isa.name]["vecs"][0] * isa.lanes
    cuts = max(1, -(-kernel.dk * panel * 4 // L1_BYTES)) if isa.name != "scalar" else 1
    return round_up(-(-kernel.dk // cuts), isa.lanes)


def grad_tile(kernel, isa):
    """The tile sizes of gradients."""
    sizes = SIZES[isa.name]
    lanes = isa.lanes
    small = kernel.isa == ("scalar",)
    task, block = (SMALL, SMALL) if small else (GRAD_TASK, GRAD_BLOCK)
    panel = sizes["vecs"][0] * lanes
    channels = channels_of(kernel, isa)
    stride = row_stride(kernel.dk, lanes)
    pairs = block * panel
    o_stride = round_up(kernel.dk, lanes)
    return TrainTile(
        lanes=lanes,
        queries=task,
        block=block,
        keys=task,
        grad=True,
        rows=sizes["rows"],
        vecs=sizes["vecs"],
        value_heads=sizes["value_rows"],
        value_vecs=sizes["value_vecs"],
        channels=channels,
        k_stride=stride,
        o_stride=o_stride,
        o_columns=round_up(kernel.dv, lanes),
        k_columns=o_stride,
        dv_tail=kernel.dv % lanes != 0,
        dense=True,
        rows_step=1 if lanes == 1 else 4,
        why={
            "registers": WHY[isa.name],
            "block": f"{task} queries by {block} keys, {task} keys by {block} queries: what is "
            f"loaded is used {task} times",
            "channels": f"{channels} channels of {panel} columns are "
            f"{channels * panel * 4 // 1024} KiB: they stay in the first-level cache",
        },
        slices={
            "panel_k": task * kernel.dk,
            "panel_v": task * kernel.dv,
            "k": block * stride,
            "v": block * stride,
            "s": pairs,
            "ds": pairs,
            "kept": pairs,
            "slope": pairs if "softcap" in kernel.features else 0,
            "out_k": task * o_stride,
            "out_v": task * o_stride,
            "row": max(stride, block, panel),
        },
    )


def forward_tile(kernel, isa):
    """The tile sizes of outputs."""
    sizes = SIZES[isa.name]
    lanes = isa.lanes
    small = kernel.isa == ("scalar",)
    queries, block = (SMALL, SMALL) if small else (QUERIES, BLOCK)
    panel = sizes["vecs"][0] * lanes
    channels = channels_of(kernel, isa)
    stride = round_up(kernel.dk, lanes)
    o_stride = round_up(kernel.dv, lanes)
    return TrainTile(
        lanes=lanes,
        queries=queries,
        block=block,
        rows=sizes["rows"],
        vecs=sizes["vecs"],
        value_heads=sizes["value_rows"],
        value_vecs=sizes["value_vecs"],
        channels=channels,
        k_stride=stride,
        o_stride=o_stride,
        o_columns=o_stride,
        dv_tail=kernel.dv % lanes != 0,
        why={
            "registers": WHY[isa.name],
            "block": f"{queries} queries by {block} keys: what is loaded is used {queries} times",
            "channels": f"{channels} channels of {panel} queries are "
            f"{channels * panel * 4 // 1024} KiB: they stay in the first-level cache",
        },
        slices={
            "q": queries * kernel.dk,
            "k": block * stride,
            "v": block * stride,
            "s": block * queries,
            "o": queries * o_stride,
            "row": max(stride, block),
        },
    )


SLICES = {
    "q": "Q^T in panels",
    "k": "the block's keys as float32",
    "v": "the block's values",
    "s": "S^T, then P^T: [key][query]",
    "o": "O, not yet divided by l",
    "row": "one row, as float32",
}
NUMBERS = {
    "m": "running maxima, in log2 units",
    "l": "running sums",
    "alpha": "factors of the last rescale",
}
GRAD_SLICES = {
    "panel_k": "Q^T in panels; tasks of keys: K^T",
    "panel_v": "dO^T; V^T",
    "k": "rows of K; of Q",
    "v": "rows of V; of dO",
    "turned_k": "on tiles: the transposes of these rows",
    "turned_v": "and of those",
    "s": "S, then P o M / keep_prob: [row][column]",
    "ds": "dP, then dS",
    "kept": "M / keep_prob",
    "slope": "of softcap",
    "out_k": "dQ; dK",
    "out_v": "dV",
    "row": "one row, as float32",
}
GRAD_NUMBERS = {
    "max": "maxima, in log2 units",
    "weight": "1 / sum",
    "delta": "rowsum(dO o O)",
    "ones": "factors of sums that go on: 1",
}
BOUNDS = {
    "low": "the first key that each query sees",
    "high": "and the one behind its last",
}


@dataclass(frozen=True)
class TrainMemory:
    """The workspace of one task: of the same size whatever the lengths."""

    slices: tuple
    floats: int
    align: int = ALIGN

    @property
    def bytes(self):
        return self.align + 4 * self.floats


def plan(tiles):
    """The slices of a kernel whose instruction sets have these tiles: {isa: tile}."""
    tiles = tuple(tiles.values())
    grad = getattr(tiles[0], "grad", False)
    queries = max(getattr(t, "numbered", t.queries) for t in tiles)
    made = []

    def add(field, floats, why, cast=""):
        size = round_up(floats, LINE)
        made.append(SimpleNamespace(field=field, size=size, why=why, cast=cast))

    for field, why in (GRAD_SLICES if grad else SLICES).items():
        floats = max(t.slices.get(field, 0) for t in tiles)
        if floats > 0:
            add(field, floats, why)
    kept = GRAD_NUMBERS if grad else NUMBERS | {f: w for t in tiles for f, w in t.numbers.items()}
    for field, why in kept.items():
        add(field, queries, why)
    for field, why in BOUNDS.items():
        add(field, queries, why, "(int32_t *)(void *)")
    return TrainMemory(tuple(made), sum(s.size for s in made))


# What a header has to be generated with, and what of a call asks for it.
WANTED = {
    "pse_types": ("a->pse_type != HL_PSE_INNER", "PSE_TYPE"),
    "softcap": ("a->softcap != 0.0f", "SOFTCAP"),
    "sinks": ("a->sinks != NULL", "SINKS"),
}
EXTRAS = {
    "pse_types": "every pse type",
    "softcap": "softcap",
    "sinks": "sinks",
}


def train_view(kernel):
    """What templates may ask about a kernel of these operators."""
    if not kernel.trains:
        return {"trains": False}
    has = kernel.features
    grad = kernel.backward
    absent = [
        SimpleNamespace(test=test, argument=argument)
        for name, (test, argument) in WANTED.items()
        if name not in has and not (grad and name == "sinks")
    ]
    extras = [EXTRAS[name] for name in has]
    return {
        "trains": True,
        "grad": grad,
        "decodes": False,
        "integer": False,
        "layout_tests": [f"a->input_layout == HL_LAYOUT_{name}" for name in kernel.layout_q],
        "has_tnd": "TND" in kernel.layout_q,
        "has_pse_types": "pse_types" in has,
        "has_softcap": "softcap" in has,
        "has_sinks": "sinks" in has,
        "absent": absent,
        "extras": listed(extras) if extras else "",
        "to_float": TO_FLOAT[kernel.dtype],
        "group_parameter": "const hl_span *g, ",
        "head_at": "(g->first + h) % g->heads",
    }
