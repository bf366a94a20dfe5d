"""The hazard table (docs/hazards.md), case 24: metadata that somebody changes while a call runs, or
between plan and its tasks. Numbers are then anybody's; memory is not: nothing outside the described
tensors is read or written. What is read again is read once and kept within bounds."""

import ctypes
import functools
import itertools
import re
from typing import Any

import helpers_every as every
import helpers_hazards as hz
import numpy as np
import pytest
from helpers_cases import INT_MAX, INT_MIN
from helpers_hazards import APPENDS, HEADERS, RECORDS, SLOTS, TRAINS, appending, made, paged
from helpers_memory import Arena, Died, in_child
from oracle import TND

from gen import bind

WHOLE = (np.dtype(np.int32), np.dtype(np.int64))
GARBAGE = (INT_MIN, -1, 0, 1, 3, 7, 1000, 1 << 20, INT_MAX)


def calls(name: str) -> list[every.Call]:
    """Calls with metadata of every kind, and with tensors whose extent follows from it."""
    if name in TRAINS:
        more = {"layout": TND, "keep_prob": 0.5, "bits": True}
        return [
            made(name, (9, 13, 6), 7, mode=6, mask="formula", pse="full", **more),
            made(name, (9, 13, 6), 7, mode=1, mask="given", pse="one_row", **more),
            made(name, (7, 7, 7), 7, mode=8, mask="formula", **more),
        ]
    if name in hz.DECODES:
        common = {"pse": "each", "mask": "each", "hidden": 0.3, "mask_rows": True}
        return [
            paged(name, (20, 9), rows=3, **common),
            made(name, (20, 9), rows=3, padding=4, room=30, **common),
            paged(name, (300, 9), rows=1, heads=1),
        ]
    some = [paged(name, (20, 9), rows=3, sparse_mode=3)]
    some += [paged(name, (20, 9), rows=3, lists="blocks", list_length=9, layout_q=TND)]
    if "TND" in every.description(name).layout_kv:
        some.append(made(name, (20, 9), rows=3, layout_kv=TND, sparse_mode=3))
    if name in SLOTS:
        some.append(paged(name, (20, 9), rows=3, lists="slots", list_lengths=True))
    return some


def metadata(fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of lengths, ends, tables, lists, positions."""
    return {
        n: a
        for n, a in fields.items()
        if isinstance(a, np.ndarray) and a.dtype in WHOLE and n != "dropout_state"
    }


def images_of(whole: dict[str, np.ndarray], seed: int) -> list[dict[str, np.ndarray]]:
    """What metadata may become: an array all of one number, all arrays at once so, mixtures."""
    rng, made_of = np.random.default_rng(seed), []
    clean = {n: a.copy() for n, a in whole.items()}
    for n, value in itertools.product(whole, GARBAGE):
        made_of.append({**clean, n: np.full_like(clean[n], value)})
    for value in GARBAGE:
        made_of.append({n: np.full_like(a, value) for n, a in clean.items()})
    for _ in range(30):
        some = {n: rng.choice(GARBAGE, a.shape).astype(a.dtype) for n, a in clean.items()}
        keep = {n: rng.random(a.shape) < rng.choice([0.1, 0.5, 0.9]) for n, a in clean.items()}
        made_of.append({n: np.where(keep[n], clean[n], some[n]) for n in clean})
    for _ in range(10):  # small numbers, which look like lengths
        made_of.append({n: rng.integers(0, 31, a.shape).astype(a.dtype) for n, a in clean.items()})
    return made_of


def plan_then_change(call: every.Call, k: bind.Kernel, isas: tuple[str, ...]) -> int:
    """Plans with what is right, tasks and merges with what is not, everything between forbidden
    pages, in a child; how many times."""
    with Arena() as arena:
        inputs = {n: arena.place(a) for n, a in call.inputs().items()}
        outputs = call.outputs(arena)
        whole = metadata(inputs)
        images = images_of(whole, 24)
        clean = {n: a.copy() for n, a in whole.items()}
        fields = {**call.sizes(), **inputs, **outputs}
        fields |= {"chunk_keys": 128} if "partials" in hz.pointers(call.name) else {}

        def change_all() -> int:
            done = 0
            for isa in isas:
                one = {**fields, "isa": k.isas()[isa]}
                plan, result = k.plan(**one)
                assert result.ok, result
                if getattr(plan, "split_bytes", 0):
                    room = arena.room((plan.split_bytes,), np.uint8)
                    plan, result = k.plan(**one, partials=room, partials_bytes=room.nbytes)
                    assert result.ok, result
                workspace = arena.room((plan.task_bytes,), np.uint8)
                for image in images[:: 1 if isa == isas[0] else 5]:
                    for n, a in whole.items():
                        a[...] = image[n]
                    run(k, plan, workspace)
                    done += 1
                for n, a in whole.items():
                    a[...] = clean[n]
            arena.check()
            return done

        return in_child(change_all, f"{call.name} {call.case}"[:300])


def run(k: bind.Kernel, plan: ctypes.Structure, workspace: np.ndarray) -> None:
    for i in range(plan.n_tasks):
        k.task(plan, i, workspace)
    for i in range(getattr(plan, "n_merges", 0)):
        k.merge(plan, i)


@pytest.mark.parametrize("name", HEADERS)
def test_hazard_24_metadata_changed_between_plan_and_tasks(name):
    isas = every.isas_in(name)
    for call in calls(name):
        whole = metadata(call.inputs())
        assert whole, "nothing to change"
        assert plan_then_change(call, call.kernel, isas) >= 40


FLIPPER = r"""
#include <pthread.h>
#include <stdint.h>
#include <string.h>
enum { MOST = 16 };
static struct {
    volatile unsigned char *at;
    const unsigned char *image[2];
    int64_t bytes;
} item[MOST];
static int items;
static volatile int stop;
static volatile int64_t turns;
static pthread_t thread;
static void *flip(void *unused)
{
    (void)unused;
    for (unsigned turn = 0; !stop; ++turn) {
        for (int i = 0; i < items; ++i) {
            const volatile int32_t *const from = (const volatile int32_t *)item[i].image[turn & 1];
            for (int64_t j = 0; j < item[i].bytes / 4; ++j) {
                ((volatile int32_t *)item[i].at)[j] = from[j];
            }
        }
        ++turns;
    }
    return 0;
}
void begin(void) { items = 0; stop = 0; turns = 0; }
void add(void *at, const void *first, const void *second, int64_t bytes)
{
    item[items].at = at;
    item[items].image[0] = first;
    item[items].image[1] = second;
    item[items++].bytes = bytes;
}
int64_t turned(void) { return turns; }
int start(void) { return pthread_create(&thread, 0, flip, 0); }
int64_t end(void) { stop = 1; pthread_join(thread, 0); return turns; }
"""


@functools.cache
def flipper() -> ctypes.CDLL:
    """A thread that turns metadata over and over, faster than Python's would."""
    flags = ("-O1", "-pthread")
    made_of = ctypes.CDLL(str(bind.compile_c({"flipper.c": FLIPPER}, flags=flags)))
    p = ctypes.c_void_p
    made_of.add.argtypes = (p, p, p, ctypes.c_int64)
    made_of.end.restype = made_of.turned.restype = ctypes.c_int64
    return made_of


def while_it_changes(whole: dict[str, np.ndarray], bad: int, call: Any, count: int) -> list[Any]:
    """In a child: call() count times and more, until the thread has had its turns too, while each
    number of the arrays is right, then `bad`, then right again; how often it said what, and how
    often they were turned."""
    lib, said = flipper(), {}
    lib.begin()
    kept = []
    for a in whole.values():
        images = (a.copy(), np.full_like(a, bad))
        kept.append(images)
        lib.add(a.ctypes.data, images[0].ctypes.data, images[1].ctypes.data, a.nbytes)
    assert lib.start() == 0
    for i in itertools.count():
        if i >= count and lib.turned() >= 100:
            break
        status = call()
        said[status] = said.get(status, 0) + 1
    turns = lib.end()
    for a, (right, _) in zip(whole.values(), kept, strict=True):
        a[...] = right
    return [said, turns]


@pytest.mark.parametrize("name", HEADERS)
def test_hazard_24_metadata_changed_during_the_call(name):
    """A thread turns lengths, tables and lists to and fro while the one call runs, again and again:
    it is refused, or it computes anything; no forbidden page is touched."""
    flipper()
    k = every.kernel(name)
    for call, bad in zip(calls(name), (INT_MIN, INT_MAX, 5, 11), strict=False):
        with Arena() as arena:
            inputs = {n: arena.place(a) for n, a in call.inputs().items()}
            outputs = call.outputs(arena)
            isa = k.isas()["scalar" if "avx2" not in k.isas() else "avx2"]
            fields = {**call.sizes(), **inputs, **outputs, "isa": isa}
            room = arena.room((k.workspace_bytes(**fields),), np.uint8)
            args, address = k.args(**fields), room.ctypes.data

            def once(args: Any = args, address: int = address, size: int = room.nbytes) -> int:
                return k._c(ctypes.byref(args), address, size, None)

            whole = metadata(inputs)
            said, turns = in_child(functools.partial(while_it_changes, whole, bad, once, 100), name)
            arena.check()
            assert turns >= 100 and sum(said.values()) >= 100, (said, turns)


@pytest.mark.parametrize("name", APPENDS)
def test_hazard_24_metadata_changed_while_rows_are_written(name):
    flipper()
    k = every.kernel(name)
    for bad in (INT_MIN, INT_MAX, -1, 3, 1000):
        fields = appending(name)
        with Arena() as arena:
            cache = ("key",) if name in RECORDS else ("key_cache", "value_cache")
            for n, a in list(fields.items()):
                if isinstance(a, np.ndarray):
                    fields[n] = arena.place(a)
            whole = metadata({n: a for n, a in fields.items() if n not in cache})
            args = k.struct(k.Rows["append"], fields)

            def once(args: Any = args) -> int:
                return k._c_append(ctypes.byref(args), None)

            said, turns = in_child(functools.partial(while_it_changes, whole, bad, once, 200), name)
            arena.check()
            assert turns >= 100 and sum(said.values()) >= 200, (said, turns)


# ---- the controls: the same without what keeps numbers within bounds ----------------------------

UNSAFE = {  # header -> (what is taken out of its text, what stands there then)
    "hl_sparse_flash_attention_f32_d32_rope8": [
        ("return block >= 0 && block < a->num_blocks;", "return 1;")
    ],
    "hl_incre_flash_attention_f16_i8_d32": [
        ("    g->length = g->length < reach - g->first ? g->length : reach - g->first;\n", "")
    ],
    "hl_fusion_attention_f32_d64_pse_types_softcap_sinks": [
        ("g->seq_q < plan->longest[0] ? g->seq_q : plan->longest[0]", "g->seq_q"),
        ("g->seq_kv < plan->longest[1] ? g->seq_kv : plan->longest[1]", "g->seq_kv"),
        ("> plan->pairs - g->pairs", "> INT64_MAX - g->pairs"),
    ],
    "hl_fusion_attention_grad_f32_d64_pse_types_softcap": [
        ("return task >= 0\n            && task <", "return task <"),
        ("g->seq_kv < plan->longest[1] ? g->seq_kv : plan->longest[1]", "g->seq_kv"),
        ("g->seq_q < plan->longest[0] ? g->seq_q : plan->longest[0]", "g->seq_q"),
        ("> plan->pairs - g->pairs", "> INT64_MAX - g->pairs"),
    ],
}


@pytest.mark.parametrize("name", sorted(UNSAFE))
def test_hazard_24_a_header_without_these_bounds_is_noticed(name):
    text = every.text(name)
    for old, new in UNSAFE[name]:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    k = bind.load(text, defines=("HL_ISA_ONLY_SCALAR",), flags=("-O0",))
    k.dtype = every.kernel(name).dtype
    noticed = 0
    for call in calls(name):
        try:
            plan_then_change(call, k, ("scalar",))
        except (Died, AssertionError):
            noticed += 1
    assert noticed > 0, "the bounds are not what keeps these calls within their memory"


HOOK = """
#include <string.h>
void *hazard_to, *hazard_from;
long long hazard_bytes;
void hazard_hook(void) { memcpy(hazard_to, hazard_from, (size_t)hazard_bytes); }
"""
AFTER_CHECKS = {  # header -> the first line behind the checks of ..._append
    "hl_sparse_flash_attention_antiquant_bf16_i8_656_d512_rope64": "    tokens = a.layout_kv",
    "hl_incre_flash_attention_f16_i8_d32": "    for (int32_t b = 0; a.rows > 0 && b < a.batch;",
}
BOUNDS = (  # that ..._append has behind its checks, and what is left without them
    (r"if \(rows < 1 \|\| rows > a\.rows.*?\) \{", "if (0) {"),
    (r"if \(at\.outer < 0 \|\| at\.outer >= a\.num_blocks\) \{", "if (0) {"),
    (r"return n > 0 && n <= a->rows.*?;", "return n;"),
    (r"if \(inner < 0 \|\| outer < 0.*?\{ /\*", "if (0) { /*"),
)


@pytest.mark.parametrize("safe", [True, False], ids=["as shipped", "the control"])
@pytest.mark.parametrize("name", sorted(AFTER_CHECKS))
def test_hazard_24_metadata_changed_between_checks_and_rows(name, safe):
    """In the middle of one call of ..._append: whatever lengths, positions and tables become after
    they have been checked, what lies around the cache is not written."""
    text, line = every.text(name), AFTER_CHECKS[name]
    assert text.count(line) == 1
    text = "void hazard_hook(void);\n" + text.replace(line, "    hazard_hook();\n" + line)
    for pattern, less in () if safe else BOUNDS:
        text = re.sub(pattern, less, text, flags=re.S)
    k = bind.load(text, defines=("HL_ISA_ONLY_SCALAR",), flags=("-O0",), extra=HOOK)
    to, from_ = (ctypes.c_void_p.in_dll(k.library, f"hazard_{n}") for n in ("to", "from"))
    size = ctypes.c_longlong.in_dll(k.library, "hazard_bytes")
    died = 0
    for what, bad in itertools.product(("positions", "lengths", "block_table"), GARBAGE):
        fields = appending(name)
        other = np.full_like(fields[what], bad)
        with Arena() as arena:
            places = {n: arena.place(a) for n, a in fields.items() if isinstance(a, np.ndarray)}

            def once(places: Any = places, fields: Any = fields, other: Any = other) -> None:
                to.value, from_.value = places[what].ctypes.data, other.ctypes.data  # noqa: B023
                size.value = other.nbytes
                k.append(**{**fields, **places}).check()

            try:
                in_child(once, f"{what} {bad}")
                arena.check()
            except AssertionError:
                died += 1
    assert died == 0 if safe else died > 0
