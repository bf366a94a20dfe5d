"""fusion_attention_grad against its oracle, behind calls of the forward kernel: every layout, mode,
bias and option; what has to hold between two calls, what is refused, what is not touched."""

import ctypes
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle_fusion as oracle
import pytest
from helpers import ISAS_HERE, WORDS_HERE, same_bits
from helpers_cases import INT_MAX
from helpers_fusion import (
    FORWARD,
    GRAD_SPECS,
    LAYOUTS,
    WAYS,
    GradCase,
    Shape,
    Way,
    best_in,
    by_pair,
    check_grad,
    check_grads,
    expected_grads,
    grad_fields,
    grad_rows,
    has,
    isas_in,
    kernel,
    make_grad_case,
    prepared_grad,
    rows_of,
    run,
    run_grad,
    run_grad_guarded,
    shapes,
    table,
    text,
    various,
)
from helpers_memory import Died, in_child
from helpers_runner import BY_TASK, FLUSH_LEFT, QEMU, need_aarch64, packed, play, program
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BSND, TND
from oracle_fusion import BNSD, INNER, OUTER, SBH, SLOPE, SLOPE_SQRT, flat, spans_of, unflat
from test_bad_input import Bad, check_refused, shape
from test_fusion_calls import finite, longs, moved, null
from test_memory import (
    DEFAULT,
    FLAGS,
    FLOAT_ENVIRONMENT,
    FLUSH,
    INVALID_OR_ZERO_DIVIDE,
    sanitized_environment,
)

from gen import bind, spec
from gen.isa import ISAS
from gen.train import BLOCK, QUERIES

ALL = tuple(GRAD_SPECS)
GRADS = ("dquery", "dkey", "dvalue")
PLAIN = Shape(
    lens_q=(110, 110), lens_kv=(130, 130), heads_kv=2, group=2, mode=3, mask="formula", seed=12
)
LONG = Shape(
    lens_q=(160, 0, 37, 20),
    lens_kv=(130, 3, 40, 220),
    heads_kv=2,
    group=2,
    layout=TND,
    mode=3,
    mask="formula",
    pse="full",
    keep_prob=0.8,
    pad_q=2,
    pad_kv=3,
    unused=1,
    seed=17,
)


def some(shape_of: Shape, **changes: object) -> Shape:
    return dataclasses.replace(shape_of, **changes)


def assert_same(x: dict, y: dict, what: object = "") -> None:
    """Every output equal in every bit."""
    assert x.keys() == y.keys()
    for name in x:
        assert same_bits(x[name], y[name]), f"{name} {what}"


def changed(grad: GradCase, **changes: Any) -> GradCase:
    """The same call with some of the oracle's arguments replaced, and no other forward call."""
    return dataclasses.replace(grad, case=grad.case.changed(**changes))


def check_guarded(name: str, shape_of: Shape, way: Way) -> None:
    """One call between guard pages against the oracle."""
    grad, known = prepared_grad(name, shape_of)
    check_grads(grad, run_grad_guarded(kernel(name), grad, way), way.isa, known)


def test_every_instruction_set_is_present():
    for name in ALL:
        k = kernel(name)
        assert tuple(k.isas()) == isas_in(name) and k.grads and not k.stats
        assert set(isas_in(name)) >= {isa for isa in ISAS_HERE if not ISAS[isa].tiles}


@by_pair(*ALL)
@settings(max_examples=20)
@given(data=st.data())
def test_any_call(name, isa, data):
    """Any two of its axes meet, between guard pages."""
    drawn = data.draw(shapes(FORWARD[name]))
    check_guarded(name, drawn, dataclasses.replace(data.draw(WAYS), isa=isa))


# ---- against the oracle -------------------------------------------------------------------------


@by_pair(*ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(name, isa, layout):
    call = some(PLAIN, lens_q=(21,) * 3, lens_kv=(37,) * 3, layout=layout, pse="full", seed=layout)
    if layout == TND:
        call = some(call, lens_q=(21, 0, 5), lens_kv=(37, 8, 0), pad_q=3, pad_kv=2, unused=2)
    check_guarded(name, call, Way(isa))
    check_guarded(name, call, Way(isa, "left", strides=True, by_task=True))


@by_pair(*ALL)
def test_every_number_of_queries_and_keys(name, isa):
    """From none to past the edges of tasks and blocks, with one head and with three."""
    k = kernel(name)
    plan, _ = k.plan(**grad_fields(k, *small_call(name)), **small_call(name)[0].outputs())
    sizes = {BLOCK, QUERIES, plan.queries, plan.keys}
    edges = sorted({n + more for n in sizes for more in (-1, 0, 1)})
    for n in (*range(0, 10), 15, 17, 31, 33, *edges):
        for m, group, mode in ((n, 1, 3), (7, 3, 1), (n + 5, 1, 2)):
            call = Shape(lens_q=(n,), lens_kv=(m,), group=group, mode=mode, mask="formula", seed=n)
            check_grad(name, call, isa)
        check_grad(name, Shape(lens_q=(5,), lens_kv=(n,), group=2, seed=n), isa)


def small_call(name: str) -> tuple[GradCase]:
    return (prepared_grad(name, Shape())[0],)


@by_pair(*ALL)
def test_any_number_of_heads(name, isa):
    """Whose gradients add up in the keys that they share."""
    for heads_kv, group in ((1, 1), (1, 7), (1, 16), (1, 33), (2, 5), (3, 3), (8, 1)):
        call = Shape(lens_q=(9,), lens_kv=(19,), heads_kv=heads_kv, group=group, seed=group)
        check_grad(name, call, isa)


@by_pair(*ALL)
@pytest.mark.parametrize("mode", range(9))
def test_every_mode(name, isa, mode):
    """More queries than keys and fewer, by formula and by the mask that the mode wants."""
    layout = TND if mode > 6 else BNSD if mode == 5 else (TND, SBH)[mode % 2]
    for lens_q, lens_kv in (((30, 30), (41, 41)), ((41, 41), (30, 30))):
        for mask in ("formula", "given"):
            call = Shape(
                lens_q=lens_q,
                lens_kv=lens_kv,
                group=2,
                layout=layout,
                mode=mode,
                mask=mask,
                band=(12, 4),
                hidden=0.2,
                mask_batch=layout != TND,
                mask_heads=layout != TND,
                seed=mode,
            )
            check_grad(name, call, isa)


@by_pair("f32_grad", "bf16_grad")
def test_bands_of_any_sign(name, isa):
    """Which leave rows without keys, keys without rows, or all of both."""
    for mode in (0, 4):
        for band in ((3, 2), (9, -3), (-3, 7), (-4, -4), (2**62, -(2**62)), (1, 2**62)):
            for lens_q, lens_kv in (((20,), (33,)), ((33,), (20,)), ((150,), (130,))):
                call = Shape(lens_q=lens_q, lens_kv=lens_kv, mode=mode, mask="formula", band=band)
                check_grad(name, call, isa)


@by_pair(*ALL)
@pytest.mark.parametrize("layout", [BSND, TND])
def test_bias_and_its_gradient(name, isa, layout):
    """Every type and shape; a gradient where each batch has a bias for each pair."""
    kinds = (INNER, OUTER) if has(name, "pse_types") else (INNER,)
    base = some(PLAIN, lens_q=(13, 13), lens_kv=(21, 21), layout=layout)
    for kind in kinds:
        for pse in ("full", "one_row"):
            grad = check_grad(name, some(base, pse=pse, pse_type=kind), isa)
            assert ("dpse" in grad.outputs()) == (pse == "full")
    if layout == BSND:
        grad = check_grad(name, some(base, pse="full", pse_each=False), isa)
        assert "dpse" not in grad.outputs()
    if has(name, "pse_types"):
        for kind in (SLOPE, SLOPE_SQRT):
            check_grad(name, some(base, pse="slope", pse_type=kind, starts=(5, 40)), isa)


@by_pair(*ALL)
def test_a_bias_that_is_hidden_has_no_gradient(name, isa):
    """0 in every bit, whether a formula hides it or bytes, and whole blocks of it."""
    k = kernel(name)
    for mode, mask, band in ((2, "formula", None), (4, "formula", (9, 0)), (1, "given", None)):
        call = Shape(
            lens_q=(150,), lens_kv=(230,), mode=mode, mask=mask, band=band, hidden=0.9, pse="full"
        )
        grad, _ = prepared_grad(name, call)
        got = run_grad(k, grad, isa)["dpse"][0, 0]
        seen = next(oracle.parts(grad.case.args)).seen
        assert not got[~seen].view(np.uint8).any() and got[seen].astype(np.float32).any()


@by_pair("f32_grad")
def test_the_last_rows_of_a_bias_stand_for_all(name, isa):
    call = Shape(lens_q=(1040,), lens_kv=(1040,), pse="last_rows", mode=2, mask="formula")
    check_grad(name, call, isa)


@by_pair("f32_grad", "bf16_grad")
def test_softcap(name, isa):
    for cap in (0.01, 0.5, 30.0, 1e6):
        for spread in ("normal", "huge"):
            for pse in ("none", "full"):
                call = some(PLAIN, lens_q=(9, 9), lens_kv=(40, 40), softcap=cap, pse=pse)
                check_grad(name, some(call, spread=spread), isa)


@by_pair(*ALL)
@pytest.mark.parametrize("layout", [BSND, SBH, TND])
def test_dropout(name, isa, layout):
    """The generator's bits and given ones."""
    for bits in (False, True):
        for share in (0.9, 0.25, 1.0):
            call = some(PLAIN, lens_q=(17, 17), lens_kv=(150, 150), layout=layout)
            check_grad(name, some(call, keep_prob=share, bits=bits, pse="full"), isa)


@by_pair("f32_grad", "bf16_grad")
def test_sinks_are_in_the_statistics(name, isa):
    """Of the forward call: the backward one need not know of them."""
    for sinks in ("plain", "infinite"):
        check_grad(name, some(PLAIN, lens_q=(40, 40), lens_kv=(30, 30), sinks=sinks), isa)


@by_pair(*ALL)
@pytest.mark.parametrize("spread", ["normal", "flat", "growing"])
def test_the_error_rule(name, isa, spread):
    """Many elements, realistic scores: at most twice the plain implementation's error."""
    call = some(PLAIN, lens_q=(200, 200), lens_kv=(230, 230), pse="full", spread=spread)
    check_grad(name, call, isa, strict=spread != "growing")


@by_pair("f32_grad")
def test_relative_error_in_float32(name, isa):
    grad, known = prepared_grad(name, some(PLAIN, lens_q=(200,), lens_kv=(200,), pse="full"))
    for of, x in grad_rows(grad.case.args, run_grad(kernel(name), grad, isa)).items():
        exact = getattr(known.want, of)
        assert np.linalg.norm(x - exact) <= 2e-6 * np.linalg.norm(exact), of


@pytest.mark.skipif("amx" not in ISAS_HERE, reason="the forward kernel has tiles on x86 only")
def test_behind_a_forward_call_on_tiles():
    """Whose output has been summed over rounded weights."""
    grad = make_grad_case("bf16_grad", PLAIN, "amx")
    want = expected_grads(grad).want
    for of, x in grad_rows(grad.case.args, run_grad(kernel("bf16_grad"), grad)).items():
        exact = getattr(want, of)
        assert np.linalg.norm(x - exact) <= 0.02 * np.linalg.norm(exact), of


# ---- what has no gradient -----------------------------------------------------------------------


@by_pair(*ALL)
def test_rows_and_keys_without_each_other_are_zero_in_every_bit(name, isa):
    """Rows without keys, keys without rows, batches without either, what lies behind the ends."""
    k = kernel(name)
    for call in (
        Shape(lens_q=(150,), lens_kv=(30,), group=2, mode=3, mask="formula"),
        Shape(lens_q=(30,), lens_kv=(250,), group=2, mode=2, mask="formula"),
        Shape(lens_q=(30,), lens_kv=(40,), mode=1, mask="given", hidden=1.1),
        Shape(lens_q=(30,), lens_kv=(40,), mode=4, mask="formula", band=(30, -20)),
        Shape(lens_q=(5, 0, 4), lens_kv=(0, 5, 3), layout=TND, pad_q=150, pad_kv=160, unused=1),
        Shape(lens_q=(5, 4), lens_kv=(6, 3), layout=TND, pad_q=3, sinks="plain")
        if has(FORWARD[name], "sinks")
        else Shape(lens_q=(4,), lens_kv=(0,)),
    ):
        grad, known = prepared_grad(name, call)
        got = run_grad(k, grad, isa)
        check_grads(grad, got, isa, known)
        a, rows = grad.case.args, grad_rows(grad.case.args, got)
        q_alone = np.ones(rows["dquery"].shape[:2], bool)
        k_alone = np.ones(rows["dkey"].shape[:2], bool)
        for p in oracle.parts(a):
            q_alone[p.rows, p.h] = ~p.seen.any(axis=1)
            k_alone[p.keys, p.n2] &= ~p.seen.any(axis=0)
        for of, alone in (("dquery", q_alone), ("dkey", k_alone), ("dvalue", k_alone)):
            left = np.ascontiguousarray(rows[of][alone])
            assert not left.astype(np.float32).any(), of
        assert q_alone.any() or k_alone.any()


@by_pair(*ALL)
def test_outputs_that_are_not_wanted(name, isa):
    """Any of them may be NULL; the others keep their bits, and nothing else is written."""
    k = kernel(name)
    grad, _ = prepared_grad(name, LONG)
    want = run_grad(k, grad, isa)
    assert set(want) == {*GRADS, "dpse"}
    for bits in range(16):
        missing = [n for i, n in enumerate(want) if bits >> i & 1]
        got = run_grad(k, grad, isa, **dict.fromkeys(missing))
        for n in missing:
            assert (got.pop(n).view(np.uint8) == 0xFF).all()
        assert all(same_bits(got[n], want[n]) for n in got), missing
    fields = {**grad_fields(k, grad, isa), **dict.fromkeys(want)}
    plan, result = k.plan(**fields)
    assert result.ok and plan.n_tasks == 0 and k.run(**fields).ok


# ---- bits ---------------------------------------------------------------------------------------


def execute(k: bind.Kernel, grad: GradCase, isa: str, order: int, workers: int) -> dict:
    """plan, and its tasks in an order (a seed) on some threads."""
    outputs = grad.outputs()
    plan, result = k.plan(**grad_fields(k, grad, isa), **outputs)
    assert result.ok, result.error_text
    k.execute(plan, np.random.default_rng(order).permutation(plan.n_tasks).tolist(), workers)
    return outputs


def in_floats(grad: GradCase) -> GradCase:
    """The call with its gradients as they are before rounding. The forward call is made already."""
    made = changed(grad)
    made.case.extra["out_f32"] = 1
    return made


@by_pair(*ALL)
def test_threads_and_the_order_of_tasks(name, isa):
    k = kernel(name)
    grad = in_floats(prepared_grad(name, LONG)[0])
    want = run_grad(k, grad, isa)
    for workers in (1, 3, 8):
        assert_same(execute(k, grad, isa, workers, workers), want, workers)
    other = changed(grad, dropout_offset=grad.case.args.dropout_offset ^ 1)
    got = run_grad(k, other, isa)
    assert not same_bits(got["dquery"], want["dquery"]), "the control did not change a bit"


@pytest.mark.parametrize("threads", [1, 3])
def test_openmp_changes_no_bit(threads):
    name = "bf16_grad"
    serial, isas = kernel(name), isas_in(name)
    grad, _ = prepared_grad(name, LONG)
    want = {isa: run_grad(serial, grad, isa) for isa in isas}
    parallel = bind.load(
        text(name),
        flags=("-O2", "-fopenmp"),
        extra="#include <omp.h>\nvoid set_threads(int n);\n"
        "void set_threads(int n) { omp_set_num_threads(n); }",
    )

    def calls() -> dict[str, dict[str, np.ndarray]]:
        parallel.library.set_threads(threads)
        return {isa: run_grad(parallel, grad, isa) for isa in isas}

    got = in_child(calls)
    for isa in isas:
        assert_same(got[isa], want[isa])


@by_pair(*ALL)
def test_what_the_workspace_held_before(name, isa):
    k = kernel(name)
    grad, _ = prepared_grad(name, LONG)
    want = run_grad(k, grad, isa)
    need = k.workspace_bytes(**grad_fields(k, grad, isa), **grad.outputs())
    for byte in (0x00, 0xFF, 0x7F):
        workspace = np.full(need + 1, byte, np.uint8)[1:]
        assert_same(run_grad(k, grad, isa, workspace=workspace), want, byte)


@by_pair(*ALL)
def test_layouts_only_change_addresses(name, isa):
    """With a mask, a bias and dropout: the same bits, in every place."""
    k = kernel(name)
    base = in_floats(prepared_grad(name, some(PLAIN, pse="full", keep_prob=0.8))[0])
    a = base.case.args
    want = grad_rows(a, run_grad(k, base, isa))
    for layout in LAYOUTS:
        tnd = layout == TND
        tensors = {n: unflat(flat(getattr(a, n), BSND), layout, 2) for n in ("query", "key")}
        ends = {"actual_seq_qlen": longs(110, 220), "actual_seq_kvlen": longs(130, 260)}
        other = changed(
            base,
            **tensors,
            value=unflat(flat(a.value, BSND), layout, 2),
            input_layout=layout,
            pse=a.pse.reshape(-1) if tnd else a.pse,
            **(ends if tnd else {}),
        )
        forward = {"attention_out": base.forward["attention_out"]}
        forward = {n: unflat(flat(x, BSND), layout, 2) for n, x in forward.items()}
        for stat in ("softmax_max", "softmax_sum"):
            x = base.forward[stat]
            forward[stat] = np.ascontiguousarray(x.swapaxes(1, 2)).reshape(220, 4, 8) if tnd else x
        other.forward, other.dout = forward, unflat(flat(base.dout, BSND), layout, 2)
        assert_same(grad_rows(other.case.args, run_grad(k, other, isa)), want, layout)


@by_pair(*ALL)
def test_statistics_eight_times_or_once_and_in_both_orders(name, isa):
    k = kernel(name)
    want = None
    for width in (8, 1):
        for order in (0, 1):
            grad = make_grad_case(name, some(LONG, stats_width=width, stats_order=order))
            for stat in ("softmax_max", "softmax_sum"):
                grad.forward[stat][..., 1:] = np.nan  # the first of the eight is read
            got = run_grad(k, grad, isa)
            want = want or got
            assert_same(got, want, (width, order))


@by_pair(*ALL)
def test_gradients_in_floats(name, isa):
    """Not rounded to the query's type; rounded they are what is returned otherwise."""
    k = kernel(name)
    grad, known = prepared_grad(name, LONG)
    want, wide = run_grad(k, grad, isa), run_grad(k, in_floats(grad), isa)
    check_grads(grad, wide, isa, known)
    for of, x in wide.items():
        assert x.dtype == np.float32 and same_bits(x.astype(grad.case.dtype), want[of])


@by_pair(*ALL)
def test_the_batches_around_a_batch(name, isa):
    """Each by itself, without dropout, which counts batches."""
    k = kernel(name)
    grad = in_floats(prepared_grad(name, some(LONG, keep_prob=0.0))[0])
    a, want = grad.case.args, run_grad(k, grad, isa)
    at = 0
    for q, sq, kv, skv in spans_of(a)[:4]:
        n = a.heads_q * sq * skv
        rows, keys = slice(q, q + sq), slice(kv, kv + skv)
        one = changed(
            grad,
            query=a.query[rows],
            key=a.key[keys],
            value=a.value[keys],
            pse=a.pse[at : at + n],
            actual_seq_qlen=longs(sq),
            actual_seq_kvlen=longs(skv),
        )
        one.forward = {name_of: x[rows] for name_of, x in grad.forward.items() if x.ndim > 1}
        one.dout = grad.dout[rows]
        got = run_grad(k, one, isa)
        mine = {"dquery": want["dquery"][rows], "dkey": want["dkey"][keys]}
        mine |= {"dvalue": want["dvalue"][keys], "dpse": want["dpse"][at : at + n]}
        assert_same(got, mine, q)
        at += n


@by_pair(*ALL)
def test_gqa_is_repeated_heads(name, isa):
    """Whose gradients of keys are added; those of queries are the same bits."""
    k = kernel(name)
    grad = in_floats(prepared_grad(name, PLAIN)[0])
    a = grad.case.args
    repeated = {n: np.repeat(getattr(a, n), 2, axis=-2) for n in ("key", "value")}
    got, each = run_grad(k, grad, isa), run_grad(k, changed(grad, **repeated), isa)
    assert same_bits(got["dquery"], each["dquery"])
    for of in ("dkey", "dvalue"):
        b, s, n, c = got[of].shape
        added = each[of].reshape(b, s, n, 2, c).sum(axis=3)
        assert np.allclose(got[of], added, rtol=1e-5, atol=1e-5 * abs(added).max())


@by_pair(*ALL)
def test_the_generators_bits_as_a_mask(name, isa):
    k = kernel(name)
    grad = in_floats(prepared_grad(name, some(LONG, keep_prob=0.6))[0])
    bits = oracle.generated_mask(grad.case.args)
    assert_same(run_grad(k, changed(grad, dropout_mask=bits), isa), run_grad(k, grad, isa))


@by_pair(*ALL)
def test_gradients_are_linear_in_dout(name, isa):
    """A power of two more of it changes no digit; nothing of it is nothing."""
    k = kernel(name)
    grad, _ = prepared_grad(name, PLAIN)
    want = run_grad(k, grad, isa, out_f32=0)
    double = run_grad(k, dataclasses.replace(grad, dout=2 * grad.dout), isa)
    none = run_grad(k, dataclasses.replace(grad, dout=0 * grad.dout), isa)
    for of in GRADS:
        if grad.case.dtype != np.float16:  # whose small numbers have fewer digits
            assert same_bits(double[of], 2 * want[of]), of
        assert not none[of].astype(np.float32).any(), of


@by_pair(*ALL)
def test_long_sequences_in_two_calls(name, isa):
    """Modes 7 and 8, forward and backward, as the document cuts queries: dquery in the same bits,
    the shares of dkey and dvalue add up."""
    k = kernel(name)
    for mode, cut in ((3, 70), (2, 50)):
        call = Shape(lens_q=(20, 120), lens_kv=(30, 140), group=2, layout=TND, mode=mode)
        call = some(call, mask="formula", heads_kv=2)
        whole = in_floats(prepared_grad(name, call)[0])
        a, want = whole.case.args, run_grad(k, whole, isa)
        one = part(whole, slice(0, 20 + cut), slice(0, 170), [20, cut], [30, 140])
        two = part(whole, slice(20 + cut, 140), slice(30, 170), [120 - cut], [140])
        band = {"band": 1, "pre_tokens": 140}
        if mode == 3:
            one = changed(one, sparse_mode=7, next_tokens=cut - 120, **band)
        else:
            two = changed(two, sparse_mode=8, next_tokens=cut - (140 - (120 - cut)), **band)
        got = [run_grad(k, x, isa) for x in (one, two)]
        assert same_bits(np.concatenate([x["dquery"] for x in got]), want["dquery"]), mode
        for of in ("dkey", "dvalue"):
            added = got[0][of].copy()
            added[30:] += got[1][of]
            assert np.allclose(added, want[of], rtol=1e-5, atol=1e-5 * abs(want[of]).max())
        assert a.sparse_mode == mode


def part(grad: GradCase, q: slice, kv: slice, lens_q: list, lens_kv: list) -> GradCase:
    """Some rows of a TND call, and of keys, as a call of their own."""
    a = grad.case.args
    made = changed(
        grad,
        query=a.query[q].copy(),
        key=a.key[kv].copy(),
        value=a.value[kv].copy(),
        actual_seq_qlen=np.cumsum(lens_q),
        actual_seq_kvlen=np.cumsum(lens_kv),
    )
    made.forward = {n: x[q] for n, x in grad.forward.items() if x.ndim > 1}
    made.dout = grad.dout[q]
    return made


# ---- bytes that do not matter -------------------------------------------------------------------


@by_pair(*ALL)
def test_memory_that_no_pair_needs(name, isa):
    """Other bytes in the place of NaN, wherever nothing is a pair of a batch."""
    k = kernel(name)
    masked = some(PLAIN, mode=0, mask="given", band=(20, 30), pse="full", hidden=0.2)
    for call in (some(LONG, mode=2), masked):
        grad = in_floats(prepared_grad(name, call)[0])
        want, a = run_grad(k, grad, isa), grad.case.args
        for byte in (0x00, 0x3C):

            def other(x: np.ndarray, byte: int = byte) -> np.ndarray:
                number = np.full(x.itemsize, byte, np.uint8).view(x.dtype)[0]
                return np.where(np.isnan(x.astype(np.float32)), number, x)

            tensors = {n: other(getattr(a, n)) for n in ("query", "key", "value", "pse")}
            made = changed(grad, **tensors)
            made.dout = other(grad.dout)
            assert_same(run_grad(k, made, isa), want, byte)


@by_pair(*ALL)
@pytest.mark.parametrize("mode", [1, 2, 3, 4])
def test_nan_reaches_what_it_has_to_do_with(name, isa, mode):
    """In a key, a value, a query or dO: rows of queries that see none of it, and keys that no such
    row sees, keep every bit."""
    k, forward = kernel(name), kernel(FORWARD[name])
    call = Shape(
        lens_q=(100,),
        lens_kv=(110,),
        group=2,
        heads_kv=2,
        mode=mode,
        mask="given",
        hidden=0.97,
        band=(9, 5),
    )
    grad = in_floats(prepared_grad(name, call)[0])
    a, want = grad.case.args, grad_rows(grad.case.args, run_grad(k, grad, isa))
    seen = np.stack([p.seen for p in oracle.parts(a)])  # [N1][Sq][Skv]
    for at in (3, 57, 97):
        for tensor in ("key", "value", "query", "dout"):
            rows = np.zeros((100, 4), bool)  # that become NaN
            if tensor in ("key", "value"):
                rows[:, 2:] = seen[2:, :, at].T
            else:
                rows[at, 2] = True
            made = changed(grad)
            if tensor == "dout":
                made.dout = grad.dout.copy()
                made.dout[0, at, 2, 0] = np.nan
            else:
                other = getattr(a, tensor).copy()
                other[0, at, 1 if tensor in ("key", "value") else 2, 0] = np.nan
                made = changed(grad, **{tensor: other})
                plain = made.case.changed()
                made.forward = run(forward, dataclasses.replace(plain, extra={}), WORDS_HERE[-1])
            keys = np.stack(
                [(seen[h] & rows[:, h, None]).any(axis=0) for h in range(4)]
            )  # [N1][Skv]
            keys = keys.reshape(2, 2, 110).any(axis=1).T
            if tensor in ("key", "value"):
                keys[at, 1] = True
            got = grad_rows(a, run_grad(k, made, isa))
            for of, reached in (("dquery", rows), ("dkey", keys), ("dvalue", keys)):
                assert same_bits(got[of][~reached], want[of][~reached]), (tensor, at, of)
            some_row = rows & seen.any(axis=2).T
            lost = ~np.isnan(got["dquery"][some_row]).any(axis=-1)
            assert not lost.any(), f"{tensor}: NaN is lost"


# ---- bad input ----------------------------------------------------------------------------------

PADDED = Shape(
    lens_q=(5, 5),
    lens_kv=(9, 9),
    heads_kv=2,
    group=3,
    mask="given",
    hidden=0.2,
    pse="full",
    keep_prob=0.5,
    bits=True,
)
BASES: dict[str, tuple[str, Shape]] = {
    "bsnd": ("f32_grad", PADDED),
    "tnd": ("f32_grad", some(PADDED, layout=TND, pad_q=1, pad_kv=2)),
    "none": ("f16_grad", PADDED),
}
INPUTS = ("query", "key", "value", "attention_out", "dout", "softmax_max", "softmax_sum")
OUTPUTS = (*GRADS, "dpse")


def base(name: str) -> tuple[bind.Kernel, GradCase, dict[str, Any]]:
    of, call = BASES[name]
    k = kernel(of)
    grad = make_grad_case(of, call)
    return k, grad, {**grad_fields(k, grad), **grad.outputs()}


STRIDES = ("query", "key", "value", "out", "dout", *GRADS)
TABLE = [
    *(null("bsnd", n) for n in INPUTS),
    *(null("tnd", n) for n in ("actual_seq_qlen", "actual_seq_kvlen")),
    null("bsnd", "pse"),
    Bad("bsnd", {"pse_batch": 1}, "UNSUPPORTED", "dpse", "NULL"),
    Bad("bsnd", {"pse_shape": 1}, "UNSUPPORTED", "dpse", "NULL"),
    Bad("bsnd", {"pse_type": 2}, "UNSUPPORTED", "dpse", "NULL"),
    Bad("none", {"pse_type": 1}, "UNSUPPORTED", "pse_type", "NULL"),
    Bad("none", {"softcap": 1.0}, "UNSUPPORTED", "softcap", "NULL"),
    *(shape("bsnd", n, -1) for n in ("batch", "seq_q", "seq_kv")),
    *(shape("bsnd", "stats_width", v, "EQUAL", 8) for v in (2, INT_MAX)),
    shape("bsnd", "sparse_mode", 9, "AT_MOST", 8),
    Bad("bsnd", {"heads_kv": 4}, "SHAPE", "heads_q", "MULTIPLE_OF", (), 6, 4),
    Bad("bsnd", {"sparse_mode": 7}, "UNSUPPORTED", "sparse_mode", "AT_MOST", (), 7, 6),
    Bad("bsnd", {"input_layout": 5}, "UNSUPPORTED", "input_layout", "GENERATED", (), 5),
    Bad(
        "tnd",
        {"actual_seq_qlen": longs(5, 4)},
        "LENGTH",
        "actual_seq_qlen",
        "AT_LEAST",
        (1,),
        4,
        5,
    ),
    *(Bad("bsnd", {"scale_value": v}, "VALUE", "scale_value", "FINITE") for v in (math.nan,)),
    *(Bad("bsnd", {"keep_prob": v}, "VALUE", "keep_prob") for v in (-1.0, 2.0, math.nan)),
    *(
        Bad("bsnd", {f"{n}_stride": (0, -4, 0)}, "SHAPE", f"{n}_stride", "AT_LEAST", (), -4, 0)
        for n in STRIDES
    ),
    *(
        Bad("bsnd", {f"{n}_stride": (0, 0, 1)}, "SHAPE", f"{n}_stride", "AT_LEAST", (), 1)
        for n in GRADS
    ),
    *(moved("bsnd", n, n, "ALIGN", "MULTIPLE_OF", 2, 4) for n in (*INPUTS, *OUTPUTS)),
    *(moved("none", n, n, "ALIGN", "MULTIPLE_OF", 1, 2) for n in ("attention_out", *OUTPUTS)),
    *(moved("bsnd", n, m, "ALIAS", "DISJOINT") for n in OUTPUTS for m in (*INPUTS, "pse")),
    *(moved("bsnd", "dquery", n, "ALIAS", "DISJOINT") for n in ("atten_mask", "dropout_mask")),
    moved("bsnd", "dkey", "dvalue", "ALIAS", "DISJOINT"),
]


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_refused(bad):
    k, _, fields = base(bad.base)
    check_refused(k, fields, bad)


@pytest.mark.parametrize("name", BASES)
def test_the_bases_are_accepted(name):
    """The control: each call of the table is fine but for the one change."""
    k, grad, fields = base(name)
    result = k.run(**fields)
    assert result.ok and result.error_text == "", result.error_text
    got = {n: fields[n] for n in grad.outputs()}
    check_grads(grad, got, best_in(BASES[name][0]), expected_grads(grad))
    plan, _ = k.plan(**fields)
    assert 0 < plan.q_tasks < plan.n_tasks and plan.work > 0 and plan.group == 3


def test_workspace_to_the_byte():
    k, grad, fields = base("tnd")
    need = k.workspace_bytes(**fields)
    plan, _ = k.plan(**fields)
    assert need > 0 and need == plan.task_bytes
    workspace = np.full(need, 0xFF, np.uint8)
    for capacity in (0, need - 1):
        result = k.run(**fields, workspace=workspace, capacity=capacity)
        assert (result.status_name, result.argument) == ("HL_ERR_WORKSPACE", "WORKSPACE")
        assert (result.rule, result.value, result.limit) == ("AT_LEAST", capacity, need)
    assert (workspace == 0xFF).all()
    assert all((fields[n].view(np.uint8) == 0xFF).all() for n in grad.outputs())
    assert k.run(**fields, workspace=workspace, capacity=need).ok


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_do_needs_nothing(layout):
    """No batch, no rows, no keys: accepted, and memory that would be empty may be NULL."""
    k = kernel("f32_grad")
    for lens_q, lens_kv in (((), ()), ((0, 0), (4, 4)), ((4, 4), (0, 0)), ((0, 0), (0, 0))):
        grad = make_grad_case("f32_grad", Shape(lens_q=lens_q, lens_kv=lens_kv, layout=layout))
        fields = grad_fields(k, grad)
        empty = {n for n, x in fields.items() if isinstance(x, np.ndarray) and x.size == 0}
        outputs = {n: x for n, x in grad.outputs().items() if x.size}
        result = k.run(**{n: x for n, x in fields.items() if n not in empty}, **outputs)
        assert result.ok, (layout, lens_q, lens_kv, result.error_text)
        assert not any(x.view(np.uint8).any() for x in outputs.values()), (lens_q, lens_kv)


def test_struct_fields_are_those_of_the_compiler():
    header = bind.parse(text("f32_grad"))
    made = bind.structures(header)
    lines = []
    for of in ("hl_fusion_attention_grad_args", "hl_fusion_attention_grad_plan"):
        lines.append(f'_Static_assert(sizeof({of}) == {ctypes.sizeof(made[of])}, "size");')
        for field, *_ in made[of]._fields_:
            offset = getattr(made[of], field).offset
            lines.append(f'_Static_assert(offsetof({of}, {field}) == {offset}, "{field}");')
    assert len(lines) > 60
    source = "\n".join(['#include "header.h"', *lines, ""])
    bind.compile_c({"header.h": header.text, "sizes.c": source})


def test_both_operators_in_one_file():
    """As a training step includes them."""
    both = [{**table(n), "isa": ["scalar"]} for n in ("f32_all", "f32_grad")]
    kernels = bind.load_all(spec.parse_header({"name": "hl_both", "kernel": both}))
    forward, backward = (kernels[table(n)["name"]] for n in ("f32_all", "f32_grad"))
    grad, known = prepared_grad("f32_grad", PLAIN)
    made = dataclasses.replace(grad, forward=run(forward, grad.case))
    check_grads(made, run_grad(backward, made), "scalar", known)


@pytest.mark.parametrize("how", ["BSND", "BNSD", "TND", "SBH joined", "BSH joined"])
def test_gradients_reads_sizes_options_and_strides_from_arrays(how):
    """attend and gradients, from arrays alone."""
    name = "f32_grad"
    k, forward = kernel(name), kernel(FORWARD[name])
    layout = oracle.LAYOUTS[how.split()[0]]
    call = Shape(lens_q=(7, 7), lens_kv=(9, 9), heads_kv=2, group=3, layout=layout, pse="full")
    grad, known = prepared_grad(name, some(call, mode=3, mask="given", keep_prob=0.7))
    a = grad.case.args
    fields = {**grad.case.inputs(), "sparse_mode": 3, "scale_value": a.scale_value}
    fields |= {"keep_prob": 0.7, "dropout_seed": a.dropout_seed, "dout": grad.dout}
    fields["dropout_offset"] = a.dropout_offset
    if layout in (SBH, BNSD):
        fields["input_layout"] = how.split()[0]
    if "joined" in how:
        for n in ("query", "key", "value", "dout"):
            rows = fields[n].reshape(*fields[n].shape[:2], -1)
            fields[n] = np.concatenate([rows, rows], axis=-1)[..., : rows.shape[-1]]
    dout = fields.pop("dout")
    first = forward.attend(**fields).outputs
    saved = {n: first[n] for n in ("attention_out", "softmax_max", "softmax_sum")}
    got = k.gradients(**fields, **saved, dout=dout).outputs
    assert set(got) == {*GRADS, "dpse"} and got["dquery"].shape == fields["query"].shape
    shaped = {n: x.reshape(grad.outputs()[n].shape) for n, x in got.items()}
    check_grads(grad, shaped, best_in(name), known)
    assert np.isfinite(rows_of(grad.case, grad.forward)["softmax_lse"]).all()


# ---- memory -------------------------------------------------------------------------------------


def test_a_kernel_that_reads_too_far_is_noticed():
    """The control for everything below: one more key than there is."""
    grad = make_grad_case("f32_grad", Shape(lens_q=(3,), lens_kv=(9,)))
    grad.case.extra["seq_kv"] = 10
    with pytest.raises(Died):
        run_grad_guarded(kernel("f32_grad"), grad, Way(WORDS_HERE[-1]))


@by_pair(*ALL)
@pytest.mark.parametrize("flush", ["left", "right"])
def test_every_edge(name, isa, flush):
    """Queries, keys and heads from 0 or 1 past any tile; bits and bytes of masks to the last."""
    for n in (*range(0, 10), 15, 17, 31, 33, 97, 145):
        call = Shape(
            lens_q=(n + 1,),
            lens_kv=(n,),
            group=1 + n % 5,
            layout=LAYOUTS[n % 5],
            mode=(0, 1, 2, 3)[n % 4],
            mask="given",
            hidden=0.2,
            pse="full" if n % 2 else "one_row",
            keep_prob=0.5,
            bits=n % 3 > 0,
            stats_width=1 if n % 4 else 8,
            seed=n,
        )
        check_guarded(name, call, Way(isa, flush, strides=n % 6 == 5))


def check_played(name: str, command: Sequence[str], isas: Sequence[str], seed: int, **env) -> None:
    """Calls of all kinds in another program, against the oracle."""
    k = kernel(name)
    number = {isa: k.constants[f"HL_ISA_{isa.upper()}"] for isa in isas}
    made, calls = [], []
    for call, way in various(FORWARD[name], seed, 30):
        grad = make_grad_case(name, call)
        known = expected_grads(grad)
        for isa in isas:
            outputs = grad.outputs()
            args = k.args(**grad.case.sizes(), isa=number[isa])
            mode = BY_TASK * way.by_task | FLUSH_LEFT * (way.flush == "left")
            calls.append((packed(args, mode, grad.inputs(), outputs), outputs))
            made.append((grad, isa, known))
    _, results = play(command, calls, **env)
    for (grad, isa, known), got in zip(made, results, strict=True):
        check_grads(grad, got, isa, known)


def test_sanitizers():
    """Address and undefined-behaviour sanitizers, where every access is still there to be seen."""
    name = "f32_grad"
    flags = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    built = program(text(name), kernel(name).name, compiler="gcc", flags=flags)
    check_played(name, (str(built),), WORDS_HERE, 9, env=sanitized_environment())


@pytest.mark.parametrize("name", ["f32_grad", "bf16_grad"])
def test_on_another_processor(name):
    """NEON and scalar code on an emulated 64-bit Arm, between guard pages too."""
    need_aarch64()
    built = program(text(name), kernel(name).name)
    check_played(name, (*QEMU, str(built)), ("scalar", "neon"), 5)


@pytest.fixture(scope="module")
def control() -> ctypes.CDLL:
    """Reads and writes the processor's floating-point control and status."""
    return ctypes.CDLL(str(bind.compile_c({"control.c": FLOAT_ENVIRONMENT})))


@by_pair(*ALL)
def test_floating_point_state_is_left_alone(name, isa, control):
    """Control bits as before; for finite inputs no invalid operation and no division by zero, which
    some callers trap; and results are right with subnormal numbers flushed too."""
    k = kernel(name)
    for call, _ in various(FORWARD[name], 3, 10):
        plain = {"spread": "normal", "sinks": call.sinks.replace("infinite", "plain")}
        grad = make_grad_case(name, dataclasses.replace(call, **plain))
        grad.case = finite(grad.case)
        grad.dout = np.where(np.isnan(grad.dout.astype(np.float32)), 1, grad.dout)
        grad.dout = grad.dout.astype(grad.case.dtype)
        known = expected_grads(grad)
        for mode in (DEFAULT, DEFAULT | FLUSH):
            outputs = grad.outputs()
            plan, result = k.plan(**grad_fields(k, grad, isa), **outputs)
            assert result.ok, result.error_text
            workspace = np.zeros(plan.task_bytes, np.uint8)
            control.set_control(mode)
            for i in range(plan.n_tasks):
                k.task(plan, i, workspace)
            after = control.get_control()
            control.set_control(DEFAULT)
            assert mode & ~FLAGS == after & ~FLAGS
            assert after & INVALID_OR_ZERO_DIVIDE == 0, (hex(after), call)
            check_grads(grad, outputs, isa, known)
