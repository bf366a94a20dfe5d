"""Headlight: a short description of an attention kernel in, one C99 header out."""

__version__ = "0.1.0"

# Raised whenever the part that all headers share changes: headers with different numbers
# refuse to live in one file.
ABI = 5
