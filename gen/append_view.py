"""What templates may ask about writing rows of the decode operator's cache."""

from types import SimpleNamespace

from gen.formats import CODE_LIMIT, FORMATS
from gen.isa import FORMAT_WORDS
from gen.record_view import number_words, put_words


def sides_of(kernel):
    """(name, how it is stored, channels)."""
    return (("key", kernel.stored_key, kernel.dk), ("value", kernel.stored_value, kernel.dv))


def is_plain(kernel, stored):
    """Numbers as they are, no codes; or codes that new rows come as."""
    return stored.name in FORMATS or kernel.integer


def written_of(kernel):
    """Formats of codes that rows of numbers become."""
    if not kernel.decodes:
        return ()
    names = [stored.name for _, stored, _ in sides_of(kernel) if not is_plain(kernel, stored)]
    return tuple(dict.fromkeys(names))


def code_format(stored):
    """Codes whose scales are in a tensor beside them."""
    words = FORMAT_WORDS[stored.type]
    return SimpleNamespace(
        name=stored.name,
        title=stored.title,
        c_type=stored.c_type,
        limit=CODE_LIMIT[stored.type],
        clip=f"vclip_{stored.type}",
        clip_n=f"vclip_{stored.type}_n",
        store=words["store"],
    )


def numbers_of(kernel, codes):
    """Types that new rows may have, each with what writes it as codes."""
    found = []
    if kernel.integer:
        return found
    for name in dict.fromkeys((kernel.dtype, "f32")):
        number = number_words(FORMATS[name], codes[0].name if codes else "")
        number.puts = [put_words(name, code.name, f"put_{code.name}") for code in codes]
        number.to_float = {"f32": "", "f16": "hl_float_of_f16", "bf16": "hl_float_of_bf16"}[name]
        found.append(number)
    return found


def absent(kernel, codes):
    """(what it is, argument) of what a kernel was not generated with."""
    names = [] if codes else ["antiquant_scale", "antiquant_offset", "token_scales"]
    names += [] if "pages" in kernel.features else ["key_pages", "value_pages"]
    rows = [(f"a->{name} != NULL", name) for name in names]
    numbers = [] if codes else ["antiquant_mode"]
    numbers += [] if "slots" in kernel.features else ["index_kind"]
    numbers += ["numbers_f32"] if kernel.integer else []  # new rows are codes
    rows += [(f"a->{name}", name) for name in numbers]
    return [SimpleNamespace(value=value, argument=name.upper()) for value, name in rows]


def copies_of(kernel):
    """Rows that are copied: (test, bytes)."""
    found = []
    for i, (_, stored, channels) in enumerate(sides_of(kernel)):
        if is_plain(kernel, stored):
            own = "" if kernel.dtype == "f32" or kernel.integer else " && !run->numbers_f32"
            found.append(SimpleNamespace(test=f"side == {i}{own}", bytes=stored.element * channels))
    return found


def calls_of(kernel, alike):
    """Rows that become something else: (test, plain, format, number)."""
    found = []
    if kernel.integer:
        return found
    for i, (_, stored, _) in enumerate(sides_of(kernel)):
        if alike and i == 1:
            break
        for number in dict.fromkeys((kernel.dtype, "f32")):
            if is_plain(kernel, stored) and (number != "f32" or kernel.dtype == "f32"):
                continue
            tests = [] if alike else [f"side == {i}"]
            tests.append(("" if number == "f32" else "!") + "run->numbers_f32")
            test = " && ".join(tests)
            found.append(
                SimpleNamespace(
                    test=test, plain=is_plain(kernel, stored), format=stored.name, number=number
                )
            )
    return found


def append_view(kernel):
    """None for operators that have no cache of this kind."""
    if not kernel.decodes:
        return None
    sides = sides_of(kernel)
    stored = list(dict.fromkeys(side for _, side, _ in sides))
    codes = [code_format(side) for side in stored if side.is_codes and not kernel.integer]
    return SimpleNamespace(
        sides=[
            SimpleNamespace(
                codes=int(side.is_codes and not kernel.integer),
                channels=channels,
                width=side.width(channels),
                element=side.element,
                align=side.align,
                argument=name.upper(),
            )
            for name, side, channels in sides
        ],
        alike=len(stored) == 1,
        copies=copies_of(kernel),
        calls=calls_of(kernel, len(stored) == 1),
        narrow=kernel.dtype not in ("f32", "i8") and any(is_plain(kernel, s) for s in stored),
        codes=codes,
        packed=[
            SimpleNamespace(name=side.name, title=side.title, group=side.group)
            for side in stored
            if side.packed
        ],
        numbers=numbers_of(kernel, codes),
        absent=absent(kernel, codes),
        code_sides=sum(side.is_codes for side in (kernel.stored_key, kernel.stored_value)),
        again=int(kernel.stored_key.is_codes and kernel.stored_value.is_codes),
    )
