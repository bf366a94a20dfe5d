"""What a caller may ask for: defaults, and every refusal. A refusal says what, why, and `fix:`."""

import hashlib
import json
import re
import tomllib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from gen import names, train_matrix
from gen.formats import FORMATS, RECORDS, STORED, Record
from gen.isa import ISAS
from gen.records import CHANNELS_MAX, parse_record
from gen.refusal import Refusal, identifier, nearest, whole

CATALOGUE = Path(__file__).with_name("catalogue.toml")

DECODE = "incre_flash_attention"
TRAIN = "fusion_attention"
GRAD = "fusion_attention_grad"
INT8 = "i8"  # queries, keys and values of the decode operator's pipeline of whole numbers
LAYOUTS_Q = {DECODE: ("BSND", "BSH", "BNSD")}
LAYOUTS_KV = {DECODE: ("BSND", "BSH", "BNSD", "PA_BSND", "PA_BNSD")}
FEATURES = {DECODE: ("stats", "sinks", "window", "softcap", "alibi", "slots", "pages")}
for _op in (TRAIN, GRAD):
    LAYOUTS_Q[_op] = LAYOUTS_KV[_op] = ("BSND", "BSH", "SBH", "BNSD", "TND")
FEATURES[TRAIN] = ("pse_types", "softcap", "sinks")
FEATURES[GRAD] = ("pse_types", "softcap")
for _op in ("sparse_flash_attention", "sparse_flash_attention_antiquant"):
    LAYOUTS_Q[_op] = ("BSND", "TND")
    LAYOUTS_KV[_op] = ("BSND", "TND", "PA_BSND")
    FEATURES[_op] = ("slots",)
# What that pipeline does not have, and why.
INT8_REFUSED = {
    "stats": "its weights are rounded after they are normalised: parts of a context cannot be "
    "merged by their max and sum",
    "sinks": "a weight without a value is not in its definition",
    "softcap": "its scores are defined as float16(S * dequant_scale1) * scale_value + pse_shift",
    "alibi": "its scores are defined as float16(S * dequant_scale1) * scale_value + pse_shift",
}
PREFIX_MAX = 8
KERNEL_KEYS = (
    "op",
    "dtype",
    "kv",
    "dk",
    "rope",
    "dv",
    "layout_q",
    "layout_kv",
    "features",
    "isa",
    "math",
    "prefix",
    "name",
)


def one_of(key, value, known):
    if value not in known:
        raise Refusal(f"{key} = {value!r} is not known", nearest(value, known))
    return value


def some_of(key, values, known, need_one=True):
    """A list without repeats, in the known order, of known words."""
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, (list, tuple)):
        raise Refusal(f"{key} = {values!r} is not a list", f'write {key} = ["{known[0]}"]')
    for value in values:
        one_of(key, value, known)
    if need_one and not values:
        raise Refusal(f"{key} is empty: nothing could be called", f"name one of {', '.join(known)}")
    return tuple(word for word in known if word in values)


def channels(key, value, least):
    return whole(key, value, least, CHANNELS_MAX, " in channels")


@dataclass(frozen=True)
class Kernel:
    """One kernel, checked. Everything that a caller can see of it, nothing that the tuner chose."""

    op: str
    dtype: str
    kv: str
    dk: int
    rope: int
    dv: int
    layout_q: tuple[str, ...]
    layout_kv: tuple[str, ...]
    features: tuple[str, ...]
    isa: tuple[str, ...]
    math: str
    prefix: str
    given_name: str = ""
    record: Record | None = None  # how a row of the cache is stored, where it is quantised

    @property
    def d(self):
        """Channels of the dot product."""
        return self.dk + self.rope

    @property
    def decodes(self):
        """Whether it is the decode operator: every row of a batch sees the same cache, densely."""
        return self.op == DECODE

    @property
    def trains(self):
        """Whether it is an operator of training and prefill: many rows see the same keys."""
        return self.op in (TRAIN, GRAD)

    @property
    def backward(self):
        """Whether it computes gradients."""
        return self.op == GRAD

    @property
    def integer(self):
        """Whether queries are int8: both products are of whole numbers."""
        return self.dtype == INT8

    @property
    def numbers(self):
        """The type of results and of pse_shift: the query's, where that is one of numbers."""
        return "f16" if self.integer else self.dtype

    @property
    def stored_key(self):
        """How keys are stored, where they are not records."""
        return STORED[self.kv.split("x")[0]]

    @property
    def stored_value(self):
        return STORED[self.kv.split("x")[-1]]

    @property
    def usual_dv(self):
        """Channels of the value if nobody says otherwise."""
        return self.record.usual_dv if self.record else self.dk

    def _what(self):
        return {
            "dtype": self.dtype,
            "kv": self.kv,
            "dk": self.dk,
            "dv": self.dv if self.dv != self.usual_dv else 0,
            "rope": self.rope,
            "features": self.features,
            "math": self.math,
        }

    @property
    def name(self):
        return self.given_name or names.kernel_name(self.prefix, self.op, **self._what())

    @property
    def private(self):
        """What the private names start with (still spelled with our own prefix)."""
        if self.given_name:
            return re.sub(rf"^{self.prefix}_", "hl_", self.given_name) + "_in"
        return names.private_name("hl", self.op, **self._what())

    @property
    def isas(self):
        return tuple(ISAS[name] for name in self.isa)

    def table(self):
        """The kernel as a table again: parse_kernel(table()) is the kernel."""
        table = {key: getattr(self, key) for key in KERNEL_KEYS if key != "name"}
        table = {k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}
        if self.given_name:
            table["name"] = self.given_name
        return table

    @property
    def described(self):
        """All that was asked for: the table, and what a record's name stands for."""
        return {**self.table(), **({"record": asdict(self.record)} if self.record else {})}


@dataclass(frozen=True)
class Header:
    """One header: a name and the kernels in it."""

    name: str
    kernels: tuple[Kernel, ...]
    from_file: str = ""  # base name of the TOML that described it, "" for the catalogue's own

    @property
    def prefix(self):
        return self.kernels[0].prefix

    @cached_property
    def digest(self):
        """Changes when, and only when, what was asked for changes."""
        tables = [kernel.described for kernel in self.kernels]
        text = json.dumps([self.name, tables], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_stored(dtype, table):
    """kv of the decode operator: one format for keys and values, or two joined by an x."""
    kv = table.get("kv", dtype)
    known = (dtype, *(name for name in STORED if name not in FORMATS and dtype != "f32"))
    if dtype == INT8:
        known = (INT8,)  # its scales are three numbers for the whole call
    sides = kv.split("x") if isinstance(kv, str) else [kv]
    for side in sides:
        one_of("kv", side, known)
    if len(sides) > 2:
        raise Refusal(f"kv = {kv!r} names {len(sides)} formats", "name K's and V's: KxV")
    if len(sides) == 2 and sides[0] == sides[1]:
        raise Refusal(f"kv = {kv!r}: K and V are stored alike", f"write kv = {sides[0]!r}")
    return kv


def parse_cache(op, dtype, table, records):
    """kv and the record that it names (None: rows of the query's own type)."""
    if op == DECODE:
        return parse_stored(dtype, table), None
    plain = op in ("sparse_flash_attention", TRAIN, GRAD)
    kv = table.get("kv", dtype if plain else None)
    if plain:
        if kv in records or (kv in STORED and kv not in FORMATS):
            raise Refusal(
                f"kv = {kv!r} is a quantised cache, which {op} does not have",
                f'set op to "{DECODE if op in (TRAIN, GRAD) else op + "_antiquant"}"',
            )
        one_of("kv", kv, tuple(FORMATS))
        if kv != dtype:
            raise Refusal(
                f"kv = {kv!r} differs from dtype = {dtype!r}: {op} has one type for query, key, "
                "value",
                f"leave kv out, or set it to {dtype!r}",
            )
        return kv, None
    if dtype == "f32":
        raise Refusal(f"dtype = 'f32': {op} has queries of 16 bits", "choose bf16 or f16")
    if kv is None:
        raise Refusal(f"kv is missing: {op} has to know its record", f"add kv = {min(records)!r}")
    if kv in STORED and kv not in FORMATS:
        raise Refusal(
            f"kv = {kv!r} has K and V, and scales, in tensors of their own: {op} has records",
            f"choose a record, or set op to {DECODE!r}",
        )
    return kv, records[one_of("kv", kv, tuple(records))]


def parse_channels(op, table, record):
    """dk, rope and dv; a record says them by itself."""
    if op in (DECODE, TRAIN, GRAD):
        if table.get("rope", 0) != 0:
            raise Refusal(
                f"rope = {table['rope']!r}: {op} has joined rows",
                "leave rope out; dk counts all channels of a key",
            )
        dk = channels("dk", table["dk"], 1)
        dv = channels("dv", table.get("dv", dk), 1)
        if op != DECODE and dv > dk:
            raise Refusal(
                f"dv = {dv} is more than dk = {dk}: {op} has values as wide as keys or narrower",
                f"set dv to {dk} or less",
            )
        return dk, 0, dv
    if record is None:
        dk = channels("dk", table["dk"], 1)
        rope = channels("rope", table.get("rope", 0), 0)
        dv = channels("dv", table.get("dv", dk), 1)
        widest, said = dk, "the key's nope part"
    else:
        dk, rope = record.count("nope"), record.count("rope")
        for key, number in (("dk", dk), ("rope", rope)):
            if table.get(key, number) != number:
                raise Refusal(
                    f"{key} = {table[key]!r}: a record {record.name} has {number}",
                    f"leave {key} out, or describe a record of your own in a [[record]] table",
                )
        dv = channels("dv", table.get("dv", record.usual_dv), 1)
        widest, said = dk + rope, "a whole row"
    if dv > widest:
        raise Refusal(
            f"dv = {dv} is more than dk = {widest}: the value cannot be wider than {said}",
            f"set dv to {widest} or less, or widen dk",
        )
    if rope > dk:
        raise Refusal(
            f"rope = {rope} is wider than dk = {dk} (dk counts the nope channels only)",
            f"set rope to {dk} or less; for joined rows of {dk + rope}, dk is the nope part",
        )
    return dk, rope, dv


def parse_input_layouts(op, table):
    """Training: all tensors of a call have the same layout."""
    layout_q = some_of("layout_q", table.get("layout_q", LAYOUTS_Q[op]), LAYOUTS_Q[op])
    layout_kv = some_of("layout_kv", table.get("layout_kv", layout_q), LAYOUTS_KV[op])
    if layout_kv != layout_q:
        raise Refusal(
            f"layout_kv = {list(layout_kv)} differs from layout_q = {list(layout_q)}: {op} has one "
            "layout for all tensors",
            "leave layout_kv out",
        )
    return layout_q, layout_kv


def parse_layouts(op, table, record):
    """layout_q and layout_kv, each of which has one of the other to go with."""
    paged_only = record is not None and record.scales_behind
    every = LAYOUTS_Q[op]
    if op in (TRAIN, GRAD):
        return parse_input_layouts(op, table)
    known = ("PA_BSND",) if paged_only else LAYOUTS_KV[op]
    layout_q = some_of("layout_q", table.get("layout_q", every), every)
    layout_kv = some_of("layout_kv", table.get("layout_kv", known), LAYOUTS_KV[op])
    for layout in layout_kv:
        if layout not in known:
            raise Refusal(
                f"layout_kv {layout}: the scales of a {record.name} lie behind the rows of a page",
                "leave layout_kv out, or set it to PA_BSND",
            )
        if layout == "PA_BNSD" and "BNSD" not in layout_q:
            raise Refusal(
                "layout_kv PA_BNSD without layout_q BNSD: the operator pairs them",
                "add BNSD to layout_q, or leave PA_BNSD out of layout_kv",
            )
        if not layout.startswith("PA_") and layout not in layout_q:
            raise Refusal(
                f"layout_kv {layout} without layout_q {layout}: {op} pairs an unpaged cache only "
                "with a query of the same layout",
                f"add {layout} to layout_q, or leave it out of layout_kv",
            )
    for layout in layout_q:
        if not {layout, "PA_BSND", f"PA_{layout}"} & set(layout_kv):
            raise Refusal(
                f"layout_q {layout} has no layout_kv to go with",
                f"add {layout} or PA_BSND to layout_kv, or leave {layout} out of layout_q",
            )
    return layout_q, layout_kv


def parse_features(op, dtype, table):
    """Features that the operator has, and the pipeline of whole numbers too."""
    features = some_of("features", table.get("features", ()), FEATURES[op], need_one=False)
    for name in features:
        if dtype == INT8 and name in INT8_REFUSED:
            raise Refusal(
                f"feature {name} with dtype = {dtype!r}: {INT8_REFUSED[name]}",
                f"leave {name} out, or choose dtype bf16 or f16 with kv = {INT8!r}",
            )
    return features


def no_tiles(op, isa, dtype, kv, dk, dv):
    """Why an instruction set cannot be had, "" if it can: when decoding and for gradients, tiles
    read rows of bfloat16 only. Of float16 they take two parts: gradients would need twice the
    memory near the processor for a step, decoding more than 16 queries, and attention rows that
    are not too wide. For codes there is no page yet."""
    if not isa.tiles or dtype == kv == "bf16" or op not in (DECODE, TRAIN, GRAD):
        return ""
    if op != TRAIN or dtype != "f16":
        return f"tiles take {'bf16 and f16' if op == TRAIN else 'bf16'} only in {op}"
    if not train_matrix.fits(dtype, dk, dv):
        return f"two parts of rows of {dk} and {dv} channels do not fit the second-level cache"
    return ""


def check_tiles(isa, record, dk, dv):
    """Tiles take values in columns of 32 channels, which have to follow each other."""
    tiles = [name for name in isa if ISAS[name].tiles]
    if record is not None and tiles and dv > dk and dk % 32 != 0:
        raise Refusal(
            f"isa {tiles[0]} with dv = {dv} beyond dk = {dk}: rotary channels would start within a "
            "column of 32",
            f"leave {tiles[0]} out of isa, or set dv to {dk} or less",
        )


def parse_kernel(table, prefix=None, records=RECORDS):
    """A kernel from its table (catalogue, TOML or command line), or a Refusal."""
    if not isinstance(table, dict):
        raise Refusal(f"a kernel is described by {table!r}", "describe it by a table")
    for key in table:
        if key not in KERNEL_KEYS:
            raise Refusal(f"unknown key {key!r}", nearest(key, KERNEL_KEYS))
    for key in ("op", "dtype"):
        if key not in table:
            raise Refusal(f"{key} is missing: it has no default", f"add {key}")
    op = one_of("op", table["op"], tuple(names.OPERATORS))
    dtype = one_of("dtype", table["dtype"], (*FORMATS, *([INT8] if op == DECODE else [])))
    numbers = "f16" if dtype == INT8 else dtype
    kv, record = parse_cache(op, dtype, table, records)
    if record is None and "dk" not in table:
        raise Refusal("dk is missing: it has no default", "add dk")
    dk, rope, dv = parse_channels(op, table, record)
    layout_q, layout_kv = parse_layouts(op, table, record)
    features = parse_features(op, dtype, table)
    math = one_of("math", table.get("math", "builtin"), names.MATHS)
    able = tuple(
        name
        for name, isa in ISAS.items()
        if math in isa.maths and numbers in isa.formats and not no_tiles(op, isa, dtype, kv, dk, dv)
    )
    isa = some_of("isa", table.get("isa", able), tuple(ISAS))
    for name in isa:
        reason = no_tiles(op, ISAS[name], dtype, kv, dk, dv)
        if reason:
            raise Refusal(
                f"isa {name} with dtype {dtype} and kv {kv}: {reason}",
                f"leave {name} out of isa",
            )
        if numbers not in ISAS[name].formats:
            raise Refusal(
                f"isa {name} cannot load {dtype}: it has words for {', '.join(ISAS[name].formats)}",
                f"leave {name} out of isa, or choose another dtype",
            )
        if math not in ISAS[name].maths:
            raise Refusal(
                f"math {math!r} is not there for isa {name}",
                f"use isa = {list(able)}, or math = {ISAS[name].maths[0]!r}",
            )
    for name in isa:
        if ISAS[name].words not in isa:
            raise Refusal(
                f"isa {name} without {ISAS[name].words}: it has that one's words, and leaves to it "
                "what tiles are no help for",
                f"add {ISAS[name].words} to isa",
            )
    check_tiles(isa, record, dk, dv)
    prefix = identifier("prefix", table.get("prefix", prefix or "hl"))
    if "_" in prefix:
        raise Refusal(
            f"prefix = {prefix!r} holds an underscore: names could no longer be read backwards",
            "use letters and digits only",
        )
    if len(prefix) > PREFIX_MAX:
        raise Refusal(
            f"prefix = {prefix!r} is {len(prefix)} letters long: the header's lines have room for "
            f"{PREFIX_MAX}",
            f"choose one of at most {PREFIX_MAX} letters",
        )
    given = table.get("name", "")
    if given:
        identifier("name", given)
        if not given.startswith(prefix + "_"):
            raise Refusal(
                f"name = {given!r} does not start with the prefix {prefix + '_'!r}",
                f"call it {prefix}_{given}",
            )
    return Kernel(
        op, dtype, kv, dk, rope, dv, layout_q, layout_kv, features, isa, math, prefix, given, record
    )


def parse_header(table, from_file="", records=RECORDS):
    """A header from its table: the keys of one kernel, or `name` and a list of `kernel`s."""
    if not isinstance(table, dict):
        raise Refusal(f"a header is described by {table!r}", "describe it by a table")
    if "kernel" not in table:
        kernel = parse_kernel(table, None, records)
        return Header(kernel.name, (kernel,), from_file)
    for key in table:
        if key not in ("name", "prefix", "kernel"):
            raise Refusal(
                f"key {key!r} stands beside a list of kernels",
                f"move {key} into each [[header.kernel]]; beside them only name and prefix",
            )
    if not isinstance(table["kernel"], list) or not table["kernel"]:
        raise Refusal("kernel is not a list of tables", "write [[header.kernel]] for each")
    prefix = table.get("prefix")
    kernels = tuple(parse_kernel(kernel, prefix, records) for kernel in table["kernel"])
    if len({kernel.prefix for kernel in kernels}) > 1:
        raise Refusal("kernels of one header have several prefixes", "give them the same prefix")
    seen = set()
    for kernel in kernels:
        if kernel.name in seen:
            raise Refusal(
                f"two kernels of one header are called {kernel.name}", "give one of them a name"
            )
        seen.add(kernel.name)
    name = identifier("name", table.get("name", kernels[0].name))
    return Header(name, kernels, from_file)


def load_toml(path):
    """All headers of a TOML file: [[header]] tables, and [[record]] tables that they may name."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(f"cannot read {path}: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} is not TOML: {error}", "mend that line") from error
    for key in table:
        if key not in ("header", "record"):
            raise Refusal(
                f"unknown key {key!r} at the top of {path.name}",
                "put every description under [[header]] or [[record]]",
            )
    if not isinstance(table.get("header"), list) or not table["header"]:
        raise Refusal(f"{path.name} describes no header", "add a [[header]] table")
    from_file = "" if path.resolve() == CATALOGUE.resolve() else path.name
    if not isinstance(table.get("record", []), list):
        raise Refusal(f"record in {path.name} is no list of tables", "write [[record]]")
    own = [parse_record(record) for record in table.get("record", [])]
    for record in own:
        if sum(record.name == other.name for other in own) > 1:
            raise Refusal(f"two records are called {record.name}", "give one of them a name")
    records = {**RECORDS, **{record.name: record for record in own}}
    headers = [parse_header(header, from_file, records) for header in table["header"]]
    seen = set()
    for header in headers:
        if header.name in seen:
            raise Refusal(f"two headers are called {header.name}", "give one of them a name")
        seen.add(header.name)
    return headers


def load_catalogue():
    """The shipped headers: the one list that is generated, tested, benchmarked and tabled."""
    return load_toml(CATALOGUE)
