"""One way to make random calls of any shipped header, whatever its operator, and to hold their
results against its oracle.

    for call in calls(name, seed=1, count=20):
        call.check(call.guarded("avx512", "left"), "avx512")

What differs between operators is in helpers_cases, helpers_decode and helpers_fusion.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import helpers
import helpers_cases
import helpers_decode
import helpers_fusion
import helpers_runner
import numpy as np
import pytest
from helpers_memory import Arena
from oracle import PA_BSND

from gen import bind, spec

HEADERS = tuple(header.name for header in spec.load_catalogue())
MODULES = {
    "sparse_flash_attention": helpers,
    "sparse_flash_attention_antiquant": helpers,
    "incre_flash_attention": helpers_decode,
    "fusion_attention": helpers_fusion,
    "fusion_attention_grad": helpers_fusion,
}


ADOPTED: dict[str, Any] = {}


def adopt(name: str, **table: Any) -> str:
    """A small header of tests' own: from now on it goes by its name wherever a shipped one does."""
    op = table["op"]
    if op in (helpers.OP, helpers.ANTIQUANT):
        helpers.SPECS[name] = table
    elif op == helpers_decode.OP:
        helpers_decode.SPECS[name] = table
    else:
        helpers_fusion.EVERY[name] = table
        if op == helpers_fusion.GRAD:
            helpers_fusion.GRADS[name] = table
            forward = {**table, "op": helpers_fusion.OP}
            helpers_fusion.FORWARD[name] = adopt(f"{name}_forward", **forward)
    ADOPTED[name] = MODULES[op].header(name).kernels[0]
    return name


@functools.cache
def description(name: str) -> Any:
    """The generator's Kernel of a shipped header, or of one that was adopted."""
    if name in ADOPTED:
        return ADOPTED[name]
    return next(h for h in spec.load_catalogue() if h.name == name).kernels[0]


def of_operator(name: str) -> Any:
    """Helpers of a header's operator."""
    return MODULES[description(name).op]


def text(name: str) -> str:
    """The header as it is shipped."""
    return of_operator(name).text(name)


def kernel(name: str) -> bind.Kernel:
    """Its compiled kernel, once for the whole run."""
    return of_operator(name).kernel(name)


def isas_in(name: str) -> tuple[str, ...]:
    """The instruction sets that it has and that run here, tiles emulated where need be."""
    return of_operator(name).isas_in(name)


def pairs(*names: str) -> list[tuple[str, str]]:
    """Every (name, instruction set) that there is; of all shipped headers if none is named."""
    return [(name, isa) for name in names or HEADERS for isa in isas_in(name)]


def by_pair(*names: str) -> pytest.MarkDecorator:
    """Parametrises name and isa."""
    return pytest.mark.parametrize("name,isa", pairs(*names))


@dataclass
class Call:
    """A call of one header: what it is given, and what should come out."""

    name: str
    case: Any  # its operator's Case; of gradients a GradCase

    @property
    def kernel(self) -> bind.Kernel:
        return kernel(self.name)

    @property
    def grads(self) -> bool:
        return isinstance(self.case, helpers_fusion.GradCase)

    @property
    def stats(self) -> bool:
        """Whether the header has statistics to write."""
        return not self.grads and self.kernel.stats

    @functools.cached_property
    def known(self) -> Any:
        """What the oracle makes of it, once for all instruction sets."""
        if self.grads:
            return helpers_fusion.expected_grads(self.case)
        module = of_operator(self.name)
        return None if module is helpers else module.expected(self.case.args)

    def inputs(self) -> dict[str, Any]:
        """The arrays behind input pointers that are not NULL."""
        return self.case.inputs()

    def sizes(self) -> dict[str, Any]:
        """All sizes and options."""
        return (self.case.case if self.grads else self.case).sizes()

    def outputs(self, arena: Arena | None = None) -> dict[str, np.ndarray]:
        """Fresh outputs, every byte 0xff."""
        if self.grads:
            return self.case.outputs(arena)
        return self.case.outputs(arena, stats=self.stats)

    def fields(self, isa: str | int = 0) -> dict[str, Any]:
        """Everything but outputs, as bind takes it."""
        isa = self.kernel.isas()[isa] if isinstance(isa, str) else isa
        return {**self.inputs(), **self.sizes(), "isa": isa}

    def run(self, isa: str | int = 0, **more: Any) -> dict[str, np.ndarray]:
        """The one-call function on ordinary memory; asserts that it is accepted."""
        outputs = self.outputs()
        result = self.kernel.run(**{**self.fields(isa), **outputs, **more})
        assert result.ok, f"{result.error_text} ({self})"
        return outputs

    def guarded(self, isa: str, flush: str = "right", **way: Any) -> dict[str, np.ndarray]:
        """In a child process, every buffer flush with a forbidden page, inputs read-only; `way` as
        in the operator's own Way: strides, by_task, chunk_keys, partials."""
        if self.grads:
            made = helpers_fusion.Way(isa, flush, **way)
            return helpers_fusion.run_grad_guarded(self.kernel, self.case, made)
        module = of_operator(self.name)
        module = helpers_cases if module is helpers else module
        return module.run_guarded(self.kernel, self.case, module.Way(isa, flush, **way))

    def check(self, got: dict[str, np.ndarray], isa: str) -> None:
        """All outputs against the oracle, each element within its bound."""
        if self.grads:
            helpers_fusion.check_grads(self.case, got, isa, self.known)
        elif (module := of_operator(self.name)) is helpers:
            helpers.check(self.case.args, got, isa)
        elif module is helpers_decode:
            helpers_decode.check(self.case.args, got, isa, known=self.known)
        else:
            helpers_fusion.check(self.case, got, isa, known=self.known)

    def recorded(self, isa: int, mode: int = 0, **more: Any) -> tuple[bytes, dict[str, Any]]:
        """The call for runner.c (helpers_runner.play), and the empty outputs that it will fill."""
        outputs = self.outputs()
        args: ctypes.Structure = self.kernel.args(**{**self.sizes(), "isa": isa, **more})
        return helpers_runner.packed(args, mode, self.inputs(), outputs), outputs


def call_of(name: str, shape: Any) -> Call:
    """The call that an operator's Shape describes."""
    module = of_operator(name)
    if description(name).backward:
        return Call(name, helpers_fusion.make_grad_case(name, shape))
    make_case = helpers_cases.make_case if module is helpers else module.make_case
    return Call(name, make_case(module.kernel(name), shape))


def shapes(name: str, seed: int, count: int) -> list[Any]:
    """Calls of all kinds, drawn once, as Shapes of the header's operator."""
    of = description(name)
    if of.trains:
        return [shape for shape, _ in helpers_fusion.various(name, seed, count)]
    if of.decodes:
        return [shape for shape, _ in helpers_decode.various(name, seed, count)]
    drawn = helpers_runner.various(
        seed,
        count,
        slots="slots" in of.features,
        rope=of.rope > 0,
        paged="BSND" not in of.layout_kv,
    )
    return [shape for shape, _ in drawn]


def calls(name: str, seed: int, count: int) -> Iterable[Call]:
    """Random calls of a header."""
    return (call_of(name, shape) for shape in shapes(name, seed, count))


def sized(name: str, keys: int, rows: int = 1, heads: int = 1, seed: int = 0, **more: Any) -> Call:
    """A plain call of one batch with so many keys, rows and query heads a kv head; `more` changes
    fields of the operator's Shape."""
    of = description(name)
    if of.trains:
        kind = helpers_fusion.Shape
        shape = kind(lens_q=(rows,), lens_kv=(keys,), group=heads, seed=seed)
    elif of.decodes:
        shape = helpers_decode.Shape(lens=(keys,), seq_q=rows, group=heads, seed=seed)
    else:
        layout = {} if "BSND" in of.layout_kv else {"layout_kv": PA_BSND}
        kind = helpers_cases.Shape
        shape = kind(lens_q=(rows,), lens_kv=(keys,), group=heads, seed=seed, **layout)
    return call_of(name, dataclasses.replace(shape, **more))
