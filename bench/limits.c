/* What this machine can do: multiply-adds per second in registers, and bytes per second out of
 * wherever the rows of a cache lie. Times are those of the thread on its processor.
 *
 * Vectors are the compiler's own (GCC and Clang), so one text serves every instruction set. */
#define _POSIX_C_SOURCE 200809L
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#if defined(__x86_64__)
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f")))
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

/* Twelve chains cover two units of four cycles latency, and still fit 16 registers. */
#define TWELVE(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define DECLARE(i) vector a##i = start + (float)i;
#define STEP(i) a##i = a##i * shrink + grow;
#define COLLECT(i) +a##i

#define PEAK(suffix, bytes)                                                            \
    TARGET_##suffix static double peak_##suffix(int64_t steps)                         \
    {                                                                                  \
        typedef float vector __attribute__((vector_size(bytes)));                      \
        const vector start = {0}, shrink = start + 0.999f, grow = start + 0.001f;      \
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

/* Reads `rows` rows of `bytes` (a multiple of 64) each: row list[i], or row i without a list.
 * `ahead` rows ahead of the reader, lines are prefetched; 0: left to the hardware. */
#define READ(suffix)                                                                   \
    TARGET_##suffix static double read_##suffix(                                       \
        const char *base, size_t bytes, const int32_t *list, int32_t rows, int ahead)  \
    {                                                                                  \
        typedef uint64_t line __attribute__((vector_size(64), aligned(4), may_alias)); \
        line even = {0}, odd = {0};                                                    \
        const double begin = nanoseconds();                                            \
        for (int32_t i = 0; i < rows; i++) {                                           \
            const int32_t j = i + ahead < rows ? i + ahead : rows - 1;                 \
            const char *row = base + bytes * (size_t)(list ? list[i] : i);             \
            const char *next = base + bytes * (size_t)(list ? list[j] : j);            \
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
                even |= *(const line *)(row + c);                                      \
            }                                                                          \
        }                                                                              \
        const double end = nanoseconds();                                              \
        even |= odd;                                                                   \
        sink_bits = even[0] ^ even[7];                                                 \
        return end - begin;                                                            \
    }

PEAK(BASE, 16)
READ(BASE)
#if defined(__x86_64__)
PEAK(AVX2, 32)
PEAK(AVX512, 64)
READ(AVX2)
READ(AVX512)
#endif

/* GFLOP/s of float multiply-adds with vectors of `bytes`; 16 is what plain C is compiled to:
 * SSE2 multiply and add on x86-64, NEON FMA on AArch64. */
double bench_peak(int bytes, int64_t steps)
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

double bench_read(
    const void *base, size_t bytes, const int32_t *list, int32_t rows, int ahead)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        return read_AVX512(base, bytes, list, rows, ahead);
    }
    if (__builtin_cpu_supports("avx2")) {
        return read_AVX2(base, bytes, list, rows, ahead);
    }
#endif
    return read_BASE(base, bytes, list, rows, ahead);
}
