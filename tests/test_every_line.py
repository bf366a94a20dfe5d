"""Random calls of every shipped header, whatever its operator, against its oracle; and sizes by
which each tile of the products gets its turn."""

import os

import helpers_every
import numpy as np
import pytest

from gen.isa import ISAS

MANY = "LLVM_PROFILE_FILE" in os.environ  # under `make coverage`
HEADS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 24, 33, 40, 64, 72)


def pairs() -> list[tuple[str, str]]:
    """All of them for coverage; else one instruction set of each header, in turn."""
    if MANY:
        return helpers_every.pairs()
    some = []
    for number, name in enumerate(helpers_every.HEADERS):
        isas = [isa for isa in helpers_every.isas_in(name) if not ISAS[isa].tiles]
        some.append((name, isas[number % len(isas)]))
    return some


@pytest.mark.parametrize("name,isa", pairs())
def test_random_calls(name, isa):
    """Calls of all kinds on ordinary memory, and every fourth by its tasks, in pieces if it can."""
    split = {} if helpers_every.description(name).trains else {"partials": True, "chunk_keys": 128}
    count = 5 if not MANY else 8 if ISAS[isa].tiles else 24
    for number, call in enumerate(helpers_every.calls(name, 11, count)):
        if number % 4 == 0:
            call.check(call.guarded(isa, by_task=True, **split), isa)
        else:
            call.check(call.run(isa), isa)


@pytest.mark.parametrize("name,isa", pairs())
def test_any_number_of_queries(name, isa):
    """Of heads, and of rows where they share their keys."""
    of = helpers_every.description(name)
    for number, heads in enumerate(HEADS[:: (4 if ISAS[isa].tiles else 1) if MANY else 8]):
        rows = heads if of.trains else 1 + number % 3
        keys = (37, 64, 131, 300)[number % 4]
        heads = 1 + number % 3 if of.trains else heads
        call = helpers_every.sized(name, keys=keys, rows=rows, heads=heads, seed=number)
        call.check(call.run(isa), isa)
        if number % 6 == 1 and not of.trains:  # the one call, with memory to cut rows in pieces
            room = {"partials": np.empty(1 << 24, np.uint8), "partials_bytes": 1 << 24}
            call.check(call.run(isa, chunk_keys=128, **room), isa)
        if number % 6 == 0 and not of.trains:
            call.check(call.guarded(isa, by_task=True, partials=True, chunk_keys=128), isa)
