"""Strict Jinja: tables and pages in, one header out. Refuses output that is not fit to read."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jinja2

from gen import ABI, __version__, matrix, memory, tiling, train
from gen.append_view import append_view, written_of
from gen.decode_view import decode_view, rows_of, side_read, side_stored
from gen.fill import WIDTH, refill
from gen.formats import FORMATS, STORED, TYPES
from gen.isa import FORMAT_WORDS, ISAS
from gen.names import OPERATORS, Speller
from gen.record_view import formats_of, record_view
from gen.refusal import Refusal
from gen.train import train_view

CHUNK_KEYS = 2048  # keys summed before they are merged, unless the caller says otherwise
MAX_GROUP = 65536  # query heads on one kv head: keeps every size of the workspace in 32 bits

# Names that an error can put to an argument, beside the fields of the args structs.
EXTRA_ARGUMENTS = ("plan", "args", "workspace", "parts")

# Minimax for (2^f - 1) / f on [-1/2, 1/2], weighted for the relative error of 2^f; the last
# coefficient is exactly 1, so that 2^0 is.
EXP2_COEFFICIENTS = (
    "1.53533619e-4f",
    "1.33988750e-3f",
    "9.61843710e-3f",
    "5.55033237e-2f",
    "2.40226477e-1f",
    "6.93147182e-1f",
    "1.0f",
)
# The same of degree 5 on [0, 1], for weights that meet V rounded: relative error 1.5e-7.
EXP2_TILE_COEFFICIENTS = (
    "1.867130496e-3f",
    "9.017029415e-3f",
    "5.579991376e-2f",
    "2.401644500e-1f",
    "6.931513118e-1f",
    "1.0f",
)
FROM_FLOAT = {"f32": "", "f16": "hl_f16_of_float", "bf16": "hl_bf16_of_float"}
LINK_NOTES = {
    "builtin": "",
    "sleef": ", to be linked with -lsleef",
    "libm": ", to be linked with -lm",
}
EXP2_ULP = "1.25"
LOG_ERROR = "8e-8"


def template_folder():
    """Beside the package in a checkout, inside it when installed."""
    here = Path(__file__).parent
    beside = here.parent / "templates"
    return beside if beside.is_dir() else here / "templates"


@cache
def environment():
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        line_statement_prefix="//%",
        autoescape=False,
    )
    made.filters["count"] = count
    return made


def count(number, noun):
    """12 keys, 1 key."""
    return f"{number} {noun}{'s' if number > 1 else ''}"


def page(name, **context):
    try:
        return environment().get_template(name).render(**context)
    except jinja2.TemplateError as error:
        raise RuntimeError(f"template {name}: {error}") from error


@cache
def fields_of(name):
    """The fields of the args structs on a page, read from it: one list, not two."""
    text = (template_folder() / f"{name}.h.j2").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    bodies = re.findall(r"typedef struct hl_\w+_args \{(.*?)\n\} ", text, re.DOTALL)
    return [field for body in bodies for field in re.findall(r"(\w+);", body)]


def argument_names(op):
    """The fields of an operator's args struct."""
    return fields_of(f"op/{op}")


def arguments():
    """Everything that an error can name, in every header the same."""
    pages = [f"op/{op}" for op in OPERATORS] + ["kv/args", "kv/decode_args"]
    rows = [field for name in pages for field in fields_of(name)] + list(EXTRA_ARGUMENTS)
    return [SimpleNamespace(lower=name, upper=name.upper()) for name in dict.fromkeys(rows)]


@dataclass(frozen=True)
class Region:
    """One kernel on one instruction set: what the pages of a region are filled in with."""

    kernel: object
    isa: object
    tile: object

    @property
    def speller(self):
        return Speller(
            self.kernel.prefix,
            self.kernel.private,
            self.isa.name,
            self.isa.words,
            self.kernel.math,
        )


def products_of(kernel):
    """Multiply-adds of one query with one key."""
    if kernel.backward:
        return 4 * kernel.d + 3 * kernel.dv  # S and dP twice, dQ, dK and dV
    return kernel.d * (2 if kernel.integer else 1) + kernel.dv


def kernel_view(kernel):
    """What templates may ask about a kernel: every decision already taken."""
    fmt = FORMATS[kernel.numbers]
    words = FORMAT_WORDS[kernel.numbers]
    views = [
        SimpleNamespace(
            name=isa.name,
            macro=isa.macro,
            title=isa.title,
            asked=bool(isa.detect) or isa.tiles,
            words=ISAS[isa.words].macro,
            task=f"{kernel.private}_task_{isa.name}",
            merge=f"{kernel.private}_merge_{isa.name}",
            walk=f"{kernel.private}_walk_{isa.name}",
        )
        for isa in kernel.isas
    ]
    return SimpleNamespace(
        name=kernel.name,
        macro=kernel.name.upper(),
        op_name=f"hl_{kernel.op}",
        dtype=kernel.dtype,
        title=TYPES[kernel.dtype].title,
        c_type=fmt.c_type,  # of results and of pse_shift
        bytes=fmt.bytes,
        query_bytes=TYPES[kernel.dtype].bytes,
        line=64 // fmt.bytes,
        dk=kernel.dk,
        rope=kernel.rope,
        rope_words=f" + {kernel.rope} rotary" if kernel.rope else "",
        dv=kernel.dv,
        d=kernel.d,
        # Multiply-adds of one key and head; whole numbers are scored twice.
        products=products_of(kernel),
        float_row_bytes=4 * kernel.dv,
        has_rope=kernel.rope > 0,
        has_slots="slots" in kernel.features and not kernel.decodes,
        math=kernel.math,
        layout_q=kernel.layout_q,
        layout_kv=kernel.layout_kv,
        layout_q_tests=[f"a->layout_query == HL_LAYOUT_{name}" for name in kernel.layout_q],
        layout_kv_tests=[f"a->layout_kv == HL_LAYOUT_{name}" for name in kernel.layout_kv],
        layouts_kv=[SimpleNamespace(file=f"{n.lower()}.h.j2") for n in kernel.layout_kv],
        isas=views,
        scalar=next((view for view in views if view.name == "scalar"), None),
        word_isas=[view for view in views if not ISAS[view.name].tiles],
        tile_isas=[view for view in views if ISAS[view.name].tiles],
        isa_last=f"HL_ISA_{list(ISAS.values())[-1].macro}",
        deepest=max(kernel.isas, key=lambda isa: isa.stack_bytes).macro,
        tile_heads=matrix.least_heads(kernel),
        load=words["load"],
        load_n=words["load_n"],
        pair=words["pair"],
        store=words["store"],
        store_n=words["store_n"],
        key=side_stored(kernel, "key"),
        value=side_stored(kernel, "value"),
        key_as=side_read(kernel, "key"),  # as the products read them
        value_as=side_read(kernel, "value"),
        **{**decode_view(kernel), **train_view(kernel)},
        append=append_view(kernel),
        record=record_view(kernel),
        layouts_of_cache=", ".join(kernel.layout_kv)
        + (f", rows of {kernel.record.name}" if kernel.record else ""),
        row_word=f"hl_vrow_{kernel.dtype}",
        from_float=FROM_FLOAT[kernel.numbers],
        exp2=Speller("hl", math=kernel.math, isa="scalar").word("vexp2"),
        log={"builtin": "hl_log", "sleef": "Sleef_logf_u10", "libm": "logf"}[kernel.math],
    )


def row_of(isa, name):
    """The loader of a whole row of one element type."""
    words = FORMAT_WORDS[name]
    return SimpleNamespace(
        guard=f"HL_VROW_{name.upper()}_{isa.macro}",
        word=f"hl_vrow_{name}_{isa.name}",
        title=STORED[name].title,
        c_type=STORED[name].c_type,
        load=words["load"],
        load_n=words["load_n"],
    )


def packed_row_of(isa, stored):
    """The loader of a row of int4 codes with their scales behind them."""
    return SimpleNamespace(
        guard=f"HL_VROW_{stored.name.upper()}_{isa.macro}",
        word=f"hl_vrow_{stored.name}_{isa.name}",
        title=stored.title,
        group=stored.group,
    )


def words_page(isa, formats, math, rows=None, written=(), turns=False):
    """Words, exp2 and row loaders of one instruction set, for the element types given; loaders for
    those of `rows`, or for the types that tensors have. written: formats of codes that rows of
    numbers become, beside those of records. turns: whether vturn is used."""
    speller = Speller("hl", isa=isa.name, words=isa.words, math=math)
    if isa.tiles:
        return speller.spell(
            page(f"isa/{isa.name}.h.j2", formats=formats, coefficients=EXP2_TILE_COEFFICIENTS)
        )
    math_tag = "" if math == "builtin" else f"_{math.upper()}"
    exp2 = SimpleNamespace(
        guard=f"HL_VEXP2{math_tag}_{isa.macro}", coefficients=EXP2_COEFFICIENTS, ulp=EXP2_ULP
    )
    text = page(f"isa/{isa.name}.h.j2", formats=formats, written=written, turns=turns)
    text += page("step/exp2.h.j2", isa=isa, math=math, exp2=exp2)
    for name in [name for name in formats if name in FORMATS] if rows is None else rows:
        if STORED[name].packed:
            text += page("kv/packed.h.j2", isa=isa, row=packed_row_of(isa, STORED[name]))
        else:
            text += page("kv/plain.h.j2", isa=isa, row=row_of(isa, name))
    return speller.spell(text)


def with_isa(side, isa):
    """A side of the cache, with the name of its row loader completed."""
    return SimpleNamespace(**{**vars(side), "row_word": f"{side.row_word}_{isa.words}"})


STEPS = ("step/load", "step/score", "step/softmax", "step/value", "step/finish")
INT8_STEPS = ("step/int8_load", "step/int8_score", "step/int8_softmax", "step/int8_value")
INT8_STEPS += ("step/finish", "algo/int8")
TRAIN_STEPS = (
    "train/load",
    "train/products",
    "train/softmax",
    "train/drop",
)
TRAIN_STEPS += ("train/finish",)
TRAIN_STEPS += ("train/forward",)
TRAIN_TILE_STEPS = ("train/tile_load", "train/drop", "train/tile_softmax", "train/tile_products")
TRAIN_TILE_STEPS += ("train/softmax", "train/finish", "train/tile_forward")
GRAD_STEPS = ("train/load", "train/products", "train/drop", "train/gradient", "train/pairs")
GRAD_STEPS += ("train/backward",)
GRAD_TILE_STEPS = ("train/tile_load", "train/drop", "train/gradient", "train/tile_gradient")
GRAD_TILE_STEPS += ("train/tile_products", "train/tile_sums", "train/tile_backward")
TILE_STEPS = ("tile/load", "tile/many", "tile/few", "tile/settle", "step/finish")


def training_steps(grad, on_tiles):
    if grad:
        return GRAD_TILE_STEPS if on_tiles else GRAD_STEPS
    return TRAIN_TILE_STEPS if on_tiles else TRAIN_STEPS


def region_page(region, view):
    """One instruction set's region: the steps, the merge and the forward page."""
    isa = region.isa
    k = SimpleNamespace(**vars(view))
    k.row_word = f"{view.row_word}_{isa.words}"
    k.key = with_isa(view.key, isa)
    k.value = with_isa(view.value, isa)
    context = {
        "k": k,
        "isa": isa,
        "tile": region.tile,
        "t": region.tile,
        "record": view.record,
        "codes": getattr(region.tile, "codes", None),
        "task_attribute": f'__attribute__((target("{isa.target}")))\n' if isa.target else "",
        # In plain C a block's frame is not to be added to its task's: what little stack there is.
        "block_linkage": "KERNEL" if isa.target or isa.lanes > 1 else "HL_OWN_FRAME",
    }
    pages = [*(TILE_STEPS if isa.tiles else STEPS), "algo/merge", "algo/forward"]
    if region.kernel.trains:
        pages = list(training_steps(view.grad, isa.tiles))
    elif region.kernel.integer:
        pages = list(INT8_STEPS)
    elif region.kernel.decodes:
        pages.insert(pages.index("tile/few" if isa.tiles else "step/softmax"), "step/decode_bias")
    if isa.tiles and not region.kernel.trains:
        pages.insert(-1, "tile/forward")
        if not region.tile.few:
            pages.remove("tile/few")
    elif not isa.tiles and context["codes"]:
        pages.insert(pages.index("step/finish"), "kv/codes")
    if region.kernel.record and not isa.tiles:
        pages.append("kv/rows")
    if region.kernel.decodes and view.append.calls and not isa.tiles:
        pages.append("kv/decode_rows")
    text = "\n".join(page(f"{name}.h.j2", **context) for name in pages)
    return region.speller.spell(text)


def tiles_of(kernel):
    tile = train.tile if kernel.trains else tiling.tile
    return {isa: tile(kernel, isa) for isa in kernel.isas}


def memory_of(kernel, tiles):
    return train.plan(tiles) if kernel.trains else memory.plan(tiles)


def most_of(tiles, name, on_tiles):
    """A number of the tiles {isa: tile} that plan needs, of one kind of instruction set."""
    found = (getattr(t, name, 0) for isa, t in tiles.items() if isa.tiles == on_tiles)
    return max(found, default=0)


def kernel_page(kernel):
    """Everything of one kernel behind the shared parts."""
    view = kernel_view(kernel)
    tiles = tiles_of(kernel)
    mem = memory_of(kernel, tiles)
    needs = (formats_of(kernel), kernel.math, rows_of(kernel), written_of(kernel), kernel.trains)
    words = [
        SimpleNamespace(isa=isa, text=words_page(isa, *needs))
        for isa in {**{ISAS["scalar"]: 0}, **dict.fromkeys(kernel.isas, 0)}
    ]
    regions = [
        SimpleNamespace(isa=isa, tile=tile, text=region_page(Region(kernel, isa, tile), view))
        for isa, tile in tiles.items()
    ]
    common = Speller(kernel.prefix, kernel.private)
    text = page(
        "train/kernel.h.j2" if kernel.trains else "kernel.h.j2",
        k=view,
        queries=most_of(tiles, "queries", False),
        tile_queries=most_of(tiles, "queries", True),
        keys=most_of(tiles, "keys", False),
        tile_keys=most_of(tiles, "keys", True),
        memory=mem,
        words=words,
        regions=regions,
        chunk=CHUNK_KEYS,
        max_group=MAX_GROUP,
    )
    return common.spell(text)


def command_of(header):
    """The exact command that makes this header again."""
    if header.from_file:
        return f"python3 -m gen header --spec {header.from_file} --only {header.name}"
    kernel = header.kernels[0]
    parts = [
        "python3 -m gen header",
        f"--op {kernel.op}",
        f"--dtype {kernel.dtype}",
    ]
    if kernel.kv != kernel.dtype:
        parts.append(f"--kv {kernel.kv}")
    if not kernel.record:
        parts.append(f"--dk {kernel.dk}")
        if kernel.rope:
            parts.append(f"--rope {kernel.rope}")
    if kernel.dv != kernel.usual_dv:
        parts.append(f"--dv {kernel.dv}")
    parts.append(f"--layout-q {','.join(kernel.layout_q)}")
    parts.append(f"--layout-kv {','.join(kernel.layout_kv)}")
    if kernel.features:
        parts.append(f"--feature {','.join(kernel.features)}")
    parts.append(f"--isa {','.join(kernel.isa)}")
    if kernel.math != "builtin":
        parts.append(f"--math {kernel.math}")
    if kernel.prefix != "hl":
        parts.append(f"--prefix {kernel.prefix}")
    if kernel.given_name:
        parts.append(f"--name {kernel.given_name}")
    parts.append(f"-o {header.name}.h")
    return " ".join(parts)


def wrap_command(command, width=91):
    """The command over several lines, each to be joined by a backslash. 7 columns are in front of
    a line in the banner, 2 behind it."""
    lines = [""]
    for word in re.split(r" (?=--?[a-z])", command):
        if lines[-1] and len(lines[-1]) + len(word) + 1 > width:
            lines.append("    " + word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip() if len(lines) == 1 else f"{lines[-1]} {word}"
    return lines


def render_header(header):
    """The text of one header."""
    views = [kernel_view(kernel) for kernel in header.kernels]
    kernels = [view for view in views if not view.decodes and not view.trains]
    ops = sorted({kernel.op for kernel in header.kernels})
    text = page(
        "header.h.j2",
        header=header,
        version=__version__,
        abi=ABI,
        guard=f"{header.name.upper()}_H",
        command=wrap_command(command_of(header)),
        kernels=kernels,
        decoders=[view for view in views if view.decodes],
        trainers=[view for view in views if view.trains],
        decode_bytes=decode_bytes(header),
        decode_tiles=any(isa.tiles for k in header.kernels if k.decodes for isa in k.isas),
        pages=[kernel_page(kernel) for kernel in header.kernels],
        arguments=arguments(),
        chunk=CHUNK_KEYS,
        libm=any(kernel.math == "libm" for kernel in header.kernels),
        log_error=LOG_ERROR,
        ops=ops,
        records=any(kernel.record for kernel in header.kernels),
        all_isas=ISAS.values(),
        isas=[
            isa
            for isa in ISAS.values()
            if isa.name == "scalar" or any(isa.name in kernel.isa for kernel in header.kernels)
        ],
        manual_of=manual_of(header),
        link_note=LINK_NOTES[header.kernels[0].math],
        isa_titles=isa_titles(header),
        tiles=any(isa.tiles for kernel in header.kernels for isa in kernel.isas),
    )
    text = refill(Speller(header.prefix).rename(text))
    lint(text, header.name)
    return text


def isa_titles(header):
    names = {name for kernel in header.kernels for name in kernel.isa}
    return [isa.title for isa in ISAS.values() if isa.name in names]


def decode_bytes(header):
    """Workspace that the manual quotes, of the first kernel that decodes: for 8 queries."""
    found = [kernel for kernel in header.kernels if kernel.decodes]
    return memory.plan(tiles_of(found[0])).workspace_bytes(8) if found else 0


def manual_of(header):
    """Figures that the manual quotes, for the header's first kernel."""
    kernel = header.kernels[0]
    mem = memory_of(kernel, tiles_of(kernel))
    if kernel.trains:
        return SimpleNamespace(bytes=mem.bytes)
    return SimpleNamespace(
        example_group=128 if kernel.d >= 512 else 8,
        bytes=mem.workspace_bytes(128 if kernel.d >= 512 else 8),
    )


def lint(text, name):
    """The product is for reading: what is not fit to be read is not written."""
    lines = text.split("\n")
    for number, text_line in enumerate(lines, 1):
        where = f"{name}.h:{number}"
        if len(text_line) > WIDTH:
            raise Refusal(
                f"{where} would be {len(text_line)} columns wide: {text_line.strip()[:60]}...",
                "choose a shorter --name or --prefix",
            )
        if text_line.rstrip() != text_line:
            raise RuntimeError(f"{where} ends in a blank: mend the template")
        if "\t" in text_line:
            raise RuntimeError(f"{where} has a tab: mend the template")
        if not text_line and number > 1 and not lines[number - 2] and number < len(lines):
            raise RuntimeError(f"{where} is a second blank line: mend the template")
    if not text.endswith("\n"):
        raise RuntimeError(f"{name}.h does not end with a line break: mend the template")
