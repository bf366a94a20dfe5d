"""Element types and records as data: what a stored number is called, how wide it is, what reads
it; and how a quantised row of a cache is put together of them."""

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
# What only a cache holds: codes, which are worth something with a scale beside them.
CODES = {
    "i8": Format("i8", "uint8_t", 1, "int8"),
    "e4m3": Format("e4m3", "uint8_t", 1, "FP8 E4M3"),
}
# And scales that are a type of their own: 2^(code - 127), 255 is NaN.
SCALES = {"e8m0": Format("e8m0", "uint8_t", 1, "E8M0")}
TYPES = {**FORMATS, **CODES, **SCALES}

CODE_LIMIT = {"i8": 127, "e4m3": 448}  # the largest number, which a tile's largest becomes
SCALE_TYPES = ("f32", "bf16", "f16", "e8m0")
ROPE_TYPES = ("query", "bf16", "f16", "f32")


@dataclass(frozen=True)
class Field:
    """Equal numbers that lie together in a record."""

    name: str  # nope, rope, scale; pad: bytes that nobody reads
    type: str  # of TYPES; "query": that of the query; of pad "bytes"
    count: int


@dataclass(frozen=True)
class Record:
    """One row of a quantised cache. number = code * scale of its tile; rotary channels as they are.

    A page of a paged cache is rows, one after another. Where `behind` names fields, those of all
    rows of a page come behind its rows, and the page is padded to a multiple of page_multiple.
    """

    name: str
    fields: tuple[Field, ...]  # in the order of their bytes
    tile: int  # nope channels that share a scale
    behind: tuple[Field, ...] = ()
    page_multiple: int = 1
    dv: int = 0  # channels of the value, from the row's first on; 0: those of nope

    def field(self, name):
        """nope, rope or scale, None if there is none."""
        found = [f for f in self.fields + self.behind if f.name == name]
        return found[0] if found else None

    def count(self, name):
        found = self.field(name)
        return found.count if found else 0

    @property
    def scales_behind(self):
        return self.field("scale") in self.behind

    @property
    def usual_dv(self):
        return self.dv or self.count("nope")

    def swapped(self):
        """The same fields with rope and scale in each other's places, or None: the two orders of
        656 bytes are each other's."""
        places = [i for i, f in enumerate(self.fields) if f.name in ("rope", "scale")]
        if len(places) != 2:
            return None
        fields = list(self.fields)
        one, two = places
        fields[one], fields[two] = fields[two], fields[one]
        return Record(f"{self.name}, scales and rope swapped", tuple(fields), self.tile)


RECORDS = {
    record.name: record
    for record in (
        # sparse_flash_attention_antiquant's own: int8, then rotary channels, then scales.
        Record(
            "i8_656",
            (Field("nope", "i8", 512), Field("rope", "query", 64), Field("scale", "f32", 4)),
            tile=128,
        ),
        # FlashMLA's, for DeepSeek V3.2.
        Record(
            "fp8_656",
            (Field("nope", "e4m3", 512), Field("scale", "f32", 4), Field("rope", "bf16", 64)),
            tile=128,
        ),
        # FlashMLA's next: scales of a page's rows behind its rows, values are whole rows.
        Record(
            "fp8_v4",
            (Field("nope", "e4m3", 448), Field("rope", "bf16", 64)),
            tile=64,
            behind=(Field("scale", "e8m0", 7), Field("pad", "bytes", 1)),
            page_multiple=576,
            dv=512,
        ),
    )
}


@dataclass(frozen=True)
class Stored:
    """How a tensor of keys or values is stored, where each has its own: rows of numbers, rows of
    codes whose scales are in a tensor beside them, or rows of codes that carry their scales."""

    name: str
    type: str  # of FORMATS, CODES, or i4
    group: int = 0  # i4: channels that share one of the float16 scales behind a row's codes

    @property
    def is_codes(self):
        """number = (code + offset) * scale, with scales in a tensor of their own."""
        return self.type in CODES

    @property
    def packed(self):
        """Two codes a byte, scales behind them: read into a panel of float32."""
        return self.group > 0

    @property
    def c_type(self):
        return TYPES[self.type].c_type if self.type in TYPES else "uint8_t"

    @property
    def title(self):
        if self.packed:
            return f"int4, a float16 scale for {self.group} channels"
        return TYPES[self.type].title

    @property
    def read_as(self):
        """The type of the rows that the products read."""
        return "f32" if self.packed else self.type

    @property
    def align(self):
        return 1 if self.packed else TYPES[self.type].bytes

    @property
    def element(self):
        """Bytes of what strides count."""
        return 1 if self.packed else TYPES[self.type].bytes

    def scales_at(self, channels):
        """Bytes of codes, filled up to where float16 may lie."""
        return -(-channels // 4) * 2

    def width(self, channels):
        """Elements of a row."""
        if not self.packed:
            return channels
        return self.scales_at(channels) + 2 * -(-channels // self.group)


I4_GROUPS = (32, 64, 128)
STORED = {
    **{name: Stored(name, name) for name in (*FORMATS, *CODES)},
    **{f"i4_{group}": Stored(f"i4_{group}", "i4", group) for group in I4_GROUPS},
}


@dataclass(frozen=True)
class Place:
    """A field, resolved: where it lies and what it is made of."""

    field: Field
    type: Format | None  # None: bytes that nobody reads
    at: int  # bytes from the start of the record (behind: of the row's own piece there)
    bytes: int
    behind: bool


@dataclass(frozen=True)
class Plan:
    """A record's bytes, with the query's type known."""

    record: Record
    places: tuple[Place, ...]
    bytes: int  # of a row
    behind: int  # bytes that each row has behind the page's rows
    align: int  # of the widest number

    def place(self, name):
        return next((p for p in self.places if p.field.name == name), None)


def layout(record, dtype):
    """Where each field lies."""
    places, ends = [], {False: 0, True: 0}
    align = 1
    for behind, fields in ((False, record.fields), (True, record.behind)):
        for field in fields:
            kind = dtype if field.type == "query" else field.type
            fmt = TYPES.get(kind)
            width = fmt.bytes if fmt else 1
            places.append(Place(field, fmt, ends[behind], width * field.count, behind))
            ends[behind] += width * field.count
            align = max(align, width)
    return Plan(record, tuple(places), ends[False], ends[True], align)
