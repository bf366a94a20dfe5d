"""OpenVINO on the processor: its operator ScaledDotProductAttention."""

from typing import Any

import numpy as np
from tensors import Shape, Tensors

from peers.base import MissingError, Peer, Prepared, mask, repeated


class OpenVino(Peer):
    name = "OpenVINO"
    lacks = ("no list: a gather in the graph; heads that share a cache are folded into rows by "
             "hand; weights rounded to 16 bits")

    def __init__(self) -> None:
        try:
            import openvino
            from openvino import opset13
        except (ImportError, OSError) as error:
            raise MissingError(str(error).splitlines()[-1][:160]) from error
        self.ov, self.ops, self.core = openvino, opset13, openvino.Core()
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]}"

    def tensor(self, x: np.ndarray, kv_format: str) -> Any:
        """The same memory as a tensor of OpenVINO."""
        kind = getattr(self.ov.Type, kv_format)
        if kv_format == "bf16":
            x = x.view(np.uint16)
        return self.ov.Tensor(x, self.ov.Shape(x.shape), kind)

    def prepare(self, shape: Shape, t: Tensors, kv_format: str) -> Prepared:
        ov, ops = self.ov, self.ops
        kind = getattr(ov.Type, kv_format)
        dk, group = t.query.shape[-1], shape.heads // shape.kv_heads
        query = ops.parameter([1, shape.kv_heads, group, dk], kind)
        key = ops.parameter([*t.key.shape], kind)
        inputs = [query, key]
        arrays = [t.query.reshape(1, shape.kv_heads, group, dk), t.key]
        rows = key
        if shape.listed:
            ids = ops.parameter([shape.keys], ov.Type.i32)
            inputs.append(ids)
            rows = ops.gather(key, ids, ops.constant(np.int32(0)))

        def heads_first(x: Any) -> Any:
            order = ops.constant(np.array([1, 0, 2], np.int32))
            return ops.unsqueeze(ops.transpose(x, order), ops.constant(np.int32(0)))

        held = heads_first(rows)
        if t.value is None:
            begin, end, step = (ops.constant(np.array([n], np.int32)) for n in (0, t.dv, 1))
            values = ops.slice(held, begin, end, step, ops.constant(np.array([3], np.int32)))
        else:
            value = ops.parameter([*t.value.shape], kind)
            inputs.append(value)
            values = heads_first(value)
        scale = ops.convert(ops.constant(np.float32(t.scale)), kv_format)
        hidden = np.zeros((1, 1), np.float32) if t.seen is None else mask(t, np.float32)
        hidden = ops.convert(ops.constant(hidden), kv_format)
        node = ops.scaled_dot_product_attention(query, held, values, hidden, scale)
        compiled = self.core.compile_model(ov.Model([node], inputs, "attention"), "CPU", {
            "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": kv_format})
        request = compiled.create_infer_request()
        fixed = [self.tensor(x, kv_format) for x in arrays]
        for i, x in enumerate(fixed):
            request.set_input_tensor(i, x)
        if t.value is not None:
            request.set_input_tensor(len(inputs) - 1, self.tensor(t.value, kv_format))
        lists = [None]
        if shape.listed:
            lists = [ov.Tensor(x, ov.Shape(x.shape), ov.Type.i32) for x in t.lists]

        def call(ids: Any) -> None:
            if ids is not None:
                request.set_input_tensor(2, ids)
            request.infer()

        def out() -> np.ndarray:
            made = request.get_output_tensor(0).data
            if kv_format == "bf16":
                made = (made.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            return np.array(made, np.float32).reshape(1, shape.heads, t.dv)

        return Prepared(repeated([lambda ids=ids: call(ids) for ids in lists]), out,
                        (compiled, fixed, lists))
