"""What templates may ask about a record: every offset and word already chosen."""

from types import SimpleNamespace

from gen.formats import CODE_LIMIT, FORMATS, TYPES, layout
from gen.isa import FORMAT_WORDS

LINE = 64
EXACT = "vmul(x, r)"  # for x / d, where d is a power of two
SCALE_WORDS = {"f32": "", "e8m0": ", up to a power of 2"}


def pieces_of(plan):
    """A record byte by byte, for people."""
    said = {
        "nope": "channels without position",
        "rope": "rotary channels",
        "scale": f"scales, of {plan.record.tile} channels each",
        "pad": "not read",
    }
    made = []
    for place in plan.places:
        span = f"{place.at} .. {place.at + place.bytes - 1}"
        elements = f"{place.type.title if place.type else 'byte'}[{place.field.count}]"
        drawn = f"{span:>12}  {elements:<17} {said[place.field.name]}"
        made.append(SimpleNamespace(drawn=drawn, behind=place.behind))
    return made


def number_words(fmt, code=""):
    """Numbers of one type beside a record, with the words that read and write them; bfloat16 has
    quicker ones to become codes."""
    words = FORMAT_WORDS[fmt.name]
    quick = fmt.name == "bf16" and code
    return SimpleNamespace(
        peak=bool(quick),
        largest="vpeak_bf16" if quick else f"ki_largest_{fmt.name}",
        type=fmt.name,
        title=fmt.title,
        c_type=fmt.c_type,
        **{name: words[name] for name in ("load", "load_n", "pair", "store", "store_n")},
    )


def put_words(number, code, name, powers=False):
    """What writes numbers that share a scale as codes."""
    words = FORMAT_WORDS[code]
    return SimpleNamespace(
        name=name,
        c_type=TYPES[code].c_type,
        quick=f"vput_{code}_bf16" if number == "bf16" else "",
        store=words["store"],
        store_n=words["store_n"],
        exact=powers,
        quotient=EXACT if powers else "vquot(x, d, r)",
        quotient_y=EXACT.replace("x", "y") if powers else "vquot(y, d, r)",
    )


def rope_pairs(numbers, rope):
    """How rotary channels get from numbers into a record and back."""
    names = dict.fromkeys(pair for x in numbers for pair in ((x.type, rope), (rope, x.type)))
    return [
        SimpleNamespace(
            name=f"{of}_{to}",
            same=of == to,
            of=number_words(FORMATS[of]),
            to=number_words(FORMATS[to]),
        )
        for of, to in names
    ]


def pads_of(plan):
    """Bytes that are written as 0: a record is the same however it came to be."""
    return [
        SimpleNamespace(
            of="holder" if place.behind else "record", at=place.at, end=place.at + place.bytes
        )
        for place in plan.places
        if place.type is None
    ]


def words_of(place):
    """A field, with the words that read and write it."""
    words = FORMAT_WORDS.get(place.type.name, {})
    return SimpleNamespace(
        type=place.type.name,
        title=place.type.title,
        c_type=place.type.c_type,
        at=place.at,
        count=place.field.count,
        bytes=place.type.bytes,
        all_bytes=place.bytes,
        row_word=f"hl_vrow_{place.type.name}",
        **{name: words.get(name, "") for name in ("load", "load_n", "store", "store_n")},
    )


def record_view(kernel):
    """Everything about a kernel's record; None where rows are stored as they are."""
    if kernel.record is None:
        return None
    record = kernel.record
    plan = layout(record, kernel.dtype)
    nope, scale = words_of(plan.place("nope")), words_of(plan.place("scale"))
    rope = words_of(plan.place("rope")) if plan.place("rope") else None
    numbers = [
        number_words(FORMATS[name], nope.type) for name in dict.fromkeys((kernel.dtype, "f32"))
    ]
    for number in numbers:
        powers = scale.type == "e8m0"
        number.puts = [put_words(number.type, nope.type, "put_codes", powers)]
    swapped = swapped_plan(record, kernel.dtype)
    return SimpleNamespace(
        name=record.name,
        bytes=plan.bytes,
        behind=plan.behind,  # bytes of a row that lie behind its page's rows
        row_behind=plan.bytes + plan.behind,
        page_multiple=record.page_multiple,
        page_slack=record.page_multiple - 1,
        align=plan.align,
        tile=record.tile,
        tiles=scale.count,
        limit=CODE_LIMIT[nope.type],
        nope=nope,
        rope=rope,
        scale=scale,
        scales_behind=record.scales_behind,
        numbers=numbers,
        rope_pairs=rope_pairs(numbers, rope.type) if rope else [],
        pads=pads_of(plan),
        scale_words=SCALE_WORDS.get(scale.type, f", rounded up to {scale.title}"),
        scale_past="(or past what the scale can hold) " if scale.type == "f16" else "",
        scale_none="the scale 2^-127" if scale.type == "e8m0" else "scale 0",
        lines=tuple(range(0, plan.bytes, LINE)),
        last_byte=plan.bytes - 1,
        pieces=pieces_of(plan),
        other_order="; ..._convert takes them to the other order:" if swapped else ".",
        swapped=bool(swapped),
        swapped_pieces=pieces_of(swapped) if swapped else [],
        moves=moves(plan, swapped) if swapped else [],
    )


def swapped_plan(record, dtype):
    """The other order of a record, None if there is none whose numbers lie at multiples of their
    own size."""
    swapped = record.swapped()
    plan = layout(swapped, dtype) if swapped else None
    if plan and any(place.type and place.at % place.type.bytes for place in plan.places):
        return None
    return plan


def moves(plan, other):
    """(bytes, here, there) of each field, in the two orders."""
    order = [p.field for p in other.places]
    return [
        SimpleNamespace(
            name=place.field.name,
            bytes=place.bytes,
            here=place.at,
            there=other.places[order.index(place.field)].at,
        )
        for place in plan.places
    ]


def formats_of(kernel):
    """Element types whose words a kernel needs, the query's first."""
    if kernel.integer:
        return ("f16", "dots")  # scores are rounded to float16; products of whole numbers
    if kernel.record is None:
        names = (kernel.dtype, kernel.stored_key.type, kernel.stored_value.type)
        return tuple(dict.fromkeys(names))
    plan = layout(kernel.record, kernel.dtype)
    names = [kernel.dtype]
    names += [plan.place(n).type.name for n in ("nope", "rope") if plan.place(n)]
    return tuple(dict.fromkeys(names))
