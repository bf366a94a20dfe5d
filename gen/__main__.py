"""The command line: list, show, header, all, check. Installed, it is called `headlight`."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from gen import __version__, render, spec
from gen.formats import FORMATS, RECORDS, layout
from gen.spec import Refusal

INCLUDE = Path(__file__).parent.parent / "include"
GROUP = 128  # query heads that `show` takes where nobody says


def write_whole(path, text):
    """The whole file or nothing: it is written beside its place, then moved there."""
    path = Path(path)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    part = None
    try:
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise Refusal(
            f"cannot write {path}: {reason}", "name a file in a folder that exists and is yours"
        ) from error
    return True


def find_header(name):
    """A header by its name: from the catalogue, or by reading the name itself."""
    headers = {header.name: header for header in spec.load_catalogue()}
    name = name.removesuffix(".h")
    if name in headers:
        return headers[name]
    table = spec.names.parse(name)
    if table is None:
        raise Refusal(f"no header is called {name!r}", spec.nearest(name, tuple(headers)))
    return spec.parse_header(table)


def quantised():
    """Names that kv may have beside the query's type."""
    return (*RECORDS, *(name for name in spec.STORED if name not in spec.FORMATS), "KxV")


def every_word(of_operators):
    """All words that some operator knows, each once."""
    return ", ".join(dict.fromkeys(word for words in of_operators.values() for word in words))


def split_words(text):
    return [word for word in text.replace(" ", ",").split(",") if word]


def table_of(options):
    """The kernel's table from the command line; only what was given."""
    lists = {
        "layout_q": options.layout_q,
        "layout_kv": options.layout_kv,
        "features": options.feature,
        "isa": options.isa,
    }
    plain = ("op", "dtype", "kv", "dk", "rope", "dv", "math", "prefix", "name")
    table = {key: getattr(options, key) for key in plain if getattr(options, key) is not None}
    for key, given in lists.items():
        if given is not None:
            table[key] = [word for text in given for word in split_words(text)]
    return table


def pick(options):
    """The headers that a `header` call asks for."""
    table = table_of(options)
    if options.spec is None:
        if options.only is not None:
            raise Refusal("--only picks from a TOML file, and there is none", "add --spec FILE")
        return [spec.parse_header(table)]
    if table:
        raise Refusal(
            f"--{next(iter(table)).replace('_', '-')} beside --spec: the file says it all",
            "put it into the TOML, or leave --spec out",
        )
    headers = spec.load_toml(options.spec)
    if options.only is not None:
        names = tuple(header.name for header in headers)
        headers = [header for header in headers if header.name == options.only]
        if not headers:
            raise Refusal(
                f"{options.spec} has no header {options.only!r}", spec.nearest(options.only, names)
            )
    return headers


def run_header(options):
    headers = pick(options)
    texts = [(header, render.render_header(header)) for header in headers]
    if options.output == "-":
        for _, text in texts:
            sys.stdout.write(text)
        return 0
    target = Path(options.output) if options.output else Path(".")
    if len(texts) > 1 and not target.is_dir():
        raise Refusal(
            f"{len(texts)} headers do not fit into one file {target}",
            "name a folder with -o, or pick one with --only",
        )
    for header, text in texts:
        path = target / f"{header.name}.h" if target.is_dir() else target
        write_whole(path, text)
        print(path)
    return 0


def run_list(_options):
    for header in spec.load_catalogue():
        kernels = header.kernels
        print(f"{header.name}.h")
        for kernel in kernels:
            print(f"    {kernel.op}: {describe(kernel)}")
    return 0


def describe(kernel):
    rope = f" + {kernel.rope}" if kernel.rope else ""
    cache = f", cache of {kernel.kv}" if kernel.kv != kernel.dtype else ""
    extra = f", {', '.join(kernel.features)}" if kernel.features else ""
    math = f", math {kernel.math}" if kernel.math != "builtin" else ""
    layouts = "/".join(kernel.layout_q)
    layouts += "" if kernel.trains else f" x {'/'.join(kernel.layout_kv)}"
    return (
        f"{kernel.dtype}{cache}, key {kernel.dk}{rope}, value {kernel.dv}, "
        f"layouts {layouts}, "
        f"isa {' '.join(kernel.isa)}{extra}{math}"
    )


def run_show(options):
    header = find_header(options.name)
    text = render.render_header(header)
    print(f"{header.name}.h: {text.count(chr(10))} lines, description {header.digest}")
    for kernel in header.kernels:
        show_kernel(kernel, options)
    return 0


def row_bytes(kernel):
    """What is read of a key and its value, which is the first channels of it but when decoding."""
    if kernel.record:
        plan = layout(kernel.record, kernel.dtype)
        return plan.bytes + plan.behind
    key, value = kernel.stored_key, kernel.stored_value
    bytes_of_key = key.width(kernel.d) * key.element
    return bytes_of_key + (value.width(kernel.dv) * value.element if kernel.decodes else 0)


def show_kernel(kernel, options):
    tiles = render.tiles_of(kernel)
    mem = render.memory_of(kernel, tiles)
    print(f"\n{kernel.name}\n  {describe(kernel)}")
    print(f"\n  arguments (hl_{kernel.op}_args)")
    print("    " + ", ".join(render.argument_names(kernel.op)))
    print("\n  instruction sets, tiles and why")
    for isa, tile in tiles.items():
        print(f"    {isa.name}: {isa.lanes} lanes, {isa.registers} registers")
        for line in (*tile.shape_lines, *tile.why.values()):
            print(f"      {line}")
    (show_training if kernel.trains else show_decoding)(kernel, mem, options)


def show_decoding(kernel, mem, options):
    """Memory, and work a key: what is read of it, heads share."""
    group, rows, keys = options.group or GROUP, options.rows or 1, options.keys
    row = row_bytes(kernel)
    chunks = max(1, -(-keys // render.CHUNK_KEYS))
    print(f"\n  memory for {group} query heads on a kv head, {rows} rows, {keys} keys")
    print(f"    workspace of one task  {mem.workspace_bytes(group)} bytes")
    print(f"    partials to split rows {mem.partials_bytes(rows, group, chunks)} bytes at most")
    flops = 2 * group * (kernel.d + kernel.dv)
    print(f"\n  work of one key\n    {flops} flop for all {group} heads, {row} bytes read once")
    print(f"    {flops / row:.1f} flop a byte")


def show_training(kernel, mem, options):
    """The same of many rows. Backward: five products, three as deep or wide as keys."""
    group, rows, keys = options.group or 1, options.rows or options.keys, options.keys
    channels = kernel.dk + kernel.dv
    if kernel.backward:
        channels = 3 * kernel.dk + 2 * kernel.dv
    size = FORMATS[kernel.dtype].bytes
    read = size * (kernel.dk + kernel.dv) * keys
    print(f"\n  memory, whatever the shape\n    workspace of one task  {mem.bytes} bytes")
    print(f"\n  work of {rows} rows of {group} query heads on a kv head, {keys} keys, no mask")
    print(f"    {2 * group * rows * keys * channels} flop, half of it where rows are causal")
    print(f"    {read} bytes of keys and values")


def run_all(options):
    folder = Path(options.folder)
    if not folder.is_dir():
        raise Refusal(f"there is no folder {folder}", "make it, or name another with --folder")
    texts = {header.name: render.render_header(header) for header in spec.load_catalogue()}
    for name, text in texts.items():
        changed = write_whole(folder / f"{name}.h", text)
        print(f"{'written  ' if changed else 'unchanged'} {folder / name}.h")
    for stray in stray_headers(folder, texts):
        print(f"stray     {stray}: not in the catalogue, left alone")
    return 0


def stray_headers(folder, known):
    return [path for path in sorted(folder.glob("*.h")) if path.stem not in known]


def run_check(options):
    folder = Path(options.folder)
    bad = 0
    texts = {header.name: render.render_header(header) for header in spec.load_catalogue()}
    for name, text in texts.items():
        path = folder / f"{name}.h"
        found = path.read_text(encoding="utf-8") if path.is_file() else None
        if found != text:
            bad += 1
            what = "is missing" if found is None else "differs from what is generated"
            print(f"{path} {what}; fix: python3 -m gen all")
    for stray in stray_headers(folder, texts):
        bad += 1
        print(f"{stray} is not in the catalogue; fix: remove it, or describe it there")
    print(f"{len(texts)} headers checked, {bad} wrong")
    return 1 if bad else 0


def parser():
    top = argparse.ArgumentParser(prog="headlight", description=__doc__.split("\n")[0])
    top.add_argument("--version", action="version", version=__version__)
    sub = top.add_subparsers(required=True, metavar="COMMAND")

    one = sub.add_parser("list", help="the shipped headers")
    one.set_defaults(run=run_list)

    one = sub.add_parser("show", help="what a header will contain: tiles and why, memory, work")
    one.add_argument("name", help="a shipped header, or any name of the grammar")
    one.add_argument("--group", type=int, help="query heads on one kv head")
    one.add_argument("--rows", type=int, help="query rows")
    one.add_argument("--keys", type=int, default=2048, help="keys of a row")
    one.set_defaults(run=run_show)

    one = sub.add_parser("header", help="make one header (or those of a TOML file)")
    one.add_argument("--spec", help="a TOML file with [[header]] tables")
    one.add_argument("--only", help="this header of the TOML file")
    one.add_argument("--op", help=", ".join(spec.names.OPERATORS))
    one.add_argument("--dtype", help="query and output: " + ", ".join((*spec.FORMATS, spec.INT8)))
    one.add_argument("--kv", help="a quantised cache: " + ", ".join(quantised()))
    one.add_argument("--dk", type=int, help="channels of the key without the rotary ones (nope)")
    one.add_argument("--rope", type=int, help="rotary channels, 0 if not given")
    one.add_argument("--dv", type=int, help="channels of the value, dk if not given")
    one.add_argument("--layout-q", action="append", help=every_word(spec.LAYOUTS_Q))
    one.add_argument("--layout-kv", action="append", help=every_word(spec.LAYOUTS_KV))
    one.add_argument("--feature", action="append", help=every_word(spec.FEATURES))
    one.add_argument("--isa", action="append", help=", ".join(spec.ISAS))
    one.add_argument("--math", help=", ".join(spec.names.MATHS))
    one.add_argument("--prefix", help="of every name in the header; hl if not given")
    one.add_argument("--name", help="of the kernel and its file, instead of the grammar's")
    one.add_argument("-o", dest="output", help="file or folder to write to; - for standard output")
    one.set_defaults(run=run_header)

    for name, run, text in (
        ("all", run_all, "make all shipped headers"),
        ("check", run_check, "are the shipped headers what would be generated?"),
    ):
        one = sub.add_parser(name, help=text)
        one.add_argument("--folder", default=str(INCLUDE))
        one.set_defaults(run=run)
    return top


def main(argv=None):
    options = parser().parse_args(argv)
    try:
        return options.run(options)
    except Refusal as refusal:
        print(f"headlight: {refusal}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
