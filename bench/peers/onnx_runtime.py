"""ONNX Runtime on the processor: the operator Attention of ONNX, and its own
GroupQueryAttention."""

from typing import Any

import numpy as np
from tensors import Shape, Tensors, allocate

from peers.base import MissingError, Peer, Prepared, fastest, mask, repeated
from peers.openblas import widened

OPSET, IR_VERSION = 23, 10  # the first with Attention


class OnnxRuntime(Peer):
    name = "ONNX Runtime"
    lacks = ("the faster of Attention, float32 only (16-bit caches lie ready in float32, twice the "
             "bytes; lists by a Gather), and GroupQueryAttention, float32 or float16, which also "
             "appends the last row")

    def __init__(self) -> None:
        try:
            import onnx
            import onnxruntime
        except (ImportError, OSError) as error:
            raise MissingError(str(error).splitlines()[-1][:160]) from error
        self.onnx, self.runtime = onnx, onnxruntime
        self.name = f"ONNX Runtime {onnxruntime.__version__}"

    def prepare(self, shape: Shape, t: Tensors, kv_format: str) -> Prepared:
        """The faster of both operators."""
        ways = {"Attention": self.attention(shape, t)}
        if t.value is not None and t.seen is None and t.value.shape == t.key.shape:
            ways["GroupQueryAttention"] = self.grouped(shape, t, kv_format)
        return fastest(ways)

    def grouped(self, shape: Shape, t: Tensors, kv_format: str) -> Prepared:
        """A step of decoding as its models have it: the cache [1][kv_heads][keys][channels] is
        extended in place by the row of the last token."""
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        dtype = np.dtype(np.float32 if kv_format == "f32" else np.float16)
        kind = kinds.FLOAT if kv_format == "f32" else kinds.FLOAT16
        heads, kv_heads, dk = shape.heads, shape.kv_heads, t.query.shape[-1]

        def cached(x: np.ndarray) -> np.ndarray:
            made = allocate((1, kv_heads, shape.keys, dk), dtype)
            made[0] = x.swapaxes(0, 1)
            return made

        past = {"past_key": cached(t.key), "past_value": cached(t.value)}
        inputs = {
            "query": t.query.astype(dtype).reshape(1, 1, heads * dk),
            "key": t.key[-1].astype(dtype).reshape(1, 1, -1),
            "value": t.value[-1].astype(dtype).reshape(1, 1, -1), **past,
            "seqlens_k": np.array([shape.keys - 1], np.int32),
            "total_sequence_length": np.array([shape.keys], np.int32)}
        out = np.empty((1, 1, heads * t.dv), dtype)
        outputs = {"out": out, "present_key": past["past_key"],
                   "present_value": past["past_value"]}
        node = helper.make_node("GroupQueryAttention", [*inputs], [*outputs],
                                domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads,
                                scale=t.scale)

        def described(arrays: dict[str, np.ndarray]) -> list[Any]:
            return [helper.make_tensor_value_info(
                name, kinds.INT32 if x.dtype == np.int32 else kind, x.shape)
                for name, x in arrays.items()]

        graph = helper.make_graph([node], "attention", described(inputs), described(outputs))
        session = self.started(graph)
        binding = session.io_binding()
        for name, x in inputs.items():
            binding.bind_input(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
        for name, x in outputs.items():
            binding.bind_output(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
        return Prepared(repeated([lambda: session.run_with_iobinding(binding)]),
                        lambda: out.reshape(1, heads, t.dv), (session, inputs, binding))

    def attention(self, shape: Shape, t: Tensors) -> Prepared:
        held = {"query": widened(t.query), "key": widened(t.key)}
        if t.value is not None:
            held["value"] = widened(t.value)
        session = self.session(shape, t, held)
        out = np.empty((1, shape.kv_heads, shape.heads // shape.kv_heads, t.dv), np.float32)
        lists = [None] if t.lists is None else list(t.lists)
        bindings = []
        for ids in lists:
            binding = session.io_binding()
            for name, x in (held if ids is None else {**held, "ids": ids}).items():
                binding.bind_input(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
            binding.bind_output("out", "cpu", 0, np.float32, out.shape, out.ctypes.data)
            bindings.append(binding)
        calls = [lambda binding=binding: session.run_with_iobinding(binding)
                 for binding in bindings]
        return Prepared(repeated(calls), lambda: out.reshape(1, shape.heads, t.dv),
                        (session, held, bindings))

    def session(self, shape: Shape, t: Tensors, held: dict[str, np.ndarray]) -> Any:
        """A model of one Attention; heads that share a cache are the rows of one head."""
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        group = shape.heads // shape.kv_heads
        nodes, constants = [], []

        def node(kind: str, inputs: list[str], out: str, **attributes: Any) -> str:
            nodes.append(helper.make_node(kind, inputs, [out], **attributes))
            return out

        def constant(name: str, values: list[int]) -> str:
            constants.append(helper.make_tensor(name, kinds.INT64, [len(values)], values))
            return name

        def heads_first(name: str) -> str:
            turned = node("Transpose", [name], f"{name}_turned", perm=[1, 0, 2])
            return node("Unsqueeze", [turned, constant(f"{name}_axes", [0])], f"{name}_heads")

        folded = constant("folded", [1, shape.kv_heads, group, t.query.shape[-1]])
        query = node("Reshape", ["query", folded], "query_heads")
        rows = node("Gather", ["key", "ids"], "rows", axis=0) if shape.listed else "key"
        key = heads_first(rows)
        if t.value is None:
            ends = [constant(name, [n]) for name, n in (("v0", 0), ("v1", t.dv), ("axis", 3))]
            value = node("Slice", [key, *ends], "values")
        else:
            value = heads_first("value")
        hidden = mask(t, np.float32)
        if hidden is not None:
            constants.append(helper.make_tensor("mask", kinds.FLOAT, hidden.shape, hidden.ravel()))
        node("Attention", [query, key, value, *([] if hidden is None else ["mask"])], "out",
             scale=t.scale)
        inputs = [helper.make_tensor_value_info(name, kinds.FLOAT, x.shape)
                  for name, x in held.items()]
        if shape.listed:
            inputs.append(helper.make_tensor_value_info("ids", kinds.INT32, [shape.keys]))
        result = helper.make_tensor_value_info(
            "out", kinds.FLOAT, [1, shape.kv_heads, group, t.dv])
        return self.started(helper.make_graph(nodes, "attention", inputs, [result], constants))

    def started(self, graph: Any) -> Any:
        """A session of a graph, on one thread."""
        made = self.onnx.helper.make_opsetid
        model = self.onnx.helper.make_model(
            graph, ir_version=IR_VERSION,
            opset_imports=[made("", OPSET), made("com.microsoft", 1)])
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return self.runtime.InferenceSession(model.SerializeToString(), options,
                                             providers=["CPUExecutionProvider"])
