"""Intel AMX tiles on processors that have none: tests/tiles.c, built and loaded.

    with helpers_tiles.during("granted") as tiles:  # None where that cannot be done
        tiles.reset()
        ...                                  # call kernels, on any thread, or in a forked child
        assert tiles.counts()["tdpbf16ps"] > 0
        assert tiles.configured() == 0       # the kernel released its tiles

    subprocess.run(program, env=helpers_tiles.preload_environment("granted"))

On a machine with tiles of its own nothing is emulated (tiles.emulated is False, no counts) unless
force is given. Programs that this process starts see none of it. Headers choose their instruction
set by what the system grants: a test that is done with tiles goes back to the mode before, as
during() does.
"""

import contextlib
import ctypes
import faulthandler
import functools
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from gen import bind

SOURCE = Path(__file__).resolve().parent / "tiles.c"
FLAGS = ("-std=gnu99", "-O2", "-Wall", "-Wextra")
MODES = ("absent", "refused", "granted")  # what the system says to who asks for tiles


@functools.cache
def here() -> bool:
    """Whether this machine can emulate tiles, or has them."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return False
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return flags is not None and {"avx512f", "avx512bw"} <= set(flags[1].split())


@functools.cache
def path() -> Path:
    """The compiled emulator."""
    made = bind.compile_c({SOURCE.name: SOURCE.read_text()}, flags=FLAGS, libs=("-pthread",))
    return made.resolve()


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator, loaded; it does nothing yet."""
    made = ctypes.CDLL(str(path()))
    made.tiles_name.restype = ctypes.c_char_p
    made.tiles_counts.argtypes = (ctypes.c_void_p, ctypes.c_int)
    made.tiles_counts.restype = made.tiles_reset.restype = made.tiles_in_front.restype = None
    return made


def native() -> bool:
    """Whether this machine has tiles of its own."""
    return here() and bool(library().tiles_native())


class Tiles:
    """The installed emulator; it is one for the whole process."""

    def __init__(self, emulated: bool) -> None:
        self.emulated = emulated
        self.names: list[str] = []
        while name := library().tiles_name(len(self.names)):
            self.names.append(name.decode())

    def counts(self) -> dict[str, int]:
        """Since the last reset, on all threads of this process (a forked child counts for itself):
        instructions by name, "violations", and "requests" for permission."""
        counts = (ctypes.c_uint64 * len(self.names))()
        library().tiles_counts(counts, len(self.names))
        return dict(zip(self.names, counts, strict=True))

    def reset(self) -> None:
        """Counts from zero again."""
        library().tiles_reset()

    def configured(self) -> int:
        """The palette in force on the calling thread; 0 when its tiles are released."""
        return library().tiles_configured()

    def clobber(self) -> bool:
        """Fills the calling thread's tiles with NaNs; whether it had any, which is while they are
        configured (LDTILECFG zeroes them, here as in hardware)."""
        return bool(library().tiles_clobber())

    def mode(self, mode: str) -> None:
        """Another of MODES from now on, without permission until it is asked for again."""
        if library().tiles_mode(MODES.index(mode)):
            raise RuntimeError("tiles are not emulated; fix: install(force=True)")


@functools.cache
def _survive_forks() -> None:
    """A child may call faulthandler.disable(), which puts back the handler of SIGILL that was there
    before; so that is done here first, and ours after it."""

    def in_child() -> None:
        faulthandler.disable()
        library().tiles_in_front()

    os.register_at_fork(after_in_child=in_child)


def install(mode: str = "granted", force: bool = False) -> Tiles | None:
    """Emulates tiles in this process, on all its threads. Called again, it sets the mode and puts
    its signal handlers in front of others. None without x86-64, Linux or AVX-512."""
    if not here():
        return None
    status = library().tiles_install(MODES.index(mode), int(force))
    if status < 0:
        raise RuntimeError(
            f"the emulator of tiles: {os.strerror(-status)}; fix: run where seccomp is allowed"
        )
    if status == 0:
        _survive_forks()
    return Tiles(emulated=status == 0)


@contextlib.contextmanager
def during(mode: str = "granted", force: bool = False) -> Iterator[Tiles | None]:
    """install(), and at the end the mode that was there before: without one, "absent"."""
    before = library().tiles_mode_now() if here() else 0
    made = install(mode, force)
    try:
        yield made
    finally:
        if made is not None and made.emulated:
            made.mode(MODES[before])


def preload_environment(mode: str = "granted", force: bool = False) -> dict[str, str]:
    """The environment of a program that is to find emulated tiles, and of what it starts."""
    environment = {key: value for key, value in os.environ.items() if key != "HL_TILES_FORCE"}
    before = environment.get("LD_PRELOAD")
    environment["LD_PRELOAD"] = f"{path()} {before}" if before else str(path())
    environment["HL_TILES"] = MODES[MODES.index(mode)]
    if force:
        environment["HL_TILES_FORCE"] = "1"
    return environment
