"""What NumPy arrays say about a call of fusion_attention or fusion_attention_grad: sizes, layout,
strides, options, and the outputs that belong to it.

Arrays of rank 4 are [B][S][N][D] unless input_layout says SBH or BNSD; of rank 3 [T][N][D] where
actual_seq_qlen is given, else heads and channels are joined: [B][S][H], or [S][B][H] for SBH.
"""

import math
from typing import Any

import numpy as np

NO_LIMIT = 2147483647  # of pre_tokens and next_tokens
LAST_ROWS = 1024
TENSORS = ("query", "key", "value", "attention_out", "dout")  # as named in the structs
STRIDES = {"attention_out": "out"}
GRADIENTS = {"dquery": "query", "dkey": "key", "dvalue": "value"}


class Call:
    """The fields that a caller gave, completed. dk: channels of a key; constants: the header's."""

    def __init__(self, constants: dict[str, int], prefix: str, dk: int, dv: int, fields: dict):
        self.constants, self.prefix = constants, prefix
        self.dk, self.dv = dk, dv
        self.fields = dict(fields)
        self.layout = self._layout()
        self.fields |= {**self._sizes(), **self._options(), **self.fields, **self._strides()}
        self.fields["input_layout"] = self.constant(f"LAYOUT_{self.layout}")

    def constant(self, name: str) -> int:
        return self.constants[f"{self.prefix}_{name}"]

    def _layout(self) -> str:
        said = self.fields.get("input_layout")
        if isinstance(said, str):
            return said
        known = ("BSND", "BSH", "SBH", "BNSD", "TND")
        if said is not None:
            named = {self.constant(f"LAYOUT_{name}"): name for name in known}
            return named[int(said)]
        if self.fields["query"].ndim == 4:
            return "BSND"
        return "TND" if self.fields.get("actual_seq_qlen") is not None else "BSH"

    def apart(self, name: str, channels: int) -> np.ndarray:
        """A tensor with an axis for its heads: a view of it."""
        array = self.fields[name]
        if array.ndim == 4 or self.layout == "TND":
            return array
        return array.reshape(*array.shape[:2], array.shape[2] // channels, channels)

    def by_row(self, array: np.ndarray) -> np.ndarray:
        """[B][S][N][..] of a tensor [..] in the call's layout; [T][N][..] stays."""
        if self.layout == "SBH":
            return array.swapaxes(0, 1)
        return array.swapaxes(1, 2) if self.layout == "BNSD" else array

    def _sizes(self) -> dict[str, int]:
        query, key = (self.by_row(self.apart(name, self.dk)) for name in ("query", "key"))
        tnd = self.layout == "TND"
        return {
            "batch": len(self.fields["actual_seq_qlen"]) if tnd else query.shape[0],
            "seq_q": query.shape[-3],
            "seq_kv": key.shape[-3],
            "heads_q": query.shape[-2],
            "heads_kv": key.shape[-2],
            "stats_width": 8,
        }

    def _options(self) -> dict[str, Any]:
        """What the shapes of the smaller arrays say, and that limits count if they are given."""
        made: dict[str, Any] = {}
        limits = ("pre_tokens", "next_tokens")
        if any(self.fields.get(name) is not None for name in limits):
            made |= {"band": 1, **dict.fromkeys(limits, NO_LIMIT)}
        mask, pse = self.fields.get("atten_mask"), self.fields.get("pse")
        if mask is not None:
            shape = (1,) * (4 - mask.ndim) + mask.shape
            names = ("mask_batch", "mask_heads", "mask_rows", "mask_width")
            made |= dict(zip(names, shape, strict=True))
        if self.fields.get("softmax_max") is not None:  # of the forward call
            made["stats_width"] = self.fields["softmax_max"].shape[-1]
        return {**made, **(self._pse(pse) if pse is not None else {})}

    def _pse(self, pse: np.ndarray) -> dict[str, int]:
        slopes = (self.constant("PSE_SLOPE"), self.constant("PSE_SLOPE_SQRT"))
        if self.fields.get("pse_type", 0) in slopes:
            return {"pse_batch": 1 if pse.ndim == 1 else len(pse)}
        sizes = self._sizes()
        if pse.ndim == 1:  # TND, batch by batch
            rows = "ONE_ROW" if pse.size == sizes["heads_q"] * sizes["seq_kv"] else "FULL"
            return {"pse_shape": self.constant(f"PSE_{rows}"), "pse_batch": sizes["batch"]}
        shape = "ONE_ROW" if pse.ndim == 3 or pse.shape[2] == 1 < sizes["seq_q"] else "FULL"
        if self.layout == "TND" or (
            pse.ndim == 4 and pse.shape[2] == LAST_ROWS and sizes["seq_q"] != LAST_ROWS
        ):
            shape = "LAST_ROWS"
        return {
            "pse_shape": self.constant(f"PSE_{shape}"),
            "pse_batch": len(pse),
            "pse_width": pse.shape[-1],
        }

    def _strides(self) -> dict[str, tuple[int, ...]]:
        """Of arrays with gaps."""
        made = {}
        for name in TENSORS:
            array = self.fields.get(name)
            if array is None or array.flags.c_contiguous:
                continue
            if array.strides[-1] != array.itemsize:
                raise ValueError("channels are apart; fix: make the last axis contiguous")
            array = self.by_row(self.apart(name, self.dk if name in ("query", "key") else self.dv))
            strides = [step // array.itemsize for step in array.strides[:-1]]
            made[f"{STRIDES.get(name, name)}_stride"] = tuple([0] * (3 - len(strides)) + strides)
        return made

    # Outputs.

    def _poisoned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Every byte 0xff: NaN until something is written."""
        memory = np.full(math.prod(shape) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        return memory.view(dtype).reshape(shape)

    def _numbers(self) -> np.dtype:
        return np.dtype(np.float32) if self.fields.get("out_f32") else self.fields["query"].dtype

    def outputs(self) -> dict[str, np.ndarray]:
        """attention_out, the statistics and dropout_state."""
        query, f = self.fields["query"], self.fields
        joined = query.ndim == 3 and self.layout != "TND"
        shape = (*query.shape[:-1], self.dv * (f["heads_q"] if joined else 1))
        one = (f["batch"], f["heads_q"], f["seq_q"])
        one = (f["seq_q"], f["heads_q"]) if self.layout == "TND" else one
        made = {"attention_out": self._poisoned(shape, self._numbers())}
        for name in ("softmax_max", "softmax_sum"):
            made[name] = self._poisoned((*one, f["stats_width"]), np.dtype(np.float32))
        made["softmax_lse"] = self._poisoned(one, np.dtype(np.float32))
        if f.get("keep_prob"):
            made["dropout_state"] = self._poisoned((3,), np.dtype(np.int64))
        return made

    def gradients(self) -> dict[str, np.ndarray]:
        """dquery, dkey, dvalue, and dpse where pse is one that has a gradient."""
        f = self.fields
        made = {
            name: self._poisoned(f[of].shape, self._numbers()) for name, of in GRADIENTS.items()
        }
        full = f.get("pse_shape", 0) == self.constant("PSE_FULL")
        if f.get("pse") is not None and full and f["pse_batch"] == f["batch"]:
            slopes = (self.constant("PSE_SLOPE"), self.constant("PSE_SLOPE_SQRT"))
            if f.get("pse_type", 0) not in slopes:
                made["dpse"] = self._poisoned(f["pse"].shape, self._numbers())
        return made
