/* cc -O2 -Iinclude examples/prefill.c -o prefill && ./prefill
 *
 * A prompt through the attention of one layer: 8 query heads on 2 of keys and values, causal. Keys
 * are all alike here, so that a row's result is the mean of the values up to it. */
#include "hl_fusion_attention_bf16_d128.h"
#include <stdio.h>
#include <string.h>

enum { ROWS = 256, HEADS = 8, KV_HEADS = 2, D = 128 };

static uint16_t query[ROWS][HEADS][D], key[ROWS][KV_HEADS][D], value[ROWS][KV_HEADS][D];
static float out[ROWS][HEADS][D];
static unsigned char workspace[HL_FUSION_ATTENTION_BF16_D128_WORKSPACE_BYTES];

int main(void)
{
    const hl_fusion_attention_args args = {
        .query = query, .key = key, .value = value, .attention_out = out, .out_f32 = 1,
        .batch = 1, .seq_q = ROWS, .seq_kv = ROWS, .heads_q = HEADS, .heads_kv = KV_HEADS,
        .scale_value = 0.0883883f, .sparse_mode = 3, .mask_from_mode = 1}; /* causal, no mask */
    hl_error error;
    char text[160];
    int wrong = 0;

    for (int j = 0; j < ROWS; j++)
        for (int n = 0; n < KV_HEADS; n++) {
            const float number = (float)j; /* bfloat16 is the upper half of a float */
            uint32_t bits;
            memcpy(&bits, &number, sizeof bits);
            for (int c = 0; c < D; c++) value[j][n][c] = (uint16_t)(bits >> 16);
        }
    if (hl_fusion_attention_bf16_d128(&args, workspace, sizeof workspace, &error) != HL_OK)
        return puts(hl_error_text(&error, text, sizeof text)), 1;
    for (int i = 0; i < ROWS; i++)
        for (int h = 0; h < HEADS; h++)
            for (int c = 0; c < D; c++) {
                const float off = out[i][h][c] - (float)i / 2;
                wrong += !(off < 1e-3f && off > -1e-3f);
            }
    printf("row 255: %.3f, expected the mean of 0 .. 255: 127.500\n", out[255][7][127]);
    return wrong != 0;
}
