"""A refusal says what, why, and `fix:`; and the checks that several tables have in common."""

import difflib
import re


class Refusal(ValueError):
    """Something that cannot be generated. The text says what, why and how to mend it."""

    def __init__(self, what, fix):
        super().__init__(f"{what}; fix: {fix}")


def nearest(word, known):
    """'did you mean' for a misspelt word: the nearest known one, or all of them."""
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"


def whole(key, value, least, most, unit=""):
    """A whole number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refusal(f"{key} = {value!r} is not a whole number", f"give it{unit}")
    if not least <= value <= most:
        raise Refusal(f"{key} = {value} is out of range", f"choose one from {least} to {most}")
    return value


def identifier(key, value):
    if not isinstance(value, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", value):
        raise Refusal(
            f"{key} = {value!r} is not a lower-case C identifier",
            "start with a letter a-z, go on with a-z, 0-9 and _",
        )
    if "__" in value or value.endswith("_"):
        raise Refusal(
            f"{key} = {value!r} has an underscore too many: C++ reserves such names",
            "write single underscores between words",
        )
    return value
