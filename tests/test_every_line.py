"""Random calls of every shipped header, whatever its operator, against its oracle."""

import helpers_every
import pytest


@pytest.mark.parametrize("name,isa", helpers_every.pairs())
def test_random_calls(name, isa):
    """Calls of all kinds on ordinary memory, and every fourth by its tasks, in pieces if it can."""
    split = {} if helpers_every.description(name).trains else {"partials": True, "chunk_keys": 128}
    for number, call in enumerate(helpers_every.calls(name, 11, 32)):
        if number % 4 == 0:
            call.check(call.guarded(isa, by_task=True, **split), isa)
        else:
            call.check(call.run(isa), isa)
