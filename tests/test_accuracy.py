"""A slice of make accuracy: every shipped header on every instruction set here, each element within
the bound of docs/numerics.md and within what is likely; and a small error in 2^x, which the second
has to notice."""

import functools

import accuracy
import helpers_every as every
import numpy as np
import pytest

from gen import bind
from gen.isa import ISAS

KEYS = 300


@functools.cache
def some_calls(name: str) -> dict[str, every.Call]:
    """Spreads of two kinds: as float32, where all of the error is seen, and in the own type."""
    wanted = (f"normal {KEYS}", f"cancel {KEYS}")
    return {label: call for label, call in accuracy.calls(name, (KEYS,)) if label in wanted}


@every.by_pair()
def test_every_element_is_within_its_bound(name, isa):
    calls = some_calls(name)
    assert len(calls) == 2
    for label, call in calls.items():
        if ISAS[isa].tiles and label.startswith("cancel"):
            continue  # emulated: a second each
        for t in accuracy.measure(call, isa, label):
            assert t.worst <= 1.0 and t.likely_worst <= 1.0, t


@pytest.mark.parametrize("name", ["hl_sparse_flash_attention_f32_d64"])
def test_what_is_likely_is_no_empty_promise(name):
    """The error in the middle is more than a thousandth of it."""
    (out,) = (
        t
        for t in accuracy.measure(some_calls(name)[f"normal {KEYS}"], "scalar", "")
        if t.output == "out"
    )
    assert out.likely_middle > 1e-3, out


def test_an_error_in_the_fifth_digit_of_a_weight_is_noticed():
    """The control: a coefficient of 2^x that is off by 2e-5."""
    name = "hl_sparse_flash_attention_f32_d32_rope8"
    text = every.text(name)
    wrong = text.replace("6.93147182e-1f", "6.93161045e-1f")
    assert wrong != text
    call = some_calls(name)[f"normal {KEYS}"]
    kernel = bind.load(wrong, flags=("-O0",))
    (out,) = (t for t in accuracy.measure(call, "scalar", "", kernel) if t.output == "out")
    assert out.likely_worst > 1.0, out
    assert np.isfinite(out.worst)
