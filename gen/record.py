"""What templates may ask about a record: every offset and word already chosen."""

from types import SimpleNamespace

from gen.formats import CODE_LIMIT, layout
from gen.isa import FORMAT_WORDS

LINE = 64
SCALE_WORDS = {"f32": "", "e8m0": ", up to a power of 2"}


def pieces_of(plan):
    """A record byte by byte, for people: (first, last, elements, what)."""
    said = {
        "nope": "channels without position",
        "rope": "rotary channels",
        "scale": f"scales, of {plan.record.tile} channels each",
        "pad": "not read",
    }
    return [
        SimpleNamespace(
            span=f"{place.at} .. {place.at + place.bytes - 1}",
            elements=f"{place.type.title if place.type else 'byte'}[{place.field.count}]",
            what=said[place.field.name],
            behind=place.behind,
        )
        for place in plan.places
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
    swapped = record.swapped()
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
        scale_words=SCALE_WORDS.get(scale.type, f", rounded to {scale.title}"),
        scale_none="the scale 2^-127" if scale.type == "e8m0" else "scale 0",
        lines=tuple(range(0, plan.bytes, LINE)),
        last_byte=plan.bytes - 1,
        pieces=pieces_of(plan),
        swapped=bool(swapped),
        swapped_pieces=pieces_of(layout(swapped, kernel.dtype)) if swapped else [],
        moves=moves(plan, layout(swapped, kernel.dtype)) if swapped else [],
    )


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
    if kernel.record is None:
        return (kernel.dtype,)
    plan = layout(kernel.record, kernel.dtype)
    names = [kernel.dtype]
    names += [plan.place(n).type.name for n in ("nope", "rope") if plan.place(n)]
    return tuple(dict.fromkeys(names))
