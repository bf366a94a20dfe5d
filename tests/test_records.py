"""The generator on caches of records: every refusal, own records from TOML, names both ways, the
same bytes, and the manual's drawing of a record."""

import re
import shutil

import numpy as np
import pytest
from helpers import (
    ANTIQUANT,
    RECORD_SPECS,
    RECORD_TABLES,
    SHIPPED_RECORDS,
    check,
    field,
    header,
    isas_in,
    known_records,
    record_of,
    text,
)
from helpers_cases import PA_BSND, Shape, make_case, run
from oracle import BSND, STORED, Record

from gen import bind, formats, names, render, spec
from gen.__main__ import main
from gen.records import parse_record

PLAIN = {"op": ANTIQUANT, "dtype": "bf16", "kv": "i8_656"}
NOPE, ROPE, SCALE = field("nope", "i8", 256), field("rope", "query", 32), field("scale", "f32", 4)
OWN = {"name": "i8_my", "fields": [NOPE, ROPE, SCALE], "tile": 64}


def own(**changes: object) -> dict:
    return {**OWN, **changes}


# what is asked for -> words that the refusal has to contain. Each is one thing that is impossible.
REFUSED_RECORDS = {
    "no table": (7, ["described by 7"]),
    "unknown key": (own(tiles=64), ["'tiles'", "'tile'"]),
    "no name": ({**OWN, "name": ""}, ["a record's name", "C identifier"]),
    "name in capitals": (own(name="I8"), ["'I8'", "C identifier"]),
    "name ends in an underscore": (own(name="i8_"), ["underscore too many"]),
    "name of a shipped record": (own(name="fp8_656"), ["there already", "another name"]),
    "name of a cache of codes": (own(name="i4_32"), ["there already"]),
    "name of a type": (own(name="bf16"), ["there already"]),
    "name of codes": (own(name="e4m3"), ["there already"]),
    "name that starts with d": (own(name="data"), ["starts a word", "another name"]),
    "name with a word of d": (own(name="i8_d64"), ["starts a word"]),
    "fields no list": (own(fields="nope"), ["fields of record 'i8_my'", "list of fields"]),
    "fields missing": ({"name": "i8_my", "tile": 64}, ["0 fields nope", "exactly one"]),
    "behind no list": (own(behind=3), ["behind of record 'i8_my'", "list of fields"]),
    "field no table": (own(fields=[NOPE, 3]), ["a field is 3", "name = "]),
    "field with an unknown key": (own(fields=[{**NOPE, "cout": 1}]), ["'cout'", "'count'"]),
    "field of an unknown name": (own(fields=[field("nop", "i8", 1)]), ["'nop'", "'nope'"]),
    "nope of a plain type": (own(fields=[field("nope", "f16", 1)]), ["'f16'", "i8"]),
    "rope of codes": (own(fields=[NOPE, field("rope", "i8", 1)]), ["rope", "'i8'"]),
    "scale of codes": (own(fields=[NOPE, field("scale", "e4m3", 4)]), ["scale", "'e4m3'"]),
    "pad of numbers": (own(fields=[NOPE, field("pad", "f32", 1)]), ["pad", "'f32'", "bytes"]),
    "count missing": (own(fields=[{"name": "nope"}]), ["count of nope", "not a whole number"]),
    "count zero": (own(fields=[field("nope", "i8", 0)]), ["count of nope = 0", "1 to 4096"]),
    "count huge": (own(fields=[field("nope", "i8", 4097)]), ["count of nope = 4097"]),
    "no nope": (own(fields=[ROPE, SCALE]), ["0 fields nope", "exactly one"]),
    "nope twice": (own(fields=[NOPE, NOPE, SCALE]), ["2 fields nope", "exactly one"]),
    "rope twice": (own(fields=[NOPE, ROPE, ROPE, SCALE]), ["2 fields rope", "at most one"]),
    "no scale": (own(fields=[NOPE, ROPE]), ["0 fields scale", "exactly one"]),
    "scale twice": (own(behind=[SCALE]), ["2 fields scale", "exactly one"]),
    "nope behind": (own(fields=[SCALE], behind=[NOPE]), ["0 fields nope"]),
    "rope behind": (
        own(fields=[NOPE], behind=[ROPE, SCALE]),
        ["rope behind the page's rows", "put it into fields"],
    ),
    "padding behind and nothing else": (
        own(behind=[field("pad", "bytes", 4)]),
        ["no scale behind", "key_stride.batch"],
    ),
    "pages filled up, scales in the rows": (own(page_multiple=64), ["page_multiple", "behind"]),
    "pages that end between numbers": (
        own(fields=[NOPE, ROPE], behind=[SCALE], page_multiple=2),
        ["page_multiple = 2 is no multiple of 4", "choose a multiple of 4"],
    ),
    "tile missing": ({"name": "i8_my", "fields": [NOPE, ROPE, SCALE]}, ["tile of record", "whole"]),
    "tile zero": (own(tile=0), ["tile of record 'i8_my' = 0"]),
    "tile wider than nope": (own(tile=257), ["tile of record 'i8_my' = 257", "1 to 256"]),
    "too few scales": (own(tile=63), ["4 scales for 256 channels", "the count 5"]),
    "too many scales": (own(tile=128), ["4 scales for 256 channels", "the count 2"]),
    "page_multiple zero": (own(page_multiple=0), ["page_multiple of record 'i8_my' = 0"]),
    "dv zero": (own(dv=0), ["dv of record 'i8_my' = 0", "1 to 288"]),
    "dv beyond the row": (own(dv=289), ["dv of record 'i8_my' = 289", "1 to 288"]),
    "a number between its places": (
        own(fields=[field("pad", "bytes", 2), NOPE, ROPE, SCALE]),
        ["scale would start at byte 322", "4 bytes", "pad"],
    ),
    "rows that end between places": (
        own(fields=[SCALE, NOPE, field("rope", "query", 31)]),
        ["a row has 334 bytes", "no multiple of 4", "end it with"],
    ),
    "what is behind ends between places": (
        own(fields=[NOPE, ROPE], behind=[SCALE, field("pad", "bytes", 3)]),
        ["behind a page has 19 bytes", "no multiple of 4"],
    ),
}


@pytest.mark.parametrize("case", REFUSED_RECORDS)
def test_refused_record(case):
    table, words = REFUSED_RECORDS[case]
    with pytest.raises(spec.Refusal) as refusal:
        parse_record(table)
    said = str(refusal.value)
    assert "; fix: " in said, said
    for word in words:
        assert word in said, said


def test_the_records_that_refusals_start_from_are_fine():
    """The control."""
    made = parse_record(OWN)
    assert (made.name, made.tile, made.usual_dv) == ("i8_my", 64, 256)
    assert made.count("rope") == 32 and not made.scales_behind
    apart = parse_record(own(fields=[NOPE, ROPE], behind=[SCALE], page_multiple=4, dv=288))
    assert apart.scales_behind and apart.usual_dv == 288


REFUSED = {
    "dtype of 32 bits": ({**PLAIN, "dtype": "f32"}, ["dtype = 'f32'", "bf16 or f16"]),
    "no kv": ({"op": ANTIQUANT, "dtype": "bf16"}, ["kv is missing", "add kv = "]),
    "unknown kv": ({**PLAIN, "kv": "i8_665"}, ["'i8_665'", "did you mean 'i8_656'"]),
    "kv of plain numbers": ({**PLAIN, "kv": "bf16"}, ["kv = 'bf16'"]),
    "scales in tensors of their own": ({**PLAIN, "kv": "i8"}, ["tensors of their own"]),
    "a record for the plain operator": (
        {"op": "sparse_flash_attention", "dtype": "bf16", "dk": 512, "kv": "i8_656"},
        ["quantised cache", f'"{ANTIQUANT}"'],
    ),
    "dk of another record": ({**PLAIN, "dk": 256}, ["dk = 256", "has 512", "leave dk out"]),
    "rope of another record": ({**PLAIN, "rope": 32}, ["rope = 32", "has 64", "[[record]]"]),
    "dv beyond the row": ({**PLAIN, "dv": 577}, ["dv = 577", "a whole row"]),
    "dv zero": ({**PLAIN, "dv": 0}, ["dv = 0"]),
    "pages only, TND": ({**PLAIN, "kv": "fp8_v4", "layout_kv": ["TND"]}, ["TND", "PA_BSND"]),
    "pages only, among others": (
        {**PLAIN, "kv": "fp8_v4", "layout_kv": ["BSND", "PA_BSND"]},
        ["layout_kv BSND", "behind the rows of a page"],
    ),
    "layout pair, kv alone": (
        {**PLAIN, "layout_q": ["BSND"], "layout_kv": ["TND"]},
        ["layout_kv TND without layout_q TND", "same layout"],
    ),
    "layout pair, query alone": (
        {**PLAIN, "layout_q": ["BSND", "TND"], "layout_kv": ["BSND"]},
        ["layout_q TND has no layout_kv"],
    ),
    "unknown feature": ({**PLAIN, "features": ["slot"]}, ["did you mean 'slots'"]),
    "tiles with rotary values within a column": (
        {**PLAIN, "kv": "odd_v4"},
        ["isa amx with dv = 56", "beyond dk = 48", "leave amx out"],
    ),
    "rope wider than nope": ({**PLAIN, "kv": "odd_rope"}, ["rope = 32 is wider than dk = 16"]),
}
ODD = [
    {
        "name": "odd_v4",
        "fields": [field("nope", "e4m3", 48), field("rope", "bf16", 16), field("scale", "f32", 3)],
        "tile": 16,
        "dv": 56,
    },
    {
        "name": "odd_rope",
        "fields": [field("nope", "i8", 16), field("rope", "query", 32), field("scale", "f32", 1)],
        "tile": 16,
    },
]


@pytest.mark.parametrize("case", REFUSED)
def test_refusal(case):
    table, words = REFUSED[case]
    records = {**formats.RECORDS, **{one["name"]: parse_record(one) for one in ODD}}
    with pytest.raises(spec.Refusal) as refusal:
        render.render_header(spec.parse_header(table, records=records))
    said = str(refusal.value)
    assert "; fix: " in said, said
    for word in words:
        assert word in said, said


def test_rotary_values_within_a_column_are_fine_without_tiles():
    records = {"odd_v4": parse_record(ODD[0])}
    made = spec.parse_header({**PLAIN, "kv": "odd_v4", "isa": ["scalar", "avx2"]}, records=records)
    assert made.kernels[0].dv == 56


# ---- files --------------------------------------------------------------------------------------

RECORD_TOML = """
[[record]]
name = "{name}"
tile = 64
fields = [
    {{ name = "nope", type = "i8", count = 256 }},
    {{ name = "rope", count = 32 }},
    {{ name = "scale", count = 4 }},
]
"""
HEADER_TOML = f"""
[[header]]
op = "{ANTIQUANT}"
dtype = "bf16"
kv = "i8_my"
"""
FILES = {
    "record no list": ('record = 3\n[[header]]\nop="x"\n', ["no list of tables", "[[record]]"]),
    "one record as a table": ('[record]\nname = "x"\n' + HEADER_TOML, ["no list of tables"]),
    "two records of one name": (
        RECORD_TOML.format(name="i8_my") * 2 + HEADER_TOML,
        ["two records are called i8_my"],
    ),
    "a record that nobody described": (HEADER_TOML, ["kv = 'i8_my' is not known"]),
    "a shipped record again": (
        RECORD_TOML.format(name="i8_656") + HEADER_TOML,
        ["'i8_656' is there already"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_refused_file(case, tmp_path, capsys):
    content, words = FILES[case]
    file = tmp_path / "my.toml"
    file.write_text(content)
    assert main(["header", "--spec", str(file), "-o", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "; fix: " in said
    for word in words:
        assert word in said, said
    assert [p.name for p in tmp_path.iterdir()] == ["my.toml"]


@pytest.fixture(scope="module")
def own_header(tmp_path_factory):
    """A header of a user's own record, as the command line makes it: file, text."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my.toml").write_text(RECORD_TOML.format(name="i8_my") + HEADER_TOML)
    target = folder / "my.h"
    assert main(["header", "--spec", str(folder / "my.toml"), "-o", str(target)]) == 0
    return folder, target.read_text()


def test_a_record_of_ones_own_compiles_and_is_right(own_header):
    """256 + 32 channels in tiles of 64, from TOML to the oracle."""
    _, made = own_header
    k = bind.load(made)
    assert (k.dk, k.rope, k.dv) == (256, 32, 256)
    fields = (("nope", "i8", 256), ("rope", "query", 32), ("scale", "f32", 4))
    k.dtype, k.record = bind.DTYPES["bf16"], Record(fields, tile=64)
    for isa in k.isas():
        for group, layout in ((1, BSND), (17, PA_BSND)):
            shape = Shape(lens_q=(2,), lens_kv=(70,), group=group, layout_kv=layout, sparse_mode=3)
            case = make_case(k, shape)
            assert case.args.key.shape[-1] == 256 + 64 + 16
            check(case.args, run(k, case, isa), isa)


def test_the_command_in_its_banner_makes_it_again(own_header, tmp_path, monkeypatch):
    folder, made = own_header
    shutil.copy(folder / "my.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    banner = made[: made.index("*/")].replace("\\\n *", "")
    command = re.search(r"python3 -m gen (header .*)", banner)[1].split()
    assert main([*command, "-o", "x.h"]) == 0
    assert (tmp_path / "x.h").read_text() == made


def test_another_record_of_the_same_name_is_another_header():
    """The digest knows what a name stands for: two headers cannot be taken for each other."""
    one, other = (
        spec.parse_header({**PLAIN, "kv": "i8_my"}, records={"i8_my": parse_record(table)})
        for table in (OWN, own(fields=[NOPE, SCALE, ROPE]))
    )
    assert one.name == other.name and one.digest != other.digest


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SHIPPED_RECORDS, *RECORD_SPECS])
def test_names_go_both_ways(name):
    kernel = header(name).kernels[0]
    parsed = names.parse(kernel.name)
    again = spec.parse_kernel(parsed, records=known_records())
    assert again.name == kernel.name
    for key in ("op", "dtype", "kv", "dk", "rope", "math", "prefix"):
        assert parsed[key] == getattr(kernel, key)
    assert again.dv == kernel.dv and tuple(parsed["features"]) == kernel.features
    assert spec.parse_kernel(kernel.table(), records=known_records()) == kernel


def test_show_reads_the_name_of_a_record(capsys):
    for name in SHIPPED_RECORDS:
        assert main(["show", name]) == 0
    capsys.readouterr()


def test_the_command_in_a_banner_fits_its_line_whatever_its_length(capsys):
    """One column too many once made a kernel impossible that nothing else was wrong with."""
    assert main(["show", "hl_sparse_flash_attention_antiquant_f16_i8_656_d512x128_rope64"]) == 0
    assert "value 128" in capsys.readouterr().out
    for length in range(1, 80):
        command = f"gen header --op {'x' * 40} --name {'y' * length} --kv {'z' * 30} -o a.h"
        lines = render.wrap_command(command)
        assert all(len(line) <= 100 - len(" *     ") - len(" \\") for line in lines)
        assert "".join(line.replace("    ", " ") for line in lines) == command


def test_the_same_bytes_every_time():
    for name in ("f16_i8_tails", "bf16_fp8_page"):
        made = [
            render.render_header(
                spec.parse_header(header(name).kernels[0].table(), "", known_records())
            )
            for _ in range(2)
        ]
        assert made[0] == made[1] == text(name)


# ---- the manual ---------------------------------------------------------------------------------

TITLES = {
    "int8": "i8",
    "FP8 E4M3": "e4m3",
    "E8M0": "e8m0",
    "IEEE float32": "f32",
    "IEEE float16": "f16",
    "bfloat16": "bf16",
    "byte": "bytes",
}
SAID = {"channels without": "nope", "rotary channels": "rope", "scales": "scale", "not read": "pad"}


def drawing(manual: str) -> tuple[list, list, int, int]:
    """What the manual's RECORD says: fields (name, type, first byte, last, count) of a row, those
    behind a page, and how many bytes each row has here and there."""
    section = manual[manual.index(" * RECORD") : manual.index(" * SELECTION")]
    section = section[: section.index("..._quantise_rows")]
    section, _, behind = section.partition("Behind the rows of a page")
    line = r" \*\s+(\d+) \.\. (\d+)\s+([\w ]+?)\[(\d+)\]\s+(.*)"

    def fields(part: str) -> list:
        return [
            (
                next(name for words, name in SAID.items() if what.startswith(words)),
                TITLES[title],
                int(first),
                int(last),
                int(count),
            )
            for first, last, title, count, what in re.findall(line, part)
        ]

    size = int(re.search(r", (\d+) bytes a token", section)[1])
    each = int(re.search(r", (\d+) bytes for each", behind)[1]) if behind else 0
    return fields(section), fields(behind), size, each


@pytest.mark.parametrize("name", [*SHIPPED_RECORDS, *RECORD_SPECS])
def test_the_manual_draws_the_record_byte_by_byte(name):
    """The drawing against what the oracle reads and against gen.formats.layout."""
    kernel = header(name).kernels[0]
    row, behind, size, each = drawing(text(name))
    plan = formats.layout(kernel.record, kernel.dtype)
    assert (size, each) == (plan.bytes, plan.behind)
    drawn = [(*one, False) for one in row] + [(*one, True) for one in behind]
    assert drawn == [
        (
            place.field.name,
            place.type.name if place.type else "bytes",
            place.at,
            place.at + place.bytes - 1,
            place.field.count,
            place.behind,
        )
        for place in plan.places
    ]
    known = record_of(kernel.kv)
    for fields, drawn_fields, total in ((known.fields, row, size), (known.behind, behind, each)):
        at = 0
        for (what, kind, count), one in zip(fields, drawn_fields, strict=True):
            kind = kernel.dtype if kind == "query" else kind
            width = STORED[kind].itemsize if kind in STORED else 1
            assert one == (what, kind, at, at + count * width - 1, count)
            at += count * width
        assert at == total


def test_the_sizes_of_the_shipped_records():
    """By their names and their documents."""
    sizes = {}
    for name in SHIPPED_RECORDS:
        kernel = header(name).kernels[0]
        plan = formats.layout(kernel.record, kernel.dtype)
        sizes[kernel.kv] = (plan.bytes, plan.behind, plan.align, kernel.dv)
    assert sizes == {
        "i8_656": (656, 0, 4, 512),
        "fp8_656": (656, 0, 4, 512),
        "fp8_v4": (576, 8, 2, 512),
    }


def test_headers_say_what_they_were_made_of():
    """Instruction sets of a test's own record, types that only its numbers need."""
    for name, table in RECORD_SPECS.items():
        code = re.sub(r"/\*.*?\*/", "", text(name), flags=re.DOTALL)
        kinds = {one["type"] for one in RECORD_TABLES[table["kv"]]["fields"]}
        for kind in ("i8", "e4m3"):
            assert (f"hl_vload_{kind}_avx512(" in code) == (kind in kinds), (name, kind)
    assert isas_in("f16_i8_tails") == isas_in("bf16_fp8_page")


def test_two_orders_of_656_bytes():
    """i8_656 and fp8_656 place scales and rotary channels the other way round."""
    one, other = (formats.RECORDS[n].swapped() for n in ("i8_656", "fp8_656"))
    assert [f.name for f in one.fields] == ["nope", "scale", "rope"]
    assert [f.name for f in other.fields] == ["nope", "rope", "scale"]
    assert formats.RECORDS["fp8_v4"].swapped() is None
    assert np.isclose(
        formats.CODE_LIMIT["e4m3"], float(np.array(0x7E, np.uint8).view(STORED["e4m3"]))
    )
