"""Tables as they are printed: Markdown that is readable as text."""

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tensors import in_huge_pages


@dataclass
class Table:
    """One table: a title, a note, lines of cells."""

    title: str
    columns: list[str]
    note: str = ""
    rows: list[list[str]] = field(default_factory=list)
    left: int = 1  # columns of words, set to the left

    def add(self, *cells: str) -> None:
        self.rows.append(list(cells))

    def markdown(self) -> str:
        """Columns of equal width."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]

        def line(cells: list[str]) -> str:
            padded = [c.ljust(w) if i < self.left else c.rjust(w)
                      for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
            return f"| {' | '.join(padded)} |"

        rule = [("-" if i < self.left else "-:").rjust(w, "-") for i, w in enumerate(widths)]
        note = [self.note, ""] if self.note else []
        return "\n".join([f"### {self.title}", "", *note, line(self.columns), line(rule),
                          *map(line, self.rows), ""])


def ms(ns: np.ndarray | float) -> str:
    """Milliseconds with three digits that count."""
    value = float(np.median(ns)) / 1e6
    return f"{value:.3f}" if value >= 0.1 else f"{value:.5f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def processor() -> str:
    """The processor's name, for the reader."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> str:
    """Where this ran, and in what company."""
    return (f"{processor()}, {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} of them for "
            f"this process, load {os.getloadavg()[0]:.1f} before")


def pages() -> str:
    """What pages caches and workspaces lie in."""
    share = in_huge_pages()
    if share is None:
        return "pages of the system's choice"
    return f"2 MiB pages asked for by madvise; {percent(share)} of the memory lies in them"
