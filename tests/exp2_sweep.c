/* Compares 2^x, in the words of every instruction set that a header has here, and ln x with
 * double, over every stride-th float32 (1: all of them).
 *
 *     cc -O2 -Iinclude -Ibench -DHEADER='"name.h"' -DKERNEL=name tests/exp2_sweep.c -lm
 *
 * 2^x is for x <= 0, and exactly 0 below -126. A line for each instruction set:
 *     isa count max_ulp at_bits rises max_rise_ulp nonzero_below special_wrong
 * rises: neighbours of the sweep where a smaller x gave a larger 2^x. Then, for x from 2^-126:
 *     log count max_error at_bits special_wrong
 * max_error: the absolute error less half a unit in the last place of the result. */
#include HEADER
#include "words.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PASTE(kernel, suffix) kernel##suffix
#define NAME(kernel, suffix) PASTE(kernel, suffix)

enum { BLOCK = 4096, N_ISAS = 4 };
static const uint32_t MINUS_ZERO = 0x80000000u, MINUS_126 = 0xc2fc0000u;
static const uint32_t SMALLEST_NORMAL = 0x00800000u, LARGEST = 0x7f7fffffu;

typedef struct sweep {
    word_loop *loop;
    const char *name;
    int64_t rises, nonzero_below;
    double max_ulp, max_rise_ulp;
    uint32_t at;
    float last;
    int special_wrong;
} sweep;

static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The distance between the float32 numbers at y. */
static double ulp_of(double y)
{
    int exponent;
    frexp(y, &exponent);
    return ldexp(1.0, exponent - 24);
}

static void compare(sweep *s, const uint32_t *bits, const float *y, const double *want, int n)
{
    for (int i = 0; i < n; i++) {
        if (bits[i] > MINUS_126) {
            s->nonzero_below += y[i] != 0.0f;
            continue;
        }
        const double ulp = ulp_of(want[i]);
        const double error = fabs((double)y[i] - want[i]) / ulp;
        if (!(error <= s->max_ulp)) {
            s->max_ulp = error;
            s->at = bits[i];
        }
        if (y[i] > s->last) {
            s->rises++;
            s->max_rise_ulp = fmax(s->max_rise_ulp, ((double)y[i] - (double)s->last) / ulp);
        }
        s->last = y[i];
    }
}

/* Zeros, the ends of the range, infinity and NaN, in every lane. */
static int exp2_special_wrong(word_loop *loop)
{
    const float x[] = {0.0f, -0.0f, -1.0f, -126.0f, -127.0f, -150.0f, -3e38f, -INFINITY, NAN};
    const float want[] = {1.0f, 1.0f, 0.5f, 0x1p-126f, 0.0f, 0.0f, 0.0f, 0.0f};
    int wrong = 0;
    for (int i = 0; i < 9; i++) {
        for (int lane = 0; lane < 16; lane++) {
            float in[16] = {0}, out[16];
            in[lane] = x[i];
            loop(in, out, 16);
            for (int j = 0; j < 16; j++) {
                const float expected = j != lane ? 1.0f : i < 8 ? want[i] : 0.0f;
                const int is_nan = j == lane && i == 8;
                wrong += is_nan ? !isnan(out[j]) : out[j] != expected || signbit(out[j]);
            }
        }
    }
    return wrong;
}

static void sweep_exp2(uint32_t stride)
{
    static const char *const names[N_ISAS] = {"scalar", "neon", "avx2", "avx512"};
    static uint32_t bits[BLOCK];
    static float x[BLOCK], y[BLOCK];
    static double want[BLOCK];
    sweep sweeps[N_ISAS] = {{0}};
    int n_sweeps = 0;
    for (int isa = HL_ISA_SCALAR; isa <= HL_ISA_AVX512; isa++) {
        if (NAME(KERNEL, _isas)() >> isa & 1u) {
            sweep *s = &sweeps[n_sweeps++];
            s->loop = exp2_loop(isa);
            s->name = names[isa - 1];
            s->last = 1.0f;
            s->special_wrong = exp2_special_wrong(s->loop);
        }
    }
    int64_t count = 0;
    for (uint64_t next = MINUS_ZERO; next <= MINUS_ZERO + LARGEST;) {
        int n = 0;
        for (; n < BLOCK && next <= MINUS_ZERO + LARGEST; n++, next += stride) {
            bits[n] = (uint32_t)next;
            x[n] = float_of(bits[n]);
            want[n] = bits[n] <= MINUS_126 ? exp2((double)x[n]) : 0.0;
            count += bits[n] <= MINUS_126;
        }
        memset(x + n, 0, sizeof(float) * (size_t)(BLOCK - n));
        for (int i = 0; i < n_sweeps; i++) {
            sweeps[i].loop(x, y, BLOCK);
            compare(&sweeps[i], bits, y, want, n);
        }
    }
    for (int i = 0; i < n_sweeps; i++) {
        const sweep *s = &sweeps[i];
        printf("%s %lld %.5f %08x %lld %.5f %lld %d\n", s->name, (long long)count, s->max_ulp,
            (unsigned)s->at, (long long)s->rises, s->max_rise_ulp, (long long)s->nonzero_below,
            s->special_wrong);
    }
}

static void sweep_log(uint32_t stride)
{
    double max_error = 0.0;
    uint32_t at = 0;
    int64_t count = 0;
    for (uint64_t bits = SMALLEST_NORMAL; bits <= LARGEST; bits += stride) {
        const float x = float_of((uint32_t)bits);
        const double want = log((double)x);
        const double error = fabs((double)hl_log(x) - want) - 0.5 * ulp_of(want);
        if (!(error <= max_error)) {
            max_error = error;
            at = (uint32_t)bits;
        }
        count++;
    }
    const int wrong = (hl_log(0.0f) != -INFINITY) + (hl_log(1.0f) != 0.0f)
        + (hl_log(INFINITY) != INFINITY) + !isnan(hl_log(NAN));
    printf("log %lld %.4g %08x %d\n", (long long)count, max_error, (unsigned)at, wrong);
}

int main(int argc, char **argv)
{
    const uint32_t stride = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 1;
    if (stride == 0) {
        fprintf(stderr, "exp2_sweep: the stride must be at least 1\n");
        return 2;
    }
    sweep_exp2(stride);
    sweep_log(stride);
    return 0;
}
