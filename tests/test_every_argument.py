"""Every argument of every function of every shipped header, alone and together with others, at
values that a caller should not pass: it is refused with a status, an argument, a rule and a
sentence, or accepted; and a refusal writes nothing. Which refusal it has to be is in the tests of
bad input. `make coverage` holds against this that each condition of a check decides by itself."""

import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import helpers_every
import helpers_tiles
import numpy as np
import pytest
from helpers_memory import in_child

from gen import bind

MANY = "LLVM_PROFILE_FILE" in os.environ  # the long walk, which reaches all there is
INT_MIN, INT_MAX, FAR = -(2**31), 2**31 - 1, 2**63 - 1
SHOWN = 4096  # bytes of each array that are looked at after a refusal
TOP = 2**64 - 64  # an address that no memory of more bytes can have
WHOLE = (-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 100, 128, 129, 256, INT_MIN)
VALUES = {
    ctypes.c_int32: (*WHOLE, 1024, 2048, 3072, 65537, INT_MAX),
    ctypes.c_int64: (*WHOLE, INT_MAX, 2**32, 2**40, 2**40 + 1, -(2**40) - 1, FAR),
    ctypes.c_float: (0.0, 0.5, 1.0, 2.0, -1.0, float("inf"), float("-inf"), float("nan")),
    ctypes.c_uint64: (0, 1, 2**20, 2**40, FAR),
}
# Counts of what is read: with nothing to write, nothing overlaps, and a larger one is believed.
COUNTS = {"batch", "seq_q", "parts", "max_blocks", "lengths"}


class Walk:
    """One function of a header, its struct of arguments, and what may be put there. Each array has
    room behind it: a larger count, if accepted, finds zeros there."""

    runs = True  # what is accepted is done: no more than what there is room for
    room = 1 << 28

    def __init__(self, kernel: bind.Kernel, kind: Any, fields: dict[str, Any], c: Any) -> None:
        self.kernel, self.c, self.seen = kernel, c, Counter()
        self.rooms: list[np.ndarray] = []
        self.arrays: dict[str, np.ndarray] = {}
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                fields[name] = self.roomy(value)
                if value.dtype in (np.int32, np.int64) and value.size:
                    self.arrays[name] = fields[name].reshape(-1)
        self.args, self.error = kernel.struct(kind, fields), kernel.Error()
        self.plan = kernel.Plan()
        self.before = bytes(self.args)
        self.places = list(self.leaves(kind))
        self.empty = False
        declared = kernel.header.structs[kind.__name__]
        # These are looked into: an address with nothing behind it would be its caller's fault.
        self.read = {f.name for f in declared if f.stars and f.type.startswith("int")}
        self.tables = {f.name for f in declared if f.stars == 2}
        self.read |= self.tables | {"atten_mask", "antiquant_scale", "antiquant_offset"}

    def roomy(self, array: np.ndarray) -> np.ndarray:
        room = np.zeros(self.room + array.nbytes, np.uint8)
        self.rooms.append(room)
        made = room[: array.nbytes].view(array.dtype).reshape(array.shape)
        made[...] = array
        return made

    def leaves(self, kind: Any) -> Iterator[tuple[str, int, Any]]:
        """(field, offset, type) of all that the struct holds."""
        for name, of in kind._fields_:
            at = getattr(kind, name).offset
            if issubclass(of, ctypes.Structure):
                for part, inner in of._fields_:
                    yield name, at + getattr(of, part).offset, inner
            else:
                yield name, at, of

    def values(self, place: tuple[str, int, Any]) -> tuple[Any, ...]:
        """What to try there."""
        name, at, kind = place
        now = kind.from_buffer(self.args, at).value
        if kind is ctypes.c_void_p:
            if name in self.tables:
                return (None, now, now + 1) if now else (None,)
            others = {kind.from_buffer(self.args, p[1]).value for p in self.places if p[2] is kind}
            dummy = self.rooms[0].ctypes.data + self.room // 2
            near = tuple(x for other in sorted(others - {None, now}) for x in (other, other + 1))
            made = (None, dummy, dummy + 1, (now or dummy) + 1, (now or dummy) + 4, *near)
            return made if name in self.read else (*made, TOP)
        if kind is ctypes.c_float:
            return VALUES[kind]
        listed = VALUES.get(kind, VALUES[ctypes.c_int64])
        listed += (now + 1, now - 1, 2 * now)
        most = 300 if name in COUNTS or self.empty else FAR
        if self.runs:
            most = 100 if kind is ctypes.c_int32 else 300
            listed += (FAR,)
        return tuple(v for v in dict.fromkeys(listed) if v <= most or v == FAR)

    def put(self, place: tuple[str, int, Any], value: Any) -> None:
        place[2].from_buffer(self.args, place[1]).value = value

    def put_all(self, fields: dict[str, Any]) -> None:
        """By name; a struct inside the struct takes a tuple."""
        for name, value in fields.items():
            places = [place for place in self.places if place[0] == name]
            values = value if isinstance(value, tuple) else (value,)
            for place, one in zip(places, values, strict=True):
                self.put(place, one)

    def restore(self) -> None:
        ctypes.memmove(ctypes.byref(self.args), self.before, len(self.before))

    def ask(self) -> int:
        """Calls; the status. Asserts what has to hold of any answer."""
        given = bytes(self.args)
        status = self.call()
        assert bytes(self.args) == given, "the caller's struct was changed"
        self.seen[status] += 1
        if status != 0:
            said = self.kernel.result(status, self.error)
            assert self.error.status == status
            assert said.status_name != "?" and said.argument not in ("?", "NONE"), said
            assert said.rule not in ("?", "NONE") and len(said.error_text) > 10, said
        return status

    def call(self) -> int:
        """A routine that writes what it makes."""
        before = [room[:SHOWN].tobytes() for room in self.rooms]
        status = self.c(ctypes.byref(self.args), ctypes.byref(self.error))
        if status != 0:
            after = [room[:SHOWN].tobytes() for room in self.rooms]
            assert before == after, "refused, but something was written"
        return status

    def alone(self) -> None:
        """Every argument at every value, and every entry of metadata."""
        for place in self.places:
            for value in self.values(place):
                self.put(place, value)
                self.ask()
                self.restore()
        for array in self.arrays.values():
            for at in {0, 1, len(array) // 2, len(array) - 1} & set(range(len(array))):
                now = int(array[at])
                near = (-1, -2, INT_MIN, INT_MAX, 0, 1, now - 1, now + 1, int(array[at - 1]))
                for value in near:
                    if INT_MIN <= value <= INT_MAX:
                        array[at] = value
                        self.ask()
                array[at] = now

    def together(self, rng: np.random.Generator, count: int) -> None:
        """Two to four arguments at a time, drawn."""
        for _ in range(count):
            for pick in rng.integers(0, len(self.places), rng.integers(2, 5)):
                values = self.values(self.places[pick])
                self.put(self.places[pick], values[rng.integers(len(values))])
            self.ask()
            self.restore()

    def after(self, fields: dict[str, Any]) -> None:
        """alone(), with these changed beforehand."""
        known, was = self.before, self.empty
        self.put_all({n: v for n, v in fields.items() if n in {p[0] for p in self.places}})
        self.before = bytes(self.args)
        self.empty = was or any(fields.get(n) == 0 for n in ("batch", "seq_q", "heads_q"))
        self.alone()
        self.before, self.empty = known, was
        self.restore()


class PlanWalk(Walk):
    """plan, which writes nothing but the plan."""

    runs = False
    room = 1 << 24

    def __init__(self, call: helpers_every.Call) -> None:
        fields: dict[str, Any] = {**call.inputs(), **call.sizes(), **call.outputs()}
        super().__init__(call.kernel, call.kernel.Args, fields, call.kernel._c_plan)
        self.empty = any(a.size == 0 for a in call.outputs().values())

    def call(self) -> int:
        plan = self.plan
        ctypes.memset(ctypes.byref(plan), 0xC3, ctypes.sizeof(plan))
        status = self.c(*map(ctypes.byref, (plan, self.args, self.error)))
        assert status == 0 or bytes(plan) == b"\xc3" * ctypes.sizeof(plan), "refused, but planned"
        assert status != 0 or plan.n_tasks >= 0
        return status


# ---- plan ----------------------------------------------------------------------------------------


def presets(walk: PlanWalk) -> Iterator[dict[str, Any]]:
    """What opens ways through the checks that a drawn call takes seldom."""
    names = {place[0] for place in walk.places}
    now = {p[0]: p[2].from_buffer(walk.args, p[1]).value for p in walk.places}
    yield {"batch": 0}
    yield {"seq_q": 0}
    yield {"heads_q": 0}
    yield {"isa": 1, "seq_kv": 0}
    ends = ("actual_seq_lengths", "actual_seq_lengths_query", "actual_seq_lengths_kv")
    yield {"batch": 0, **dict.fromkeys(ends)}
    if {"value", "key"} <= names:
        same = {"key_stride": (900, 800, 700), "value_stride": (900, 800, 700)}
        yield {"value": now["key"], "block_table": None, **same}
    if "sparse_mode" in names and "pse_shape" in names:  # training
        mask = walk.rooms[0].ctypes.data + walk.room // 2
        equal = {"seq_kv": now["seq_q"], "heads_kv": now["heads_q"]}
        for mode in range(9):
            yield {"sparse_mode": mode, "atten_mask": mask, "mask_from_mode": mode % 2}
            yield {"sparse_mode": mode, "pse_shape": 2, "pse": mask, "pse_width": 2048, **equal}
            size = {"mask_rows": 3072 if mode == 6 else 2048, "mask_width": 2048}
            yield {"sparse_mode": mode, "atten_mask": mask, "mask_check": 1, **size}


def vast(walk: PlanWalk, rng: np.random.Generator, count: int) -> None:
    """Sizes at the ends of their types, tensors 2^44 bytes and more apart: no product of them may
    wrap, and what does not fit is refused. Nothing is read: lengths, lists and tables are NULL."""
    known = walk.before
    pointers = [p for p in walk.places if p[2] is ctypes.c_void_p]
    needed = [p for p in pointers if p[2].from_buffer(walk.args, p[1]).value]
    for _ in range(count):
        for i, place in enumerate(pointers):
            there = place in needed and place[0] not in walk.read
            far = rng.choice([44, 56, 58])
            walk.put(place, ((i + 1) << int(far)) if there else None)
        some = {p[0]: p for p in walk.places if p[2] is ctypes.c_int32}
        for name in ("seq_q", "seq_kv", "heads_q", "heads_kv", "block_size", "num_blocks"):
            if name in some and rng.random() < 0.6:
                walk.put(some[name], int(rng.choice([1, 2, 2**16, 2**24, 2**30, INT_MAX])))
        walk.put_all(
            {"batch": int(rng.choice([1, 2])), "list_length": 0, "chunk_keys": 128}
            if "list_length" in some
            else {"batch": int(rng.choice([1, 1, 2]))}
        )
        if "partials" in {p[0] for p in walk.places}:
            walk.put_all({"chunk_keys": 128, "partials": int(rng.choice([0, 1 << 60])) or None})
        walk.ask()
        walk.before = bytes(walk.args) if rng.random() < 0.7 else known
        walk.restore()
    walk.before = known
    walk.restore()


def odd(call: helpers_every.Call) -> None:
    """What is no argument: no plan, no arguments, nobody to hear of an error, no workspace."""
    kernel, walk = call.kernel, PlanWalk(call)
    args, plan, error = (ctypes.byref(x) for x in (walk.args, walk.plan, walk.error))
    text = kernel.result
    for a, p in ((None, plan), (args, None), (None, None)):
        assert text(kernel._c_plan(p, a, error), walk.error).argument in ("PLAN", "ARGS")
        assert kernel._c_plan(p, a, None) != 0
    assert kernel._c_workspace_bytes(None) == 0
    status = kernel._c_plan(plan, args, error)
    assert status == 0 and kernel.error_text(walk.error) == "no error"
    assert kernel._c_text(error, None, 0) is None
    for task in (-1, walk.plan.n_tasks, INT_MAX):  # no such task: nothing is done
        kernel._c_task(plan, task, None)
        if kernel.merges:
            kernel._c_merge(plan, task)
    for array in walk.arrays.values():  # an error with a position, and nobody to hear of it
        now = int(array[0])
        for value in (INT_MIN, INT_MAX):
            array[0] = value
            kernel._c_plan(plan, args, None)
        array[0] = now
    names = kernel.header.constants
    for rule in range(max(v for n, v in names.items() if n.startswith("HL_RULE_")) + 1):
        for wrong in ("HL_ERR_ALIGN", "HL_ERR_SHAPE"):
            problem = full_error(kernel, 12)
            problem.rule, problem.status = rule, names[wrong]
            assert kernel.error_text(problem).startswith("key")
    for size in range(40):
        made = kernel.error_text(full_error(kernel, 2**63 - 1), max(size, 1))
        assert len(made) < max(size, 1)
    for value in (-(2**63), -1, 0, 7):
        assert str(value) in kernel.error_text(full_error(kernel, value))
    if kernel._c_plan(plan, args, error) == 0 and walk.plan.n_tasks > 0:
        need = walk.plan.task_bytes
        for memory, size in ((None, need), (walk.rooms[0].ctypes.data + walk.room // 2, need - 1)):
            said = text(kernel._c(args, memory, size, error), walk.error)
            assert said.argument == "WORKSPACE", said
            assert kernel._c(args, memory, size, None) != 0


def full_error(kernel: bind.Kernel, value: int) -> ctypes.Structure:
    """An error that has everything."""
    made = kernel.Error()
    names = kernel.header.constants
    made.status = names["HL_ERR_ALIGN"]
    made.argument, made.rule = names["HL_ARG_KEY"], names["HL_RULE_MULTIPLE_OF"]
    made.positions, made.value, made.limit = 3, value, value
    made.position[0], made.position[1] = -3, 2**40
    return made


def walk_plan(call: helpers_every.Call, seed: int, drawn: int) -> Counter:
    """Status codes, and how often each was given."""
    rng, walk = np.random.default_rng(seed), PlanWalk(call)
    walk.alone()
    walk.together(rng, drawn)
    vast(walk, rng, drawn)
    for i, fields in enumerate(presets(walk)):
        if MANY and (i < 6 or (i + seed) % 8 == 0):
            walk.after(fields)
    if seed < 4:
        odd(call)
    for mode in ("absent", "refused") if MANY and seed == 0 else ():
        with helpers_tiles.during(mode):
            PlanWalk(call).ask()
    return walk.seen


@pytest.mark.parametrize("name", helpers_every.HEADERS)
def test_any_argument_at_any_value(name):
    """Each kind of refusal comes up, and calls that are still accepted."""
    calls = list(helpers_every.calls(name, 5, 16 if MANY else 3))
    seen: Counter = Counter()
    for seed, call in enumerate(calls):  # each in a child, which may not take long
        seen += in_child(lambda c=call, s=seed: walk_plan(c, s, 400 if MANY else 60))
    constants = helpers_every.kernel(name).constants
    kinds = ("OK", "ERR_NULL", "ERR_SHAPE", "ERR_UNSUPPORTED", "ERR_VALUE", "ERR_ALIAS")
    assert {constants[f"HL_{kind}"] for kind in kinds} <= set(seen), seen
    assert seen.total() > 1000


def test_a_plan_that_writes_before_it_refuses_is_noticed():
    """The control: a plan whose copy of the arguments is the caller's."""
    name = next(n for n in helpers_every.HEADERS if helpers_every.isas_in(n) == ("scalar",))
    text = helpers_every.text(name)
    broken = text.replace("p.args = *args;", "p.args = *args; plan->args = *args;")
    assert broken != text
    walk = PlanWalk(next(iter(helpers_every.calls(name, 5, 1))))
    walk.c = bind.load(broken, flags=("-O0",))._c_plan
    with pytest.raises(AssertionError, match="refused, but planned"):
        walk.alone()


# ---- rows of caches, and parts ------------------------------------------------------------------

SIZES = {"batch": 2, "rows": 3, "heads_kv": 2, "seq_kv": 12, "num_blocks": 8, "block_size": 4,
         "max_blocks": 3}  # fmt: skip
TABLES = {
    "positions": np.array([0, 2], np.int32),
    "lengths": np.array([3, 2], np.int32),
    "block_table": np.array([[0, 1, 2], [5, 4, 3]], np.int32),
}
BSND, PA_BSND, BNSD, PA_BNSD = 0, 2, 4, 5


def bases(kernel: bind.Kernel, routine: str) -> Iterator[dict[str, Any]]:
    """Fields of a call that is accepted, in each layout."""
    declared = {f.name: f for f in kernel.header.structs[kernel.Rows[routine].__name__]}
    sizes = {name: value for name, value in SIZES.items() if name in declared}
    paged_only = kernel.header.text.count("a page's scales are one a row") > 0
    if routine != "append":  # rows of records, one after another
        sizes["block_size"] = SIZES["block_size"] if paged_only else 0
        sizes = {name: value for name, value in sizes.items() if name in declared}
    tensors = {
        name: np.ones(64, np.float32)
        for name, f in declared.items()
        if f.stars == 1 and not f.type.startswith("int") and name not in TABLES
    }
    for layout in (BSND, PA_BSND, BNSD, PA_BNSD) if routine == "append" else (None,):
        tables = {name: value for name, value in TABLES.items() if name in declared}
        made: dict[str, Any] = {**sizes, **tensors, **tables}
        if layout is not None:
            made["layout_kv"] = layout
            if layout in (BSND, BNSD):
                made.pop("block_table")
        if paged_only:
            made["heads_kv"] = 1
        for name in ("antiquant_scale", "antiquant_offset", "token_scales"):
            made.pop(name, None)
        yield {name: value for name, value in made.items() if name in declared}


def variants(kernel: bind.Kernel, routine: str) -> Iterator[dict[str, Any]]:
    """bases(), and what a cache of codes wants beside them."""
    declared = {f.name for f in kernel.header.structs[kernel.Rows[routine].__name__]}
    for base in bases(kernel, routine):
        yield base
        if "numbers_f32" in declared:
            yield {**base, "numbers_f32": 1}
        if "token_scales" in declared:
            for mode in (0, 1, 2):
                some = {"antiquant_scale": np.ones(4096, np.float32), "antiquant_f32": 1}
                own = {"token_scales": np.ones(64, np.float32)} if mode == 2 else some
                yield {**base, "antiquant_mode": mode, **own}
        if "value_cache" in declared:  # without values, and keys and values side by side
            yield {name: x for name, x in base.items() if name not in ("value", "value_cache")}


def walk_rows(name: str, routine: str, which: int, drawn: int) -> Counter:
    """The same of one of variants()."""
    kernel = helpers_every.kernel(name)
    c = getattr(kernel, f"_c_{routine}")
    fields = list(variants(kernel, routine))[which]
    walk = Walk(kernel, kernel.Rows[routine], fields, c)
    walk.ask()
    walk.alone()
    walk.together(np.random.default_rng(which), drawn)
    kernel.result(c(None, ctypes.byref(walk.error)), walk.error)
    assert walk.error.argument == kernel.constants["HL_ARG_ARGS"]
    assert c(None, None) != 0
    return walk.seen


def routines(name: str) -> list[str]:
    """Those that a header has: by its text, for nothing is compiled before a test is run."""
    kernel = helpers_every.description(name).name
    return [r for r in bind.ROUTINES if f"{kernel}_{r}(" in helpers_every.text(name)]


ROUTINES = [(name, routine) for name in helpers_every.HEADERS for routine in routines(name)]
PARTS = [n for n in helpers_every.HEADERS if "_merge_parts(" in helpers_every.text(n)]


@pytest.mark.parametrize("name,routine", ROUTINES)
def test_rows_with_any_argument_at_any_value(name, routine):
    seen: Counter = Counter()
    count = len(list(variants(helpers_every.kernel(name), routine)))
    for which in range(0, count, 1 if MANY else 3):
        seen += in_child(lambda w=which: walk_rows(name, routine, w, 200 if MANY else 20))
    assert len(seen) >= 4 and seen[0] > 0, seen


def walk_parts(name: str, drawn: int) -> Counter:
    """Two parts of two batches; results to memory of their own, or to the first part's."""
    kernel, rng = helpers_every.kernel(name), np.random.default_rng(4)
    count = 2 * 3 * 4
    fields: dict[str, Any] = {
        which: [np.ones(1 << 23, np.float32) for _ in range(2)] * 160
        for which in ("out", "max", "sum")
    }
    for which in ("max", "sum"):
        fields[which][0][count // 2] = 0
    fields |= {"parts": 2, "batch": 2, "seq_q": 3, "heads_q": 4, "heads_kv": 2}
    walk = Walk(kernel, kernel.Parts, fields, kernel._c_merge_parts)
    outputs = ("attention_out", "softmax_max", "softmax_sum", "softmax_lse")
    rooms = [walk.roomy(np.zeros(4096, np.float32)) for _ in outputs]
    addresses = dict(zip(outputs, (room.ctypes.data for room in rooms), strict=True))
    same = {
        "softmax_max": fields["max"][0].ctypes.data,
        "softmax_sum": fields["sum"][0].ctypes.data,
    }
    for given in (addresses, {**addresses, **same}, {**addresses, "out_f32": 1}):
        walk.put_all(given)
        walk.before = bytes(walk.args)
        walk.ask()
        walk.alone()
        walk.together(rng, drawn)
    walk.put_all({"batch": INT_MAX, "seq_q": INT_MAX})  # as large as no memory is
    assert walk.ask() != 0
    kernel._c_merge_parts(None, ctypes.byref(walk.error))
    assert walk.error.argument == kernel.constants["HL_ARG_PARTS"]
    return walk.seen


@pytest.mark.parametrize("name", PARTS)
def test_parts_with_any_argument_at_any_value(name):
    seen = in_child(lambda: walk_parts(name, 200 if MANY else 20))
    assert len(seen) >= 4 and seen[0] > 0, seen


@pytest.mark.parametrize("table", ["out", "max", "sum"])
def test_merging_does_not_write_over_the_tables_of_its_parts(table):
    """The tables of pointers were no memory of the call: results could lie on them, and a table
    could lie askew."""
    kernel = helpers_every.kernel(PARTS[0])
    ones = np.ones(4096, np.float32)
    fields: dict[str, Any] = {which: [ones, ones] for which in ("out", "max", "sum")}
    fields |= {"parts": 2, "batch": 1, "seq_q": 1, "heads_q": 1, "heads_kv": 1}
    parts, error = kernel.struct(kernel.Parts, fields), kernel.Error()
    at = getattr(parts, table)

    def refused(out: int, moved: int) -> tuple[str, str, str]:
        parts.attention_out = out
        setattr(parts, table, moved)
        status = kernel._c_merge_parts(ctypes.byref(parts), ctypes.byref(error))
        said = kernel.result(status, error)
        return said.status_name, said.argument, said.rule

    room = np.zeros(4096, np.float32).ctypes.data
    assert in_child(lambda: refused(at, at)) == ("HL_ERR_ALIAS", "ATTENTION_OUT", "DISJOINT")
    assert in_child(lambda: refused(room, at + 1)) == ("HL_ERR_ALIGN", "PARTS", "MULTIPLE_OF")
