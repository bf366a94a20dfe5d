/* cc -O2 -Iinclude examples/static_memory.c -o static_memory -lm && ./static_memory
 *
 * No heap. How much memory a call needs is a constant expression, so everything can be a static
 * array and the linker's map already says whether it fits. Here: a ring of the last WINDOW tokens,
 * to which every step adds one before it attends to all of them. */
#include "hl_sparse_flash_attention_f32_d64.h"
#include <math.h>
#include <stdio.h>

enum {
    HEADS = 8,
    KV_HEADS = 2, /* 4 query heads share one key head */
    GROUP = HEADS / KV_HEADS,
    WINDOW = 48,
    STEPS = 100,
    D = HL_SPARSE_FLASH_ATTENTION_F32_D64_DK,
    WORKSPACE = HL_SPARSE_FLASH_ATTENTION_F32_D64_WORKSPACE_BYTES(GROUP)
};

/* Fails to compile if the workspace outgrows what this device has for it. */
typedef char workspace_fits[WORKSPACE <= 128 * 1024 ? 1 : -1];

static unsigned char workspace[WORKSPACE];
static float query[HEADS][D], key[WINDOW][KV_HEADS][D], value[WINDOW][KV_HEADS][D], out[HEADS][D];

static void fill(float *x, int n)
{
    static uint32_t state = 1;
    while (n-- > 0) {
        state = state * 1664525u + 1013904223u;
        *x++ = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
}

/* The formula, in float64: the largest difference of one head. */
static double error_of_head(int head, int keys, double scale)
{
    const int kv = head / GROUP;
    double p[WINDOW], max = -INFINITY, sum = 0, worst = 0;
    for (int j = 0; j < keys; j++) {
        p[j] = 0;
        for (int c = 0; c < D; c++) p[j] += scale * query[head][c] * key[j][kv][c];
        max = fmax(max, p[j]);
    }
    for (int j = 0; j < keys; j++) sum += p[j] = exp(p[j] - max);
    for (int c = 0; c < D; c++) {
        double o = 0;
        for (int j = 0; j < keys; j++) o += p[j] / sum * value[j][kv][c];
        worst = fmax(worst, fabs(o - out[head][c]));
    }
    return worst;
}

int main(void)
{
    hl_sparse_flash_attention_args args = {
        .query = query, .key = key, .value = value, .attention_out = out,
        .batch = 1, .seq_q = 1, .seq_kv = WINDOW, .heads_q = HEADS, .heads_kv = KV_HEADS,
        .scale_value = 0.5f};
    hl_error error;
    char text[160];
    double worst = 0;

    for (int step = 0; step < STEPS; step++) {
        const int32_t cached = step + 1 < WINDOW ? step + 1 : WINDOW;
        fill(&query[0][0], HEADS * D);
        fill(&key[step % WINDOW][0][0], KV_HEADS * D);
        fill(&value[step % WINDOW][0][0], KV_HEADS * D);
        args.actual_seq_lengths_kv = &cached;
        if (hl_sparse_flash_attention_f32_d64(&args, workspace, sizeof workspace, &error) != HL_OK)
            return puts(hl_error_text(&error, text, sizeof text)), 1;
        for (int head = 0; head < HEADS; head++)
            worst = fmax(worst, error_of_head(head, cached, args.scale_value));
    }
    printf("%d steps, %d bytes of workspace, no heap\n", STEPS, WORKSPACE);
    printf("largest difference from float64: %.1e (float32 resolves 1.2e-07 of 1)\n", worst);

    /* One byte short is refused, and the sentence says by how much. */
    const hl_status status =
        hl_sparse_flash_attention_f32_d64(&args, workspace, sizeof workspace - 1, &error);
    printf("one byte short: %s\n", hl_error_text(&error, text, sizeof text));
    return !(worst < 2e-6) || status != HL_ERR_WORKSPACE;
}
