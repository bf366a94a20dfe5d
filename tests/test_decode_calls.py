"""What incre_flash_attention does not do: accept what is wrong, touch what is not its own, look at
what does not matter, or depend on how it is called."""

import ctypes
import dataclasses
import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle_decode as oracle
import pytest
from helpers import WORDS_HERE, assert_same, same_bits
from helpers_cases import INT_MAX, INT_MIN, poison
from helpers_decode import (
    CODED,
    SMALL,
    SPECS,
    Case,
    Shape,
    Way,
    best_in,
    by_pair,
    check,
    execute,
    expected,
    fields_of,
    in_floats,
    isas_in,
    kernel,
    make_case,
    run,
    run_guarded,
    table,
    text,
    various,
)
from helpers_memory import LIBC, MAP_NORESERVE, Arena, Died, in_child, map_pages, view
from helpers_runner import QEMU, need_aarch64, play, program, record
from oracle import BSND, PA_BSND, TND
from oracle_decode import BNSD, BSH, PA_BNSD, TOKEN, by_row
from test_bad_input import OTHER_MACHINES_ISA, Bad, check_refused, ints, shape, with_entry
from test_memory import (
    DEFAULT,
    FLAGS,
    FLOAT_ENVIRONMENT,
    FLUSH,
    INVALID_OR_ZERO_DIVIDE,
    sanitized_environment,
)

from gen import bind, spec

ALL = tuple(SPECS)
LENGTHS = "actual_seq_lengths"

# ---- bad input ----------------------------------------------------------------------------------

DENSE = Shape(
    lens=(20, 9), seq_q=2, heads_kv=2, group=3, room=1, pse="each", mask="each", mask_rows=True
)
# name of the base -> kernel, call
BASES: dict[str, tuple[str, Shape]] = {
    "dense": ("f32_all", DENSE),
    "padded": ("f32_all", dataclasses.replace(DENSE, padding=1)),
    "paged": ("f32_all", dataclasses.replace(DENSE, layout_kv=PA_BSND, block_size=4)),
    "by_head": (
        "f32_all",
        dataclasses.replace(DENSE, layout_q=BNSD, layout_kv=PA_BNSD, block_size=4),
    ),
    "slots": ("f32_all", dataclasses.replace(DENSE, layout_kv=PA_BSND, block_size=4, slots=True)),
    "pages": ("f32_all", dataclasses.replace(DENSE, layout_kv=PA_BSND, block_size=4, pages=True)),
    "full": (
        "f32_all",
        dataclasses.replace(DENSE, sinks="plain", alibi=True, quant="channel", softcap=1.0),
    ),
    "none": ("f16_none", DENSE),
    "codes": ("bf16_i8", DENSE),
    "tokens": ("bf16_i8", dataclasses.replace(DENSE, antiquant=TOKEN)),
    "mixed": ("bf16_bf16xi8", DENSE),
    "nibbles": ("bf16_i4", DENSE),
}


def base(name: str) -> tuple[bind.Kernel, Case, dict[str, Any]]:
    """A call that is accepted: its kernel, its case and all its fields."""
    of, call = BASES[name]
    k = kernel(of)
    case = make_case(k, call)
    return k, case, {**fields_of(k, case), **case.outputs(stats=k.stats)}


def length(base_name: str, values: np.ndarray, at: int, rule: str, limit: int) -> Bad:
    return Bad(base_name, {LENGTHS: values}, "LENGTH", LENGTHS, rule, (at,), int(values[at]), limit)


def block_id(base_name: str, b: int, i: int, value: int, most: int) -> Bad:
    rule, limit = ("AT_LEAST", 0) if value < 0 else ("AT_MOST", most)
    change = with_entry("block_table", (b, i), value)
    return Bad(base_name, change, "BLOCK_ID", "block_table", rule, (b, i), value, limit)


def unsupported(base_name: str, argument: str, value: Any, rule: str = "NULL") -> Bad:
    return Bad(base_name, {argument: value}, "UNSUPPORTED", argument, rule)


def null(base_name: str, argument: str) -> Bad:
    return Bad(base_name, {argument: None}, "NULL", argument, "NOT_NULL")


def without_page(argument: str, at: int) -> Bad:
    """A page that is needed and not there; rows of the table have 7 entries."""

    def change(fields: dict[str, Any]) -> dict[str, Any]:
        pages = list(fields[argument])
        pages[at] = None
        return {argument: pages}

    return Bad("pages", change, "NULL", argument, "NOT_NULL", divmod(at, 7))


def moved(
    base_name: str,
    argument: str,
    to: str,
    status: str,
    rule: str,
    offset: int = 0,
    limit: int | None = None,
) -> Bad:
    """An argument where another one (or itself, some bytes on) lies."""

    def change(fields: dict[str, Any]) -> dict[str, Any]:
        return {argument: fields[to].ctypes.data + offset}

    return Bad(base_name, change, status, argument, rule, (), offset if limit else None, limit)


FLOATS, BYTES = np.zeros(4096, np.float32), np.zeros(4096, np.uint8)
TABLE = [
    # Required pointers, and those that go together.
    *(null("dense", n) for n in ("query", "key", "attention_out")),
    *(null("paged", n) for n in ("block_table", LENGTHS, "key")),
    *(null("pages", n) for n in (LENGTHS,)),
    *(null(b, "value") for b in ("none", "mixed")),
    *(null(b, "antiquant_scale") for b in ("codes", "tokens", "mixed")),
    null("full", "quant_scale2"),
    *(without_page(n, at) for n in ("key_pages", "value_pages") for at in (0, 4, 8)),
    # Pointers that must not be there.
    unsupported("dense", "block_table", np.zeros((2, 9), np.int32)),
    unsupported("dense", "key_pages", [BYTES] * 2),
    unsupported("dense", "value_pages", [BYTES] * 2),
    *(unsupported("pages", n, FLOATS) for n in ("key", "value")),
    unsupported("pages", "block_table", np.zeros((2, 7), np.int32)),
    *(unsupported("dense", n, FLOATS) for n in ("antiquant_scale", "antiquant_offset")),
    *(unsupported("nibbles", n, FLOATS) for n in ("antiquant_scale", "antiquant_offset")),
    *(unsupported("full", n, FLOATS) for n in ("dequant_scale1", "quant_scale1", "dequant_scale2")),
    # Features that a kernel does not have.
    *(
        unsupported("none", n, FLOATS)
        for n in ("alibi_slopes", "sinks", "softmax_max", "softmax_sum", "softmax_lse")
    ),
    *(unsupported("none", n, [BYTES] * 2) for n in ("key_pages", "value_pages")),
    unsupported("none", "window", 5),
    unsupported("none", "softcap", 1.0),
    unsupported("none", "index_kind", 1),
    unsupported("full", "out_f32", 1),
    unsupported("dense", "antiquant_mode", 1),
    # Sizes.
    *(
        shape("dense", n, v)
        for v in (-1, INT_MIN)
        for n in (
            "batch",
            "seq_q",
            "seq_kv",
            "heads_q",
            "heads_kv",
            "lengths",
            "pse_batch",
            "pse_width",
            "mask_batch",
            "mask_rows",
            "mask_width",
            "window",
            "chunk_keys",
        )
    ),
    *(shape("paged", n, -1) for n in ("num_blocks", "max_blocks")),
    *(shape("paged", "block_size", v, limit=1) for v in (0, -1, INT_MIN)),
    *(shape("dense", "seq_q", v, "AT_MOST", 16) for v in (17, INT_MAX)),
    Bad("dense", {"heads_kv": 4}, "SHAPE", "heads_q", "MULTIPLE_OF", (), 6, 4),
    Bad("dense", {"heads_kv": 7}, "SHAPE", "heads_q", "MULTIPLE_OF", (), 6, 7),
    *(shape("dense", "chunk_keys", v, "MULTIPLE_OF", 128) for v in (1, 127, 129, INT_MAX)),
    shape("paged", "max_blocks", INT_MAX, "AT_MOST", INT_MAX // 4),
    *(
        shape(b, n, v, "AT_MOST", most)
        for b, n, most in (
            ("dense", "inner_precise", 1),
            ("dense", "out_f32", 1),
            ("codes", "antiquant_f32", 1),
            ("codes", "antiquant_mode", 2),
            ("full", "quant_per_channel", 1),
            ("full", "quant_bf16", 1),
        )
        for v in (most + 1, INT_MAX)
    ),
    *(
        shape(b, n, -1)
        for b, n in (
            ("dense", "inner_precise"),
            ("dense", "out_f32"),
            ("codes", "antiquant_f32"),
            ("codes", "antiquant_mode"),
            ("full", "quant_per_channel"),
            ("full", "quant_bf16"),
        )
    ),
    # Shapes of the smaller tensors.
    Bad("dense", {"batch": 3, "lengths": 2}, "SHAPE", "lengths", "AT_LEAST", (), 2, 3),
    *(shape("dense", "pse_batch", v, "EQUAL", 2) for v in (3, INT_MAX)),
    *(shape("dense", "mask_batch", v, "EQUAL", 2) for v in (3, INT_MAX)),
    *(shape("dense", "mask_rows", v, "EQUAL", 2) for v in (3, INT_MAX)),
    *(shape("dense", f"{n}_width", v, "AT_LEAST", 20) for n in ("pse", "mask") for v in (1, 19)),
    *(shape("padded", f"{n}_width", 20, "AT_LEAST", 21) for n in ("pse", "mask")),
    # Sizes that together do not fit in memory.
    Bad(
        "dense",
        {
            "batch": INT_MAX,
            "seq_q": 16,
            "heads_q": 8388608,
            "heads_kv": 8388608,
            LENGTHS: None,
            "pse_shift": None,
            "pse_batch": 1,
            "atten_mask": None,
            "mask_batch": 1,
            "mask_rows": 1,
        },
        "SHAPE",
        "query",
        "ADDRESSABLE",
    ),
    Bad("dense", {"query_stride": (2**62, 0, 0)}, "SHAPE", "query", "ADDRESSABLE"),
    Bad("dense", {"key_stride": (0, 2**62, 0)}, "SHAPE", "key", "ADDRESSABLE"),
    # Strides.
    *(
        Bad("dense", {f"{n}_stride": s}, "SHAPE", f"{n}_stride", "AT_LEAST", (), -4, 0)
        for n in ("query", "key", "value", "out")
        for s in ((-4, 0, 0), (0, -4, 0), (0, 0, -4))
    ),
    Bad("dense", {"out_stride": (0, 0, 6)}, "SHAPE", "out_stride", "AT_LEAST", (), 6, 7),
    Bad("dense", {"out_stride": (0, 41, 0)}, "SHAPE", "out_stride", "AT_LEAST", (), 41, 42),
    Bad("dense", {"out_stride": (83, 0, 0)}, "SHAPE", "out_stride", "AT_LEAST", (), 83, 84),
    # Lengths.
    *(length("dense", ints(v, 9), 0, "AT_LEAST", 0) for v in (-1, INT_MIN)),
    *(length("dense", ints(20, v), 1, "AT_MOST", 21) for v in (22, INT_MAX)),
    *(length("paged", ints(20, v), 1, "AT_MOST", 28) for v in (29, INT_MAX)),
    *(length("slots", ints(20, v), 1, "AT_MOST", 22) for v in (23, INT_MAX)),
    *(length("pages", ints(v, 9), 0, "AT_LEAST", 0) for v in (-1, INT_MIN)),
    Bad(
        "dense",
        {LENGTHS: ints(-1), "lengths": 1},
        "LENGTH",
        LENGTHS,
        "AT_LEAST",
        (0,),
        -1,
        0,
    ),
    # Needed entries of the block table; there are 10 blocks of 4 tokens.
    *(
        block_id(b, i, j, v, 9)
        for b in ("paged", "by_head")
        for v in (-1, -2, INT_MIN, 10, 11, INT_MAX)
        for i, j in ((0, 4), (1, 0), (1, 2))
    ),
    *(
        block_id("slots", i, j, v, 39)
        for v in (-1, INT_MIN, 40, INT_MAX)
        for i, j in ((0, 19), (1, 0), (1, 8))
    ),
    # Numbers and options.
    *(
        Bad("dense", {"scale_value": v}, "VALUE", "scale_value", "FINITE")
        for v in (math.nan, math.inf, -math.inf)
    ),
    *(
        Bad("dense", {"softcap": v}, "VALUE", "softcap", "FINITE")
        for v in (math.nan, math.inf, -math.inf, -1.0)
    ),
    *(
        Bad("dense", {n: v}, "UNSUPPORTED", n, "GENERATED", (), v)
        for n, values in (
            ("layout_query", (TND, PA_BSND, PA_BNSD, 6, -1)),
            ("layout_kv", (TND, 6, -1)),
            ("index_kind", (2, -1)),
            ("isa", (OTHER_MACHINES_ISA, 5, 6, 31, 32, -1, INT_MAX, INT_MIN)),
        )
        for v in values
    ),
    *(
        Bad("dense", {"layout_kv": v}, "UNSUPPORTED", "layout_kv", "PAIRED", (), v, BSND)
        for v in (BSH, BNSD, PA_BNSD)
    ),
    Bad("paged", {"layout_kv": PA_BNSD}, "UNSUPPORTED", "layout_kv", "PAIRED", (), PA_BNSD, BSND),
    # Alignment: each tensor to its element, nothing more.
    *(
        moved("full", n, n, "ALIGN", "MULTIPLE_OF", o, 4)
        for o in (1, 2, 3)
        for n in (
            "query",
            "key",
            "value",
            "pse_shift",
            LENGTHS,
            "quant_scale2",
            "quant_offset2",
            "alibi_slopes",
            "sinks",
            "softmax_max",
            "softmax_sum",
            "softmax_lse",
        )
    ),
    *(
        moved(b, n, n, "ALIGN", "MULTIPLE_OF", 1, size)
        for b, n, size in (
            ("dense", "attention_out", 4),
            ("padded", "kv_padding_size", 4),
            ("paged", "block_table", 4),
            ("codes", "antiquant_scale", 4),
            ("codes", "antiquant_offset", 4),
        )
    ),
    # Outputs over anything else.
    *(
        moved(b, n, m, "ALIAS", "DISJOINT")
        for b, m in (
            ("dense", "query"),
            ("dense", "key"),
            ("dense", "value"),
            ("dense", "pse_shift"),
            ("dense", "atten_mask"),
            ("dense", LENGTHS),
            ("padded", "kv_padding_size"),
            ("paged", "block_table"),
            ("full", "sinks"),
            ("full", "alibi_slopes"),
            ("full", "quant_scale2"),
            ("full", "quant_offset2"),
            ("codes", "antiquant_scale"),
            ("codes", "antiquant_offset"),
        )
        for n in ("attention_out", "softmax_lse")
    ),
]


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_refused(bad):
    k, _, fields = base(bad.base)
    check_refused(k, fields, bad)


@pytest.mark.parametrize("name", BASES)
def test_the_bases_are_accepted(name):
    """The control: each call of the table is fine but for the one change."""
    k, case, fields = base(name)
    result = k.run(**fields)
    assert result.ok, result.error_text
    check(case.args, {n: fields[n] for n in case.outputs(stats=k.stats)}, best_in(BASES[name][0]))


def test_a_table_that_is_not_needed_is_not_asked_for():
    """Nor a cache, nor pages, where no batch has a key; nor anything where there is no batch."""
    for name in ("dense", "paged", "pages", "codes"):
        k, case, fields = base(name)
        gone = dict.fromkeys(("block_table", "key_pages", "value_pages"))
        none = {**fields, LENGTHS: ints(0, 0)}
        if name in ("dense", "codes"):
            none |= {"seq_kv": 0, "pse_width": 0, "mask_width": 0}
        if name == "paged":
            none |= {"num_blocks": 0}
        outputs = case.outputs(stats=k.stats)
        result = k.run(**{**none, **(gone if name == "paged" else {}), **outputs})
        assert result.ok, (name, result.error_text)
        assert not outputs["attention_out"].view(np.uint8).any()
        bare = {n: v for n, v in fields.items() if not isinstance(v, (np.ndarray, list))}
        result = k.run(**{**bare, "batch": 0, "pse_batch": 0, "mask_batch": 0, "lengths": 0})
        assert result.ok, (name, result.error_text)


def test_workspace_to_the_byte():
    k, _, fields = base("paged")
    need = k.workspace_bytes(**fields)
    plan, _ = k.plan(**fields)
    assert need > 0 and need == plan.task_bytes
    before = fields["attention_out"].tobytes()
    workspace = np.full(need, 0xFF, np.uint8)
    for capacity in (0, 1, need - 1):
        result = k.run(**fields, workspace=workspace, capacity=capacity)
        assert (result.status_name, result.argument) == ("HL_ERR_WORKSPACE", "WORKSPACE")
        assert (result.rule, result.value, result.limit) == ("AT_LEAST", capacity, need)
    result = k.run(**fields, workspace=None, capacity=need)
    assert (result.status_name, result.argument) == ("HL_ERR_NULL", "WORKSPACE")
    assert fields["attention_out"].tobytes() == before and (workspace == 0xFF).all()
    assert k.run(**fields, workspace=workspace, capacity=need).ok


def test_partials_to_the_byte():
    k, _, fields = base("dense")
    case = make_case(k, dataclasses.replace(DENSE, lens=(300, 9)))
    fields = {**fields_of(k, case), **case.outputs(), "chunk_keys": 128}
    plan, _ = k.plan(**fields)
    assert plan.chunks == 3 and plan.split_bytes > 0 and plan.n_merges == 0
    partials = np.full(plan.split_bytes, 0xFF, np.uint8)
    for held in (0, 1, plan.split_bytes - 1):
        _, result = k.plan(**fields, partials=partials, partials_bytes=held)
        assert (result.status_name, result.argument) == ("HL_ERR_WORKSPACE", "PARTIALS_BYTES")
        assert (result.value, result.limit) == (held, plan.split_bytes)
    split, result = k.plan(**fields, partials=partials, partials_bytes=plan.split_bytes)
    assert result.ok and split.n_merges > 0 and split.n_tasks > plan.n_tasks
    over = {**fields, "attention_out": partials.ctypes.data // 4 * 4 + 4}
    _, result = k.plan(**over, partials=partials, partials_bytes=plan.split_bytes)
    assert result.status_name == "HL_ERR_ALIAS"
    assert (partials == 0xFF).all()


def test_struct_fields_are_those_of_the_compiler():
    """Sizes and offsets against what C says, for the operator's structs."""
    header = bind.parse(text("f32_all"))
    made = bind.structures(header)
    lines = []
    for name in ("args", "plan", "parts"):
        struct = made[f"hl_incre_flash_attention_{name}"]
        of = f"hl_incre_flash_attention_{name}"
        lines.append(f'_Static_assert(sizeof({of}) == {ctypes.sizeof(struct)}, "{name}");')
        for field, *_ in struct._fields_:
            offset = getattr(struct, field).offset
            lines.append(f'_Static_assert(offsetof({of}, {field}) == {offset}, "{field}");')
    assert len(lines) > 80
    source = "\n".join(['#include "header.h"', *lines, ""])
    bind.compile_c({"header.h": header.text, "sizes.c": source})


# ---- the binding --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["BSND", "BSH", "BNSD", "PA_BSND", "PA_BNSD", "joined", "pages"])
def test_attend_reads_sizes_and_strides_from_arrays(layout):
    k = kernel("f32_all")
    rng = np.random.default_rng(3)

    def tensor(*shape_of: int) -> np.ndarray:
        """With a gap between heads, or rows."""
        return rng.standard_normal((*shape_of[:-1], 2 * shape_of[-1])).astype(np.float32)[
            ..., : shape_of[-1]
        ]

    query, key, value = tensor(2, 3, 4, 15), tensor(6, 8, 2, 15), tensor(6, 8, 2, 7)
    lens = ints(8, 5)
    a = oracle.Args(query=query, key=key[:2], value=value[:2], dk=15, dv=7, scale_value=0.3)
    a.actual_seq_lengths = lens
    fields: dict[str, Any] = {"query": query, "key": key[:2], "value": value[:2], LENGTHS: lens}
    if layout in ("BNSD", "PA_BNSD"):
        a.layout_query, a.layout_kv = BNSD, BNSD
        a.query, a.key, a.value = (by_row(x, BNSD) for x in (query, a.key, a.value))
        fields |= {"query": a.query, "key": a.key, "value": a.value, "layout_query": BNSD}
    if layout == "BSH":
        for name in ("query", "key", "value"):
            flat = fields[name].reshape(*fields[name].shape[:2], -1)
            fields[name] = np.concatenate([flat, flat], axis=-1)[..., : flat.shape[-1]]
    if layout in ("PA_BSND", "PA_BNSD", "joined", "pages"):
        a.block_table = ints(5, 1, 2, 3).reshape(2, 2)
        a.key, a.value, a.layout_kv = key, value, PA_BSND
        fields |= {"key": key, "value": value, "block_table": a.block_table}
    if layout == "PA_BNSD":
        a.key, a.value, a.layout_kv = by_row(key, PA_BNSD), by_row(value, PA_BNSD), PA_BNSD
        fields |= {"key": a.key, "value": a.value, "layout_kv": PA_BNSD}
    if layout == "joined":
        fields |= {"key": key.reshape(6, 8, 30), "value": value.reshape(6, 8, 14)}
    if layout == "pages":
        for name in ("key", "value"):
            pages = [page.copy() for page in fields.pop(name)]
            fields[f"{name}_pages"] = [[pages[5], pages[1]], [pages[2], None]]
        del fields["block_table"]
    got = k.attend(**fields, scale_value=0.3)
    want = oracle.incre_flash_attention(a)
    assert np.allclose(got.out.reshape(want.out.shape), want.out, atol=1e-6)
    assert got.out.shape == (2, 3, 28) if layout == "BSH" else got.out.shape == want.out.shape
    assert np.allclose(got.outputs["softmax_lse"], want.lse, atol=1e-5)


def test_attend_reads_options_from_arrays():
    k = kernel("bf16_i8")
    for quant in ("tensor", "channel"):
        for bf16 in (False, True):
            call = dataclasses.replace(
                DENSE, quant=quant, quant_bf16=bf16, antiquant_f32=bf16, mask_rows=bf16
            )
            case = make_case(k, call)
            given = {**case.inputs(), "scale_value": case.args.scale_value}
            got = k.attend(**given)
            assert got.out.dtype == np.int8
            assert (got.out == run(k, case)["attention_out"]).all()
    none = kernel("f16_none")
    case = make_case(none, DENSE)
    got = none.attend(**case.inputs(), scale_value=case.args.scale_value, out_f32=1)
    assert got.out.dtype == np.float32 and list(got.outputs) == ["attention_out"]


def test_another_prefix_and_name():
    small = {"isa": ["scalar"], "features": []}
    small |= {"prefix": "zz", "name": "zz_my_attention"}
    header = spec.parse_header({**table("f32_all"), **small})
    k = bind.load(header)
    assert (k.name, k.op, k.stats) == ("zz_my_attention", "zz_incre_flash_attention", False)
    k.formats = ("", "")
    case = make_case(k, Shape(lens=(9,), group=2))
    check(case.args, run(k, case), "scalar")


# ---- memory -------------------------------------------------------------------------------------


def test_a_kernel_that_reads_too_far_is_noticed():
    """The control for everything below: one more key, one more column than there is."""
    k = kernel("f32_all")
    case = make_case(k, Shape(lens=(9,), lengths="none", pse="one"))
    case.extra["seq_kv"] = case.extra["pse_width"] = 10
    with pytest.raises(Died):
        run_guarded(k, case, Way(WORDS_HERE[-1]))


@by_pair(*ALL)
@pytest.mark.parametrize("flush", ["left", "right"])
def test_every_number_of_keys_and_heads(name, isa, flush):
    """Both together from 0 (keys) and 1 (heads) past any tile, whatever lies beside the cache."""
    k = kernel(name)
    for n in (*range(0, 10), 15, 16, 17, 31, 33, 63, 65, 100):
        layout = (BSND, BNSD, PA_BSND, PA_BNSD)[n % 4]
        call = Shape(
            lens=(n,),
            seq_q=1 + n % 5,
            group=1 + n % 19,
            layout_q=BNSD if layout in (BNSD, PA_BNSD) else BSND,
            layout_kv=layout,
            block_size=1 + n % 7,
            pse="one" if n % 2 else "none",
            mask="one" if n % 3 else "none",
            mask_rows=n % 5 == 3,
            hidden=0.2,
            antiquant=n % 3,
            quant=("none", "channel", "none", "tensor")[n % 4],
            seed=n,
        )
        case = make_case(k, call)
        check(case.args, run_guarded(k, case, Way(isa, flush, strides=n % 6 == 5)), isa)


@by_pair("bf16_all", "bf16_i8")
def test_only_the_needed_table_entries_are_read(name, isa):
    """The table ends with the last entry that the last batch needs; so do pse and mask, which
    may be no wider than the keys."""
    k = kernel(name)
    for size in (1, 3, 16):
        for n in (0, 1, size, size + 1, 4 * size - 1):
            call = Shape(
                lens=(n + 1, n), layout_kv=PA_BSND, block_size=size, spare_blocks=3, seed=n
            )
            case = make_case(k, call)
            whole = case.args.block_table
            keep = whole.shape[1] + -(-n // size)
            with Arena("right") as arena:
                outputs = case.outputs(arena, k.stats)
                short = arena.place(whole.reshape(-1)[:keep].copy())
                arena.protect()
                fields = {**fields_of(k, case, isa), **outputs, "block_table": short}
                assert in_child(lambda f=fields: k.run(**f)).ok
                check(case.args, outputs, isa)


@by_pair("bf16_all")
def test_offsets_beyond_two_to_the_33_bytes(name, isa):
    """A cache of 16 GiB that is not there but for two blocks at its ends."""
    k = kernel(name)
    call = Shape(
        lens=(200,), layout_kv=PA_BSND, block_size=128, spare_blocks=0, value=False, seed=5
    )
    case = make_case(k, call)
    want = run(k, case, isa)
    row = 128 * k.dk * 2
    blocks = (1 << 34) // row
    memory = map_pages(blocks * row, mmap.PROT_READ | mmap.PROT_WRITE, MAP_NORESERVE)
    try:
        first, second = case.args.key[case.args.block_table[0]]
        view(memory + (blocks - 1) * row, first.shape, first.dtype)[...] = first
        view(memory, second.shape, second.dtype)[...] = second
        changes = {"key": memory, "num_blocks": blocks, "block_table": ints(blocks - 1, 0)}
        assert_same(run(k, case, isa, **changes), want)
        far = (1 << 33) // 2  # and the same with a stride of 2^32 elements between two blocks
        view(memory + far * 2, first.shape, first.dtype)[...] = first
        changes |= {"num_blocks": 2, "block_table": ints(1, 0), "key_stride": (far, 0, 0)}
        assert_same(run(k, case, isa, **changes), want)
    finally:
        LIBC.munmap(memory, blocks * row)


def check_played(name: str, command: Sequence[str], isas: Sequence[str], seed: int, **env) -> None:
    """Calls of all kinds in another program, against the oracle."""
    k = kernel(name)
    number = {isa: k.constants[f"HL_ISA_{isa.upper()}"] for isa in isas}
    made = [(make_case(k, call), way, isa) for call, way in various(name, seed, 40) for isa in isas]
    calls = [record(k, case, way, number[isa]) for case, way, isa in made]
    _, results = play(command, calls, **env)
    for (case, _, isa), got in zip(made, results, strict=True):
        check(case.args, got, isa)


@pytest.mark.parametrize("name", ["f32_all", "f16_e4m3xi4"])
def test_sanitizers(name):
    """Address and undefined-behaviour sanitizers, where every access is still there to be seen."""
    flags = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    built = program(text(name), kernel(name).name, compiler="gcc", flags=flags)
    check_played(name, (str(built),), WORDS_HERE, 9, env=sanitized_environment())


@pytest.mark.parametrize("name", ["f32_all", "bf16_i8", "f16_e4m3xi4"])
def test_on_another_processor(name):
    """NEON and scalar code on an emulated 64-bit Arm, between guard pages too."""
    need_aarch64()
    built = program(text(name), kernel(name).name)
    check_played(name, (*QEMU, str(built)), ("scalar", "neon"), 5)


@pytest.fixture(scope="module")
def control() -> ctypes.CDLL:
    """Reads and writes the processor's floating-point control and status."""
    return ctypes.CDLL(str(bind.compile_c({"control.c": FLOAT_ENVIRONMENT})))


@by_pair("f32_all", "bf16_all", "bf16_i8", "f16_e4m3xi4", "bf16_i4")
def test_floating_point_state_is_left_alone(name, isa, control):
    """Control bits as before; for finite inputs no invalid operation and no division by zero, which
    some callers trap; and results are right with subnormal numbers flushed too."""
    k = kernel(name)
    calls = [
        dataclasses.replace(call, spread="normal", sinks=call.sinks.replace("infinite", "plain"))
        for call, _ in various(name, 3, 12)
    ]
    for call in calls:
        case = make_case(k, call)
        known = expected(case.args)
        for mode in (DEFAULT, DEFAULT | FLUSH):
            outputs = case.outputs(stats=k.stats)
            fields = {**fields_of(k, case, isa), **outputs, "chunk_keys": 128}
            plan, _ = k.plan(**fields)
            room = np.zeros(plan.split_bytes + 1, np.uint8)
            plan, result = k.plan(**fields, partials=room, partials_bytes=room.nbytes)
            assert result.ok
            workspace = np.zeros(plan.task_bytes, np.uint8)
            control.set_control(mode)
            for i in range(plan.n_tasks):
                k.task(plan, i, workspace)
            for i in range(plan.n_merges):
                k.merge(plan, i)
            after = control.get_control()
            control.set_control(DEFAULT)
            assert mode & ~FLAGS == after & ~FLAGS
            assert after & INVALID_OR_ZERO_DIVIDE == 0, (hex(after), call)
            check(case.args, outputs, isa, known=known)


# ---- bytes that do not matter -------------------------------------------------------------------

LONG = Shape(
    lens=(500, 9, 0, 129),
    seq_q=3,
    heads_kv=2,
    group=3,
    layout_kv=PA_BSND,
    block_size=16,
    pse="each",
    mask="each",
    mask_rows=True,
    hidden=0.2,
    wider=9,
    antiquant=TOKEN,
    seed=17,
)


def differs(x: dict, y: dict) -> bool:
    return not all(same_bits(x[name], y[name]) for name in x)


@by_pair(*ALL)
def test_memory_that_no_row_sees(name, isa):
    """Other bytes in the place of NaN and 0xff, wherever nothing is a key of a batch."""
    k = kernel(name)
    for call in (LONG, dataclasses.replace(LONG, layout_kv=BSND, padding=5, room=3)):
        case = in_floats(make_case(k, call))
        want = run(k, case, isa)
        a = case.args
        for byte in (0x00, 0x3C):
            changes: dict[str, Any] = {"key": a.key.copy(), "value": a.value.copy()}
            seen = np.zeros(by_row(a.key, a.layout_kv).shape[:3], bool)
            for r in oracle.rows(a):
                seen.reshape(-1, a.heads_kv)[r.at, r.n2] = True
            assert not seen.all(), "nothing to hide"
            for tensor in ("key", "value"):
                other = poison((1,), changes[tensor].dtype)
                other.view(np.uint8)[...] = byte
                by_row(changes[tensor], a.layout_kv)[~seen] = other[0]
            for numbers in ("pse_shift", "antiquant_scale", "antiquant_offset"):
                old = getattr(a, numbers)
                if old is not None:
                    unread = np.isnan(old.astype(np.float32))
                    assert unread.any(), numbers
                    changes[numbers] = np.where(unread, old.dtype.type(byte), old)
            assert_same(run(k, case.changed(**changes), isa), want, byte)


@by_pair("f32_all", "bf16_all")
def test_a_query_of_nan_that_sees_nothing(name, isa):
    """Rows in front of the first key: no score, no NaN."""
    k = kernel(name)
    case = make_case(k, Shape(lens=(2,), seq_q=5, group=3, seed=1))
    want = run(k, case, isa)
    query = case.args.query.copy()
    query[:, :3] = np.nan
    assert_same(run(k, case.changed(query=query), isa), want)


@by_pair("bf16_all", "bf16_i8")
def test_what_the_workspace_held_before(name, isa):
    k = kernel(name)
    case = make_case(k, LONG)
    seen = []
    for byte in (0x00, 0xFF, 0x7F):
        fields, outputs = (
            {**fields_of(k, case, isa), "chunk_keys": 128},
            case.outputs(stats=k.stats),
        )
        plan, _ = k.plan(**fields, **outputs)
        partials = np.full(plan.split_bytes, byte, np.uint8)
        workspace = np.full(k.workspace_bytes(**fields, **outputs), byte, np.uint8)
        room = {"partials": partials, "partials_bytes": partials.nbytes}
        assert k.run(**fields, **outputs, **room, workspace=workspace).ok
        seen.append(outputs)
    for other in seen[1:]:
        assert_same(other, seen[0])


# ---- bits ---------------------------------------------------------------------------------------


@by_pair(*ALL)
def test_threads_task_order_and_partials(name, isa):
    k = kernel(name)
    case = in_floats(make_case(k, LONG))
    want = run(k, case, isa, chunk_keys=128)
    for workers in (1, 3, 8):
        for partials in (False, True):
            got = execute(k, case, isa, order=workers, workers=workers, partials=partials)
            assert_same(got, want, (workers, partials))
    assert differs(run(k, case, isa, chunk_keys=256), want), "the control did not change a bit"


def batches(case: Case, order: list[int]) -> Case:
    """The batches of a call in another order, or some of them, or some many times."""
    a = case.args
    changes = {}
    for name in ("query", "pse_shift", "atten_mask", "block_table", LENGTHS):
        changes[name] = getattr(a, name)[order].copy()
    for name in ("antiquant_scale", "antiquant_offset"):
        numbers = getattr(a, name)
        if numbers is not None:
            changes[name] = numbers.reshape(-1, a.batch, a.seq_kv)[:, order].reshape(-1)
    return case.changed(**changes, lengths=0)


@by_pair(*ALL)
def test_the_batch_around_a_row(name, isa):
    """One by one, turned round, and as one of 64."""
    k = kernel(name)
    case = in_floats(make_case(k, LONG))
    want = run(k, case, isa, chunk_keys=128)
    for order in ([0], [1], [2], [3], [3, 2, 1, 0], [1, 3] * 31 + [0, 2]):
        got = run(k, batches(case, order), isa, chunk_keys=128)
        assert_same(got, {n: x[order] for n, x in want.items()}, order)
    turned = batches(case, [0, 1, 2, 3])
    turned.args.atten_mask[...] ^= 1
    assert differs(run(k, turned, isa, chunk_keys=128), want), "the control did not change a bit"


@by_pair(*SMALL, *CODED)
def test_where_pages_lie(name, isa):
    """The same pages anywhere in a larger pool."""
    k = kernel(name)
    case = in_floats(make_case(k, LONG))
    want = run(k, case, isa)
    a = case.args
    place = np.random.default_rng(1).permutation(len(a.key) + 7)[: len(a.key)].astype(np.int32)
    used = (a.block_table >= 0) & (a.block_table < len(a.key))
    moved = np.where(used, place[np.where(used, a.block_table, 0)], INT_MAX).astype(np.int32)
    changes: dict[str, Any] = {"block_table": moved}
    for tensor in ("key", "value"):
        old = getattr(a, tensor)
        changes[tensor] = poison((len(old) + 7, *old.shape[1:]), old.dtype)
        changes[tensor][place] = old
    assert_same(run(k, case.changed(**changes), isa), want)


@by_pair(*ALL)
def test_alignment(name, isa):
    """Every buffer at other offsets that its elements allow."""
    k = kernel(name)
    call = dataclasses.replace(LONG, lens=(40, 9, 0, 129), quant="channel")
    case = make_case(k, call)
    want = run(k, case, isa, chunk_keys=128)
    for offset in (2, 4, 6, 10, 34, 62):
        outputs = {n: shifted(array, offset, 4) for n, array in case.outputs(stats=k.stats).items()}
        fields = {**fields_of(k, case, isa), **outputs, "chunk_keys": 128}
        for i, (name_of, array) in enumerate(case.inputs().items()):
            fields[name_of] = shifted(array, offset + i, array.itemsize)
        assert k.run(**fields).ok
        assert_same(outputs, want, offset)


def shifted(array: np.ndarray, offset: int, multiple: int) -> np.ndarray:
    """A copy that starts some bytes behind a 64-byte line."""
    offset = offset // multiple * multiple
    memory = np.empty(array.nbytes + 192, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("name", ["bf16_i8", "bf16_tails"])
@pytest.mark.parametrize("threads", [1, 3])
def test_openmp_changes_no_bit(name, threads):
    """The same header compiled with -fopenmp, long rows split over its threads; tiles belong to a
    thread each."""
    serial, isas = kernel(name), isas_in(name)
    case = make_case(serial, dataclasses.replace(LONG, pse="none"))
    want = {isa: run(serial, case, isa, chunk_keys=128) for isa in isas}
    parallel = bind.load(
        text(name),
        flags=("-O2", "-fopenmp"),
        extra="#include <omp.h>\nvoid set_threads(int n);\n"
        "void set_threads(int n) { omp_set_num_threads(n); }",
    )

    def calls() -> dict[str, dict[str, np.ndarray]]:
        parallel.library.set_threads(threads)
        return {isa: run(parallel, case, isa, chunk_keys=128) for isa in isas}

    got = in_child(calls)
    for isa in isas:
        assert_same(got[isa], want[isa])


# ---- one token after the other ------------------------------------------------------------------


@by_pair(*ALL)
def test_single_steps_are_one_causal_pass(name, isa):
    """33 tokens one by one, in drafts of 5, and in calls of 16 rows: the same numbers, and those
    of the dense causal matrix."""
    k = kernel(name)
    tokens = 33
    whole = make_case(k, Shape(lens=(tokens,), heads_kv=2, group=2, lengths="none", seed=7))
    query = np.random.default_rng(7).standard_normal((1, tokens, 4, k.dk)).astype(k.dtype)
    made = {}
    for at_once in (1, 5, 16):
        out = np.full((tokens, 4, k.dv), np.nan)
        for first in range(0, tokens, at_once):
            last = min(first + at_once, tokens)
            step = whole.changed(
                query=query[:, first:last].copy(),
                actual_seq_lengths=ints(last),
                key=behind(whole.args.key, last),
                value=behind(whole.args.value, last),
            )
            out[first:last] = run(k, step, isa)["attention_out"][0]
        made[at_once] = out
    dense = dataclasses.replace(whole.args, query=query)
    want = oracle.incre_flash_attention(dense).out[0]
    unit = {"float32": 2.0**-20, "float16": 2.0**-9, "bfloat16": 2.0**-6}[k.dtype.name]
    for out in made.values():
        assert abs(out - want).max() <= unit * abs(want).max()


def behind(tensor: np.ndarray, length: int) -> np.ndarray:
    """The cache before later tokens are there: 0xff behind the length."""
    made = poison(tensor.shape, tensor.dtype)
    made[:, :length] = tensor[:, :length]
    return made
