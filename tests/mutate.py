"""Mutants of the shipped headers, and which of them the tests notice.

    make mutate COUNT=500 SEED=1        or: build/venv/bin/python tests/mutate.py --help

A mutant is a header with one small defect, put where a random draw says: a comparison, an operator,
a number, a condition, a statement or a whole check that is gone, two arguments or two accumulators
in each other's place, a mask that is dropped. It is stillborn if it does not compile, equivalent if
-O2 makes the same object code of it; every other one has to be killed: some test of the suite has
to fail with it.

First by tests/test_every.py, in a child process with one instruction set compiled. What survives
goes to pytest: the files of its operator, with the defect in every header that has the same lines,
those of the tests' own small kernels too (as a plugin of pytest, this file puts it there). A line
of a log each, to be continued: build/mutants/<seed>.jsonl.
"""

import argparse
import dataclasses
import difflib
import functools
import itertools
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import helpers  # noqa: E402
import helpers_every as every  # noqa: E402
import helpers_memory  # noqa: E402
import helpers_runner  # noqa: E402
import test_decode_append  # noqa: E402
import test_every  # noqa: E402
import test_rows  # noqa: E402

from gen import bind  # noqa: E402

REGIONS = ("shared", "scalar", "avx2", "avx512", "amx", "neon")
LONGEST = 40  # seconds of processor time of the first stage; without a defect it takes a few
SLOW = 600.0  # of a pytest file


# ---- reading a header ---------------------------------------------------------------------------

TOKEN = re.compile(
    r"""(?P<gap>\s+|/\*.*?\*/|^[ \t]*\#(?:[^\n]*\\\n)*[^\n]*)
    |(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<name>[A-Za-z_]\w*)
    |(?P<number>(?:0[xX][0-9a-fA-F]+|\d+\.?\d*(?:[eE][+-]?\d+)?)[uUlLfF]*)
    |(?P<sign><<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|[-+*/%&|^~!<>=?:;,.(){}\[\]])
    |(?P<other>.)""",
    re.X | re.S | re.M,
)
FUNCTION = re.compile(
    r"^(?:static|HL_)[^;{}=#]*?\b(\w+)\((?:[^;{}#]|\n)*?\)\s*"
    r"(?:\{(?P<line>[^\n]*)\}$|\{\n(?P<body>.*?)^\})",
    re.M | re.S,
)
PAGE = re.compile(r"^/\* (?:----|====) (.*?)(?::|\n| ----| ====)", re.M)


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Function:
    name: str
    region: str
    page: str
    tokens: tuple[Token, ...]


def tokens_of(text: str, start: int, end: int) -> tuple[Token, ...]:
    """C between two places, without gaps."""
    found, at = [], start
    while at < end and (match := TOKEN.match(text, at, end)):
        if match.lastgroup != "gap":
            found.append(Token(match.lastgroup, match[0], at, match.end()))
        at = match.end()
    return tuple(found)


@functools.lru_cache(maxsize=64)
def functions(text: str) -> tuple[Function, ...]:
    """All functions with a body, in the order of the header."""
    pages = [(match.start(), match[1].strip()) for match in PAGE.finditer(text)]
    found = []
    for match in FUNCTION.finditer(text):
        group = "line" if match["line"] is not None else "body"
        page = next((p for at, p in reversed(pages) if at < match.start()), "")
        named = "" if "_runs_" in match[1] else match[1]  # what looks for one has none itself
        region = next((r for r in REGIONS[1:] if named.endswith(f"_{r}")), "shared")
        found.append(Function(match[1], region, page, tokens_of(text, *match.span(group))))
    return tuple(found)


def page_of(f: Function) -> str:
    """What of the algorithm a function is."""
    first = f.page.split(":")[0].split(" ")[0].lower()
    if "check" in f.name or re.search(r"_(cap|extent|default_stride|refuse|refuse_at)$", f.name):
        return "check"
    if "drop" in f.name or "philox" in f.name:
        return "dropout"
    names = {"words": "words", "memory": "memory", "hl_": "call", "shared": "core"}
    return next((page for lead, page in names.items() if first.startswith(lead)), first)


@functools.lru_cache(maxsize=64)
def prefix(text: str) -> str:
    """What begins the names of a kernel's own functions."""
    found = re.search(r"\b(hl_\w+?_)check_sizes\(", text)
    return found[1] if found else "no kernel"


# ---- the defects --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """Tokens first .. last - 1 of a function become other text."""

    kind: str
    first: int
    last: int
    new: str


COMPARED = {"<": ("<=", ">="), "<=": ("<", ">"), ">": (">=", "<="), ">=": (">", "<")}
COMPARED |= {"==": ("!=",), "!=": ("==",)}
COUNTED = {"+": ("-",), "-": ("+",), "*": ("+", "/"), "/": ("*",), "%": ("/",), "<<": (">>",)}
COUNTED |= {">>": ("<<",), "&": ("|",), "|": ("&",), "^": ("|",), "+=": ("-=",), "-=": ("+=",)}
COUNTED |= {"*=": ("/=",), "|=": ("&=",), "&=": ("|=",), "++": ("--",)}
JOINED = {"&&": ("||",), "||": ("&&",)}
ENDS = {"(": ")", "[": "]", "{": "}"}
COMMUTES = re.compile(r"_v?(f?n?m(ul|add|sub)|add|mul|max|fma|xor|and|or)(_|$)")
NOT_CALLED = ("if", "for", "while", "switch", "return", "sizeof", "HL_FETCH", "defined")


def closing(t: tuple[Token, ...], at: int) -> int:
    """The place of the bracket that closes the one at a place."""
    depth = 0
    for i in range(at, len(t)):
        depth += (t[i].text in ENDS) - (t[i].text in ENDS.values())
        if depth == 0:
            return i
    return len(t) - 1


def signs(t: tuple[Token, ...]) -> Iterator[Edit]:
    """Comparisons, arithmetic and what joins conditions."""
    for i, token in enumerate(t):
        if token.kind != "sign" or i == 0:
            continue
        before = t[i - 1]
        operand = before.kind in ("name", "number") or before.text in (")", "]")
        apart = before.end < token.start and i + 1 < len(t) and token.end < t[i + 1].start
        for kind, table in (("compare", COMPARED), ("logic", JOINED), ("arithmetic", COUNTED)):
            if token.text in table and operand and (apart or token.text == "++"):
                for new in table[token.text]:
                    yield Edit(kind, i, i + 1, new)
        if token.text == "++" and not operand:
            yield Edit("arithmetic", i, i + 1, "--")


def numbers(t: tuple[Token, ...]) -> Iterator[Edit]:
    """One more, one less, none; other fractions."""
    for i, token in enumerate(t):
        if token.kind != "number":
            continue
        match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|\d+)([uUlL]*)", token.text)
        if match is None:
            number = float(token.text.rstrip("fF"))
            for new in (number * 1.5, 0.0) if number else (1.0,):
                yield Edit("number", i, i + 1, f"{new!r}f")
            continue
        number = int(match[1], 0)
        for new in {number + 1, number - 1, 0} - {number, -1}:
            yield Edit("number", i, i + 1, f"{new}{match[2]}")


def conditions(t: tuple[Token, ...]) -> Iterator[Edit]:
    """The opposite."""
    for i, token in enumerate(t):
        if token.text in ("if", "while") and t[i + 1].text == "(":
            yield Edit("negate", i + 1, i + 2, "(!(")
        if token.text == "!" and t[i + 1].kind == "name":
            yield Edit("negate", i, i + 1, "")


def statements(t: tuple[Token, ...]) -> Iterator[Edit]:
    """Assignments, calls and jumps that are gone, and blocks that end in a jump: checks."""
    start = 0
    for i, token in enumerate(t):
        if token.text in ("{", "}") or (token.text == ")" and is_head(t, i)):
            start = i + 1
        if token.text != ";":
            continue
        inside = t[start:i]
        if is_jump(inside) or is_statement(inside):
            yield Edit("delete", start, i, "")
        start = i + 1
    for i, token in enumerate(t):
        if token.text == "if" and (end := closing(t, i + 1)) + 1 < len(t):
            last = closing(t, end + 1) if t[end + 1].text == "{" else 0
            jump = last and any(x.text in ("return", "continue", "break") for x in t[end:last])
            if jump and (last + 1 >= len(t) or t[last + 1].text != "else"):
                yield Edit("check", i, last + 1, ";")


def is_jump(t: tuple[Token, ...]) -> bool:
    return bool(t) and t[0].text in ("return", "continue", "break", "goto")


def is_head(t: tuple[Token, ...], i: int) -> bool:
    """Whether a bracket closes the head of an if or a loop."""
    depth = 0
    for j in range(i, -1, -1):
        depth += (t[j].text == ")") - (t[j].text == "(")
        if depth == 0:
            return j > 0 and t[j - 1].text in ("if", "for", "while")
    return False


def is_statement(t: tuple[Token, ...]) -> bool:
    """Whether it does something, and declares nothing."""
    if len(t) < 3 or t[0].text in ("HL_FETCH", "const", "static", "enum", "for"):
        return False
    if t[0].text == "*":
        return True
    after = t[1]
    return t[0].kind == "name" and (
        after.text in ("(", "[", ".", "->", "++", "--") or after.text.endswith("=")
    )


def arguments(t: tuple[Token, ...]) -> Iterator[Edit]:
    """Neighbours in each other's place."""
    for i, token in enumerate(t[:-1]):
        if token.kind != "name" or t[i + 1].text != "(" or token.text in NOT_CALLED:
            continue
        end, depth, cuts = closing(t, i + 1), 0, [i + 1]
        for j in range(i + 2, end):
            depth += (t[j].text in ENDS) - (t[j].text in ENDS.values())
            if t[j].text == "," and depth == 0:
                cuts.append(j)
        cuts.append(end)
        parts = [(a + 1, b) for a, b in itertools.pairwise(cuts)]
        for turn, ((a, b), (c, d)) in enumerate(itertools.pairwise(parts)):
            if turn == 0 and COMMUTES.search(token.text):
                continue
            first, second = (" ".join(x.text for x in t[m:n]) for m, n in ((a, b), (c, d)))
            if first != second and first and second:
                yield Edit("swap", a, d, f"{second}, {first}")


def words(t: tuple[Token, ...], known: frozenset[str]) -> Iterator[Edit]:
    """Least for largest; the next accumulator for this one; no mask."""
    here = {token.text for token in t if token.kind == "name"}
    for i, token in enumerate(t):
        if token.kind != "name":
            continue
        name = token.text
        for a, b in (("min", "max"), ("max", "min")):
            other = re.sub(rf"(?<=_){a}(?=_)|(?<=_v){a}(?=_)", b, name)
            if other != name and (other in known or name.startswith("_mm")):
                yield Edit("min-max", i, i + 1, other)
        if match := re.fullmatch(r"([a-z]\w*?)(\d+)", name):
            for d in (1, -1):
                other = f"{match[1]}{int(match[2]) + d}"
                if other in here:
                    yield Edit("lane", i, i + 1, other)
        yield from unmasked(t, i, known)


def unmasked(t: tuple[Token, ...], i: int, known: frozenset[str]) -> Iterator[Edit]:
    """An intrinsic without its mask, a word of n elements with all."""
    name = t[i].text
    if i + 2 >= len(t) or t[i + 1].text != "(":
        return
    end = closing(t, i + 1)
    parts = "".join(x.text + " " for x in t[i + 2 : end])
    if "_maskz_" in name and "," in parts and not re.match("hl_all_|all ", parts):
        rest = parts.split(",", 1)[1] if "(" not in parts.split(",", 1)[0] else None
        rest = rest or re.sub(r"^[^()]*\([^()]*\) ?,", "", parts)
        yield Edit("mask", i, end + 1, f"{name.replace('_maskz_', '_')}({rest})")
    if "_mask_store" in name:
        where, what = parts.split(",", 1)[0], parts.rsplit(",", 1)[1]
        yield Edit("mask", i, end + 1, f"{name.replace('_mask_', '_')}({where}, {what})")


MADE: dict[str, Callable[..., Iterator[Edit]]] = {
    f.__name__: f for f in (signs, numbers, conditions, statements, arguments)
}
NOT_MUTATED = re.compile(r"_text$|_argument_name$|_rule_words$")  # words of messages


def edits(f: Function, known: frozenset[str]) -> list[Edit]:
    """All defects of a function."""
    fetched = set()
    for i, token in enumerate(f.tokens[:-1]):
        if token.text == "HL_FETCH":
            fetched.update(range(i, closing(f.tokens, i + 1) + 1))
    made = [edit for make in MADE.values() for edit in make(f.tokens)]
    made += words(f.tokens, known)
    return [edit for edit in made if edit.first not in fetched]


def with_edit(text: str, f: Function, edit: Edit) -> str:
    """The header with the defect."""
    t = f.tokens
    start = t[edit.first].start
    end = t[edit.last - 1].end
    if edit.new == "(!(":
        other = t[closing(t, edit.first)].start
        return f"{text[:start]}(!({text[end:other]})){text[other + 1 :]}"
    return f"{text[:start]}{edit.new}{text[end:]}"


@dataclass(frozen=True)
class Mutant:
    """A defect of a header: which function, which tokens, which text instead."""

    header: str
    function: str
    region: str
    page: str
    kind: str
    first: int
    last: int
    new: str

    @property
    def edit(self) -> Edit:
        return Edit(self.kind, self.first, self.last, self.new)

    def of(self, text: str) -> Function:
        return next(f for f in functions(text) if f.name == self.function)

    def text(self) -> str:
        """The header with it."""
        plain = original(self.header)
        return with_edit(plain, self.of(plain), self.edit)

    def diff(self) -> str:
        """The lines that differ."""
        lines = difflib.unified_diff(
            original(self.header).splitlines(), self.text().splitlines(), n=2, lineterm=""
        )
        return "\n".join(list(lines)[2:])

    def elsewhere(self, text: str) -> str:
        """The same defect in another header, or that header as it is. It is found by what stands
        around it: two headers' pages are the same but for names and numbers."""
        plain = original(self.header)
        if text == plain:
            return self.text()
        mine, other = prefix(plain), prefix(text)
        name = self.function.replace(mine, other, 1)
        there = next((f for f in functions(text) if f.name == name), None)
        if there is None:
            return text
        here = self.of(plain)
        for width in (12, 6, 3):
            place = self.place(here, there, mine, other, width)
            if place is not None:
                new = self.new.replace(mine, other)
                moved = Edit(self.kind, place, place + self.last - self.first, new)
                return with_edit(text, there, moved)
        return text

    def place(self, f: Function, g: Function, p: str, q: str, width: int) -> int | None:
        """The index of the defect's first token in another header's function."""
        a = [t.text.replace(p, "@") for t in f.tokens]
        b = [t.text.replace(q, "@") for t in g.tokens]
        low, high = max(self.first - width, 0), min(self.last + width, len(a))
        wanted, size = a[low:high], high - low

        def places(x: list[str]) -> list[int]:
            return [i for i in range(len(x) - size + 1) if x[i : i + size] == wanted]

        mine, others = places(a), places(b)
        if not others:
            return None
        turn = mine.index(low)
        return others[min(turn, len(others) - 1)] + self.first - low


def named(header: str, ending: str, old: str, new: str) -> Mutant:
    """A defect by its text: `old`, which a function whose name ends so has once."""
    f = next(f for f in functions(original(header)) if f.name.endswith(ending))
    here = [t.text for t in f.tokens]
    wanted = [t.text for t in tokens_of(old, 0, len(old))]
    at = [i for i in range(len(here)) if here[i : i + len(wanted)] == wanted]
    if len(at) != 1:
        raise ValueError(f"{header} {f.name} has {old!r} {len(at)} times; fix: name another")
    return Mutant(header, f.name, f.region, page_of(f), "named", at[0], at[0] + len(wanted), new)


@functools.cache
def original(name: str) -> str:
    return (ROOT / "include" / f"{name}.h").read_text()


# ---- drawing ------------------------------------------------------------------------------------


def strata() -> dict[tuple[str, str, str], list[tuple[str, Function]]]:
    """(operator, region, page) -> functions of the headers that have them."""
    made: dict[tuple[str, str, str], list[tuple[str, Function]]] = {}
    for name in every.HEADERS:
        regions = ("shared", "neon", *every.isas_in(name))
        for f in functions(original(name)):
            if f.region in regions and f.tokens and not NOT_MUTATED.search(f.name):
                key = (every.description(name).op, f.region, page_of(f))
                made.setdefault(key, []).append((name, f))
    return made


WEIGHTS = {"check": 8, "call": 2, "select": 2, "memory": 2}  # that are there once, not by set


def draw(seed: int, count: int, only: str = "") -> list[Mutant]:
    """Operators, regions and pages in turn, in each a function and a kind of defect by chance; of
    NEON, which is emulated, one in eight of its turns."""
    rng = np.random.default_rng(seed)
    groups = strata()
    keys = [k for k in groups for _ in range(WEIGHTS.get(k[2], 1)) if re.search(only, " ".join(k))]
    made: dict[Mutant, None] = {}
    for turn in itertools.count():
        for i in rng.permutation(len(keys)):
            if len(made) >= count or turn > 100 * count:
                return list(made)
            key = keys[i]
            if key[1] == "neon" and turn % 8 != 1:
                continue
            if (mutant := chosen(rng, groups[key], key)) is not None:
                made[mutant] = None
    return list(made)


def chosen(rng: np.random.Generator, group: list[Any], key: tuple[str, str, str]) -> Mutant | None:
    """One defect: functions count by their length, kinds alike."""
    sizes = np.array([len(f.tokens) for _, f in group], np.float64)
    name, f = group[rng.choice(len(group), p=sizes / sizes.sum())]
    all_of_them = edits(f, known_names(name))
    kinds = sorted({edit.kind for edit in all_of_them})
    if not kinds:
        return None
    kind = kinds[rng.integers(len(kinds))]
    of_kind = [edit for edit in all_of_them if edit.kind == kind]
    edit = of_kind[rng.integers(len(of_kind))]
    return Mutant(name, f.name, f.region, key[2], *dataclasses.astuple(edit))


@functools.cache
def known_names(name: str) -> frozenset[str]:
    return frozenset(f.name for f in functions(original(name)))


# ---- killing ------------------------------------------------------------------------------------


def one_isa(mutant: Mutant) -> list[str]:
    """What has to be compiled of a header: all where the text itself asks which there are."""
    if mutant.region == "shared":
        lines = mutant.of(original(mutant.header))
        whole = re.search(r"_isas$|_plan$|_task$|_words$|_present$|_merge$", lines.name)
        return [] if whole else ["HL_ISA_ONLY_SCALAR"]
    return [f"HL_ISA_ONLY_{mutant.region.upper()}"]


def compiled(text: str, defines: list[str], level: str, compiler: str, made: Path) -> bytes | None:
    """The object code, and a library beside it; None if it does not compile."""
    header, source = made.with_name("header.h"), made.with_suffix(".c")
    header.write_text(text)
    source.write_text(bind.export_source(bind.parse(text), defines))
    object_file = made.with_suffix(".o")
    command = [compiler, level, "-w", "-c", "-fPIC", source.name, "-o", object_file.name]
    if subprocess.run(command, cwd=made.parent, capture_output=True).returncode:
        return None
    if compiler == "cc":
        link = [compiler, "-shared", object_file.name, "-o", made.name]
        subprocess.run(link, cwd=made.parent, check=True)
    return object_file.read_bytes()


@functools.lru_cache(maxsize=256)
def plain_object(name: str, defines: tuple[str, ...], compiler: str) -> bytes | None:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.so"
        return compiled(original(name), list(defines), "-O2", compiler, made)


def forget_kernels() -> None:
    """Kernels are loaded anew."""
    for module in (helpers, every.helpers_decode, every.helpers_fusion, test_decode_append):
        module.kernel.cache_clear()


def first_stage(mutant: Mutant, library: Path, whole: bool) -> None:
    """In a child: the tests of every header, on the instruction set of the defect."""
    plain = original(mutant.header)
    usual = bind.compile_c

    def instead(files: dict[str, str], **how: Any) -> Path:
        return library if files.get("header.h") == plain else usual(files, **how)

    bind.compile_c = instead
    forget_kernels()
    isas = every.isas_in(mutant.header)
    mine = [mutant.region] if mutant.region in isas else [isas[0]]
    if whole:
        mine = list(isas)
    if every.description(mutant.header).kv in test_rows.NAMES:
        rows_stage(mutant, mine)
    test_every.check_all(mutant.header, mine, first="refusals" * (mutant.page == "check"))


def rows_stage(mutant: Mutant, isas: list[str]) -> None:
    """What test_rows.py asks of a shipped header."""
    name = every.description(mutant.header).kv
    test_rows.kernel.cache_clear()
    test_rows.ISAS_HERE = tuple(isas)
    for numbers_f32 in (0, 1):
        test_rows.test_every_instruction_set_writes_the_oracles_bytes(name, numbers_f32, 1)
        test_rows.test_every_instruction_set_writes_the_oracles_bytes(name, numbers_f32, 0)
        test_rows.test_all_codes_times_special_scales(name, numbers_f32)
    for which, paged, heads in test_rows.ways():
        if which == name:
            test_rows.test_append_by_token_or_at_once_writes_the_oracles_bytes(name, paged, heads)
    routines = ["quantise_rows", "dequantise_rows", "append"]
    for routine in routines + ["convert"] * (name in test_rows.SWAPPED):
        test_rows.test_nothing_to_do_needs_no_memory(name, routine)
    if name in test_rows.SWAPPED:
        test_rows.test_convert_is_the_oracles_order_and_its_own_inverse(name)
    for bad in test_rows.BAD:
        if bad[0] == name:
            test_rows.test_bad_input(*bad)


def neon_stage(mutant: Mutant, text: str) -> None:
    """Recorded calls under qemu."""
    test_every.check_neon(mutant.header, text)


def control(name: str, region: str) -> tuple[str, str]:
    """What becomes of a header without a defect: it has to survive."""
    same = Mutant(name, "", region, "check", "", 0, 0, "")
    test_every.drawn(name)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "made.so"
        defines = [] if region == "shared" else [f"HL_ISA_ONLY_{region.upper()}"]
        assert compiled(original(name), defines, LEVEL, "cc", library) is not None
        return attempt(lambda: first_stage(same, library, not defines))


@functools.cache
def called(name: str) -> frozenset[str]:
    """Functions that some public function of a header needs; the others leave no code."""
    found = {f.name: {t.text for t in f.tokens} for f in functions(original(name))}
    public = every.description(name).name
    seen, new = set(), {f for f in found if f.startswith(public)} | {"hl_error_text"}
    while new:
        seen |= new
        new = set().union(*(found.get(f, set()) for f in new)) & found.keys() - seen
    return frozenset(seen)


def killed_first(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """(fate, what noticed it)."""
    if mutant.function not in called(mutant.header):
        return "equivalent", "nobody calls it"
    text, defines = mutant.text(), one_isa(mutant)
    if mutant.region == "neon":
        compiler = helpers_runner.AARCH64
        made = compiled(text, defines, "-O2", compiler, folder / "made.so")
        if made is None:
            return "stillborn", ""
        if made == plain_object(mutant.header, tuple(defines), compiler):
            return "equivalent", ""
        return attempt(lambda: neon_stage(mutant, text))
    library = folder / f"made{time.monotonic_ns()}.so"
    if compiled(text, defines, LEVEL, "cc", library) is None:
        return "stillborn", ""
    test_every.drawn(mutant.header)  # here, not in each child
    return attempt(lambda: first_stage(mutant, library, not defines))


def same_object(mutant: Mutant, folder: Path) -> bool:
    """Whether the optimiser makes the same of it."""
    defines = one_isa(mutant)
    made = compiled(mutant.text(), defines, "-O2", "cc", folder / "made.so")
    return made == plain_object(mutant.header, tuple(defines), "cc")


LEVEL = "-O0"


def attempt(call: Callable[[], None]) -> tuple[str, str]:
    def in_time() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (LONGEST, LONGEST))
        call()

    try:
        helpers_memory.in_child(in_time, longest=20.0 * LONGEST)  # others may be at work, too
    except AssertionError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return "killed", f"test_every: {lines[-1][:200]}"
    return "survived", ""


# ---- the slower tests ---------------------------------------------------------------------------

FILES = {
    "sparse_flash_attention": "bad_input operator properties determinism memory plan tiles words",
    "sparse_flash_attention_antiquant": "antiquant antiquant_calls records rows amx words",
    "incre_flash_attention": "decode decode_calls decode_append decode_properties decode_int8 "
    "decode_tiles decode_walk words",
    "fusion_attention": "fusion fusion_calls fusion_properties fusion_tiles words",
    "fusion_attention_grad": "fusion_grad fusion_tiles words",
}
NARROW = {"check": "refused or bad_input or overlap or workspace or partials or struct or nothing"}


def second_stage(mutant: Mutant) -> tuple[str, str]:
    """pytest on the operator's files, with the defect wherever the same lines are."""
    operator = every.description(mutant.header).op
    environment = {**os.environ, "HEADLIGHT_MUTANT": json.dumps(dataclasses.asdict(mutant))}
    files = [HERE / f"test_{name}.py" for name in FILES[operator].split()]
    with tempfile.TemporaryDirectory() as cache:
        environment["HEADLIGHT_MUTANTS"] = cache
        narrow = NARROW.get(mutant.page)
        for which in [narrow, f"not ({narrow})"] if narrow else [""]:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "mutate", "--no-header"]
            command += ["-p", "no:cacheprovider", *(["-k", which] if which else []), *files]
            path = {"PYTHONPATH": f"{HERE}:{ROOT}"}
            try:
                run = subprocess.run(
                    [*map(str, command)],
                    cwd=ROOT,
                    env={**environment, **path},
                    capture_output=True,
                    text=True,
                    timeout=SLOW,
                )
            except subprocess.TimeoutExpired:
                return "survived", "pytest took too long"
            if run.returncode == 1:
                failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.M)
                return "killed", failed[0] if failed else run.stdout[-200:]
    return "survived", ""


def pytest_configure() -> None:
    """As a plugin: what is compiled has the defect."""
    mutant = Mutant(**json.loads(os.environ["HEADLIGHT_MUTANT"]))
    usual, cache = bind.compile_c, os.environ.get("HEADLIGHT_CACHE")

    def instead(files: dict[str, str], **how: Any) -> Path:
        changed = dict(files)
        if "header.h" in files:
            changed["header.h"] = mutant.elsewhere(files["header.h"])
        if changed == files:
            return usual(files, **how)
        os.environ["HEADLIGHT_CACHE"] = os.environ["HEADLIGHT_MUTANTS"]
        try:
            return usual(changed, **how)
        finally:
            os.environ.pop("HEADLIGHT_CACHE")
            if cache:
                os.environ["HEADLIGHT_CACHE"] = cache

    bind.compile_c = instead


# ---- the run ------------------------------------------------------------------------------------


def one(mutant: Mutant, folder: Path, stages: int) -> dict[str, Any]:
    """What became of it, as a line of the log."""
    start = time.monotonic()
    fate, by = killed_first(mutant, folder)
    stage = 1
    if fate == "survived" and stages > 1 and mutant.region != "neon":
        fate = "equivalent" if same_object(mutant, folder) else fate
    if fate == "survived" and stages > 2:
        (fate, by), stage = second_stage(mutant), 2
    for made in folder.glob("made*"):
        made.unlink()
    seconds = round(time.monotonic() - start, 1)
    row = {**dataclasses.asdict(mutant), "fate": fate, "by": by, "stage": stage}
    row["seconds"] = seconds
    if fate == "survived":
        row["diff"] = mutant.diff()
    return row


def report(rows: list[dict[str, Any]]) -> str:
    """Figures, and survivors with their lines."""
    fates = {f: [r for r in rows if r["fate"] == f] for f in ("killed", "survived")}
    real = len(fates["killed"]) + len(fates["survived"])
    lines = [f"{len(rows)} mutants, {real} of them different programs:"]
    for fate in ("stillborn", "equivalent"):
        lines.append(f"  {sum(r['fate'] == fate for r in rows):4} {fate}")
    for stage in (1, 2):
        killed = sum(r["stage"] == stage for r in fates["killed"])
        lines.append(f"  {killed:4} killed by {'test_every.py' if stage == 1 else 'pytest'}")
    share = len(fates["killed"]) / max(real, 1)
    lines.append(f"  {len(fates['survived']):4} survived: {share:.1%} killed")
    for by in ("region", "page", "kind"):
        lines.append(table(by, fates["killed"], fates["survived"]))
    for row in fates["survived"]:
        lines.append(f"\n{row['header']} {row['function']} ({row['page']}, {row['kind']})")
        lines.append(row["diff"])
    return "\n".join(lines)


def table(by: str, killed: list[dict[str, Any]], survived: list[dict[str, Any]]) -> str:
    names = sorted({r[by] for r in killed + survived})
    cells = []
    for name in names:
        k, s = (sum(r[by] == name for r in rows) for rows in (killed, survived))
        cells.append(f"{name} {k}/{k + s}")
    return f"  by {by}: " + ", ".join(cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--stages",
        type=int,
        default=3,
        choices=(1, 2, 3),
        help="test_every; and what is no other program; and pytest",
    )
    parser.add_argument("--only", default="", help="pattern of 'operator region page'")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="only survivors of the log, once more")
    chosen_here = parser.parse_args()
    log = ROOT / "build" / "mutants" / f"{chosen_here.seed}{chosen_here.only and '-some'}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    done = logged(log)
    mutants = draw(chosen_here.seed, chosen_here.count, chosen_here.only)
    left = [m for m in mutants if m not in done]
    if chosen_here.again:
        left = [m for m in mutants if m in done and done[m]["fate"] == "survived"]
    share(sorted(left, key=lambda m: m.header), log, chosen_here.stages, chosen_here.jobs)
    done = logged(log)
    print(report([done[m] for m in mutants if m in done]))
    return 0


def logged(log: Path) -> dict[Mutant, dict[str, Any]]:
    """The last line of each mutant."""
    rows = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
    keys = [field.name for field in dataclasses.fields(Mutant)]
    return {Mutant(**{k: row[k] for k in keys}): row for row in rows}


def share(mutants: list[Mutant], log: Path, stages: int, jobs: int) -> None:
    """All of them, some at a time, by so many processes: those of a header together, whose calls
    are then made once."""
    some = [mutants[i : i + 12] for i in range(0, len(mutants), 12)]
    turn = multiprocessing.Value("l", 0)

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            while True:
                with turn.get_lock():
                    at, turn.value = turn.value, turn.value + 1
                if at >= len(some):
                    return
                for mutant in some[at]:
                    row = one(mutant, Path(folder), stages)
                    with log.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    shown = f"{row['fate']:10} {row['seconds']:6} s  {mutant.header[3:40]}"
                    print(shown, mutant.function, mutant.kind, row["by"][:100], flush=True)

    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    sys.exit(main())
