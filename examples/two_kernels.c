/* cc -O2 -Iinclude examples/two_kernels.c -o two_kernels -lm && ./two_kernels
 *
 * Two kernels in one file, as an engine for DeepSeek's models needs them: the prompt is read with
 * ordinary heads of 128+64 channels and values of their own, and every later token with the latent
 * cache of 512+64 channels that all heads share. Both headers bring the same argument struct; what
 * they have in common is compiled once. */
#include "hl_sparse_flash_attention_bf16_d128_rope64.h"
#include "hl_sparse_flash_attention_bf16_d512_rope64.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 4, PROMPT = 200, ROPE = 64 };

static uint16_t to_bf16(float x) /* to the nearest, ties to even */
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static double from_bf16(uint16_t x)
{
    const uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return (double)f;
}

static void fill(uint16_t *x, int n)
{
    static uint32_t state = 1;
    while (n-- > 0) {
        state = state * 1664525u + 1013904223u;
        *x++ = to_bf16((float)(state >> 8) / 8388608.0f - 1.0f);
    }
}

/* One row and head in float64: the norms of the difference and of the result are added up.
 * k and v are the rows of one kv head, `row` elements apart. */
static void check_row(double norms[2], const uint16_t *out, const uint16_t *q, const uint16_t *qr,
                      const uint16_t *k, int row, const uint16_t *kr, int rope_row,
                      const uint16_t *v, int keys, int dk, int dv, double scale)
{
    double p[PROMPT], max = -INFINITY, sum = 0;
    for (int j = 0; j < keys; j++) {
        p[j] = 0;
        for (int c = 0; c < dk; c++) p[j] += from_bf16(q[c]) * from_bf16(k[j * row + c]);
        for (int c = 0; c < ROPE; c++) p[j] += from_bf16(qr[c]) * from_bf16(kr[j * rope_row + c]);
        max = fmax(max, p[j] *= scale);
    }
    for (int j = 0; j < keys; j++) sum += p[j] = exp(p[j] - max);
    for (int c = 0; c < dv; c++) {
        double o = 0;
        for (int j = 0; j < keys; j++) o += p[j] / sum * from_bf16(v[j * row + c]);
        norms[0] += pow(from_bf16(out[c]) - o, 2);
        norms[1] += pow(o, 2);
    }
}

/* bf16 holds 8 bits: rounding the exact result alone costs about 1.6e-3 of its norm. */
static int report(const char *what, const double norms[2])
{
    const double error = sqrt(norms[0] / norms[1]);
    printf("%s: error %.1e of the result's norm\n", what, error);
    return !(error < 2.5e-3);
}

static uint16_t q1[PROMPT][HEADS][128], qr1[PROMPT][HEADS][ROPE], o1[PROMPT][HEADS][128];
static uint16_t k1[PROMPT][HEADS][128], kr1[PROMPT][HEADS][ROPE], v1[PROMPT][HEADS][128];
static uint16_t q2[HEADS][512], qr2[HEADS][ROPE], o2[HEADS][512], k2[PROMPT][512];
static uint16_t kr2[PROMPT][ROPE];

int main(void)
{
    const hl_sparse_flash_attention_args prompt = {
        .query = q1, .query_rope = qr1, .key = k1, .key_rope = kr1, .value = v1,
        .attention_out = o1, .batch = 1, .seq_q = PROMPT, .seq_kv = PROMPT, .heads_q = HEADS,
        .heads_kv = HEADS, .sparse_mode = 3, /* causal */ .scale_value = 0.25f};
    const hl_sparse_flash_attention_args token = {
        .query = q2, .query_rope = qr2, .key = k2, .key_rope = kr2, .attention_out = o2,
        .batch = 1, .seq_q = 1, .seq_kv = PROMPT, .heads_q = HEADS, .scale_value = 0.125f};
    hl_error error;
    char text[160];
    double norms[2][2] = {{0}};

    fill(&q1[0][0][0], PROMPT * HEADS * 128), fill(&qr1[0][0][0], PROMPT * HEADS * ROPE);
    fill(&k1[0][0][0], PROMPT * HEADS * 128), fill(&kr1[0][0][0], PROMPT * HEADS * ROPE);
    fill(&v1[0][0][0], PROMPT * HEADS * 128);
    fill(&q2[0][0], HEADS * 512), fill(&qr2[0][0], HEADS * ROPE);
    fill(&k2[0][0], PROMPT * 512), fill(&kr2[0][0], PROMPT * ROPE);

    const size_t bytes1 = hl_sparse_flash_attention_bf16_d128_rope64_workspace_bytes(&prompt);
    const size_t bytes2 = hl_sparse_flash_attention_bf16_d512_rope64_workspace_bytes(&token);
    const size_t bytes = bytes1 > bytes2 ? bytes1 : bytes2; /* one workspace serves both */
    void *workspace = malloc(bytes);
    if (workspace == NULL ||
        hl_sparse_flash_attention_bf16_d128_rope64(&prompt, workspace, bytes, &error) != HL_OK ||
        hl_sparse_flash_attention_bf16_d512_rope64(&token, workspace, bytes, &error) != HL_OK)
        return puts(hl_error_text(&error, text, sizeof text)), 1;
    free(workspace);

    for (int h = 0; h < HEADS; h++) {
        for (int i = 0; i < PROMPT; i++)
            check_row(norms[0], o1[i][h], q1[i][h], qr1[i][h], k1[0][h], HEADS * 128, kr1[0][h],
                      HEADS * ROPE, v1[0][h], i + 1, 128, 128, prompt.scale_value);
        check_row(norms[1], o2[h], q2[h], qr2[h], k2[0], 512, kr2[0], ROPE, k2[0], PROMPT, 512,
                  512, token.scale_value);
    }
    return report("prompt, 128+64 channels, causal", norms[0]) |
           report("token,  512+64 channels       ", norms[1]);
}
