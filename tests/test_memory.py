"""No byte outside the described memory is read or written, whatever the sizes."""

import ctypes
import dataclasses
import mmap
from functools import partial

import helpers_tiles
import numpy as np
import pytest
from helpers import (
    SPECS,
    TILES,
    best_in,
    by_pair,
    by_way,
    check,
    enough_heads,
    groups_of,
    kernel,
    pairs,
    same_bits,
    shipped,
    text,
)
from helpers_cases import INT_MIN, Shape, Way, make_case, run, run_guarded
from helpers_memory import LIBC, MAP_NORESERVE, Arena, Died, in_child, map_pages, view
from helpers_runner import play, program, record, various
from oracle import BSND, PA_BSND, TND

from gen import bind


def peek(address: int) -> float:
    """The float32 at an address."""
    return ctypes.c_float.from_address(address).value


def test_the_guard_notices():
    """Reading or writing one element past either end kills the child; writing an input does too."""
    for flush, outside in (("right", 64), ("left", -1)):
        with Arena(flush) as arena:
            array = arena.place(np.arange(64, dtype=np.float32))
            arena.protect()
            address = array.ctypes.data
            assert in_child(partial(peek, address)) == 0.0
            with pytest.raises(Died):
                in_child(partial(peek, address + 4 * outside))
            with pytest.raises(Died):
                in_child(partial(ctypes.memset, address, 0, 4))
    with Arena("right") as arena:
        array = arena.room((5,), np.float32)
        ctypes.memset(array.ctypes.data - 1, 0, 1)
        with pytest.raises(AssertionError):
            arena.check()


def test_a_kernel_that_reads_too_far_is_noticed():
    """The control for everything below: one more key than there is."""
    k = kernel("f32_small")
    case = make_case(k, Shape(lens_kv=(9,), lengths_given=False))
    case.extra["seq_kv"] = 10
    with pytest.raises(Died):
        run_guarded(k, case, Way(best_in("f32_small")))


@by_pair(*sorted(SPECS))
@pytest.mark.parametrize("flush", ["left", "right"])
def test_every_number_of_keys_and_heads(name, isa, flush):
    """Both together from 0 (keys) and 1 (heads) past any tile."""
    k = kernel(name)
    for n in (*range(0, 12), *range(15, 18), *range(31, 35), *range(62, 67), 100):
        shape = Shape(
            lens_q=(1 + n % 2,),
            lens_kv=(n,),
            group=1 + n % 37,
            seed=n,
            layout_kv=PA_BSND if n % 3 == 0 else BSND,
            block_size=1 + n % 5,
            lists="blocks" if n % 4 == 1 else "none",
            list_length=n % 7,
            value=n % 2 == 0,
            joined_q=n % 5 == 0,
            joined_k=n % 7 == 0,
        )
        case = make_case(k, shape)
        check(case.args, run_guarded(k, case, Way(isa, flush, strides=n % 6 == 5)), isa)


@pytest.mark.parametrize("flush", ["left", "right"])
@pytest.mark.parametrize("name", shipped())
def test_shipped_headers(name, flush):
    k = kernel(name)
    for isa in k.isas():
        for n, group in ((0, 1), (1, 16), (7, 3), (33, 17), (65, 2)):
            shape = Shape(
                lens_q=(2,),
                lens_kv=(n,),
                group=enough_heads(name, isa, group),
                seed=n,
                layout_kv=PA_BSND,
                block_size=3,
                sparse_mode=3,
                lists="blocks",
                list_length=n // 2,
            )
            case = make_case(k, shape)
            check(case.args, run_guarded(k, case, Way(isa, flush)), isa)


@by_way("bf16_small", few=1)
def test_only_the_needed_table_entries_are_read(name, isa, group):
    """The table ends with the last entry that the last batch needs."""
    k = kernel(name)
    for page in (1, 3, 16):
        for n in (0, 1, page, page + 1, 4 * page - 1):
            shape = Shape(
                lens_q=(1, 1),
                lens_kv=(n + 1, n),
                group=group,
                layout_kv=PA_BSND,
                block_size=page,
                spare_blocks=3,
                seed=n,
            )
            case = make_case(k, shape)
            table = case.args.block_table
            keep = table.shape[1] + -(-n // page)
            tail = table.reshape(-1)[keep:].copy()
            assert len(tail) > 0
            fields = {**case.inputs(), **case.sizes(), "isa": k.isas()[isa]}
            with Arena("right") as arena:
                outputs = case.outputs(arena)
                short = arena.place(table.reshape(-1)[:keep].copy())
                arena.protect()
                call = {**fields, **outputs, "block_table": short}
                assert in_child(lambda c=call: k.run(**c)).ok
                check(case.args, outputs, isa)


@by_way("bf16_small", few=1)
def test_slots_need_neither_lengths_nor_table(name, isa, group):
    k = kernel(name)
    for layout in (BSND, TND, PA_BSND):
        query = TND if layout == TND else BSND
        case = make_case(
            k,
            Shape(
                lens_q=(2,),
                lens_kv=(40,),
                group=group,
                lists="slots",
                list_length=20,
                seed=3,
                layout_q=query,
                layout_kv=layout,
            ),
        )
        without = case.inputs()
        without.pop("actual_seq_lengths_kv", None)
        outputs = case.outputs()
        if layout == PA_BSND:
            without["block_table"] = np.full_like(without["block_table"], INT_MIN)
        assert k.run(**without, **case.sizes(), **outputs, isa=k.isas()[isa]).ok
        check(case.args, outputs, isa)


@by_way("bf16_small", few=1)
def test_offsets_beyond_two_to_the_33_bytes(name, isa, group):
    """A cache of 16 GiB that is not there but for two pages at its ends (and rows far apart)."""
    k = kernel(name)
    width, size = k.dk + k.rope, 128
    row = size * width * 2
    blocks = (1 << 34) // row
    case = make_case(
        k,
        Shape(
            lens_q=(1,),
            lens_kv=(200,),
            layout_kv=PA_BSND,
            block_size=size,
            joined_k=True,
            group=group,
            spare_blocks=0,
            seed=5,
        ),
    )
    want = run(k, case, isa)
    address = map_pages(blocks * row, mmap.PROT_READ | mmap.PROT_WRITE, MAP_NORESERVE)
    try:
        pages = case.args.key[case.args.block_table[0]]
        for at, page in ((blocks - 1, pages[0]), (0, pages[1])):
            view(address + at * row, page.shape, page.dtype)[...] = page
        fields = {
            **case.inputs(),
            **case.sizes(),
            "key": address,
            "num_blocks": blocks,
            "isa": k.isas()[isa],
            "block_table": np.array([[blocks - 1, 0]], np.int32),
        }
        outputs = case.outputs()
        result = k.run(**fields, **outputs)
        assert result.ok, result.error_text
        assert all(same_bits(outputs[n], want[n]) for n in want)
        far = (1 << 33) // 2  # and the same with a stride of 2^32 elements between two blocks
        for at, page in ((1, pages[0]), (0, pages[1])):
            view(address + at * far * 2, page.shape, page.dtype)[...] = page
        outputs = case.outputs()
        fields |= {
            "num_blocks": 2,
            "block_table": np.array([[1, 0]], np.int32),
            "key_stride": (far, width, width),
        }
        result = k.run(**fields, **outputs)
        assert result.ok, result.error_text
        assert all(same_bits(outputs[n], want[n]) for n in want)
    finally:
        LIBC.munmap(address, blocks * row)


@pytest.mark.parametrize("name", ["f16_small", "bf16_small", "f16_i8_tails", "bf16_fp8_page"])
def test_sanitizers(name):
    """Address and undefined-behaviour sanitizers over all kinds of calls and instruction sets. At
    -O0 every access is still there to be seen, and it compiles in a quarter of -O1's time."""
    k = kernel(name)
    flags = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    built = program(text(name), k.name, compiler="gcc", flags=flags)
    calls, cases = [], []
    for _, isa in pairs(name):
        for group in groups_of(name, isa, 0):
            paged = k.record is not None and bool(k.record.behind)
            for shape, way in various(9, 60, slots=True, rope=True, paged=paged):
                shape = dataclasses.replace(shape, group=shape.group + group)
                case = make_case(k, shape)
                cases.append((case, isa))
                calls.append(record(k, case, dataclasses.replace(way, isa=isa), k.isas()[isa]))
    _, results = play((str(built),), calls, env=sanitized_environment())
    for (case, isa), got in zip(cases, results, strict=True):
        check(case.args, got, isa)


def sanitized_environment() -> dict[str, str] | None:
    """With tiles where they have to be emulated: the sanitizers otherwise want to be the first
    library that is loaded, and to handle every signal."""
    if TILES is None or not TILES.emulated:
        return None
    options = "verify_asan_link_order=0:handle_sigill=0:handle_sigtrap=0"
    return {**helpers_tiles.preload_environment("granted"), "ASAN_OPTIONS": options}


FLOAT_ENVIRONMENT = r"""
#include <xmmintrin.h>
unsigned get_control(void);
void set_control(unsigned value);
unsigned get_control(void) { return _mm_getcsr(); }
void set_control(unsigned value) { _mm_setcsr(value); }
"""
FLAGS, DEFAULT, FLUSH = 0x3F, 0x1F80, 0x8040
INVALID_OR_ZERO_DIVIDE = 0x05


@pytest.fixture(scope="module")
def control() -> ctypes.CDLL:
    """Reads and writes the processor's floating-point control and status."""
    return ctypes.CDLL(str(bind.compile_c({"control.c": FLOAT_ENVIRONMENT})))


@by_way("f32_small", "f16_small", "bf16_small")
def test_floating_point_state_is_left_alone(name, isa, group, control):
    """Control bits as before; for finite inputs no invalid operation and no division by zero, which
    some callers trap; and the error rule holds with subnormal numbers flushed too."""
    k = kernel(name)
    shapes = [
        Shape(
            lens_q=(3,),
            lens_kv=(n,),
            group=group,
            sparse_mode=3,
            lists=lists,
            list_length=20,
            seed=n,
            sinks=sinks,
        )
        for n in (0, 1, 2, 77, 200)
        for lists in ("none", "blocks")
        for sinks in ("none", "plain")
    ]
    for shape in shapes:
        case = make_case(k, shape)
        fill = dict.fromkeys(("query", "query_rope", "key", "key_rope"))
        case = case.changed(**{n: np.nan_to_num(getattr(case.args, n), nan=1.0) for n in fill})
        for mode in (DEFAULT, DEFAULT | FLUSH):
            outputs = case.outputs()
            fields = {
                **case.inputs(),
                **case.sizes(),
                **outputs,
                "isa": k.isas()[isa],
                "chunk_keys": 128,
            }
            plan, _ = k.plan(**fields)
            room = np.zeros(plan.split_bytes + 1, np.uint8)

            def call(fields=fields, room=room, mode=mode) -> tuple[int, int]:
                plan, result = k.plan(**fields, partials=room, partials_bytes=room.nbytes)
                assert result.ok
                workspace = np.zeros(plan.task_bytes, np.uint8)
                before, after = mode, 0
                control.set_control(mode)
                for i in range(plan.n_tasks):
                    k.task(plan, i, workspace)
                for i in range(plan.n_merges):
                    k.merge(plan, i)
                after = control.get_control()
                control.set_control(DEFAULT)
                return before, after

            before, after = call()
            assert before & ~FLAGS == after & ~FLAGS
            assert after & INVALID_OR_ZERO_DIVIDE == 0, (hex(after), shape)
            check(case.args, outputs, isa)
