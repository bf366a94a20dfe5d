/* 2^x over an array, through the words of each instruction set that the header before it has:
 * bench/exp2_time.c times it, tests/exp2_sweep.c looks at every float. n is a multiple of 16. */
#ifndef BENCH_WORDS_H
#define BENCH_WORDS_H

#include <stddef.h>

typedef void word_loop(const float *x, float *y, size_t n);

#if defined(HL_VEXP2_SLEEF_SCALAR)
#define VEXP2(isa) hl_vexp2_sleef_##isa
#elif defined(HL_VEXP2_LIBM_SCALAR)
#define VEXP2(isa) hl_vexp2_libm_##isa
#else
#define VEXP2(isa) hl_vexp2_##isa
#endif

#define TARGET_scalar
#define TARGET_neon
#define TARGET_avx2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_avx512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

#define EXP2_LOOP(isa, lanes)                                               \
    TARGET_##isa static void exp2_##isa(const float *x, float *y, size_t n) \
    {                                                                       \
        for (size_t i = 0; i < n; i += (lanes)) {                           \
            hl_vstore_##isa(y + i, VEXP2(isa)(hl_vload_##isa(x + i)));      \
        }                                                                   \
    }

EXP2_LOOP(scalar, 1)
#ifdef HL_WORDS_NEON
EXP2_LOOP(neon, 4)
#endif
#ifdef HL_WORDS_AVX2
EXP2_LOOP(avx2, 8)
#endif
#ifdef HL_WORDS_AVX512
EXP2_LOOP(avx512, 16)
#endif

/* NULL: the header does not have this instruction set. */
static word_loop *exp2_loop(int isa)
{
    switch (isa) {
    case HL_ISA_SCALAR:
        return exp2_scalar;
#ifdef HL_WORDS_NEON
    case HL_ISA_NEON:
        return exp2_neon;
#endif
#ifdef HL_WORDS_AVX2
    case HL_ISA_AVX2:
        return exp2_avx2;
#endif
#ifdef HL_WORDS_AVX512
    case HL_ISA_AVX512:
        return exp2_avx512;
#endif
    default:
        return NULL;
    }
}

#endif
