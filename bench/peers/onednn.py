"""oneDNN: matmul, softmax, matmul."""

import os

import ml_dtypes
import numpy as np
from tensors import Shape, Tensors

from peers.base import MissingError, Peer, Prepared, addresses, compiled

FORMATS = {"f32": 0, "bf16": 1}


class OneDnn(Peer):
    name = "oneDNN"
    lacks = "no attention operator: matmul, softmax, matmul through memory; lists by a copy; no f16"

    def __init__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        self.library = compiled(
            "onednn.c", ("-ldnnl",),
            {"peer_onednn_make": ("ppppiiiiiifipp", "p"), "peer_onednn_run": ("pii", "i"),
             "peer_onednn_free": ("p", "v"), "peer_onednn_version": ("", "i")})
        version = self.library.peer_onednn_version()
        self.name = f"oneDNN {version // 100}.{version % 100}"

    def refuses(self, shape: Shape, kv_format: str) -> str:
        if kv_format not in FORMATS:
            return f"no {kv_format} on processors"
        return super().refuses(shape, kv_format)

    def prepare(self, shape: Shape, t: Tensors, kv_format: str) -> Prepared:
        dtype = ml_dtypes.bfloat16 if kv_format == "bf16" else np.float32
        out = np.empty((1, shape.heads, t.dv), dtype)
        value = t.key if t.value is None else t.value
        n, lists = 1 if t.lists is None else len(t.lists), addresses(t.lists)
        handle = self.library.peer_onednn_make(
            t.query.ctypes.data, t.key.ctypes.data, value.ctypes.data, lists, shape.keys,
            shape.heads, shape.kv_heads, t.query.shape[-1], t.dv, n, t.scale, FORMATS[kv_format],
            out.ctypes.data, None if t.seen is None else t.seen.ctypes.data)
        if not handle:
            raise MissingError("it refused to make the primitives")

        def run(first: int, count: int) -> None:
            status = self.library.peer_onednn_run(handle, first, count)
            if status:
                raise RuntimeError(f"oneDNN failed with status {status}")

        return Prepared(run, lambda: out, (t, lists),
                        lambda: self.library.peer_onednn_free(handle))
