"""No byte outside the described memory is read or written: every shipped header, every instruction
set, every buffer flush left and flush right against pages that may not be touched.

A slice of the sweep by default; all of it with HEADLIGHT_GUARD=full (`make guard`).
"""

import ctypes
import re
from functools import partial

import helpers_cases
import helpers_decode
import helpers_every as every
import helpers_fusion
import helpers_guard
import numpy as np
import pytest
from helpers import ISAS_HERE, same_bits
from helpers_guard import FULL, jobs, note
from helpers_memory import Arena, Died, in_child, survey
from oracle import BSND, PA_BSND

from gen import bind

SLICE = 101  # every so many jobs of the sweep: a prime, so that all options come up


@every.by_pair()
def test_sweep(name, isa):
    """Hazards 5, 30 and 45: keys and rows from 0 to one past two tiles, heads, batches, pages,
    lists; results do not depend on where buffers lie, and are the oracle's."""
    every.kernel(name)  # here, not in each child
    some = jobs(name, (isa,))
    note("sweep", name, isa, survey(some if FULL else some[len(name) % 17 :: SLICE]))


# ---- hazards by name -----------------------------------------------------------------------------

PAGED = [(name, isa) for name, isa in every.pairs() if helpers_guard.paged(name)]
BEST = [(name, isa) for name, isa in PAGED if isa == every.isas_in(name)[-1]]
BY_PAGED = pytest.mark.parametrize("name,isa", PAGED if FULL else BEST[:: 1 if FULL else 3])


def trimmed(name: str, isa: str, size: int, n: int) -> int:
    """A call of two batches, whose table ends with the last entry that the last batch needs: what
    is behind it may not be touched. Other entries that no batch needs are nonsense."""
    of, more = every.description(name), helpers_guard.paged(name)
    more |= {"block_size": size, "spare_blocks": 3, "seed": n}
    if of.decodes:
        made = helpers_decode.Shape(lens=(n + 1, n), group=1 + n % 3, **more)
    else:
        rows = {"lens_q": (1, 1), "lens_kv": (n + 1, n)}
        made = helpers_cases.Shape(**rows, group=1 + n % 3, **more)
    call = every.call_of(name, made)
    table = call.case.args.block_table
    keep = table.shape[1] + -(-n // size)
    want = call.run(isa)
    with Arena("right") as arena:
        short = arena.place(table.reshape(-1)[:keep].copy())
        arena.protect()
        got = call.run(isa, block_table=short)
        arena.check()
    assert all(same_bits(got[x], want[x]) for x in got)
    return 1


@BY_PAGED
def test_hazards_3_and_5_no_entry_of_a_table_is_read_too_many(name, isa):
    """Pages of 1 .. 17, and others, by lengths that end a page, begin one, and end a tile."""
    every.kernel(name)
    tile = helpers_guard.tile_of(name, isa).block
    sizes = (*range(1, 18), 31, 32, 33, 48, 64, tile - 1, tile, tile + 1, 130)
    lengths = (0, 1, 2, 3, *(n + d for n in (16, 32, tile, 2 * tile) for d in (-1, 0, 1)))
    some = [partial(trimmed, name, isa, size, n) for size in sizes for n in lengths]
    made = survey(some if FULL else some[:: len(some) // 40])
    note("tables", name, isa, made)


def test_a_table_that_is_too_short_is_noticed():
    """The control: one entry less than the last batch needs."""
    name = BEST[0][0]
    call = every.sized(name, 33, layout_kv=PA_BSND, block_size=3, spare_blocks=0)
    with Arena("right") as arena:
        short = arena.place(call.case.args.block_table.reshape(-1)[:-1].copy())
        with pytest.raises(Died):
            in_child(lambda: call.run("scalar", block_table=short))


def repaged(call: every.Call, size: int) -> every.Call:
    """The call on the same rows in pages of another size, in any order."""
    case = call.case
    if every.description(call.name).decodes:
        return every.Call(call.name, helpers_decode.relaid(case, BSND, PA_BSND, size))
    a, rng = case.args, np.random.default_rng(size)
    lens, before = a.actual_seq_lengths_kv, a.key.shape[1]
    needed = [-(-int(n) // size) for n in lens]
    table = np.full((len(needed), max(needed)), -1, np.int32)
    order, at = rng.permutation(sum(needed)), 0
    for b, n in enumerate(needed):
        table[b, :n], at = order[at : at + n], at + n
    changes = {"block_table": table}
    for name in ("key", "key_rope", "value"):
        pool = getattr(a, name)
        if pool is None:
            continue
        changes[name] = helpers_cases.poison((sum(needed), size, *pool.shape[2:]), pool.dtype)
        for b, n in enumerate(lens):
            j = np.arange(n)
            rows = pool[a.block_table[b, j // before], j % before]
            changes[name][table[b, j // size], j % size] = rows
    return every.Call(call.name, case.changed(**changes))


@BY_PAGED
def test_hazard_06_every_page_size_has_the_same_bits(name, isa):
    """Pages of 2 .. 130 tokens against pages of one."""
    if every.description(name).decodes:
        dense = every.call_of(name, helpers_decode.Shape(lens=(150, 41), seq_q=2, group=3, seed=3))
        call = every.Call(name, helpers_decode.relaid(dense.case, BSND, PA_BSND, 1))
        base = dense
    else:
        base = call = every.call_of(
            name,
            helpers_cases.Shape(
                lens_q=(1, 2), lens_kv=(150, 41), group=3, layout_kv=PA_BSND, block_size=1,
                sparse_mode=3, seed=3,
            ),
        )  # fmt: skip
    want = call.run(isa)

    def job(size: int) -> int:
        got = repaged(base, size).run(isa)
        assert all(same_bits(got[x], want[x]) for x in got), f"pages of {size}"
        return 1

    sizes = range(2, 131) if FULL else (2, 3, 7, 16, 31, 48, 128, 130)
    note("pages", name, isa, survey([partial(job, size) for size in sizes]))
    spoilt = repaged(base, 7)
    spoilt.case.args.block_table[0, :5] = spoilt.case.args.block_table[1, :5]
    other = spoilt.run(isa)
    assert not all(same_bits(other[x], want[x]) for x in want), "the control changed no bit"


# ---- hazard 30: channels -------------------------------------------------------------------------

WIDTHS = (*range(1, 19), 23, 24, 25, *range(31, 35), 47, 48, 49, *range(63, 67), 79, 80, 81)
WIDTHS = (*WIDTHS, 95, 96, 97, 111, 112, 113, *range(127, 131)) if FULL else (37,)
TYPES = ("f32", "bf16", "f16")


def of_width(d: int, i: int) -> str:
    """A small header of rows of d channels, of the i-th operator."""
    op = list(every.MODULES)[i % 5]
    table = {"op": op, "dtype": TYPES[i % 3], "dk": d, "dv": max(1, d - i % 4)}
    if op == "sparse_flash_attention_antiquant":
        op = table["op"] = "sparse_flash_attention"
    if op == "sparse_flash_attention":
        table |= {"rope": i % 6 if d > 6 else 0, "features": ["slots"] if i % 2 else []}
    if op == "incre_flash_attention":
        table |= {"kv": ("i8", table["dtype"])[i // 5 % 2], "features": ["stats", "window"]}
    return every.adopt(f"guard_{i % 5}_{d}", **table)


@pytest.mark.parametrize("d", WIDTHS)
def test_hazard_30_rows_of_any_width(d):
    """Channels past d are not read, not of the last row and not behind the last head."""
    name = of_width(d, d + d // 5)
    every.kernel(name)
    if every.description(name).backward:
        helpers_fusion.kernel(helpers_fusion.FORWARD[name])
    for isa in every.isas_in(name):
        some = [
            helpers_guard.job(name, (isa,), n + 7 * heads, n, 1 + n % 3, heads)
            for n in (1, 2, 5, 16, 17, 33, 70)
            for heads in (1, 2, 3, 17, 33)
        ]
        note("widths", f"d{d}", isa, survey(some))


# ---- instruments ---------------------------------------------------------------------------------

PROBES = r"""
#include <immintrin.h>
float gather(const float *x);
float masked(const float *x);
void store(float *x);
__attribute__((target("avx512f"))) float gather(const float *x)
{
    const __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_reduce_add_ps(_mm512_i32gather_ps(at, x, 4));
}
__attribute__((target("avx512f"))) float masked(const float *x)
{
    return _mm512_reduce_add_ps(_mm512_maskz_loadu_ps((__mmask16)0xff, x));
}
__attribute__((target("avx512f"))) void store(float *x)
{
    _mm512_mask_storeu_ps(x, (__mmask16)0xff, _mm512_setzero_ps());
}
"""


@pytest.mark.skipif("avx512" not in ISAS_HERE, reason="no AVX-512 here")
def test_gathers_and_masked_accesses_die_of_guard_pages():
    """What sanitizers miss (gathers, masked loads and stores) dies one lane past the end, and lives
    at it. Tile loads, emulated or not: tests/test_tiles.py::test_faults_of_loads_and_stores_are_
    ordinary, and the key of every call on tiles in tests/test_guard_lies.py."""
    library = ctypes.CDLL(str(bind.compile_c({"probes.c": PROBES})))
    for what, lanes in (("gather", 16), ("masked", 8), ("store", 8)):
        with Arena("right") as arena:
            address = arena.room((lanes,), np.float32).ctypes.data
            function = getattr(library, what)
            function.argtypes, function.restype = (ctypes.c_void_p,), None
            in_child(partial(function, address))
            with pytest.raises(Died):
                in_child(partial(function, address + 4))


def test_no_header_gathers():
    """An index past the end could not be masked off: rows are read where they begin."""
    for name in every.HEADERS:
        assert "gather" not in re.sub(r"/\*.*?\*/", "", every.text(name), flags=re.DOTALL), name


def test_a_job_that_dies_is_named():
    """The control of survey(): one job of many reads past the end."""
    with Arena("right") as arena:
        address = arena.place(np.zeros(4, np.float32)).ctypes.data

        def job(i: int) -> int:
            assert i != 3, "three"
            return int(ctypes.c_float.from_address(address + (16 if i == 150 else 0)).value == 0)

        made = survey([partial(job, i) for i in range(250)])
        assert made.calls == 248
        assert len(made.wrong) == 2, made.wrong
        assert "three" in made.wrong[0] and "SIGSEGV" in made.wrong[1]
