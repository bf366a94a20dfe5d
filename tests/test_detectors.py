"""What the tools that watch memory can see of vector code, and what only a guard page does: the
reason why tests between guard pages come first here, and sanitizers second. A newer compiler may
see more; then the table below, and the one in the documents, may be shortened."""

import subprocess
from pathlib import Path

import helpers_tiles
import pytest
from helpers import ISAS_HERE

from gen import bind

# One float past 8 that were allocated (a tile's row: 64 bytes); from the heap, and with -DPAGE in
# front of a page that nobody may touch.
PROGRAM = r"""
#define _DEFAULT_SOURCE 1
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef PAGE
static void *room(size_t bytes)
{
    char *const at = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return mprotect(at + 4096, 4096, PROT_NONE) ? 0 : at + 4096 - bytes;
}
#else
#define room malloc
#endif
static volatile float kept;
static volatile __m256 wide; /* whole: of a vector that is used in part, a part may be read */
static volatile __m512 wider;

int main(void)
{
    float *const x = room(8 * sizeof(float));
    const __m256i lanes = _mm256_set1_epi32(-1);
    memset(x, 0, 8 * sizeof(float));
    (void)lanes;
    (void)wide;
    (void)wider;
    (void)kept;
#if ACCESS == 0
    kept = x[8];
#elif ACCESS == 1
    wide = _mm256_loadu_ps(x + 1);
#elif ACCESS == 2
    wide = _mm256_maskload_ps(x + 1, lanes);
#elif ACCESS == 3
    wider = _mm512_maskz_loadu_ps(0x1ff, x);
#elif ACCESS == 4
    _mm512_mask_storeu_ps(x, 0x1ff, _mm512_setzero_ps());
#elif ACCESS == 5
    wide = _mm256_i32gather_ps(x, _mm256_set1_epi32(8), 4);
#elif ACCESS == 6
    wider = _mm512_i32gather_ps(_mm512_set1_epi32(8), x, 4);
#else
    {
        unsigned char shape[64] = {1};
        syscall(158, 0x1023, 18); /* may this process use tiles? */
        shape[16] = 64;
        shape[48] = 1;
        __asm__ volatile("ldtilecfg %0" : : "m"(shape));
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(x), "r"((size_t)64) : "memory");
        __asm__ volatile("tilerelease");
    }
#endif
    return 0;
}
"""
ACCESSES = ("a float", "a vector", "maskload", "maskz load", "mask store", "gather, AVX2",
            "gather, AVX-512", "tile load")  # fmt: skip
NEEDS = {1: "avx2", 2: "avx2", 3: "avx512", 4: "avx512", 5: "avx2", 6: "avx512", 7: "amx"}
TARGET = ("-mavx2", "-mavx512f", "-O1", "-g")
ASAN = (*TARGET, "-fsanitize=address")
# By tool: the accesses that it misses.
MISSED = {
    ("gcc", ASAN): {2, 3, 4, 5, 6, 7},
    ("clang", ASAN): {5, 6, 7},
    ("gcc", (*TARGET, "-DPAGE")): set(),
}
TABLE = [
    (compiler, flags, access)
    for compiler, flags in MISSED
    for access in range(len(ACCESSES))
    if NEEDS.get(access, "scalar") in ISAS_HERE
]


def ends(compiler: str, flags: tuple[str, ...], access: int, text: str = PROGRAM) -> bool:
    """Whether the program is stopped."""
    flags = (*flags, f"-DACCESS={access}")
    made = bind.compile_c({"p.c": text}, compiler=compiler, flags=flags, suffix=".bin")
    environment = {"PATH": "/usr/bin:/bin", "ASAN_OPTIONS": "detect_leaks=0"}
    if NEEDS.get(access) == "amx":
        signals = ":verify_asan_link_order=0:handle_sigill=0:handle_sigtrap=0"
        environment = helpers_tiles.preload_environment("granted")
        environment["ASAN_OPTIONS"] = "detect_leaks=0" + signals
    run = subprocess.run([str(made)], env=environment, capture_output=True, check=False)
    return run.returncode != 0


@pytest.mark.parametrize(
    "compiler,flags,access",
    TABLE,
    ids=lambda x: ACCESSES[x] if isinstance(x, int) else x if isinstance(x, str) else "",
)
def test_who_notices_an_access_past_the_end(compiler, flags, access):
    """Guard pages: all of them. (The control of each: one float less is not stopped.)"""
    assert ends(compiler, flags, access) == (access not in MISSED[compiler, flags])
    inside = PROGRAM.replace("room(8 * sizeof(float))", "room(16 * sizeof(float))")
    assert not ends(compiler, flags, access, inside)


RACE = r"""
#include <immintrin.h>
#include <pthread.h>
float shared[16] __attribute__((aligned(64)));
__attribute__((target("avx512f"))) static void *put(void *own)
{
    (void)own;
#if ACCESS == 0
    shared[0] = 1.0f;
#elif ACCESS == 1
    _mm256_storeu_ps(shared, _mm256_set1_ps(1.0f));
#else
    _mm512_mask_storeu_ps(shared, 0xff, _mm512_set1_ps(1.0f));
#endif
    return 0;
}
int main(void)
{
    pthread_t a, b;
    pthread_create(&a, 0, put, 0);
    pthread_create(&b, 0, put, 0);
    pthread_join(a, 0);
    return pthread_join(b, 0);
}
"""
RACES = {"gcc": (True, True, False), "clang": (True, False, False)}


@pytest.mark.parametrize("compiler", list(RACES))
def test_who_notices_a_race(compiler):
    """Two threads store the same place: a float, a vector, a vector under a mask. clang's TSan sees
    up to 16 bytes at a time, gcc's any plain access: it is the one that `make sanitize` takes."""
    flags = ("-mavx2", "-O1", "-g", "-fsanitize=thread", "-pthread")
    here = [access for access in range(3) if access < 2 or "avx512" in ISAS_HERE]
    seen = tuple(ends(compiler, flags, access, RACE) for access in here)
    assert seen == RACES[compiler][: len(here)]


def test_the_runner_with_a_workspace_for_all_is_noticed():
    """The control of TSan: 16 threads in one workspace."""
    import sanitize

    name = "hl_sparse_flash_attention_f32_d32_rope8"
    flags = (*sanitize.THREAD, "-DRACY")
    command = (str(sanitize.built(name, "gcc", flags)),)
    env = sanitize.environment("halt_on_error=1:exitcode=9")
    with pytest.raises(AssertionError, match="data race"):
        sanitize.played(name, command, ("scalar",), 2, env)


@pytest.mark.parametrize("tool", ["memory", "thread", "valgrind"])
def test_the_smallest_header(tool):
    """`make sanitize` in small; the address sanitizer has tests of its own beside other tests."""
    import sanitize

    sanitize.TOOLS[tool]("hl_sparse_flash_attention_f32_d32_rope8", 4)


def test_memory_that_nothing_was_written_to_is_noticed():
    """The control of MSan and of valgrind: a sum that begins with what was there."""
    import sanitize

    name = "hl_sparse_flash_attention_f32_d32_rope8"
    text = (Path(__file__).resolve().parent.parent / "include" / f"{name}.h").read_text()
    broken = text.replace("hl_vstore_scalar(t->l + h, hl_vzero_scalar());", ";")
    assert broken != text
    for compiler, flags, front in (
        ("clang", sanitize.MEMORY, ()),
        ("gcc", ("-O1", "-g", sanitize.HEAP), sanitize.VALGRIND),
    ):
        command = (*front, str(sanitize.built(name, compiler, flags, broken)))
        with pytest.raises(AssertionError, match="ninitiali"):
            sanitize.played(name, command, ("scalar",), 2, sanitize.environment(""))
