"""The pictures beside the tables: a roofline, and bars against peers."""

from pathlib import Path
from typing import Any

import cases
import matplotlib
import numpy as np
from cases import Measured

matplotlib.use("Agg")  # before pyplot looks for a screen

import matplotlib.pyplot as plt

MARKS = "osD^vPX*<>hd"
COLOURS = matplotlib.colormaps["tab20"]
Records = list[dict[str, Any]]


def intensity(record: dict[str, Any]) -> float:
    """Operations a byte of the cache."""
    return record["gflops"] / record["gbps"]


def title(record: dict[str, Any]) -> str:
    """The shape in a few letters."""
    heads = f"{record['heads']}" if record["kv_heads"] == 1 else (
        f"{record['heads']}/{record['kv_heads']}")
    of = f" of {record['cache_keys']}" if record["cache_keys"] > record["keys"] else ""
    of = f", {record['rows']} rows" if record["rows"] > 1 else of
    batch = f"{record['batch']} x " if record["batch"] > 1 else ""
    return f"{batch}{heads} heads\n{record['keys']}{of}\n{record['kv_format']}"


def roofline(records: Records, measured: list[Measured], path: Path) -> None:
    """Every kernel of this project as a point under the limits of this run."""
    ours = [r for r in records if r["peer"] is None and r["threads"] == 1 and r["warm"]]
    figure, axes = plt.subplots(figsize=(9, 7), layout="constrained")
    x = np.geomspace(min(map(intensity, ours)) / 2, max(map(intensity, ours)) * 2, 100)
    peaks: dict[str, list[float]] = {}
    for row in measured:
        peaks.setdefault(row.record.isa, []).append(row.peak)
    bandwidths = sorted(row.bandwidth for row in measured)
    levels: dict[str, list[str]] = {}  # equal peaks share a line and a label
    for isa, values in peaks.items():
        levels.setdefault(f"{np.median(values):.2g}", []).append(isa)
    top = max(np.median(values) for values in peaks.values())
    for isas in levels.values():
        value = np.median(np.concatenate([peaks[isa] for isa in isas]))
        axes.plot(x, np.full_like(x, value), "k-", linewidth=0.8)
        axes.annotate(f"{', '.join(isas)}: {value:.0f} GFLOP/s", (x[0], value), va="bottom",
                      fontsize=7)
    for value, where in ((bandwidths[-1], "smallest"), (bandwidths[0], "largest")):
        axes.plot(x, np.minimum(value * x, top), "k--", linewidth=0.8,
                  label=f"read, {where} working set: {value:.0f} GB/s")
    kernels = list(dict.fromkeys(r["kernel"] for r in ours))
    isas = list(dict.fromkeys(r["isa"] for r in ours))
    for i, kernel in enumerate(kernels):
        for j, isa in enumerate(isas):
            points = [r for r in ours if (r["kernel"], r["isa"]) == (kernel, isa)]
            if points:
                axes.plot([*map(intensity, points)], [r["gflops"] for r in points],
                          MARKS[j % len(MARKS)], color=COLOURS(i % COLOURS.N), markersize=5,
                          alpha=0.8, label=f"{cases.short(kernel)}, {isa}")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of the cache",
             ylabel="GFLOP/s")
    figure.legend(fontsize=5, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def peers(records: Records, path: Path) -> bool:
    """Times of peers over ours on the same shapes; False if there are none to draw."""
    of_peers = sorted((r for r in records if r["peer"] is not None),
                      key=lambda r: (r["kernel"], -r["heads"], r["cache_keys"], r["keys"]))
    shapes: dict[tuple[Any, ...], dict[str, float]] = {}
    titles, operators = {}, {}
    for r in of_peers:
        key = shape_of(r)
        titles[key], operators[key] = title(r), r["op"]
        shapes.setdefault(key, {})[r["peer"]] = r["ms"]
    best = {key: min((r["ms"] for r in records if r["peer"] is None and shape_of(r) == key),
                     default=None) for key in shapes}
    shapes = {key: times for key, times in shapes.items() if best[key]}
    if not shapes:
        return False
    names = list(dict.fromkeys(name for times in shapes.values() for name in times))
    by_operator: dict[str, list[tuple[Any, ...]]] = {}
    for key in shapes:
        by_operator.setdefault(operators[key], []).append(key)
    longest = max(map(len, by_operator.values()))
    figure, rows = plt.subplots(len(by_operator), squeeze=False, layout="constrained",
                                figsize=(max(7, 1.5 * longest), 4.5 * len(by_operator)))
    for axes, (operator, keys) in zip(rows[:, 0], by_operator.items(), strict=True):
        bars_of([(titles[key], shapes[key], best[key]) for key in keys], names, axes)
        axes.set_title(operator, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def bars_of(shapes: list[tuple[str, dict[str, float], float]], names: list[str],
            axes: Any) -> None:
    """A group of bars for each shape: its title, the time of each peer, ours."""
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        at = [j for j, (_, times, _) in enumerate(shapes) if name in times]
        ratios = [times[name] / ours for _, times, ours in shapes if name in times]
        bars = axes.bar(np.array(at) + (i - (len(names) - 1) / 2) * width, ratios, width,
                        label=name)
        axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], fontsize=5)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), [shape[0] for shape in shapes], fontsize=7)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("time, this project's fastest = 1")
    axes.legend(fontsize=7)


def shape_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a record is about, whoever computed it."""
    return tuple(record[name] for name in (
        "kernel", "threads", "rows", "heads", "kv_heads", "keys", "cache_keys", "selection",
        "batch", "layout", "warm"))
