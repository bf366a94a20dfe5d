/* Times 2^x alone. Compiled behind a header, in the same file, for its words. */
#include "words.h"

#include <time.h>

static double thread_nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* `count` times over n numbers, n a multiple of 16; negative: an hl_status. */
double bench_exp2(int isa, const float *x, float *y, size_t n, int count)
{
    word_loop *loop = exp2_loop(isa);
    if (!loop) {
        return (double)HL_ERR_UNSUPPORTED;
    }
    const double begin = thread_nanoseconds();
    for (int i = 0; i < count; i++) {
        loop(x, y, n);
    }
    return thread_nanoseconds() - begin;
}
