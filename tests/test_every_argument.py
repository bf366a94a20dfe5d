"""Every argument of every shipped header, alone and together with others, at values that a caller
should not pass: it is refused with a status, an argument, a rule and a sentence, or accepted; and
nothing is written either way. What a refusal has to say is in the tests of bad input."""

import ctypes
from collections import Counter
from collections.abc import Iterator
from typing import Any

import helpers_every
import numpy as np
import pytest
from helpers_memory import in_child

from gen import bind

INT_MIN, INT_MAX, FAR = -(2**31), 2**31 - 1, 2**63 - 1
ROOM = 1 << 23  # bytes behind each array: a larger count, if accepted, finds zeros there
TOP = 2**64 - 4096  # an address that no memory of this size can have
WHOLE = (-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 100, 128, 129, 256, INT_MIN)
VALUES = {
    ctypes.c_int32: (*WHOLE, 1024, 2048, 3072, 65537, INT_MAX),
    ctypes.c_int64: (*WHOLE, INT_MAX, 2**32, 2**40, 2**40 + 1, -(2**40) - 1, FAR),
    ctypes.c_float: (0.0, 0.5, 1.0, 2.0, -1.0, float("inf"), float("-inf"), float("nan")),
    ctypes.c_uint64: (0, 1, 2**20, 2**40, FAR),
}
# Counts of what plan reads: with nothing to write, nothing overlaps, and a larger one is believed.
COUNTS = {"batch", "seq_q"}


class Caller:
    """A call whose arguments can be changed, every array with room behind it."""

    def __init__(self, call: helpers_every.Call) -> None:
        self.kernel, self.kept, self.arrays = call.kernel, [], {}
        fields: dict[str, Any] = {**call.inputs(), **call.sizes(), **call.outputs()}
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                fields[name] = self.roomy(value)
                if value.dtype in (np.int32, np.int64) and value.size:
                    self.arrays[name] = fields[name].reshape(-1)
        self.args = self.kernel.args(**fields)
        self.before = bytes(self.args)
        self.plan, self.error = self.kernel.Plan(), self.kernel.Error()
        self.places = list(self.leaves())
        self.empty = any(a.size == 0 for a in call.outputs().values())
        declared = self.kernel.header.structs[self.kernel.Args.__name__]
        # Plan looks into these: an address with nothing behind it would be its caller's fault.
        self.read = {f.name for f in declared if f.stars and f.type.startswith("int")}
        self.read.add("atten_mask")

    def roomy(self, array: np.ndarray) -> np.ndarray:
        room = np.zeros(ROOM + array.nbytes, np.uint8)
        self.kept.append(room)
        made = room[: array.nbytes].view(array.dtype).reshape(array.shape)
        made[...] = array
        return made

    def leaves(self) -> Iterator[tuple[str, int, Any]]:
        """(field, offset, type) of all that the struct holds."""
        for name, kind in self.kernel.Args._fields_:
            at = getattr(self.kernel.Args, name).offset
            if issubclass(kind, ctypes.Structure):
                for part, inner in kind._fields_:
                    yield name, at + getattr(kind, part).offset, inner
            else:
                yield name, at, kind

    def values(self, place: tuple[str, int, Any]) -> tuple[Any, ...]:
        """What to try there."""
        name, at, kind = place
        now = kind.from_buffer(self.args, at).value
        if kind is ctypes.c_void_p:
            others = {kind.from_buffer(self.args, p[1]).value for p in self.places if p[2] is kind}
            dummy = self.kept[0].ctypes.data + ROOM // 2
            near = tuple(x for other in sorted(others - {None, now}) for x in (other, other + 1))
            made = (None, dummy, dummy + 1, (now or dummy) + 1, (now or dummy) + 4, *near)
            return made if name in self.read else (*made, TOP)
        if kind in (ctypes.c_float,):
            return VALUES[kind]
        listed = VALUES.get(kind, VALUES[ctypes.c_int64])
        listed += (now + 1, now - 1, 2 * now)
        most = 300 if name in COUNTS or self.empty else FAR
        return tuple(v for v in dict.fromkeys(listed) if v <= most)

    def put(self, place: tuple[str, int, Any], value: Any) -> None:
        place[2].from_buffer(self.args, place[1]).value = value

    def restore(self) -> None:
        ctypes.memmove(ctypes.byref(self.args), self.before, len(self.before))

    def ask(self) -> str:
        """Plans; the status's name. Asserts what has to hold of any answer."""
        kernel, plan = self.kernel, self.plan
        ctypes.memset(ctypes.byref(plan), 0xC3, ctypes.sizeof(plan))
        given = bytes(self.args)
        status = kernel._c_plan(*map(ctypes.byref, (plan, self.args, self.error)))
        said = kernel.result(status, self.error)
        assert bytes(self.args) == given, "the caller's struct was changed"
        assert self.error.status == status
        if status == 0:
            assert plan.n_tasks >= 0
            return said.status_name
        assert bytes(plan) == b"\xc3" * ctypes.sizeof(plan), f"refused, but planned: {said}"
        assert said.status_name != "?" and said.argument not in ("?", "NONE"), said
        assert said.rule not in ("?", "NONE") and len(said.error_text) > 10, said
        return said.status_name


def alone(caller: Caller) -> Counter:
    """Every argument at every value, and every entry of metadata."""
    seen: Counter = Counter()
    for place in caller.places:
        for value in caller.values(place):
            caller.put(place, value)
            seen[caller.ask()] += 1
            caller.restore()
    for array in caller.arrays.values():
        for at in {0, 1, len(array) // 2, len(array) - 1} & set(range(len(array))):
            now = array[at]
            for value in (-1, -2, INT_MIN, INT_MAX, 0, 1, now - 1, now + 1, array[at - 1]):
                array[at] = value
                seen[caller.ask()] += 1
            array[at] = now
    return seen


def together(caller: Caller, rng: np.random.Generator, count: int) -> Counter:
    """Two to four arguments at a time, drawn."""
    seen: Counter = Counter()
    for _ in range(count):
        for pick in rng.integers(0, len(caller.places), rng.integers(2, 5)):
            values = caller.values(caller.places[pick])
            caller.put(caller.places[pick], values[rng.integers(len(values))])
        seen[caller.ask()] += 1
        caller.restore()
    return seen


def walk(calls: list[helpers_every.Call], seed: int, drawn: int) -> Counter:
    rng = np.random.default_rng(seed)
    seen: Counter = Counter()
    for call in calls:
        caller = Caller(call)
        seen += alone(caller) + together(caller, rng, drawn)
    return seen


@pytest.mark.parametrize("name", helpers_every.HEADERS)
def test_any_argument_at_any_value(name):
    """Each kind of refusal comes up, and calls that are still accepted."""
    calls = list(helpers_every.calls(name, 5, 12))
    seen = in_child(lambda: walk(calls, 7, 300))
    kinds = {"HL_OK", "HL_ERR_NULL", "HL_ERR_SHAPE", "HL_ERR_UNSUPPORTED", "HL_ERR_VALUE"}
    assert kinds | {"HL_ERR_ALIAS", "HL_ERR_LENGTH"} <= set(seen), seen
    assert seen.total() > 10000


def test_a_plan_that_writes_before_it_refuses_is_noticed():
    """The control: a plan whose copy of the arguments is the caller's."""
    name = next(n for n in helpers_every.HEADERS if helpers_every.isas_in(n) == ("scalar",))
    text = helpers_every.text(name)
    broken = text.replace("p.args = *args;", "p.args = *args; plan->args = *args;")
    assert broken != text
    call = next(iter(helpers_every.calls(name, 5, 1)))
    kernel = bind.load(broken, flags=("-O0",))
    with pytest.raises(AssertionError, match="refused, but planned"):
        caller = Caller(call)
        caller.kernel = kernel
        alone(caller)
