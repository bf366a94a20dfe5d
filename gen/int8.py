"""(kernel of whole numbers, instruction set) -> sizes of its block of keys, and their reasons."""

from dataclasses import dataclass

QUERIES = 4  # that are scored together: their sums are reduced together, and share a key's codes
BLOCK_BYTES = 16 * 1024  # of keys, which stay in the first-level cache for all queries
BLOCK_KEYS = {"scalar": 16}  # where workspace is dear
BLOCK_MOST = 64
STATES = 3  # numbers that a query keeps a lane: maximum, sum, what the sum has rounded off
LINE = 16  # floats of a cache line
Q_STEP = 32  # channels that queries are filled up to: the widest vector of 16-bit numbers
FOLD = 1 << 16  # keys whose products, of 2^14 at most, 32 bits hold with room to spare


@dataclass(frozen=True)
class Int8Tile:
    """Strides in elements of their own type."""

    lanes: int
    block: int  # keys that are scored together
    queries: int
    fold: int  # keys after which 32-bit sums are added to those of 64 bits
    q_stride: int
    o_stride: int
    sum_stride: int
    m_stride: int
    dv_tail: bool  # dv is not a whole number of vectors
    why: dict[str, str]
    memory: dict[str, int]  # floats that slices need: of a query o, sum, q, m; of a task the rest
    paired: int = 0  # channels of O lie in their order

    @property
    def shape_lines(self):
        """For people."""
        return (
            f"score tiles {self.queries} queries x 1 key, or 1 query x {self.queries} keys",
            f"values of keys whose weight is not 0, {self.block} keys at a time",
        )


def round_up(n, step):
    return (n + step - 1) // step * step


def tile(kernel, isa):
    """The sizes of one kernel on one instruction set."""
    most = BLOCK_KEYS.get(isa.name, BLOCK_MOST)
    block = min(most, max(LINE, BLOCK_BYTES // kernel.dk // LINE * LINE))
    q_stride = round_up(kernel.dk, Q_STEP)
    o_stride = round_up(kernel.dv, LINE)
    m_stride = round_up(STATES * isa.lanes, LINE)
    return Int8Tile(
        lanes=isa.lanes,
        block=block,
        queries=QUERIES,
        fold=FOLD,
        q_stride=q_stride,
        o_stride=o_stride,
        sum_stride=o_stride,
        m_stride=m_stride,
        dv_tail=kernel.dv % isa.lanes != 0,
        why={
            "registers": f"{QUERIES} queries share the codes of a key, or {QUERIES} keys those of "
            "a query",
            "block": f"{block} keys a block: their codes stay in the first-level cache for all "
            "queries",
            "channels": "weights that are rounded to 0 cost nothing: their values are not read",
        },
        memory={
            "o": 2 * o_stride,
            "sum": o_stride,
            "q": q_stride // 2,
            "m": m_stride,
            "s": QUERIES * block,
            "out": o_stride,
            "row": block,
        },
    )
