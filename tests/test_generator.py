"""The generator: every refusal, names in both directions, the same bytes, nothing half-written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gen import fill, names, render, spec
from gen.__main__ import main

ROOT = Path(__file__).parent.parent
PLAIN = {"op": "sparse_flash_attention", "dtype": "bf16", "dk": 64}

# what is asked for -> words that the refusal has to contain. Each is one thing that is impossible.
REFUSED = {
    "unknown key": ({**PLAIN, "rop": 8}, ["'rop'", "'rope'"]),
    "unknown key, nothing near": ({**PLAIN, "zzz": 8}, ["'zzz'", "dtype"]),
    "op missing": ({"dtype": "bf16", "dk": 64}, ["op is missing"]),
    "dtype missing": ({"op": "sparse_flash_attention", "dk": 64}, ["dtype is missing"]),
    "dk missing": ({"op": "sparse_flash_attention", "dtype": "f32"}, ["dk is missing"]),
    "unknown op": ({**PLAIN, "op": "sparse_flash_atention"}, ["did you mean 'sparse_flash"]),
    "unknown dtype": ({**PLAIN, "dtype": "bf61"}, ["'bf61'", "'bf16'"]),
    "kv differs": ({**PLAIN, "kv": "f16"}, ["kv = 'f16'", "one type"]),
    "dk zero": ({**PLAIN, "dk": 0}, ["dk = 0", "1 to 4096"]),
    "dk huge": ({**PLAIN, "dk": 4097}, ["dk = 4097"]),
    "dk not whole": ({**PLAIN, "dk": 64.0}, ["not a whole number"]),
    "dk a truth value": ({**PLAIN, "dk": True}, ["not a whole number"]),
    "rope negative": ({**PLAIN, "rope": -1}, ["rope = -1"]),
    "rope wider than dk": ({**PLAIN, "rope": 65}, ["wider than dk = 64", "joined"]),
    "dv wider than dk": ({**PLAIN, "dv": 65}, ["dv = 65", "dk = 64"]),
    "dv zero": ({**PLAIN, "dv": 0}, ["dv = 0"]),
    "unknown layout": ({**PLAIN, "layout_q": ["BNSD"]}, ["'BNSD'", "BSND"]),
    "layout list empty": ({**PLAIN, "layout_kv": []}, ["layout_kv is empty"]),
    "layout not a list": ({**PLAIN, "layout_kv": 3}, ["not a list"]),
    "layout pair, kv alone": (
        {**PLAIN, "layout_q": ["BSND"], "layout_kv": ["TND"]},
        ["layout_kv TND without layout_q TND"],
    ),
    "layout pair, query alone": (
        {**PLAIN, "layout_q": ["BSND", "TND"], "layout_kv": ["BSND"]},
        ["layout_q TND has no layout_kv"],
    ),
    "unknown feature": ({**PLAIN, "features": ["slot"]}, ["did you mean 'slots'"]),
    "unknown isa": ({**PLAIN, "isa": ["avx51"]}, ["'avx51'", "avx5"]),
    "isa list empty": ({**PLAIN, "isa": []}, ["isa is empty"]),
    "unknown math": ({**PLAIN, "math": "sleaf"}, ["did you mean 'sleef'"]),
    "isa without that math": ({**PLAIN, "isa": ["neon"], "math": "sleef"}, ["neon", "'sleef'"]),
    "prefix no identifier": ({**PLAIN, "prefix": "9x"}, ["'9x'", "C identifier"]),
    "prefix in capitals": ({**PLAIN, "prefix": "HL"}, ["'HL'", "C identifier"]),
    "prefix with underscore": ({**PLAIN, "prefix": "a_b"}, ["underscore"]),
    "prefix too long": ({**PLAIN, "prefix": "ninelette"}, ["9 letters", "at most 8"]),
    "prefix not a word": ({**PLAIN, "prefix": 7}, ["C identifier"]),
    "name without prefix": ({**PLAIN, "name": "mla"}, ["'hl_'", "hl_mla"]),
    "name reserved in C++": ({**PLAIN, "name": "hl__mla"}, ["C++ reserves"]),
    "name no identifier": ({**PLAIN, "name": "hl mla"}, ["C identifier"]),
    "name too long to read": ({**PLAIN, "name": "hl_" + "x" * 90}, ["columns wide", "shorter"]),
    "no table": (3, ["described by 3"]),
    "kernel no table": ({"kernel": [3]}, ["described by 3"]),
    "kernel list empty": ({"kernel": []}, ["[[header.kernel]]"]),
    "key beside kernels": ({"kernel": [PLAIN], "dtype": "f32"}, ["'dtype'", "beside"]),
    "two kernels of one name": ({"kernel": [PLAIN, PLAIN]}, ["two kernels"]),
    "several prefixes": ({"kernel": [PLAIN, {**PLAIN, "prefix": "ax"}]}, ["several prefixes"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal(case):
    table, words = REFUSED[case]
    with pytest.raises(spec.Refusal) as refusal:
        render.render_header(spec.parse_header(table))
    text = str(refusal.value)
    assert "; fix: " in text, text
    for word in words:
        assert word in text, text


def test_isa_that_lacks_a_type_is_refused(monkeypatch):
    from dataclasses import replace

    poor = replace(spec.ISAS["neon"], formats=("f32",))
    monkeypatch.setitem(spec.ISAS, "neon", poor)
    with pytest.raises(spec.Refusal, match=r"isa neon cannot load bf16.*; fix: "):
        spec.parse_header({**PLAIN, "isa": ["neon"]})


FILES = {
    "not TOML": ("[[header]\n", ["is not TOML"]),
    "key at the top": ("a = 1\n[[header]]\n", ["'a'", "[[header]]"]),
    "no header": ("", ["describes no header"]),
    "two of one name": (
        '[[header]]\nop="sparse_flash_attention"\ndtype="f32"\ndk=8\n' * 2,
        ["two headers are called"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_refused_file(case, tmp_path, capsys):
    text, words = FILES[case]
    file = tmp_path / "my.toml"
    file.write_text(text)
    assert main(["header", "--spec", str(file), "-o", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "; fix: " in said
    for word in words:
        assert word in said
    assert os.listdir(tmp_path) == ["my.toml"]


def asked(*extra):
    return ["header", "--op", "sparse_flash_attention", "--dtype", "f32", "--dk", "8", *extra]


COMMANDS = {
    "file missing": (["header", "--spec", "none.toml"], "cannot read"),
    "flag beside spec": ([*asked(), "--spec", "x.toml"], "the file says it all"),
    "only without spec": (asked("--only", "x"), "there is none"),
    "show unknown": (["show", "acme"], "no header is called 'acme'"),
    "show misspelt": (["show", "hl_sparse_flash_atention_bf16_d512"], "did you mean"),
    "all into nowhere": (["all", "--folder", "nowhere"], "there is no folder"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_refused_command(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, words = COMMANDS[case]
    code = main(arguments)
    said = capsys.readouterr()
    assert code == 2 and words in said.err and "fix: " in said.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["missing/x.h", "file/x.h", "folder"])
def test_output_path_not_writable(where, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    target = tmp_path / where
    if where == "folder":
        target = target / "x.h"
        target.mkdir()  # the file's place is taken by a folder that is not empty
        (target / "hl_sparse_flash_attention_f32_d8.h").mkdir()
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    assert main(asked("-o", str(target))) == 2
    said = capsys.readouterr().err
    assert "cannot write" in said and "; fix: " in said
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_nothing_half_written_when_the_disk_is_full(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    target = tmp_path / "x.h"
    target.write_text("as it was")
    monkeypatch.setattr(os, "replace", full)
    assert main(asked("-o", str(target))) == 2
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["x.h"] and target.read_text() == "as it was"


def test_two_headers_do_not_go_into_one_file(tmp_path, capsys):
    file = tmp_path / "my.toml"
    table = '[[header]]\nop="sparse_flash_attention"\ndtype="{}"\ndk=8\n'
    file.write_text(table.format("f32") + table.format("f16"))
    assert main(["header", "--spec", str(file), "-o", str(tmp_path / "x.h")]) == 2
    assert "do not fit into one file" in capsys.readouterr().err
    assert main(["header", "--spec", str(file), "-o", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.h"))) == 2
    only = "hl_sparse_flash_attention_f16_d8"
    picked = tmp_path / "one.h"
    assert main(["header", "--spec", str(file), "--only", only, "-o", str(picked)]) == 0
    assert picked.read_text() == (tmp_path / f"{only}.h").read_text()
    assert main(["header", "--spec", str(file), "--only", "x", "-o", str(picked)]) == 2


TABLES = [
    {**PLAIN, "rope": 16, "dv": 48},
    {**PLAIN, "features": ["slots"], "math": "sleef"},
    {**PLAIN, "dtype": "f32", "prefix": "acme", "math": "libm"},
    {**PLAIN, "dk": 15},
    {"op": "fusion_attention", "dtype": "f32", "dk": 64, "features": ["pse_types", "sinks"]},
    {"op": "fusion_attention_grad", "dtype": "bf16", "dk": 6, "features": ["pse_types"]},
]


@pytest.mark.parametrize("table", TABLES)
def test_names_go_both_ways(table):
    kernel = spec.parse_kernel(table)
    parsed = names.parse(kernel.name)
    assert spec.parse_kernel(parsed).name == kernel.name
    for key in ("op", "dtype", "kv", "dk", "rope", "math", "prefix"):
        assert parsed[key] == getattr(kernel, key)
    assert parsed.get("dv", kernel.usual_dv) == kernel.dv
    assert tuple(parsed["features"]) == kernel.features
    assert spec.parse_kernel(kernel.table()) == kernel
    assert spec.parse_kernel(parsed).name == kernel.name


def test_names_that_are_none():
    for name in ("hl_sfa_bf16_d64", "hl_sparse_flash_attention_d64", "x", ""):
        assert names.parse(name) is None


def test_same_input_same_bytes_in_another_process_and_place(tmp_path):
    """Banner and all: no date, path, host, hash seed or working directory gets in."""
    header = spec.load_catalogue()[0]
    texts = set()
    for seed in ("0", "1"):
        out = tmp_path / f"{seed}.h"
        command = [sys.executable, "-m", "gen", "header", "--op", header.kernels[0].op]
        command += ["--dtype", "bf16", "--dk", "512", "--rope", "64", "-o", str(out)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "TZ": "X"}
        subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
        texts.add(out.read_text())
    texts.add(render.render_header(header))
    assert len(texts) == 1


@pytest.mark.parametrize("header", spec.load_catalogue(), ids=lambda h: h.name)
def test_the_command_in_the_banner_makes_the_header(header, tmp_path):
    text = render.render_header(header)
    banner = text[: text.index("*/")].replace("\\\n *", "")
    command = re.search(r"python3 -m gen (header .*)", banner)[1].split()
    command[command.index("-o") + 1] = str(tmp_path / "x.h")
    assert main(command) == 0
    assert (tmp_path / "x.h").read_text() == text


def test_check_notices(tmp_path, capsys, monkeypatch):
    three = spec.load_catalogue()[:3]  # one for each way of being wrong
    monkeypatch.setattr(spec, "load_catalogue", lambda: three)
    assert main(["all", "--folder", str(tmp_path)]) == 0
    assert main(["check", "--folder", str(tmp_path)]) == 0
    one = sorted(tmp_path.glob("*.h"))[0]
    one.write_text(one.read_text().replace("/*", "/* ", 1))
    (tmp_path / "hl_other.h").write_text("")
    sorted(tmp_path.glob("hl_sparse*.h"))[1].unlink()
    capsys.readouterr()
    assert main(["check", "--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "differs" in said and "is missing" in said and "not in the catalogue" in said
    assert "fix: python3 -m gen all" in said and "3 wrong" in said


def test_list_and_show(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for header in spec.load_catalogue():
        assert f"{header.name}.h" in listed
    name = spec.load_catalogue()[0].name
    assert main(["show", name, "--group", "16", "--rows", "2", "--keys", "5000"]) == 0
    shown = capsys.readouterr().out
    for word in ("sparse_indices", "avx512", "registers", "first-level cache", "bytes", "flop"):
        assert word in shown
    lines = render.render_header(spec.load_catalogue()[0]).count("\n")
    assert f"{lines} lines" in shown


def test_show_reads_any_name_of_the_grammar(capsys):
    assert main(["show", "hl_sparse_flash_attention_f16_d51x20_rope4"]) == 0
    assert "f16, key 51 + 4, value 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [h.name for h in spec.load_catalogue() if any(k.trains for k in h.kernels)]
)
def test_show_of_training(name, capsys):
    """One layout for all tensors, one workspace for all shapes, and the products of a whole call:
    two forward, five backward."""
    kernel = next(h.kernels[0] for h in spec.load_catalogue() if h.name == name)
    assert main(["show", name, "--group", "2", "--rows", "3", "--keys", "5"]) == 0
    shown = capsys.readouterr().out
    deep, wide = (3, 2) if kernel.backward else (1, 1)
    flops = 2 * 2 * 3 * 5 * (deep * kernel.dk + wide * kernel.dv)
    assert f"    {flops} flop" in shown and "BSND/BSH/SBH/BNSD/TND, isa" in shown
    size = render.memory_of(kernel, render.tiles_of(kernel)).bytes
    assert f"workspace of one task  {size} bytes" in shown


def test_what_was_not_asked_for_is_not_there():
    whole = render.render_header(spec.parse_header(PLAIN))
    less = render.render_header(
        spec.parse_header({**PLAIN, "isa": ["scalar"], "layout_q": ["BSND"], "layout_kv": ["BSND"]})
    )
    assert len(less) < len(whole) / 2
    for word in ("_mm512_fmadd", "vfmaq_f32", "_mm256_fmadd"):
        assert word in whole and word not in less
    code = re.sub(r"/\*.*?\*/", "", less, flags=re.DOTALL)
    assert "g->pages + j / a->block_size" in whole and "g->pages + j" not in code
    assert "find_slot" not in whole
    slots = render.render_header(spec.parse_header({**PLAIN, "features": ["slots"]}))
    assert "find_slot" in slots


def test_prefix_and_name_reach_every_name():
    text = render.render_header(spec.parse_header({**PLAIN, "prefix": "acme", "rope": 8}))
    code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<![a-zA-Z0-9])(hl_|HL_)", code)
    assert "acme_sparse_flash_attention_bf16_d64_rope8_plan(" in code
    text = render.render_header(spec.parse_header({**PLAIN, "name": "hl_mla"}))
    assert "hl_mla_plan(" in text and "HL_MLA_WORKSPACE_BYTES" in text
    assert "hl_sparse_flash_attention_bf16" not in text


def test_lint_refuses_what_is_not_fit_to_read():
    for text in ("a \n", "\n\n\nb\n", "a\tb\n", "no end"):
        with pytest.raises(RuntimeError, match="mend the template"):
            render.lint(text, "x")
    with pytest.raises(spec.Refusal, match="101 columns"):
        render.lint("x" * 101 + "\n", "x")


def test_a_misspelt_hole_is_an_error():
    environment = render.environment()
    with pytest.raises(Exception, match="undefined"):
        environment.from_string("{{ typo }}").render()


def test_fill_breaks_calls_and_nothing_else():
    long = "    " + "a_name_that_is_long(" + ", ".join(f"argument_{i}" for i in range(12)) + ");"
    filled = fill.refill(long)
    assert all(len(line) <= fill.WIDTH for line in filled.split("\n"))
    assert "".join(filled.split()) == "".join(long.split())
    for kept in ("/* " + "x " * 60 + "*/", "#define A " + "x + " * 40, "short(a,\n      b) + c;"):
        assert "".join(fill.refill(kept).split()) == "".join(kept.split())
    assert fill.refill("#define A (1 + \\\n    2)") == "#define A (1 + \\\n    2)"


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("header", spec.load_catalogue(), ids=lambda h: h.name)
def test_the_example_in_the_manual_compiles(header, compiler, tmp_path):
    assert shutil.which(compiler), f"{compiler} is missing: apt-get install {compiler}"
    text = render.render_header(header)
    use = text[text.index(" * USE\n") : text.index(" *   Every field that stays 0")]
    lines = [line[9:] for line in use.split("\n") if line.startswith(" *       ")]
    assert len(lines) > 10
    types = "const void *q, const void *k, const void *v, const void *scales, void *out, "
    types += "int rows, int keys, int heads, int heads_kv, float scale, "
    types += "const void *dout, const float *max, const float *sum, void *dq, void *dk, void *dv"
    source = tmp_path / "use.c"
    source.write_text(
        f'#include <stdio.h>\n#include "{header.name}.h"\n'
        f"void use({types}, void *workspace, size_t bytes);\n"
        f"void use({types}, void *workspace, size_t bytes)\n{{\n" + "\n".join(lines) + "\n}\n"
    )
    (tmp_path / f"{header.name}.h").write_text(text)
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-missing-field-initializers", "-Wno-unused-parameter"]
    # To make code of the header is for tests/check.py.
    subprocess.run([*command, "-fsyntax-only", str(source)], check=True)
