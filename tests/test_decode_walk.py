"""Some kv heads of a batch decoded in turn, which the one call does where a cache is large and a
token's heads lie side by side: the bits are those of the tasks one by one, however many heads take
turns.

Kernels of few channels have many heads here: what counts is the bytes of all of them.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from helpers import assert_same, same_bits
from helpers_cases import STATS
from helpers_decode import (
    SPECS,
    Case,
    Shape,
    Way,
    check,
    execute,
    fields_of,
    formats_of,
    in_floats,
    isas_in,
    kernel,
    make_case,
    prepared,
    run,
    run_guarded,
)
from oracle import BSND, PA_BSND
from oracle_decode import BNSD, BSH, PA_BNSD, TOKEN, stored_type, width

from gen import bind
from gen.isa import ISAS

LEAST = 1 << 20  # bytes of a batch's keys and values from which on heads take turns
MOST = 16  # heads that do
NAMES = ("bf16_heads", "f32_all", "bf16_mla", "bf16_i8", "f16_i8xe4m3", "f16_i4xf16")
BF16_NAMES = tuple(n for n in NAMES if SPECS[n]["dtype"] == "bf16" and formats_of(n) == ("", ""))


def all_of(*names: str) -> pytest.MarkDecorator:
    """Parametrises name and isa, words and tiles alike."""
    return pytest.mark.parametrize("name,isa", [(n, isa) for n in names for isa in isas_in(n)])


def row_bytes(name: str) -> int:
    """Of one head's key and value."""
    k = kernel(name)
    sides = zip(k.formats, (k.dk, k.dv), strict=True)
    return sum(width(kind, n) * stored_type(kind, k.dtype).itemsize for kind, n in sides)


def large(name: str, heads_kv: int, **more: Any) -> Shape:
    """A call whose cache is just large enough: one batch full, one that ends within a block, one
    with no key at all or fewer than rows."""
    n = max(math.ceil(LEAST / (row_bytes(name) * heads_kv)), 150)
    return Shape(**{"lens": (n, n - 37, 3), "heads_kv": heads_kv, "seed": n, **more})


def turns(k: bind.Kernel, case: Case, isa: str, **more: Any) -> tuple[int, int]:
    """How many heads take turns with the workspace that is asked for, and the bytes of one."""
    fields = {**fields_of(k, case, isa), **case.outputs(stats=k.stats), **more}
    plan, result = k.plan(**fields)
    assert result.ok, result.error_text
    need = k.workspace_bytes(**fields)
    assert need % plan.task_bytes == 0
    return need // plan.task_bytes, plan.task_bytes


def check_turns(name: str, isa: str, call: Shape, guarded: bool = False) -> None:
    """The one call, tasks in some order, partials, and less workspace: right, and the same bits."""
    k = kernel(name)
    case, known = prepared(name, call)
    case = case.changed() if call.quant != "none" else in_floats(case.changed())
    n, one = turns(k, case, isa, chunk_keys=128)
    assert n == min(call.heads_kv, MOST) > 1
    want = run(k, case, isa, chunk_keys=128)
    check(case.args, want, isa, known=known)
    assert_same(execute(k, case, isa, order=1), want, "tasks")
    if max(call.lens) > 128:
        assert_same(execute(k, case, isa, order=2, partials=True), want, "partials")
    for held in sorted({1, 3, n - 1}):
        room = np.full(held * one + one // 2, 0xFF, np.uint8)
        got = run(k, case, isa, chunk_keys=128, workspace=room)
        assert_same(got, want, f"{held} in turn")
    if guarded:
        assert_same(run_guarded(k, case, Way(isa, chunk_keys=128, strides=True)), want, "strides")
    whole = run(k, case, isa)
    check(case.args, whole, isa, known=known)
    assert_same(execute(k, case, isa, order=3, chunk_keys=0), whole, "one chunk")


@all_of(*NAMES)
@pytest.mark.parametrize("group,rows", [(1, 1), (2, 4), (3, 4), (1, 16), (2, 16)])
def test_heads_in_turn_are_heads_one_by_one(name, isa, group, rows):
    """More heads than take turns, up to 8 queries, 16 and more, rows whose own keys are in the last
    chunk or in the last two."""
    if name != "bf16_heads" and (group, rows) not in ((1, 1), (3, 4)):
        return
    check_turns(name, isa, large(name, MOST + 2, group=group, seq_q=rows), guarded=rows == 4)


@all_of("bf16_heads")
def test_many_query_heads_in_turn(name, isa):
    check_turns(name, isa, large(name, MOST + 1, group=17))


@all_of("bf16_heads")
@pytest.mark.parametrize("lens", [(128, 127, 0), (256, 255, 1), (257, 129, 16), (300, 272, 128)])
def test_lengths_about_a_block_and_a_chunk(name, isa, lens):
    for rows in (1, 3):
        check_turns(name, isa, Shape(lens=lens, heads_kv=9, seq_q=rows, seed=lens[0]))


@all_of("bf16_heads")
def test_one_key_more_than_blocks_in_turn(name, isa):
    """In one chunk: two blocks of tiles and one key, four of words."""
    k = kernel(name)
    for rows in (1, 2):
        case = make_case(k, Shape(lens=(512 + rows, 385, 257), heads_kv=3, seq_q=rows, seed=rows))
        case = in_floats(case)
        assert turns(k, case, isa, chunk_keys=1024)[0] == 3
        got = run(k, case, isa, chunk_keys=1024)
        check(case.args, got, isa)
        assert_same(execute(k, case, isa, chunk_keys=1024), got)


@all_of("bf16_heads", "f16_i8xe4m3", "bf16_mla")
def test_layouts_in_turn(name, isa):
    """Where heads lie side by side: BSND, BSH, blocks of either query; and left padding."""
    for layout_q, layout_kv, size in (
        (BSH, BSH, 16),
        (BSND, PA_BSND, 16),
        (BNSD, PA_BSND, 3),
        (BSH, PA_BSND, 128),
    ):
        how = {"layout_q": layout_q, "layout_kv": layout_kv, "block_size": size}
        call = large(name, MOST + 2, seq_q=2, **how, padding=5 if layout_kv == BSH else None)
        check_turns(name, isa, call, guarded=size == 3)


@all_of("f32_all")
def test_slots_and_pages_in_turn(name, isa):
    for how in ({"slots": True}, {"pages": True}):
        check_turns(name, isa, large(name, 24, layout_kv=PA_BSND, block_size=48, seq_q=2, **how))


@all_of(*BF16_NAMES)
def test_values_in_the_keys_in_turn(name, isa):
    check_turns(name, isa, large(name, 9, value=False, seq_q=2, group=3), guarded=True)


@all_of("bf16_heads", "f32_all", "bf16_i8", "f16_i8xe4m3")
def test_options_in_turn(name, isa):
    """Whatever a kernel has: bias, slopes, softcap, sinks, windows, numbers a token, codes."""
    has = SPECS[name].get("features", ())
    for rows, window in ((1, 100), (5, 60), (5, 140)):  # the last: own keys in front of common ones
        call = large(
            name,
            MOST + 1,
            seq_q=rows,
            group=3,
            pse="each",
            wider=3,
            window=window if "window" in has else 0,
            softcap=20.0 if "softcap" in has else 0.0,
            alibi="alibi" in has,
            sinks="plain" if "sinks" in has else "none",
            antiquant=TOKEN,
            quant="channel" if rows == 1 else "none",
        )
        check_turns(name, isa, call)


@all_of("bf16_heads")
def test_scores_that_grow_in_turn(name, isa):
    """Every head has a maximum of its own, raised in each block."""
    for spread in ("growing", "falling", "cancel", "huge"):
        for rows, group in ((1, 3), (4, 3), (11, 3)):
            lens = (600, 290)
            check_turns(name, isa, Shape(lens=lens, heads_kv=3, seq_q=rows, group=group,
                                         spread=spread, seed=rows))  # fmt: skip


@all_of("bf16_heads", "bf16_i8")
def test_each_head_has_its_own_numbers(name, isa):
    """A head's result does not depend on which others it takes turns with: the same as a call with
    that head alone, which has no turns."""
    k = kernel(name)
    case = in_floats(make_case(k, large(name, MOST + 2, seq_q=3, group=2, antiquant=TOKEN)))
    assert turns(k, case, isa)[0] == MOST
    want = run(k, case, isa)
    a = case.args
    for head in (0, 7, MOST - 1, MOST, MOST + 1):
        one = case.changed(
            query=a.query[:, :, 2 * head : 2 * head + 2].copy(),
            key=a.key[:, :, head : head + 1].copy(),
            value=a.value[:, :, head : head + 1].copy(),
        )
        assert turns(k, one, isa)[0] == 1
        got = run(k, one, isa)
        heads = slice(2 * head, 2 * head + 2)
        assert same_bits(got["attention_out"], want["attention_out"][:, :, heads].copy())
        for stat in STATS:
            assert same_bits(got[stat], want[stat][:, heads].copy())


@all_of("bf16_heads", "f32_all")
def test_nan_stays_with_its_head(name, isa):
    k = kernel(name)
    case = in_floats(make_case(k, large(name, MOST + 1, seq_q=3)))
    want = run(k, case, isa, chunk_keys=128)
    n = case.args.key.shape[1]
    for head, at in ((0, 0), (3, n - 1), (MOST - 1, n // 2), (MOST, n - 2)):
        key = case.args.key.copy()
        key[0, at, head, 1] = np.nan
        got = run(k, case.changed(key=key), isa, chunk_keys=128)["attention_out"]
        bad = np.isnan(got)
        first = max(at - (n - 3), 0)  # the row that is the first to see it
        assert bad[0, first:, head].all()
        bad[0, first:, head] = False
        assert not bad.any()
        kept = np.ones(got.shape[:3], bool)
        kept[0, first:, head] = False
        assert same_bits(got[kept], want["attention_out"][kept])


@all_of("bf16_heads")
def test_batches_of_their_own_and_the_batch_around(name, isa):
    """Each batch by itself, also one that alone would be too small to take turns."""
    k = kernel(name)
    case = in_floats(make_case(k, large(name, MOST + 1, lens=(150, 113, 9), seq_q=2)))
    want = run(k, case, isa, chunk_keys=128)
    a = case.args
    for b in range(3):
        n = int(a.actual_seq_lengths[b])
        change = {"lengths": 0, "actual_seq_lengths": None}
        tensors = {t: getattr(a, t)[b : b + 1, :n].copy() for t in ("key", "value")}
        one = case.changed(query=a.query[b : b + 1].copy(), **tensors, **change)
        assert turns(k, one, isa, chunk_keys=128)[0] == (1 if n == 9 else MOST)
        got = run(k, one, isa, chunk_keys=128)
        assert_same(got, {output: x[b : b + 1] for output, x in want.items()}, b)


@all_of("bf16_heads")
def test_what_the_workspace_held_before(name, isa):
    k = kernel(name)
    case = in_floats(make_case(k, large(name, MOST + 1, seq_q=3)))
    n, one = turns(k, case, isa, chunk_keys=128)
    want = run(k, case, isa, chunk_keys=128)
    for byte in (0x00, 0x7F, 0xFF):
        room = np.full(n * one, byte, np.uint8)
        assert_same(run(k, case, isa, chunk_keys=128, workspace=room), want, byte)


@all_of("bf16_heads")
def test_who_takes_no_turns(name, isa):
    """Small caches, those whose heads lie apart, masks, partials, one head: as many bytes of
    workspace as a task has."""
    k = kernel(name)
    call = large(name, 8)
    for changes, wanted in (
        ({}, 8),
        ({"heads_kv": 2, "lens": (600,)}, 2),
        ({"lens": (LEAST // (8 * row_bytes(name)), 9)}, 1),
        ({"lens": (LEAST // (8 * row_bytes(name)) + 1, 9)}, 8),
        ({"heads_kv": 1, "lens": (1200,)}, 1),
        ({"mask": "one", "hidden": 0.0}, 1),
        ({"layout_q": BNSD, "layout_kv": BNSD}, 1),
        ({"layout_q": BNSD, "layout_kv": PA_BNSD}, 1),
    ):
        case = make_case(k, dataclasses.replace(call, **changes))
        assert turns(k, case, isa)[0] == wanted, changes
    case = make_case(k, call)
    fields = {**fields_of(k, case, isa), **case.outputs(), "chunk_keys": 128}
    plan, _ = k.plan(**fields)
    partials = np.zeros(plan.split_bytes, np.uint8)
    room = {"partials": partials, "partials_bytes": partials.nbytes}
    assert turns(k, case, isa, chunk_keys=128, **room)[0] == 1


def test_both_words_and_tiles_are_here():
    """The control for everything above: on a machine with AVX-512 there are tiles among them."""
    kinds = {ISAS[isa].tiles for isa in isas_in("bf16_heads")}
    assert kinds == ({False, True} if "avx512" in isas_in("bf16_heads") else {False})
