/* What this machine can do: multiply-adds per second in registers and in tiles, and bytes per
 * second out of wherever the rows of a cache lie. Times are those of the thread on its processor.
 *
 * Vectors are the compiler's own (GCC and Clang), so one text serves every instruction set; tiles
 * are assembly, so that no compiler can move, merge or spill them. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f")))
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES 1
#endif
#define TARGET_BASE

static double nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* Results go here, so that no loop is dead. */
static volatile float sink_float;
static volatile uint64_t sink_bits;

/* ---- float32 multiply-adds ------------------------------------------------------------------ */

/* Where numbers come from that no compiler may know. */
static volatile float zero;

/* Twelve chains cover two units of four cycles latency, and still fit 16 registers. Each starts
 * with a number of its own, unknown to the compiler: equal chains would be merged into one, and a
 * chain that stands still (1 is where all of them go) would not be computed at all. */
#define TWELVE(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define DECLARE(i) vector a##i = start + (float)i;
#define STEP(i) a##i = a##i * shrink + grow;
#define COLLECT(i) +a##i

#define PEAK(suffix, bytes)                                                            \
    TARGET_##suffix static double peak_##suffix(int64_t steps)                         \
    {                                                                                  \
        typedef float vector __attribute__((vector_size(bytes)));                      \
        const vector start = (vector){0} + zero;                                       \
        const vector shrink = start + 0.999f, grow = start + 0.001f;                   \
        TWELVE(DECLARE)                                                                \
        const double begin = nanoseconds();                                            \
        for (int64_t i = 0; i < steps; i++) {                                          \
            TWELVE(STEP)                                                               \
        }                                                                              \
        const double end = nanoseconds();                                              \
        const vector sum = start TWELVE(COLLECT);                                      \
        sink_float = sum[0];                                                           \
        return 2.0 * 12.0 * (double)(bytes / sizeof(float)) * (double)steps            \
            / (end - begin);                                                           \
    }

PEAK(BASE, 16)
#if defined(__x86_64__)
PEAK(AVX2, 32)
PEAK(AVX512, 64)
#endif

/* GFLOP/s of float multiply-adds with vectors of `bytes`; 16 is what plain C is compiled to:
 * SSE2 multiply and add on x86-64, NEON FMA on AArch64. */
double bench_fma_peak(int bytes, int64_t steps)
{
#if defined(__x86_64__)
    if (bytes == 64) {
        return peak_AVX512(steps);
    }
    if (bytes == 32) {
        return peak_AVX2(steps);
    }
#endif
    return peak_BASE(steps);
}

/* ---- tile products -------------------------------------------------------------------------- */

#if defined(HAS_TILES)

enum {
    CPUID_OSXSAVE = 1 << 27,   /* leaf 1, ecx */
    CPUID_AMX_BF16 = 1 << 22,  /* leaf 7, edx */
    CPUID_AMX_TILE = 1 << 24,
    CPUID_AMX_INT8 = 1 << 25,
    STATE_TILES = 3 << 17,     /* XCR0: tile configuration and tile data */
    REQUEST_PERMISSION = 0x1023, /* arch_prctl: ARCH_REQ_XCOMP_PERM */
    FEATURE_TILE_DATA = 18
};

/* 1: the processor has tiles, the system saves them, and this process may use them. */
int bench_has_tiles(void)
{
    const uint32_t wanted = CPUID_AMX_BF16 | CPUID_AMX_TILE | CPUID_AMX_INT8;
    uint32_t a, b, c, d, states, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & CPUID_OSXSAVE)
        || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) {
        return 0;
    }
    __asm__ volatile("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
    return (states & STATE_TILES) == STATE_TILES
        && syscall(SYS_arch_prctl, REQUEST_PERMISSION, FEATURE_TILE_DATA) == 0;
}

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Eight full tiles: 0 to 3 are accumulators, 4 and 5 left operands, 6 and 7 right operands, every
 * byte of which is 1: small numbers as bf16 and as int8, so that no sum overflows. */
static void tiles_begin(void)
{
    static uint8_t ones[16 * 64];
    tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    for (size_t i = 0; i < sizeof ones; i++) {
        ones[i] = 1;
    }
    __asm__ volatile("ldtilecfg %0\n\t"
                     "tilezero %%tmm0\n\t"
                     "tilezero %%tmm1\n\t"
                     "tilezero %%tmm2\n\t"
                     "tilezero %%tmm3\n\t"
                     "tileloadd (%1,%2,1), %%tmm4\n\t"
                     "tileloadd (%1,%2,1), %%tmm5\n\t"
                     "tileloadd (%1,%2,1), %%tmm6\n\t"
                     "tileloadd (%1,%2,1), %%tmm7"
                     :
                     : "m"(config), "r"(ones), "r"((size_t)64)
                     : "memory");
}

static void tiles_end(void)
{
    static uint8_t result[16 * 64];
    __asm__ volatile("tilestored %%tmm0, (%0,%1,1)\n\t"
                     "tilerelease"
                     :
                     : "r"(result), "r"((size_t)64)
                     : "memory");
    sink_bits = result[0];
}

/* The four products of a 2 x 2 block, as an attention kernel issues them. */
#define FOUR_PRODUCTS(word)                     \
    #word " %%tmm6, %%tmm4, %%tmm0\n\t"         \
    #word " %%tmm7, %%tmm4, %%tmm1\n\t"         \
    #word " %%tmm6, %%tmm5, %%tmm2\n\t"         \
    #word " %%tmm7, %%tmm5, %%tmm3\n\t"

#define PRODUCT_LOOP(name, word)                                                       \
    static double name(int64_t steps)                                                  \
    {                                                                                  \
        tiles_begin();                                                                 \
        const double begin = nanoseconds();                                            \
        __asm__ volatile("1:\n\t" FOUR_PRODUCTS(word) FOUR_PRODUCTS(word)              \
                         "sub $1, %0\n\t"                                              \
                         "jnz 1b"                                                      \
                         : "+r"(steps)                                                 \
                         :                                                             \
                         : "cc", "memory");                                            \
        const double end = nanoseconds();                                              \
        tiles_end();                                                                   \
        return end - begin;                                                            \
    }

PRODUCT_LOOP(bf16_products, tdpbf16ps)
PRODUCT_LOOP(int8_products, tdpbssd)

/* GFLOP/s (int8: GOP/s) of tile products in registers; steps > 0, eight products each. Only where
 * bench_has_tiles() is 1. A product is 16 x 16 sums of 64 bytes of elements. */
double bench_tile_peak(int int8, int64_t steps)
{
    const double each = 2.0 * 16 * 16 * (int8 ? 64 : 32);
    return 8.0 * each * (double)steps / (int8 ? int8_products(steps) : bf16_products(steps));
}

#else

int bench_has_tiles(void)
{
    return 0;
}

double bench_tile_peak(int int8, int64_t steps)
{
    (void)int8, (void)steps;
    return 0;
}

#endif

/* ---- reading -------------------------------------------------------------------------------- */

/* read_flat: all whole lines of a range; `ahead` bytes ahead of the reader, lines are prefetched,
 * 0: left to the hardware. read_rows: the rows that a list names, `bytes` each, a multiple of 64;
 * `ahead` counts rows. */
#define READ(suffix)                                                                   \
    typedef uint64_t line_##suffix                                                     \
        __attribute__((vector_size(64), aligned(4), may_alias));                       \
    TARGET_##suffix static void read_flat_##suffix(                                    \
        const char *base, size_t bytes, size_t ahead)                                  \
    {                                                                                  \
        typedef line_##suffix line;                                                    \
        line a = {0}, b = {0}, c = {0}, d = {0};                                       \
        size_t i = 0;                                                                  \
        for (; i + 256 <= bytes; i += 256) {                                           \
            if (ahead) {                                                               \
                __builtin_prefetch(base + i + ahead);                                  \
                __builtin_prefetch(base + i + ahead + 64);                             \
                __builtin_prefetch(base + i + ahead + 128);                            \
                __builtin_prefetch(base + i + ahead + 192);                            \
            }                                                                          \
            a |= *(const line *)(base + i);                                            \
            b |= *(const line *)(base + i + 64);                                       \
            c |= *(const line *)(base + i + 128);                                      \
            d |= *(const line *)(base + i + 192);                                      \
        }                                                                              \
        for (; i + 64 <= bytes; i += 64) {                                             \
            a |= *(const line *)(base + i);                                            \
        }                                                                              \
        a |= b | c | d;                                                                \
        sink_bits = a[0] ^ a[7];                                                       \
    }                                                                                  \
    TARGET_##suffix static void read_rows_##suffix(                                    \
        const char *base, size_t bytes, const int32_t *list, int32_t rows, int ahead)  \
    {                                                                                  \
        typedef line_##suffix line;                                                    \
        line even = {0}, odd = {0};                                                    \
        for (int32_t i = 0; i < rows; i++) {                                           \
            const int32_t j = i + ahead < rows ? i + ahead : rows - 1;                 \
            const char *row = base + bytes * (size_t)list[i];                          \
            const char *next = base + bytes * (size_t)list[j];                         \
            size_t c = 0;                                                              \
            for (; c + 128 <= bytes; c += 128) {                                       \
                if (ahead) {                                                           \
                    __builtin_prefetch(next + c);                                      \
                    __builtin_prefetch(next + c + 64);                                 \
                }                                                                      \
                even |= *(const line *)(row + c);                                      \
                odd |= *(const line *)(row + c + 64);                                  \
            }                                                                          \
            if (c < bytes) {                                                           \
                if (ahead) {                                                           \
                    __builtin_prefetch(next + c);                                      \
                }                                                                      \
                even |= *(const line *)(row + c);                                      \
            }                                                                          \
        }                                                                              \
        even |= odd;                                                                   \
        sink_bits = even[0] ^ even[7];                                                 \
    }

READ(BASE)
#if defined(__x86_64__)
READ(AVX2)
READ(AVX512)
#endif

static void read_flat(const char *base, size_t bytes, size_t ahead)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        read_flat_AVX512(base, bytes, ahead);
        return;
    }
    if (__builtin_cpu_supports("avx2")) {
        read_flat_AVX2(base, bytes, ahead);
        return;
    }
#endif
    read_flat_BASE(base, bytes, ahead);
}

static void read_rows(
    const char *base, size_t bytes, const int32_t *list, int32_t rows, int ahead)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        read_rows_AVX512(base, bytes, list, rows, ahead);
        return;
    }
    if (__builtin_cpu_supports("avx2")) {
        read_rows_AVX2(base, bytes, list, rows, ahead);
        return;
    }
#endif
    read_rows_BASE(base, bytes, list, rows, ahead);
}

/* Nanoseconds of reading `count` groups of `each` ranges one after another: group `first`,
 * first + 1, .. modulo n. */
double bench_read(const char *const *bases, const size_t *bytes, int each, int n, int first,
                  int count, size_t ahead)
{
    const double begin = nanoseconds();
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < each; j++) {
            const int range = (first + i) % n * each + j;
            read_flat(bases[range], bytes[range], ahead);
        }
    }
    return nanoseconds() - begin;
}

/* The same for `count` lists of rows. */
double bench_gather(const char *base, size_t bytes, const int32_t *const *lists, int32_t rows,
                    int n, int first, int count, int ahead)
{
    const double begin = nanoseconds();
    for (int i = 0; i < count; i++) {
        read_rows(base, bytes, lists[(first + i) % n], rows, ahead);
    }
    return nanoseconds() - begin;
}

/* Leaves nothing but this range in any cache that is smaller. */
void bench_sweep(const char *base, size_t bytes)
{
    read_flat(base, bytes, 1024);
}
