"""Element types as data: what a stored number is called, how wide it is, what reads it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One element type of a tensor, or of a cache."""

    name: str  # in kernel names and on the command line
    c_type: str  # what holds its bits in C
    bytes: int
    title: str  # for people


FORMATS = {
    "f32": Format("f32", "float", 4, "IEEE float32"),
    "f16": Format("f16", "uint16_t", 2, "IEEE float16"),
    "bf16": Format("bf16", "uint16_t", 2, "bfloat16"),
}
# What numbers are only stored as: divided by a scale, and rounded to a code. No kernel's dtype.
CODES = {
    "i8": Format("i8", "uint8_t", 1, "int8"),
    "e4m3": Format("e4m3", "uint8_t", 1, "FP8 E4M3"),
}
