"""OpenBLAS: sgemm, softmax with expf, sgemm."""

import numpy as np
from tensors import Shape, Tensors, allocate

from peers.base import Peer, Prepared, addresses, compiled


def widened(x: np.ndarray) -> np.ndarray:
    """The same numbers in float32, in memory like that of the original."""
    made = allocate(x.shape, np.float32)
    made[:] = x
    return made


class OpenBlas(Peer):
    name = "OpenBLAS"
    lacks = "float32 only: 16-bit caches lie ready in float32, twice the bytes; lists by a copy"

    def __init__(self) -> None:
        # Fast maths lets GCC take the C library's vector expf, as a user would want it.
        self.library = compiled(
            "openblas.c", ("-lopenblas", "-lm"), {"peer_openblas": ("ppppiiiiiifppiip", "v")},
            flags=("-O3", "-march=native", "-ffast-math"))

    def prepare(self, shape: Shape, t: Tensors, kv_format: str) -> Prepared:
        query, key = widened(t.query), widened(t.key)
        value = key if t.value is None else widened(t.value)
        out = np.empty((1, shape.heads, t.dv), np.float32)
        dk, n = query.shape[-1], 1 if t.lists is None else len(t.lists)
        group = shape.heads // shape.kv_heads
        memory = np.empty(group * shape.keys + (shape.keys * dk if shape.listed else 0),
                          np.float32)
        lists = addresses(t.lists)

        def run(first: int, count: int) -> None:
            self.library.peer_openblas(
                query.ctypes.data, key.ctypes.data, value.ctypes.data, lists, shape.keys,
                shape.heads, shape.kv_heads, dk, t.dv, n, t.scale, memory.ctypes.data,
                out.ctypes.data, first, count,
                None if t.seen is None else t.seen.ctypes.data)

        return Prepared(run, lambda: out, (query, key, value, lists, memory, t))
