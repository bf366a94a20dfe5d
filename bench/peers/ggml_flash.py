"""ggml, the library under llama.cpp: its operator flash_attn_ext, through the package
ggml-python."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from tensors import Shape, Tensors, allocate

from gen import bind
from peers.base import MissingError, Peer, Prepared, fastest, mask, repeated

SCRATCH = 64 << 20  # for what a graph makes besides its tensors
KINDS = {"i8": "q8_0"}  # of ours -> what it has in its place
NUMBERS = {"f32": np.float32, "f16": np.float16, "bf16": bind.DTYPES["bf16"], "q8_0": np.float32}


class Ggml(Peer):
    name = "ggml"
    lacks = ("no list: get_rows copies rows, into float32; of bf16 caches the faster of bf16 and "
             "f16; of int8 ones its own q8_0, a scale for 32 channels")

    def __init__(self) -> None:
        try:
            import ggml
        except (ImportError, OSError, RuntimeError) as error:
            raise MissingError(str(error).splitlines()[-1][:160]) from error
        self.ggml = ggml
        self.name = f"ggml-python {ggml.__version__}"
        # The package does not bind the functions of the plan.
        library = ctypes.CDLL(str(Path(ggml.__file__).parent / "lib" / "libggml-cpu.so"))
        library.ggml_graph_plan.restype = ggml.ggml_cplan
        library.ggml_graph_plan.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        library.ggml_graph_compute.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.library = library
        ggml.ggml_cpu_init()

    def prepare(self, shape: Shape, t: Tensors, kv_format: str) -> Prepared:
        """The fastest of: heads as they are, and heads that share a cache folded into rows; in the
        types that such a cache may have."""
        ways = {}
        for kind in ("bf16", "f16") if kv_format == "bf16" else (KINDS.get(kv_format, kv_format),):
            if t.seen is None:
                ways[f"heads, {kind}"] = self.graph(shape, t, kind, False)
            if shape.heads > shape.kv_heads:
                ways[f"folded, {kind}"] = self.graph(shape, t, kind, True)
        return fastest(ways)

    def refuses(self, shape: Shape, kv_format: str) -> str:
        return "" if kv_format in KINDS else super().refuses(shape, kv_format)

    def graph(self, shape: Shape, t: Tensors, kind: str, folded: bool) -> Prepared:
        """flash_attn_ext over copies of the tensors. folded: q is [kv_heads][group] instead of
        [heads][1]."""
        g = self.ggml
        stored = NUMBERS[kind]
        kind = getattr(g, f"GGML_TYPE_{kind.upper()}")
        dk, kv_heads = t.query.shape[-1], shape.kv_heads
        key, value = (x if x is None or x.dtype == stored else x.astype(stored)
                      for x in (t.key, t.value))
        held = [t.query.astype(np.float32), key, *([] if value is None else [value])]
        size = sum(x.nbytes for x in held) + SCRATCH
        if shape.listed:
            size += 4 * shape.keys * dk
        memory = allocate((size,), np.uint8)
        context = g.ggml_init(g.ggml_init_params(size, memory.ctypes.data, False))
        group = shape.heads // kv_heads if folded else 1
        q = g.ggml_new_tensor_3d(context, g.GGML_TYPE_F32, dk, group, shape.heads // group)
        k = filled(g, context, kind, key)
        fill(g, q, held[0])
        ids = None
        if shape.listed:
            ids = g.ggml_new_tensor_1d(context, g.GGML_TYPE_I32, shape.keys)
            flat = g.ggml_reshape_2d(context, k, dk, shape.cache_keys)
            k = g.ggml_reshape_3d(context, g.ggml_get_rows(context, flat, ids), dk, 1, shape.keys)
        keys = g.ggml_permute(context, k, 0, 2, 1, 3)
        if value is None:
            part = keys.contents
            v = g.ggml_view_3d(context, keys, t.dv, shape.keys, kv_heads, part.nb[1], part.nb[2], 0)
        else:
            v = g.ggml_permute(context, filled(g, context, kind, value), 0, 2, 1, 3)
        hidden, x = None, mask(t, np.float16)
        if x is not None:
            hidden = g.ggml_new_tensor_2d(context, g.GGML_TYPE_F16, shape.keys, group)
            fill(g, hidden, x)
        result = g.ggml_flash_attn_ext(context, q, keys, v, hidden, t.scale, 0.0, 0.0)
        graph = g.ggml_new_graph(context)
        g.ggml_build_forward_expand(graph, result)
        plan = self.library.ggml_graph_plan(ctypes.addressof(graph.contents), 1, None)
        work = allocate((max(plan.work_size, 1),), np.uint8)
        plan.work_data = ctypes.cast(work.ctypes.data, ctypes.POINTER(ctypes.c_ubyte))
        address, plan_address = ctypes.addressof(graph.contents), ctypes.addressof(plan)

        def call(entries: np.ndarray | None) -> None:
            if entries is not None:
                ctypes.memmove(g.ggml_get_data(ids), entries.ctypes.data, entries.nbytes)
            if self.library.ggml_graph_compute(address, plan_address):
                raise RuntimeError("ggml failed")

        def out() -> np.ndarray:
            made = np.empty((1, shape.heads, t.dv), np.float32)
            ctypes.memmove(made.ctypes.data, g.ggml_get_data(result), made.nbytes)
            # [row][head][channel], where folded: row and head changed places
            if folded:
                made = made.reshape(group, kv_heads, t.dv).transpose(1, 0, 2)
            return np.ascontiguousarray(made).reshape(1, shape.heads, t.dv)

        lists = [None] if t.lists is None else list(t.lists)
        return Prepared(repeated([lambda x=x: call(x) for x in lists]), out,
                        (memory, work, plan, graph), lambda: g.ggml_free(context))


def fill(g: Any, tensor: Any, x: np.ndarray) -> None:
    """Copies an array into a tensor of ggml."""
    ctypes.memmove(g.ggml_get_data(tensor), x.ctypes.data, x.nbytes)


def filled(g: Any, context: int, kind: int, x: np.ndarray) -> Any:
    """A cache [keys][heads][channels] as a tensor of ggml, copied, or quantised where ggml has
    blocks of codes."""
    made = g.ggml_new_tensor_3d(context, kind, x.shape[2], x.shape[1], x.shape[0])
    if kind == g.GGML_TYPE_Q8_0:
        source = ctypes.cast(x.ctypes.data, ctypes.POINTER(ctypes.c_float))
        g.ggml_quantize_chunk(kind, source, g.ggml_get_data(made), 0, x.shape[0] * x.shape[1],
                              x.shape[2], None)
    else:
        fill(g, made, x)
    return made
