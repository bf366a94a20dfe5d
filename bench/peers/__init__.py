"""The same shapes through what one could take instead, side by side in alternating runs.

Each peer is a module here with a class of its own (base.Peer). What cannot be imported or compiled
is named and left out; `make bench-peers` installs what it can (peers/install.py).
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import cases
import decode
import measure as m
import numpy as np
import training
from cases import MLA, SMALL, Shape, mla
from side import Bench
from tables import Table, ms, number, percent
from tensors import Tensors

from peers.base import MissingError, Peer, Prepared
from peers.ggml_flash import Ggml
from peers.onednn import OneDnn
from peers.onnx_runtime import OnnxRuntime
from peers.openblas import OpenBlas
from peers.openvino_sdpa import OpenVino
from peers.torch_sdpa import Torch

VENV = m.ROOT / "build" / "peers-venv"
PEERS: tuple[type[Peer], ...] = (Torch, OpenVino, OnnxRuntime, Ggml, OneDnn, OpenBlas)
ROUNDS, SECONDS = 15, 12.0

SPARSE = "hl_sparse_flash_attention_"
HEADERS = (
    (SPARSE + MLA, [*(mla(n, *dense) for n in (128, 16) for dense in cases.DENSE),
           *(mla(n, "list", 2048, 32768) for n in (128, 16)), mla(1, "dense", 8192),
           mla(1, "list", 2048, 32768)]),
    (f"{SPARSE}f16_d512_rope64", [mla(128, "dense", 8192)]),
    (f"{SPARSE}f32_d64", [SMALL, Shape(32, 8, 4096, 4096, value=True)]),
    (f"{decode.PREFIX}bf16_d128", [decode.gqa(4096), decode.gqa(16384), decode.ROWS, decode.BATCH]),
    (f"{decode.PREFIX}f16_d128", [decode.gqa(4096), decode.gqa(16384)]),
    (f"{decode.PREFIX}bf16_i8_d128", [decode.gqa(4096), decode.gqa(16384)]),
    (decode.PREFIX + decode.F32, [decode.SMALL]),
    (decode.PREFIX + decode.LATENT, decode.MLA),
    (f"{training.PREFIX}bf16_d128", [*training.PROMPTS, *training.GROUPED]),
    (f"{training.PREFIX}f32_d128", training.PROMPTS),
)


def importable() -> None:
    """Lets this process import what lies in the peers' own virtual environment, behind its own
    packages."""
    sys.path += [str(path) for path in VENV.glob("lib/python*/site-packages")]


def present() -> tuple[list[Peer], list[str]]:
    """The peers that work here, and a line about each that does not."""
    importable()
    found, missing = [], []
    for kind in PEERS:
        try:
            found.append(kind())
        except MissingError as error:
            missing.append(f"{kind.name}: {reason_of(kind.name) or error}")
    return found, missing


def reason_of(name: str) -> str:
    """Why the installation left a peer out; "" if it did not."""
    try:
        return json.loads((VENV / "peers.json").read_text()).get(name, "")
    except (OSError, ValueError):
        return ""


def timed(prepared: Prepared, turn: m.Turn) -> Callable[[], float]:
    """Nanoseconds a call, of all threads of this process together: a pool's work counts too."""

    def sample(count: int) -> float:
        first = turn.take(count)
        begin = time.process_time_ns()
        prepared.run(first, count)
        return (time.process_time_ns() - begin) / count

    prepared.run(turn.take(), 1)
    count = max(1, round(m.SAMPLE_NS / max(sample(1), 1.0)))
    return lambda: sample(count)


def compare(bench: Bench, only: str) -> tuple[Table, list[dict]]:
    """Our kernel and every peer on every shape: the table and the records."""
    found, missing = present()
    table = Table("Against other libraries, one thread",
                  ["shape", "type", "who", "ms", "spread", "times ours", "GFLOP/s", "of limit",
                   "bound", "error"], left=3)
    records, refused = [], []
    for header, shapes in HEADERS:
        made = m.build(bench.include / f"{header}.h")
        for shape in shapes:
            if cases.matches(only, f"{cases.short(header)} {shape.title}"):
                records += on_shape(made, shape, found, table, refused)
    lines = [f"- {peer.name}: {peer.lacks}." for peer in found]
    lines += [f"- left out, {line}" for line in (*missing, *refused)]
    table.note = "\n".join([
        "Processor time of all threads; the data of every peer lie ready in the type it wants.",
        "error: relative L2 against float64. of limit: the limits of this project's kernel in the "
        "same row; a peer with", "bf16 dot products of vectors is not bound by float32 "
        "multiply-adds. What each of them does less:", "", *lines])
    return table, records


def on_shape(made: m.Build, shape: Shape, found: list[Peer], table: Table,
             refused: list[str]) -> list[dict]:
    """One shape, all in turn."""
    isa = next(iter(made.isas))
    calls = m.Calls(made, shape, isa)
    t = calls.tensors
    able, errors = prepared_peers(made, shape, t, found, refused)
    reads = m.reads(shape, t, calls.turn)
    steps: dict[str, m.Step] = {
        "peak before": m.peak(isa), **{f"{name} before": step for name, step in reads.items()},
        "ns": calls, **{f"peer {name}": timed(prepared, calls.turn)
                        for name, prepared in able.items()},
        "peak after": m.peak(isa), **{f"{name} after": step for name, step in reads.items()}}
    times = m.alternate(steps, ROUNDS, SECONDS)
    for prepared in able.values():
        prepared.free()
    peaks, bandwidth = cases.around(times)
    records = []
    for name in (None, *able):
        ns = times["ns" if name is None else f"peer {name}"]
        record, *_ = cases.written(
            made, shape, isa if name is None else None, ns, peaks, bandwidth,
            calls.error if name is None else errors[name], peer=name, limit_isa=isa)
        records.append(record.json())
        table.add(shape.title, record.kv_format, name or f"this, {isa}", ms(ns),
                  percent(record.spread), f"{np.median(ns / times['ns']):.2f}",
                  number(record.gflops), percent(record.share_of_limit), record.limit_kind,
                  f"{record.rel_err:.1e}")
    print(f"{shape.title}, {made.kv_format}: done", file=sys.stderr, flush=True)
    return records


def prepared_peers(made: m.Build, shape: Shape, t: Tensors, found: list[Peer],
                   refused: list[str]) -> tuple[dict[str, Prepared], dict[str, float]]:
    """The peers that can do a shape, and their errors; those that cannot are named."""
    able: dict[str, Prepared] = {}
    errors: dict[str, float] = {}
    parts = parts_of(shape, t)
    for peer in found:
        why = peer.refuses(parts[0][0], made.kv_format)
        if not why:
            try:
                prepared = joined([peer.prepare(*part, made.kv_format) for part in parts], shape)
                prepared.run(0, 1)
                errors[peer.name] = made.error(shape, {"attention_out": prepared.out()})
                able[peer.name] = prepared
            except Exception as error:  # whatever another library throws: named, not fatal
                why = " ".join(str(error).split())[:160] or type(error).__name__
        if why:
            refused.append(f"{peer.name}, {shape.title}, {made.kv_format}: {why}")
    return able, errors


# ---- the decode operator's shapes ---------------------------------------------------------------


def parts_of(shape: Shape, t: Tensors) -> list[tuple[Shape, Tensors]]:
    """What peers are given: the sequences of a batch one after the other. Several query rows become
    so many more heads of a group, each of which sees so many keys: nobody reads the cache again for
    each row because of how it is asked."""
    if not isinstance(t, decode.Decoding):
        return [(shape, t)]
    one = replace(shape, batch=1, rows=1, heads=shape.heads * shape.rows, selection="dense")
    seen = None
    if shape.rows > 1:
        group = shape.heads // shape.kv_heads
        seen = np.repeat(shape.keys - shape.rows + 1 + np.arange(shape.rows), group)
    made = []
    for b in range(shape.batch):
        tokens = slice(b * shape.keys, (b + 1) * shape.keys)
        query = turned(t.query[b * shape.rows : (b + 1) * shape.rows], shape.kv_heads)
        key, value = (held and held.numbers[tokens] for held in (t.key_held, t.value_held))
        made.append((one, Tensors(query, key, value, None, t.dv, t.scale,
                                  seen=None if seen is None else seen.astype(np.int32))))
    return made


def turned(query: np.ndarray, kv_heads: int) -> np.ndarray:
    """[rows][heads][dk] -> [1][kv_heads * rows * group][dk]."""
    rows, heads, channels = query.shape
    apart = query.reshape(rows, kv_heads, heads // kv_heads, channels)
    return np.ascontiguousarray(apart.swapaxes(0, 1)).reshape(1, rows * heads, channels)


def joined(parts: list[Prepared], shape: Shape) -> Prepared:
    """One call after the other, and what they wrote as our kernels write it."""
    if shape.calls == 1 or training.is_prompt(shape):
        return parts[0]

    def run(first: int, count: int) -> None:
        for _ in range(count):
            for part in parts:
                part.run(first, 1)

    def out() -> np.ndarray:
        group = shape.heads // shape.kv_heads
        made = [part.out().reshape(shape.kv_heads, shape.rows, group, -1).swapaxes(0, 1)
                for part in parts]
        return np.concatenate(made).reshape(shape.calls, shape.heads, -1)

    def free() -> None:
        for part in parts:
            part.free()

    return Prepared(run, out, tuple(parts), free)
