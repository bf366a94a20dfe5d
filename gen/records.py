"""Records of a caller's own, from [[record]] tables: checked, with every refusal saying its fix."""

from gen.formats import (
    CODES,
    RECORDS,
    ROPE_TYPES,
    SCALE_TYPES,
    STORED,
    Field,
    Record,
    layout,
)
from gen.refusal import Refusal, identifier, nearest, whole

KEYS = ("name", "fields", "tile", "behind", "page_multiple", "dv")
NAMES = {"nope": tuple(CODES), "rope": ROPE_TYPES, "scale": SCALE_TYPES, "pad": ("bytes",)}
CHANNELS_MAX = 4096


def parse_field(where, table):
    """{name, type, count}."""
    if not isinstance(table, dict):
        raise Refusal(
            f"{where}: a field is {table!r}", 'write { name = "nope", type = "i8", count = 256 }'
        )
    for key in table:
        if key not in ("name", "type", "count"):
            raise Refusal(
                f"{where}: a field has the key {key!r}", nearest(key, ("name", "type", "count"))
            )
    name = table.get("name")
    if name not in NAMES:
        raise Refusal(f"{where}: a field is called {name!r}", nearest(name, tuple(NAMES)))
    kind = table.get("type", NAMES[name][0])
    if kind not in NAMES[name]:
        raise Refusal(f"{where}: {name} cannot be of type {kind!r}", nearest(kind, NAMES[name]))
    count = whole(f"{where}: count of {name}", table.get("count"), 1, CHANNELS_MAX)
    return Field(name, kind, count)


def parse_fields(where, tables):
    if not isinstance(tables, list):
        raise Refusal(f"{where} is {tables!r}", "write a list of fields, in the order of the bytes")
    return tuple(parse_field(where, table) for table in tables)


def only(record, name, fields, least):
    """The one field of that name."""
    found = [field for field in fields if field.name == name]
    if not least <= len(found) <= 1:
        raise Refusal(
            f"record {record!r} has {len(found)} fields {name}",
            f"describe {'exactly' if least else 'at most'} one",
        )
    return found[0] if found else None


def check_places(record):
    """Numbers lie at multiples of their own size, in every row."""
    plan = layout(record, "bf16")
    for place in plan.places:
        if place.type and place.at % place.type.bytes:
            raise Refusal(
                f"record {record.name!r}: {place.field.name} would start at byte {place.at}, which "
                f"is no multiple of its {place.type.bytes} bytes",
                'put { name = "pad", count = ... } in front of it, or choose another order',
            )
    for bytes_each, what in ((plan.bytes, "a row"), (plan.behind, "what is behind a page")):
        if bytes_each % plan.align:
            raise Refusal(
                f"record {record.name!r}: {what} has {bytes_each} bytes a token, no multiple of "
                f"{plan.align}",
                'end it with { name = "pad", count = ... }',
            )


def check_pages(record):
    """What is behind a page's rows is there for the scales, and ends where a page may begin."""
    if record.behind and not record.scales_behind:
        raise Refusal(
            f"record {record.name!r} has no scale behind the page's rows, but other things",
            "leave behind out; a call's key_stride.batch may step over what it does not know",
        )
    if record.page_multiple > 1 and not record.scales_behind:
        raise Refusal(
            f"record {record.name!r} has a page_multiple, but no scale in behind",
            "leave page_multiple out; the stride of pages is an argument (key_stride.batch)",
        )
    align = layout(record, "bf16").align
    if record.page_multiple > 1 and record.page_multiple % align:
        raise Refusal(
            f"record {record.name!r}: page_multiple = {record.page_multiple} is no multiple of "
            f"{align}, so that rows of later pages would not be aligned",
            f"choose a multiple of {align}, or leave page_multiple out",
        )


def parse_record(table):
    """A Record from its table, or a Refusal."""
    if not isinstance(table, dict):
        raise Refusal(f"a record is described by {table!r}", "describe it by a table")
    for key in table:
        if key not in KEYS:
            raise Refusal(f"a record has the unknown key {key!r}", nearest(key, KEYS))
    name = identifier("a record's name", table.get("name", ""))
    if name in (*RECORDS, *STORED):
        raise Refusal(f"record {name!r} is there already", "choose another name")
    if "_d" in name or name.startswith("d"):
        raise Refusal(
            f"record {name!r} holds a d that starts a word: names could not be read backwards",
            "choose another name",
        )
    fields = parse_fields(f"fields of record {name!r}", table.get("fields", []))
    behind = parse_fields(f"behind of record {name!r}", table.get("behind", []))
    nope = only(name, "nope", fields, 1)
    rope = only(name, "rope", fields, 0)
    scale = only(name, "scale", fields + behind, 1)
    for field in behind:
        if field.name not in ("scale", "pad"):
            raise Refusal(
                f"record {name!r} has {field.name} behind the page's rows",
                "only scale (and pad) may be there; put it into fields",
            )
    tile = whole(f"tile of record {name!r}", table.get("tile"), 1, nope.count)
    scales = -(-nope.count // tile)
    if scale.count != scales:
        raise Refusal(
            f"record {name!r} has {scale.count} scales for {nope.count} channels in tiles of "
            f"{tile}",
            f"give scale the count {scales}, or choose another tile",
        )
    multiple = whole(f"page_multiple of record {name!r}", table.get("page_multiple", 1), 1, 1 << 20)
    every = nope.count + (rope.count if rope else 0)
    dv = whole(f"dv of record {name!r}", table.get("dv", nope.count), 1, every)
    record = Record(name, fields, tile, behind, multiple, dv)
    check_places(record)
    check_pages(record)
    return record
