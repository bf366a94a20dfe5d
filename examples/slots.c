/* cc -O2 -Iinclude examples/slots.c -o slots -lm && ./slots
 *
 * Physical slots, the convention of FlashMLA. With index_kind = HL_INDEX_SLOTS an id is a row of
 * the paged cache itself, page * page size + offset, and no block_table is read. -1 is a hole, at
 * any place of the list; sparse_lengths says how many entries of a list count; a sink is one more
 * score a head that takes weight and has no value. softmax_lse does not include the sink. */
#include "hl_sparse_flash_attention_bf16_d512_rope64_slots.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BATCH = 3, HEADS = 16, BLOCKS = 20, PAGE = 64, LIST = 128, DK = 512, ROPE = 64 };

static uint16_t query[BATCH][HEADS][DK], query_rope[BATCH][HEADS][ROPE], out[BATCH][HEADS][DK];
static uint16_t key[BLOCKS * PAGE][DK], key_rope[BLOCKS * PAGE][ROPE];
static int32_t slots[BATCH][LIST];
static const int32_t list_lengths[BATCH] = {128, 37, 0}; /* the last row sees no key at all */
static float sinks[HEADS], lse[BATCH][HEADS];

static uint32_t random_bits(void)
{
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static void fill(uint16_t *x, int n) /* bf16 between -1 and 1: the upper half of a float */
{
    while (n-- > 0) {
        const float f = (float)random_bits() / 8388608.0f - 1.0f;
        uint32_t u;
        memcpy(&u, &f, sizeof u);
        *x++ = (uint16_t)(u >> 16);
    }
}

static double from_bf16(uint16_t x)
{
    const uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return (double)f;
}

/* The formula in float64, for row b and head h: o and the logarithm of the sum. */
static double attend(double *o, int b, int h, double scale)
{
    double score[LIST], max = sinks[h], sum = 0;
    for (int n = 0; n < list_lengths[b]; n++) {
        const int32_t slot = slots[b][n];
        score[n] = slot < 0 ? -INFINITY : 0;
        for (int c = 0; c < DK && slot >= 0; c++)
            score[n] += scale * from_bf16(query[b][h][c]) * from_bf16(key[slot][c]);
        for (int c = 0; c < ROPE && slot >= 0; c++)
            score[n] += scale * from_bf16(query_rope[b][h][c]) * from_bf16(key_rope[slot][c]);
        max = fmax(max, score[n]);
    }
    memset(o, 0, DK * sizeof *o);
    for (int n = 0; n < list_lengths[b]; n++) {
        const double p = exp(score[n] - max);
        sum += p;
        for (int c = 0; c < DK && p > 0; c++) o[c] += p * from_bf16(key[slots[b][n]][c]);
    }
    for (int c = 0; c < DK; c++) o[c] /= sum + exp(sinks[h] - max);
    return max + log(sum);
}

int main(void)
{
    const hl_sparse_flash_attention_args args = {
        .query = query, .query_rope = query_rope, .key = key, .key_rope = key_rope,
        .sparse_indices = slots[0], .sparse_lengths = list_lengths, .sinks = sinks,
        .attention_out = out, .softmax_lse = lse[0], .batch = BATCH, .seq_q = 1,
        .heads_q = HEADS, .num_blocks = BLOCKS, .block_size = PAGE, .list_length = LIST,
        .layout_kv = HL_LAYOUT_PA_BSND, .index_kind = HL_INDEX_SLOTS, .scale_value = 0.1f};
    hl_error error;
    char text[160];
    int holes = 0;

    fill(&query[0][0][0], BATCH * HEADS * DK), fill(&query_rope[0][0][0], BATCH * HEADS * ROPE);
    fill(&key[0][0], BLOCKS * PAGE * DK), fill(&key_rope[0][0], BLOCKS * PAGE * ROPE);
    for (int h = 0; h < HEADS; h++) sinks[h] = (float)h / 4;
    for (int n = 0; n < BATCH * LIST; n++) {
        const int hole = random_bits() % 5 == 0;
        slots[n / LIST][n % LIST] = hole ? -1 : (int32_t)(random_bits() % (BLOCKS * PAGE));
        holes += hole;
    }

    const size_t bytes = hl_sparse_flash_attention_bf16_d512_rope64_slots_workspace_bytes(&args);
    void *workspace = malloc(bytes);
    if (workspace == NULL || hl_sparse_flash_attention_bf16_d512_rope64_slots(
                                 &args, workspace, bytes, &error) != HL_OK)
        return puts(hl_error_text(&error, text, sizeof text)), 1;
    free(workspace);

    double difference = 0, norm = 0, lse_error = 0, o[DK];
    int empty_is_zero = 1;
    for (int b = 0; b < BATCH; b++)
        for (int h = 0; h < HEADS; h++) {
            const double expected = attend(o, b, h, args.scale_value);
            for (int c = 0; c < DK; c++) {
                difference += pow(from_bf16(out[b][h][c]) - o[c], 2);
                norm += o[c] * o[c];
                empty_is_zero &= list_lengths[b] > 0 || out[b][h][c] == 0;
            }
            if (list_lengths[b] > 0) lse_error = fmax(lse_error, fabs(lse[b][h] - expected));
            else empty_is_zero &= lse[b][h] == -INFINITY;
        }
    const double relative = sqrt(difference / norm);
    printf("%d rows of up to %d slots, %d holes, lists of 128, 37 and 0\n", BATCH, LIST, holes);
    printf("output: error %.1e of its norm (rounding to bf16: 1.6e-03); lse: %.1e\n", relative,
           lse_error);
    printf("row without keys: output 0 and lse -inf: %s\n", empty_is_zero ? "yes" : "NO");
    return !(relative < 2.5e-3) || !(lse_error < 1e-5) || !empty_is_zero;
}
