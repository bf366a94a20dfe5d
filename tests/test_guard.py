"""No byte outside the described memory is read or written: every shipped header, every instruction
set, every buffer flush left and flush right against pages that may not be touched.

A slice of the sweep by default; all of it with HEADLIGHT_GUARD=full (`make guard`).
"""

import helpers_every as every
from helpers_guard import FULL, jobs, note
from helpers_memory import survey

SLICE = 101  # every so many jobs of the sweep: a prime, so that all options come up


@every.by_pair()
def test_sweep(name, isa):
    """Hazards 5, 30 and 45: keys and rows from 0 to one past two tiles, heads, batches, pages,
    lists; results do not depend on where buffers lie, and are the oracle's."""
    every.kernel(name)  # here, not in each child
    some = jobs(name, (isa,))
    note("sweep", name, isa, survey(some if FULL else some[len(name) % 17 :: SLICE]))
