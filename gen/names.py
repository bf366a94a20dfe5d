"""The naming grammar, in both directions, and how the pages' short names are spelled in C.

kernel  = <prefix>_<op>_<dtype>[_<kv>]_d<DK>[x<DV>][_rope<ROPE>][_<feature>...][_<math>]
private = <prefix>_<short op>_...        the same tail; its instruction set comes last
"""

import re
from dataclasses import dataclass

from gen.isa import WORDS

# What an operator is called in public names, and in private ones.
OPERATORS = {
    "sparse_flash_attention": "sfa",
    "sparse_flash_attention_antiquant": "sfaq",
    "incre_flash_attention": "ifa",
    "fusion_attention": "fa",
    "fusion_attention_grad": "fag",
}

KERNEL = re.compile(
    r"(?P<prefix>[a-z][a-z0-9]*)_(?P<op>" + "|".join(OPERATORS) + r")_(?P<dtype>f32|f16|bf16|i8)"
    r"(_(?P<kv>[a-z][a-z0-9_]*?))?_d(?P<dk>\d+)(x(?P<dv>\d+))?(_rope(?P<rope>\d+))?(?P<rest>(_[a-z][a-z0-9]*)*)"
)
MATHS = ("builtin", "sleef", "libm")
TWO_WORDS = ("pse_types",)  # features whose names hold what stands between features


def tail(dtype, kv, dk, dv, rope, features, math):
    """Everything in a kernel's name behind its operator. dv: 0 where it is the usual one."""
    parts = [dtype] + ([kv] if kv != dtype else [])
    parts.append(f"d{dk}" + (f"x{dv}" if dv else ""))
    if rope:
        parts.append(f"rope{rope}")
    parts.extend(features)
    if math != "builtin":
        parts.append(math)
    return "_".join(parts)


def kernel_name(prefix, op, **what):
    return f"{prefix}_{op}_{tail(**what)}"


def private_name(prefix, op, **what):
    return f"{prefix}_{OPERATORS[op]}_{tail(**what)}"


def parse(name):
    """The table that a grammatical kernel name stands for, or None."""
    match = KERNEL.fullmatch(name)
    if not match:
        return None
    rest = match["rest"]
    for feature in TWO_WORDS:
        rest = rest.replace(f"_{feature}", f"_{feature.replace('_', ' ')}")
    rest = [word.replace(" ", "_") for word in rest.split("_") if word]
    math = rest.pop() if rest and rest[-1] in MATHS else "builtin"
    given_dv = {"dv": int(match["dv"])} if match["dv"] else {}
    return {
        "prefix": match["prefix"],
        "op": match["op"],
        "dtype": match["dtype"],
        "kv": match["kv"] or match["dtype"],
        "dk": int(match["dk"]),
        **given_dv,
        "rope": int(match["rope"] or 0),
        "features": rest,
        "math": math,
    }


@dataclass(frozen=True)
class Speller:
    """Spells the pages' short names out: a page stays a C file that can be read.

    vload, vf       a word or the vector type  -> hl_vload_avx512, hl_vf_avx512
    ki_score        this kernel and ISA        -> hl_sfa_bf16_d512_rope64_score_avx512
    k_group         this kernel, any ISA       -> hl_sfa_bf16_d512_rope64_group
    WORD, KERNEL    linkage and target of the ISA's words and kernels
    hl_, HL_        the prefix, as asked for
    """

    prefix: str
    private: str = ""
    isa: str = ""
    words: str = ""  # whose words it uses, if not its own
    math: str = "builtin"

    def word(self, name):
        if name == "vexp2" and self.math != "builtin":
            name = f"vexp2_{self.math}"
        return f"hl_{name}_{self.words or self.isa}"

    def spell(self, text):
        if self.isa:
            for name in ("vf", *WORDS):
                text = re.sub(rf"\b{name}\b", self.word(name), text)
            text = re.sub(r"\bki_(\w+)", rf"{self.private}_\1_{self.isa}", text)
            text = re.sub(r"\b(WORD|KERNEL)\b", rf"HL_\1_{self.isa.upper()}", text)
        if self.private:
            text = re.sub(r"\bk_(\w+)", rf"{self.private}_\1", text)
        return text

    def rename(self, text):
        """Puts the user's prefix in the place of ours, last of all."""
        if self.prefix == "hl":
            return text
        text = re.sub(r"(?<![A-Za-z0-9_])hl(?=[_:.])", self.prefix, text)
        return re.sub(r"(?<![A-Za-z0-9_])HL_", self.prefix.upper() + "_", text)
