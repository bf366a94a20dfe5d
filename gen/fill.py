"""Fills calls and declarations again once their names are spelled out.

A page writes ki_score(w, n); the product says hl_sfa_bf16_d512_rope64_score_avx512(w, n), and a
user may choose longer names still. So line breaks inside parentheses cannot be decided in a
template. This decides them, by one rule; it touches nothing else.
"""

import re
from dataclasses import dataclass

WIDTH = 100
OPERATORS = ("+ ", "* ", "&& ", "|| ", "| ", "? ", ": ")
DEEP = 52  # continuation lines hang under an open parenthesis only up to this column


@dataclass
class Spot:
    """A place where a line may break: in front of s[at], `depth` parentheses deep."""

    at: int
    depth: int


def depth_of(line):
    return line.count("(") - line.count(")")


def is_code(line):
    text = line.strip()
    return bool(text) and not text.startswith(("#", "/*", "*", "//")) and "/*" not in text


def spots(s):
    """Behind commas, and in front of the binary operators that clauses are joined by."""
    depth, quoted, found = 0, False, []
    for i, char in enumerate(s):
        if char == '"' and s[i - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        depth += (char in "([{") - (char in ")]}")
        if char == " " and i > 0:
            joins = s.startswith(OPERATORS, i + 1)
            if s[i - 1] == "," or joins or s.endswith(" =", 0, i):
                found.append(Spot(i + 1, depth))
    return found


def fill(indent, s):
    """One logical line over as many lines as it needs."""
    lines, column, start = [], indent, 0
    breaks = spots(s)
    while len(s) - start + column > WIDTH:
        fit = [b for b in breaks if start < b.at <= start + WIDTH - column + 1]
        if not fit:
            cut = s.find("(", start) + 1  # a name too long to share its line with an argument
            if cut <= start or cut == len(s):
                break
            lines.append(" " * column + s[start:cut])
            start, column = cut, indent + 4
            continue
        shallow = min(b.depth for b in fit)
        best = max((b for b in fit if b.depth == shallow), key=lambda b: b.at)
        lines.append(" " * column + s[start : best.at].rstrip())
        column = hang(lines, indent)
        start = best.at
    lines.append(" " * column + s[start:])
    return lines


def hang(lines, indent):
    """Where the next line starts: under the innermost open parenthesis, if that is not too far."""
    opened = []
    for line in lines:
        for i, char in enumerate(line):
            if char in "([{":
                opened.append(i + 1)
            elif char in ")]}" and opened:
                opened.pop()
    if not opened:
        return indent + 4
    return opened[-1] if opened[-1] <= DEEP else indent + 4 * min(len(opened), 2)


BODY = re.compile(r"(?P<head>[^{}]*\)) \{ (?P<body>[^{}]*) \}")


def open_bodies(text):
    """A function on one line that has become too wide: its body on lines of its own."""
    for line in text.split("\n"):
        match = BODY.fullmatch(line)
        if len(line) > WIDTH and match:
            yield from (match["head"], "{", f"    {match['body']}", "}")
        else:
            yield line


TRAILING = re.compile(r"(?P<indent> *)(?P<code>\S.*?\S) +(?P<comment>/\* .*?) +\*/")


def narrow_comments(lines):
    """A comment behind code that is now too wide: its padding goes, or it goes above."""
    for line in lines:
        match = TRAILING.fullmatch(line)
        if len(line) <= WIDTH or not match:
            yield line
            continue
        short = f"{match['indent']}{match['code']} {match['comment']} */"
        if len(short) <= WIDTH:
            yield short
        else:
            yield f"{match['indent']}{match['comment']} */"
            yield f"{match['indent']}{match['code']}"


def refill(text):
    """The text with every call that spans lines, or is too wide, filled again."""
    lines, out, i = list(narrow_comments(open_bodies(text))), [], 0
    while i < len(lines):
        group = [lines[i]]
        in_macro = lines[i].endswith("\\") or (i > 0 and lines[i - 1].endswith("\\"))
        if is_code(lines[i]) and not in_macro:
            depth = depth_of(lines[i])
            while depth > 0 and i + len(group) < len(lines) and is_code(lines[i + len(group)]):
                group.append(lines[i + len(group)])
                depth += depth_of(group[-1])
            wide = any(len(line) > WIDTH for line in group)
            plain = depth == 0 and not any("{" in line and ";" in line for line in group)
            if plain and (len(group) > 1 or wide):
                joined = " ".join(line.strip() for line in group).replace("( ", "(")
                indent = len(group[0]) - len(group[0].lstrip())
                out.extend(fill(indent, joined))
                i += len(group)
                continue
        out.append(lines[i])
        i += 1
    return "\n".join(out)
