"""Machines with addresses of 32 bits, and one with the bytes the other way round: the same results,
and sizes whose product no memory can hold are refused before anything is touched."""

import os

import helpers_every
import helpers_sizes
import helpers_wide
import pytest
from helpers import same_bits
from helpers_every import HEADERS, description
from helpers_runner import BY_TASK, FLUSH_LEFT, PARTIALS
from helpers_wide import HERE_64, MACHINES

ALL = os.environ.get("HEADLIGHT_WIDE") == "all"  # make wide: every header on every machine
CALLS, DRAWS = (40, 20000) if ALL else (10, 2000)

SPARSE = "hl_sparse_flash_attention_f32_d32_rope8"
DECODE = "hl_incre_flash_attention_f16_i8_d32"
FORWARD = "hl_fusion_attention_f32_d64_pse_types_softcap_sinks"
GRAD = "hl_fusion_attention_grad_f32_d64_pse_types_softcap"
RECORDS = "hl_sparse_flash_attention_antiquant_bf16_fp8_v4_d448_rope64_slots"
BF16 = "hl_incre_flash_attention_bf16_d576x512_stats"
# What `make test` runs: each operator, type of numbers and machine once.
SLICE = [
    (SPARSE, "i686"),
    (SPARSE, "s390x"),
    (DECODE, "i686-sse"),
    (DECODE, "s390x"),
    (FORWARD, "armv7"),
    (GRAD, "i686-gnu99"),
    (RECORDS, "s390x"),
    (BF16, "s390x"),
]
PAIRS = [(name, machine) for name in HEADERS for machine in MACHINES] if ALL else SLICE


@pytest.mark.parametrize("name,machine", PAIRS)
def test_any_call_on_another_machine(name, machine):
    """Between guard pages, in one go and by task; within the bounds, and where floats are floats
    (not x87's) bit by bit what this machine's plain C gives."""
    there = MACHINES[machine]
    modes = (0, BY_TASK | FLUSH_LEFT, BY_TASK | PARTIALS, FLUSH_LEFT)
    calls = [
        (call, modes[i % len(modes)]) for i, call in enumerate(helpers_every.calls(name, 23, CALLS))
    ]
    results = helpers_wide.play(there, name, calls)
    for (call, _), got in zip(calls, results, strict=True):
        call.check(got, "scalar")
        here = call.run("scalar") if there.exact else {}
        for output in here:
            assert same_bits(here[output], got[output]), f"{output} of {call}"


def test_bytes_the_wrong_way_round_are_noticed(monkeypatch):
    """The control: a little-endian machine's inputs on a big-endian one."""
    monkeypatch.setattr(helpers_wide, "there", lambda machine, call, field, array: array.tobytes())
    with pytest.raises(AssertionError):
        test_any_call_on_another_machine(SPARSE, "s390x")


ASKED = [(name, kind) for name in HEADERS for kind in helpers_sizes.kinds(name)]
ASKED_SLICE = {(name, m) for name in (SPARSE, DECODE, GRAD, RECORDS) for m in ("x86-64", "armv7")}
ASKED_SLICE |= {(FORWARD, "x86-64"), (DECODE, "i686"), (GRAD, "s390x")}


def machine_named(name):
    return HERE_64 if name == "x86-64" else MACHINES[name]


@pytest.mark.parametrize(
    "name,kind,machine",
    [
        (name, kind, machine)
        for name, kind in ASKED
        for machine in ("x86-64", "i686", "armv7", "s390x")
        if ALL or (name, machine) in ASKED_SLICE
    ],
)
def test_sizes_that_no_memory_holds_are_refused(name, kind, machine):
    """Sizes and strides of every order of magnitude, held against whole numbers without an end:
    what is accepted is in memory and apart, what is called too large is; no sum or product
    overflows on the way (undefined behaviour is trapped)."""
    accepted, large = helpers_sizes.hold(machine_named(machine), name, kind, 5, DRAWS)
    assert accepted >= DRAWS // 250 and large >= DRAWS // 20, (accepted, large)


CAPPED = "return b != 0 && a > UINT64_MAX / b ? UINT64_MAX : a * b;"


@pytest.mark.parametrize(
    "machine,product", [("x86-64", "return a * b;"), ("armv7", "return (uint32_t)(a * b);")]
)
@pytest.mark.parametrize("name", [SPARSE, DECODE, GRAD])
def test_products_that_wrap_are_noticed(name, machine, product):
    """The control: the header with products of 64 bits, or 32, that wrap."""
    text = helpers_every.text(name)
    assert text.count(CAPPED) == 1
    wrapping = text.replace(CAPPED, product)
    with pytest.raises(AssertionError):
        helpers_sizes.hold(machine_named(machine), name, "plan", 5, 4000, wrapping)


def test_dropout_bits_of_more_weights_than_numbers_were_taken_as_few():
    """Of 2^64 weights and more the bytes of dropout_mask were counted as 2^61."""
    k = helpers_every.kernel(FORWARD)
    sizes = {"batch": 1 << 30, "seq_q": 2, "seq_kv": 1 << 30, "heads_q": 8, "heads_kv": 8}
    strides = dict.fromkeys(("query_stride", "key_stride", "value_stride"), (1, 1, 1))
    tensors = dict.fromkeys(("query", "key", "value", "dropout_mask"), 1 << 20)
    outputs = {"attention_out": 1 << 62, "keep_prob": 0.5, "scale_value": 1.0}
    _, result = k.plan(**sizes, **strides, **tensors, **outputs)
    assert (result.status_name, result.argument) == ("HL_ERR_SHAPE", "DROPOUT_MASK"), result
    assert result.limit == 2**63 - 1


def test_lists_of_ends_beyond_memory_were_read_before_they_were_measured():
    """TND on 32 bits: a batch whose list of ends cannot be in memory is refused, not read."""
    armv7 = MACHINES["armv7"]
    k = helpers_every.kernel(FORWARD)
    fields = {"batch": 2**31 - 1, "input_layout": k.constants["HL_LAYOUT_TND"], "seq_q": 8}
    fields |= {"heads_q": 1, "heads_kv": 1, "scale_value": 1.0, "seq_kv": 8}
    fields |= dict.fromkeys(("actual_seq_qlen", "actual_seq_kvlen", "query", "key"), 1 << 20)
    asked = helpers_sizes.Asked(fields, [])
    (said,) = helpers_sizes.answers(armv7, FORWARD, "plan", [asked])
    wanted = [k.constants[f"HL_{n}"] for n in ("ERR_SHAPE", "ARG_ACTUAL_SEQ_QLEN")]
    assert list(said[:2]) == wanted and said[3:] == (8 * (2**31 - 1), 2**31 - 1)


def test_the_slice_has_every_operator_and_machine():
    assert {description(name).op for name, _ in SLICE} == {description(n).op for n in HEADERS}
    assert {machine for _, machine in SLICE} | {"armv7"} == set(MACHINES)
