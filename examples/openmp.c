/* cc -O2 -fopenmp -Iinclude examples/openmp.c -o openmp && ./openmp
 *
 * OpenMP. Compiled with -fopenmp, the one-call function spreads its tasks over as many threads as
 * the workspace holds; ..._workspace_bytes() says what all of them need. Nothing else changes, not
 * even a bit of the result. Without -fopenmp this file still compiles and runs on one thread. */
#include "hl_sparse_flash_attention_f32_d64.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { HEADS = 16, KEYS = 20000, D = 64 };

static float query[HEADS][D], key[KEYS][D], serial[HEADS][D], out[HEADS][D];

static void fill(float *x, int32_t n)
{
    static uint32_t state = 1;
    while (n-- > 0) {
        state = state * 1664525u + 1013904223u;
        *x++ = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
}

static int attend(const hl_sparse_flash_attention_args *args, void *workspace, size_t bytes)
{
    hl_error error;
    char text[160];
    if (hl_sparse_flash_attention_f32_d64(args, workspace, bytes, &error) == HL_OK) return 1;
    puts(hl_error_text(&error, text, sizeof text));
    return 0;
}

int main(void)
{
    static unsigned char one_thread[HL_SPARSE_FLASH_ATTENTION_F32_D64_WORKSPACE_BYTES(HEADS)];
    hl_sparse_flash_attention_args args = {
        .query = query, .key = key, .attention_out = serial,
        .batch = 1, .seq_q = 1, .seq_kv = KEYS, .heads_q = HEADS, .scale_value = 0.5f};
    int threads = 1;
    fill(&query[0][0], HEADS * D);
    fill(&key[0][0], KEYS * D);

#ifdef _OPENMP
    threads = omp_get_max_threads();
#else
    puts("compiled without -fopenmp: the same calls, on one thread");
#endif
    const size_t bytes = hl_sparse_flash_attention_f32_d64_workspace_bytes(&args);
    void *workspace = malloc(bytes);
    if (bytes == 0 || workspace == NULL) return 1;

    /* Workspace for one thread: one thread works. Workspace for all: all do. */
    int done = attend(&args, one_thread, sizeof one_thread);
    args.attention_out = out;
    done = done && attend(&args, workspace, bytes);
    free(workspace);

    const int same = done && memcmp(out, serial, sizeof out) == 0 && out[0][0] != 0;
    printf("%zu bytes of workspace, 1 thread; %zu bytes, %d: %s\n", sizeof one_thread, bytes,
           threads, same ? "the same bits" : "DIFFERENT bits");
    return !same;
}
