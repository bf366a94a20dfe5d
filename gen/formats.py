"""Element types as data: what a stored number is called, how wide it is, what reads it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One element type of a tensor."""

    name: str  # in kernel names and on the command line
    c_type: str  # what holds its bits in C
    bytes: int
    title: str  # for people


FORMATS = {
    "f32": Format("f32", "float", 4, "IEEE float32"),
    "f16": Format("f16", "uint16_t", 2, "IEEE float16"),
    "bf16": Format("bf16", "uint16_t", 2, "bfloat16"),
}
