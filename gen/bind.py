"""Compiles a generated header and calls its kernels with NumPy arrays.

    from gen import bind
    kernel = bind.load("include/hl_sparse_flash_attention_f32_d64.h")
    result = kernel.attend(query=q, key=k, scale_value=0.125, sparse_mode=3)
    result.out

The header is the one source: structs and constants are read from its text. bf16 arrays are those of
ml_dtypes. Compiled libraries are kept in build/cache, named by what went into them.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gen.bind_train import Call

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "i8": np.dtype(np.int8),
}
C_TYPES = {
    "float": ctypes.c_float,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "size_t": ctypes.c_size_t,
    "ptrdiff_t": ctypes.c_ssize_t,
}
POINTED = {
    "float": np.dtype(np.float32),
    "int32_t": np.dtype(np.int32),
    "int64_t": np.dtype(np.int64),
}
ROUTINES = ("quantise_rows", "dequantise_rows", "append", "convert")  # of a cache's rows
TENSORS = ("query", "query_rope", "key", "key_rope", "value")
STATS = ("softmax_max", "softmax_sum", "softmax_lse")
loaded: list[ctypes.CDLL] = []  # libraries of headers, by this process


# ---- what the text of a header says -------------------------------------------------------------


@dataclass(frozen=True)
class CField:
    """One field of a C struct, as declared."""

    name: str
    type: str  # without const and stars
    stars: int
    count: int  # 0: not an array


@dataclass(frozen=True)
class HeaderText:
    """Names, constants and structs that a header declares."""

    text: str
    prefix: str
    kernels: tuple[str, ...]
    constants: dict[str, int]
    structs: dict[str, tuple[CField, ...]]
    enums: tuple[str, ...]

    @property
    def macro(self) -> str:
        """The prefix of macros."""
        return self.prefix.upper()


def without_comments(text: str) -> str:
    """C without its comments."""
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.S)


def parse_fields(body: str) -> tuple[CField, ...]:
    """The fields of a struct body that has one declarator in each declaration."""
    fields = []
    for line in filter(None, map(str.strip, body.split(";"))):
        match = re.fullmatch(r"((?:\w+|\*|\s)+?)(\w+)\s*(?:\[(\d+)\])?", line)
        if match is None:
            raise ValueError(f"cannot read the declaration {line!r}")
        words = match[1].replace("*", " * ").split()
        names = [word for word in words if word not in ("*", "const")]
        fields.append(CField(match[2], names[0], words.count("*"), int(match[3] or 0)))
    return tuple(fields)


def parse_constants(code: str) -> dict[str, int]:
    """Enumerators whose values are written as numbers or follow from the one before."""
    constants: dict[str, int] = {}
    for body in re.findall(r"\benum\b\s*\w*\s*\{([^}]*)\}", code):
        value: int | None = -1
        for entry in filter(None, map(str.strip, body.split(","))):
            name, _, number = (part.strip() for part in entry.partition("="))
            if number:
                value = (
                    int(number, 0)
                    if re.fullmatch(r"-?\w+", number) and (number.lstrip("-")[0].isdigit())
                    else None
                )
            elif value is not None:
                value += 1
            if value is not None:
                constants[name] = value
    return constants


@functools.lru_cache(maxsize=64)
def parse(text: str) -> HeaderText:
    """Reads names, constants and structs from the text of a header."""
    code = without_comments(text)
    prefix = re.search(r"typedef enum (\w+)_status\b", code)
    if prefix is None:
        raise ValueError("not a generated header: no status type; fix: pass the header's full text")
    structs = {
        name: parse_fields(body)
        for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\} *\1;", code, flags=re.S)
        if name.startswith(prefix[1] + "_")
    }
    return HeaderText(
        text=text,
        prefix=prefix[1],
        kernels=tuple(dict.fromkeys(re.findall(r"\b(\w+)_workspace_bytes\(\s*const", code))),
        constants=parse_constants(code),
        structs=structs,
        enums=tuple(re.findall(r"typedef enum (\w+)", code)),
    )


def structures(header: HeaderText) -> dict[str, type[ctypes.Structure]]:
    """A ctypes class for each struct that ctypes can spell, named as in C."""
    made: dict[str, type[ctypes.Structure]] = {}
    for name, fields in header.structs.items():
        known = {**C_TYPES, **made, **dict.fromkeys(header.enums, ctypes.c_int)}
        if any(f.stars == 0 and f.type not in known for f in fields):
            continue
        spelled = [(f.name, ctypes.c_void_p if f.stars else known[f.type], f.count) for f in fields]
        made[name] = type(
            name,
            (ctypes.Structure,),
            {"_fields_": [(n, kind * count if count else kind) for n, kind, count in spelled]},
        )
    return made


# ---- compiling ----------------------------------------------------------------------------------


def cache_folder() -> Path:
    """HEADLIGHT_CACHE, else build/cache of the checkout, else the user's cache."""
    chosen = os.environ.get("HEADLIGHT_CACHE")
    if chosen:
        return Path(chosen)
    if (ROOT / "templates").is_dir() and (ROOT / "pyproject.toml").is_file():
        return ROOT / "build" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headlight"


@functools.lru_cache(maxsize=16)
def compiler_version(compiler: str) -> str:
    """What the compiler says it is."""
    return subprocess.run(
        [*compiler.split(), "--version"], check=True, capture_output=True, text=True
    ).stdout


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Others who come with the same path wait, in this process and in all others. The file is a
    lock, gone afterwards; who then waits for it still goes in, with somebody new perhaps: what is
    done in here has to be right twice at once, and is done twice only after a failure."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def compile_c(
    files: dict[str, str],
    *,
    compiler: str = "cc",
    flags: Sequence[str] = ("-O2",),
    libs: Sequence[str] = (),
    suffix: str = ".so",
) -> Path:
    """Compiles files[...] (name -> text; those ending in .c are compiled, the others lie beside
    them) and returns the result's path: a shared library, or with another suffix a program. The
    result is kept, and made again only when text, flags or compiler differ."""
    shared = ("-shared", "-fPIC") if suffix == ".so" else ()
    command = [*compiler.split(), *flags, *shared]
    parts = [*command, *libs, compiler_version(compiler), suffix]
    parts += [part for name in sorted(files) for part in (name, files[name])]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    result = cache_folder() / f"{digest}{suffix}"
    if result.exists():
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(result.with_suffix(".lock")):
        if not result.exists():
            build_into(result, files, command, libs)
    return result


def build_into(
    result: Path, files: dict[str, str], command: Sequence[str], libs: Sequence[str]
) -> None:
    """Runs the compiler beside the result, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=result.parent) as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        sources = [name for name in files if name.endswith(".c")]
        run = subprocess.run(
            [*command, *sources, "-o", "made", *libs], cwd=folder, capture_output=True, text=True
        )
        if run.returncode:
            raise RuntimeError(f"{' '.join(run.args)}:\n{run.stderr}")
        os.replace(Path(folder) / "made", result)


def export_source(header: HeaderText, defines: Sequence[str] = (), extra: str = "") -> str:
    """The one C file that holds a header's functions for all others."""
    lines = [f"#define {name}" for name in defines]
    lines += [
        f"#define {header.macro}_API extern",
        f"#define {header.macro}_IMPLEMENTATION",
        '#include "header.h"',
        extra,
    ]
    return "\n".join(lines) + "\n"


# ---- calling ------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a call returned. `error` has the names that C has; None when all went well."""

    status: int
    status_name: str
    error_text: str = ""
    argument: str = ""  # the argument's name in capitals, without prefix
    rule: str = ""
    position: tuple[int, ...] = ()
    value: int = 0
    limit: int = 0
    outputs: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the call was accepted."""
        return self.status == 0

    @property
    def out(self) -> np.ndarray:
        """attention_out of attend."""
        return self.outputs["attention_out"]

    def check(self) -> "Result":
        """The result itself, or RuntimeError with the header's own sentence."""
        if not self.ok:
            raise RuntimeError(f"{self.status_name}: {self.error_text}")
        return self


class Kernel:
    """One kernel of a compiled header. Fields are those of the C structs, by name: arrays (or
    addresses) for pointers, (batch, row, head) for strides, numbers for the rest."""

    def __init__(
        self, header: HeaderText, name: str, library: ctypes.CDLL, dtype: np.dtype | None
    ) -> None:
        self.header, self.name, self.library = header, name, library
        self.op = re.search(rf"\b{name}_workspace_bytes\(\s*const (\w+)_args\b", header.text)[1]
        made = structures(header)
        self.Args, self.Plan, self.Error = (
            made[n] for n in (f"{self.op}_args", f"{self.op}_plan", f"{header.prefix}_error")
        )
        self.Parts = made.get(f"{self.op}_parts")
        # One query step over any cache has arguments of its own, and statistics only if asked for.
        self.decodes = self.op.endswith("_incre_flash_attention")
        # Whole sequences of queries: every task writes what it computes, there is nothing to merge.
        declared = {f.name for f in header.structs[f"{self.op}_args"]}
        self.trains, self.grads = "stats_width" in declared, "dquery" in declared
        self.merges = f"{name}_merge(" in header.text
        self.parts = f"{name}_merge_parts(" in header.text
        self.stats = self.parts or (self.trains and not self.grads)
        self.Rows = {  # of routines that not all caches have
            routine: made[found[1]]
            for routine in ROUTINES
            if (found := re.search(rf"\b{name}_{routine}\(\s*const (\w+)", header.text))
        }
        self.constants = header.constants
        self.statuses = {
            value: name
            for name, value in self.constants.items()
            if name == f"{header.macro}_OK" or name.startswith(f"{header.macro}_ERR_")
        }
        macro = self.macro = name.upper()
        self.dk, self.dv = (self.constants[f"{macro}_{n}"] for n in ("DK", "DV"))
        self.rope = self.constants.get(f"{macro}_ROPE", 0)
        self.dtype = dtype
        self._declare()

    def _declare(self) -> None:
        p, size = ctypes.c_void_p, ctypes.c_size_t
        status, index = ctypes.c_int, ctypes.c_int64
        for suffix, result, parameters in (
            ("", status, (p, p, size, p)),
            ("_plan", status, (p, p, p)),
            ("_task", None, (p, index, p)),
            *((("_merge", None, (p, index)),) if self.merges else ()),
            *((("_merge_parts", status, (p, p)),) if self.parts else ()),
            ("_workspace_bytes", size, (p,)),
            ("_isas", ctypes.c_uint32, ()),
            *((f"_{routine}", status, (p, p)) for routine in self.Rows),
        ):
            function = self.library[self.name + suffix]
            function.restype, function.argtypes = result, parameters
            setattr(self, f"_c{suffix}", function)
        self._c_text = self.library[f"{self.header.prefix}_error_text"]
        self._c_text.restype = p
        self._c_text.argtypes = (p, ctypes.c_char_p, size)

    # Structs.

    def struct(self, kind: type[ctypes.Structure], fields: dict[str, Any]) -> ctypes.Structure:
        """A zero-initialised C struct with the given fields set. It keeps the arrays alive."""
        declared = {f.name: f for f in self.header.structs[kind.__name__]}
        made = kind()
        made.kept = []
        for name, value in fields.items():
            if name not in declared:
                raise TypeError(
                    f"{kind.__name__} has no field {name!r}; fix: one of {', '.join(declared)}"
                )
            if value is not None:
                setattr(made, name, self._c_value(made, declared[name], value))
        return made

    def _c_value(self, made: ctypes.Structure, declared: CField, value: Any) -> Any:
        if declared.stars == 2:
            if value and isinstance(value[0], (list, tuple)):  # a table of pages, row by row
                value = [page for row in value for page in row]
            array = (ctypes.c_void_p * len(value))(
                *(v.ctypes.data if isinstance(v, np.ndarray) else v for v in value)
            )
            made.kept += [array, value]
            return ctypes.addressof(array)
        expected = POINTED.get(declared.type) if declared.stars else None
        if expected is not None and isinstance(value, list):
            value = np.array(value, expected)
        if declared.stars and isinstance(value, np.ndarray):
            if expected is not None and value.dtype != expected:
                raise TypeError(f"{declared.name} is {value.dtype}; fix: pass {expected}")
            made.kept.append(value)
            return value.ctypes.data
        if isinstance(value, tuple):
            return structures_of(type(made), declared.name)(*value)
        if declared.type == "float" and not declared.stars:
            return float(value)
        return int(value)

    def args(self, **fields: Any) -> ctypes.Structure:
        """The arguments struct."""
        return self.struct(self.Args, fields)

    def result(self, status: int, error: ctypes.Structure | None = None) -> Result:
        """A status and what the C error struct says, with names."""
        prefix = self.header.macro
        made = Result(status, self.statuses.get(status, "?"))
        if status == 0 or error is None:
            return made

        def name_of(kind: str, number: int) -> str:
            lead = f"{prefix}_{kind}_"
            return next(
                (
                    n[len(lead) :]
                    for n, v in self.constants.items()
                    if n.startswith(lead) and v == number
                ),
                "?",
            )

        made.argument = name_of("ARG", error.argument)
        made.rule = name_of("RULE", error.rule)
        made.position = tuple(error.position[: error.positions])
        made.value, made.limit = error.value, error.limit
        made.error_text = self.error_text(error)
        return made

    def error_text(self, error: ctypes.Structure, size: int = 160) -> str:
        """The header's sentence about an error."""
        text = ctypes.create_string_buffer(size)
        self._c_text(ctypes.byref(error), text, size)
        return text.value.decode()

    # Calls.

    def run(self, *, workspace: Any = None, capacity: int | None = None, **fields: Any) -> Result:
        """The one-call function. Without `workspace`, one of workspace_bytes() is made for it;
        `capacity` says how many bytes of it may be used."""
        args, error = self.args(**fields), self.Error()
        if workspace is None and capacity is None:
            capacity = self._c_workspace_bytes(ctypes.byref(args))
            workspace = np.empty(max(capacity, 1), np.uint8)
        elif capacity is None:
            capacity = workspace.nbytes
        address = workspace.ctypes.data if isinstance(workspace, np.ndarray) else workspace
        status = self._c(ctypes.byref(args), address, capacity, ctypes.byref(error))
        return self.result(status, error)

    def plan(self, **fields: Any) -> tuple[ctypes.Structure, Result]:
        """Checks arguments. The plan is usable when the result is ok."""
        plan, args, error = self.Plan(), self.args(**fields), self.Error()
        status = self._c_plan(*map(ctypes.byref, (plan, args, error)))
        plan.kept = args
        return plan, self.result(status, error)

    def task(self, plan: ctypes.Structure, i: int, workspace: np.ndarray | int) -> None:
        """One task of a plan; other Python threads run meanwhile."""
        address = workspace.ctypes.data if isinstance(workspace, np.ndarray) else workspace
        self._c_task(ctypes.byref(plan), i, address)

    def merge(self, plan: ctypes.Structure, i: int) -> None:
        """One merge of a plan, after all tasks."""
        self._c_merge(ctypes.byref(plan), i)

    def execute(
        self, plan: ctypes.Structure, order: Iterable[int] | None = None, workers: int = 1
    ) -> None:
        """All tasks in the given order on some threads, then all merges, if it has any."""
        tasks = iter(range(plan.n_tasks) if order is None else order)
        lock = threading.Lock()

        def work() -> None:
            workspace = np.empty(max(plan.task_bytes, 1), np.uint8)
            while True:
                with lock:
                    i = next(tasks, None)
                if i is None:
                    return
                self.task(plan, i, workspace)

        threads = [threading.Thread(target=work) for _ in range(workers - 1)]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
        for i in range(plan.n_merges if self.merges else 0):
            self.merge(plan, i)

    def workspace_bytes(self, **fields: Any) -> int:
        """Bytes that run needs; 0 when the arguments are refused."""
        return self._c_workspace_bytes(ctypes.byref(self.args(**fields)))

    def merge_parts(self, **fields: Any) -> Result:
        """Merges the results of several calls over parts of one context."""
        if not self.parts:
            fix = "call it once for all keys" if self.trains else "add the feature stats"
            raise TypeError(f"{self.name} has no merge_parts; fix: {fix}")
        parts, error = self.struct(self.Parts, fields), self.Error()
        status = self._c_merge_parts(ctypes.byref(parts), ctypes.byref(error))
        return self.result(status, error)

    def _rows(self, routine: str, fields: dict[str, Any]) -> Result:
        if routine not in self.Rows:
            raise TypeError(f"{self.name} has no {routine}: its cache holds plain rows")
        args, error = self.struct(self.Rows[routine], fields), self.Error()
        status = getattr(self, f"_c_{routine}")(ctypes.byref(args), ctypes.byref(error))
        return self.result(status, error)

    def quantise_rows(self, **fields: Any) -> Result:
        """Rows of numbers to records, one after another."""
        return self._rows("quantise_rows", fields)

    def dequantise_rows(self, **fields: Any) -> Result:
        """Records to rows of numbers."""
        return self._rows("dequantise_rows", fields)

    def append(self, **fields: Any) -> Result:
        """New rows of each batch to rows of a cache."""
        return self._rows("append", fields)

    def convert(self, **fields: Any) -> Result:
        """Records to those with scales and rotary channels in each other's places, or back."""
        return self._rows("convert", fields)

    def isas(self) -> dict[str, int]:
        """Instruction sets that the header has and this machine runs: name -> value of args.isa."""
        lead, bits = f"{self.header.macro}_ISA_", self._c_isas()
        return {
            name[len(lead) :].lower(): value
            for name, value in self.constants.items()
            if name.startswith(lead) and value > 0 and bits >> value & 1
        }

    def attend(self, **fields: Any) -> Result:
        """run() with sizes, layouts and strides read from the arrays, and outputs made here:
        attention_out and, where the kernel has them, softmax_max, softmax_sum and softmax_lse in
        .outputs. Of fusion_attention also dropout_state, where keep_prob is given."""
        if self.trains:
            call = self._trained(fields)
            return self._fill(call, call.outputs())
        fields = {**self.sizes(fields), **fields}
        outputs = {"attention_out": np.empty(self._out_shape(fields), out_dtype(fields))}
        if self.stats:
            shape = self._stats_shape(fields)
            outputs |= {name: np.empty(shape, np.float32) for name in STATS}
        result = self.run(**fields, **outputs).check()
        result.outputs = outputs
        return result

    def gradients(self, **fields: Any) -> Result:
        """run() of fusion_attention_grad with the fields of attend, what that returned in
        attention_out, softmax_max and softmax_sum, and dout: dquery, dkey, dvalue and, where pse
        has a gradient, dpse in .outputs."""
        if not self.grads:
            raise TypeError(f"{self.name} has no gradients; fix: load fusion_attention_grad")
        call = self._trained(fields)
        return self._fill(call, call.gradients())

    def _trained(self, fields: dict[str, Any]) -> Call:
        return Call(self.constants, self.header.macro, self.dk, self.dv, fields)

    def _fill(self, call: Call, outputs: dict[str, np.ndarray]) -> Result:
        result = self.run(**call.fields, **outputs).check()
        result.outputs = outputs
        return result

    def _out_shape(self, fields: dict[str, Any]) -> tuple[int, ...]:
        """The query's shape with the value's channels; of BSH, those of all heads."""
        query = fields["query"]
        joined = self.decodes and query.ndim == 3
        return (*query.shape[:-1], self.dv * (fields["heads_q"] if joined else 1))

    def _stats_shape(self, fields: dict[str, Any]) -> tuple[int, ...]:
        """[B][N1][S1] of a decode step, else [B][N2][S1][G] or [N2][T1][G]."""
        heads_q, heads_kv = fields["heads_q"], fields["heads_kv"]
        if self.decodes:
            return (fields["batch"], heads_q, fields["seq_q"])
        shape = fields["query"].shape[:-2]
        return (*shape[:-1], heads_kv, shape[-1], heads_q // heads_kv)

    def sizes(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """The size, layout and stride fields that arrays of the documented shapes imply."""
        if self.trains:
            given = self._trained(arrays).fields
            return {n: v for n, v in given.items() if arrays.get(n) is not v}
        return self._decode_sizes(arrays) if self.decodes else self._sparse_sizes(arrays)

    def _layout(self, name: str) -> int:
        return self.constants[f"{self.header.macro}_LAYOUT_{name}"]

    def _sparse_sizes(self, arrays: dict[str, Any]) -> dict[str, Any]:
        query, key = arrays["query"], arrays["key"]
        tnd, paged = query.ndim == 3, arrays.get("block_table") is not None
        ends = arrays.get("actual_seq_lengths_query")
        sizes: dict[str, Any] = {
            "batch": len(ends) if tnd else query.shape[0],
            "seq_q": query.shape[-3],
            "heads_q": query.shape[-2],
            "heads_kv": key.shape[-2],
            "layout_query": self._layout("TND" if tnd else "BSND"),
            "layout_kv": self._layout(
                "PA_BSND" if paged else "TND" if key.ndim == 3 else "BSND",
            ),
        }
        if paged:
            sizes["num_blocks"], sizes["block_size"] = key.shape[:2]
            sizes["max_blocks"] = arrays["block_table"].shape[1]
        else:
            sizes["seq_kv"] = key.shape[-3]
        if arrays.get("sparse_indices") is not None:
            sizes["list_length"] = arrays["sparse_indices"].shape[-1]
        for name in TENSORS:
            array = arrays.get(name)
            if array is not None and not array.flags.c_contiguous:
                sizes[f"{name}_stride"] = element_strides(array)
        return sizes

    def _decode_sizes(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Arrays of rank 3 are BSH, or pages of all heads side by side. Of rank 4 they are BSND and
        PA_BSND unless the fields layout_query and layout_kv say otherwise; pages come as one list
        of arrays for each batch."""
        query, pages = arrays["query"], arrays.get("key_pages")
        paged = pages is not None or arrays.get("block_table") is not None
        key = arrays["key"] if pages is None else first_page(pages)
        layout_q = arrays.get("layout_query")
        if layout_q is None:
            layout_q = self._layout("BSH" if query.ndim == 3 else "BSND")
        layout_kv = arrays.get("layout_kv")
        if layout_kv is None:
            layout_kv = self._layout("PA_BSND") if paged else layout_q
        seq_q, heads_q = self._rows_and_heads(query.shape, layout_q)
        rows, heads_kv = self._rows_and_heads(key.shape, layout_kv, joined=2 + (pages is None))
        sizes: dict[str, Any] = {
            "batch": query.shape[0],
            "seq_q": seq_q,
            "heads_q": heads_q,
            "heads_kv": arrays.get("heads_kv", heads_kv),
            "layout_query": layout_q,
            "layout_kv": layout_kv,
        }
        if pages is not None:
            sizes["block_size"], sizes["max_blocks"] = rows, len(pages[0])
        elif paged:
            sizes["num_blocks"], sizes["block_size"] = key.shape[0], rows
            sizes["max_blocks"] = arrays["block_table"].shape[1]
        else:
            sizes["seq_kv"] = rows
        return {**sizes, **self._decode_options(arrays), **self._decode_strides(arrays, sizes)}

    def _rows_and_heads(
        self, shape: tuple[int, ...], layout: int, joined: int = 3
    ) -> tuple[int, int]:
        """Of a tensor [B][S][H] of rank `joined` or [B][S][N][C], [B][N][S][C]; a page by itself
        has no B."""
        if len(shape) == joined:
            return shape[-2], shape[-1] // self.dk
        by_head = (self._layout("BNSD"), self._layout("PA_BNSD"))
        return (shape[-2], shape[-3]) if layout in by_head else (shape[-3], shape[-2])

    def _decode_options(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """What the shapes and types of the smaller arrays say."""
        options: dict[str, Any] = {}
        lengths, scale = arrays.get("actual_seq_lengths"), arrays.get("quant_scale2")
        pse, mask = arrays.get("pse_shift"), arrays.get("atten_mask")
        if lengths is not None:
            options["lengths"] = len(lengths)
        if pse is not None:
            options["pse_batch"], options["pse_width"] = pse.shape[0], pse.shape[-1]
        if mask is not None:
            options["mask_batch"], options["mask_width"] = mask.shape[0], mask.shape[-1]
            options["mask_rows"] = mask.shape[1] if mask.ndim == 3 else 1
        if arrays.get("antiquant_scale") is not None:
            options["antiquant_f32"] = int(arrays["antiquant_scale"].dtype == np.float32)
        if scale is not None:
            options["quant_per_channel"] = int(scale.size > 1)
            options["quant_bf16"] = int(scale.dtype == DTYPES["bf16"])
        return options

    def _decode_strides(self, arrays: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
        """Of arrays with gaps, by row and head whichever comes first in memory."""
        by_head = (self._layout("BNSD"), self._layout("PA_BNSD"))
        strides: dict[str, Any] = {}
        for name in ("query", "key", "value"):
            array = arrays.get(name)
            if array is None or array.flags.c_contiguous:
                continue
            if array.ndim == 3:
                heads = sizes["heads_q" if name == "query" else "heads_kv"]
                array = array.reshape(*array.shape[:2], heads, array.shape[2] // heads)
            elif sizes["layout_query" if name == "query" else "layout_kv"] in by_head:
                array = array.swapaxes(1, 2)
            strides[f"{name}_stride"] = element_strides(array)
        return strides


def out_dtype(fields: dict[str, Any]) -> np.dtype:
    """attention_out's type."""
    if fields.get("quant_scale2") is not None:
        return np.dtype(np.int8)
    if fields.get("out_f32"):
        return np.dtype(np.float32)
    query = fields["query"].dtype
    return np.dtype(np.float16) if query == np.int8 else query


def first_page(pages: Sequence[Sequence[Any]]) -> np.ndarray:
    """Any page that is there: they all have the same shape."""
    return next(page for row in pages for page in row if isinstance(page, np.ndarray))


def structures_of(kind: type[ctypes.Structure], name: str) -> type[ctypes.Structure]:
    """The class of a struct's field."""
    return dict(kind._fields_)[name]


def element_strides(array: np.ndarray) -> tuple[int, int, int]:
    """(batch, row, head) in elements; channels lie side by side."""
    if array.strides[-1] != array.itemsize:
        raise ValueError("channels are apart; fix: make the last axis contiguous")
    strides = [s // array.itemsize for s in array.strides[:-1]]
    return tuple([0] * (3 - len(strides)) + strides)


def header_text(header: Any) -> str:
    """The text of a header: itself, the file at a path, or a rendered gen.spec.Header."""
    if isinstance(header, str) and "\n" in header:
        return header
    if isinstance(header, (str, os.PathLike)):
        return Path(header).read_text()
    from gen.render import render_header

    return render_header(header)


def dtype_of(name: str, header: Any) -> np.dtype | None:
    """The kernel's element type, from its spec or its name; None when neither says."""
    for kernel in getattr(header, "kernels", ()):
        if kernel.name == name:
            return DTYPES[kernel.dtype]
    match = re.search(r"_(bf16|f16|f32|i8)_", name)
    return DTYPES[match[1]] if match else None


def load_all(
    header: Any,
    *,
    compiler: str = "cc",
    flags: Sequence[str] = ("-O2",),
    libs: Sequence[str] = (),
    defines: Sequence[str] = (),
    extra: str = "",
) -> dict[str, Kernel]:
    """Compiles a header (text, path or gen.spec.Header) and binds every kernel in it, by name.
    defines: "NAME" or "NAME value". extra: C text after the header, in the same file.
    HEADLIGHT_CC stands for `cc` where no other compiler is named, and HEADLIGHT_CFLAGS then comes
    behind the flags."""
    text = header_text(header)
    if compiler == "cc":
        compiler = os.environ.get("HEADLIGHT_CC") or compiler
        flags = (*flags, *os.environ.get("HEADLIGHT_CFLAGS", "").split())
    parsed = parse(text)
    path = compile_c(
        {"header.h": text, "header.c": export_source(parsed, defines, extra)},
        compiler=compiler,
        flags=flags,
        libs=libs,
    )
    library = ctypes.CDLL(str(path))
    loaded.append(library)
    return {n: Kernel(parsed, n, library, dtype_of(n, header)) for n in parsed.kernels}


def load(header: Any, kernel: str | None = None, **build: Any) -> Kernel:
    """The named kernel of a header, or its only one. Keywords as for load_all."""
    kernels = load_all(header, **build)
    if kernel is None and len(kernels) != 1:
        raise ValueError(
            f"the header has {len(kernels)} kernels; fix: name one of {', '.join(kernels)}"
        )
    return kernels[kernel] if kernel else next(iter(kernels.values()))
