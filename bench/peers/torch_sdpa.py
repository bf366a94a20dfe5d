"""PyTorch on the processor: scaled_dot_product_attention."""

from typing import Any

import numpy as np
import training
from tensors import Shape, Tensors

from peers.base import MissingError, Peer, Prepared, fastest, mask, repeated

# Unfolded, PyTorch copies the cache for every head. Beyond this that takes minutes and all memory.
MOST_COPIED = 256 << 20


class Torch(Peer):
    name = "PyTorch"
    lacks = "no list: a gather makes a copy; heads that share a cache are folded into rows by hand"

    def __init__(self) -> None:
        try:
            import torch
        except (ImportError, OSError) as error:
            raise MissingError(str(error).splitlines()[-1][:160]) from error
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.name = f"PyTorch {torch.__version__.split('+')[0]}"

    def tensor(self, x: np.ndarray) -> Any:
        """The same memory as a tensor of PyTorch."""
        torch = self.torch
        if x.dtype.kind == "f" and x.dtype.name != "bfloat16":
            return torch.from_numpy(x)
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)

    def refuses(self, shape: Shape, kv_format: str) -> str:
        return "" if training.is_prompt(shape) else super().refuses(shape, kv_format)

    def prompt(self, shape: Shape, t: Tensors) -> Prepared:
        """A causal prompt, as PyTorch has it."""
        attend = self.torch.nn.functional.scaled_dot_product_attention
        q, k, v = (self.tensor(x).permute(1, 0, 2)[None] for x in (t.query, t.key, t.value))
        last: list[Any] = [None]

        def call() -> None:
            last[0] = attend(q, k, v, scale=t.scale, is_causal=True,
                             enable_gqa=shape.heads != shape.kv_heads)

        def out() -> np.ndarray:
            return last[0][0].permute(1, 0, 2).float().contiguous().numpy()

        return Prepared(repeated([call]), out)

    def prepare(self, shape: Shape, t: Tensors, kv_format: str) -> Prepared:
        """The fastest of: heads as they are, heads folded into rows of one head, and the same with
        the whole key as value, which spares PyTorch the slow path of unequal widths."""
        if training.is_prompt(shape):
            return self.prompt(shape, t)
        dv, kv_heads, group = t.dv, shape.kv_heads, shape.heads // shape.kv_heads
        attend = self.torch.nn.functional.scaled_dot_product_attention
        q, k = self.tensor(t.query), self.tensor(t.key)  # [1][heads][dk], [keys][kv_heads][dk]
        value = None if t.value is None else self.tensor(t.value)
        lists = [None] if t.lists is None else [self.torch.from_numpy(x).long() for x in t.lists]
        folded = q.view(1, kv_heads, group, -1)
        whole = q.view(1, shape.heads, 1, -1)
        hidden = None if t.seen is None else self.tensor(mask(t, t.query.dtype))
        last: list[Any] = [None]

        def call(query: Any, ids: Any, wide: bool) -> None:
            rows = k if ids is None else k.index_select(0, ids)
            held = rows.permute(1, 0, 2)[None]
            v = held if value is None else value.permute(1, 0, 2)[None]
            v = v if wide or value is not None else v[..., :dv]
            last[0] = attend(query, held, v, scale=t.scale, attn_mask=hidden,
                             enable_gqa=query.shape[1] != kv_heads)

        def out() -> np.ndarray:
            made = last[0].float().reshape(1, shape.heads, -1)[..., :dv]
            return made.contiguous().numpy()

        ways = {"folded": (folded, False), "folded, key as value": (folded, True)}
        if hidden is None and group > 1 and group * t.key.nbytes < MOST_COPIED:
            ways["heads"] = (whole, False)
        return fastest({
            name: Prepared(repeated([lambda ids=ids, query=query, wide=wide: call(query, ids, wide)
                                     for ids in lists]), out)
            for name, (query, wide) in ways.items()})
