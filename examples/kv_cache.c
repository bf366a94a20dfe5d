/* cc -O2 -Iinclude examples/kv_cache.c -o kv_cache -lm && ./kv_cache
 *
 * Decoding with a quantised cache. Each new token is appended to a paged cache of int8 records of
 * 656 bytes, where plain bfloat16 rows would take 1152, and then attends to all tokens so far. The
 * cache needs no more preparation than that: append quantises the row and finds its page; a page
 * is taken from the pool when a sequence has filled the one before. Now and then the result is
 * held against that of another kernel on the rows as they were: what the int8 codes cost. */
#include "hl_sparse_flash_attention_antiquant_bf16_i8_656_d512_rope64.h"
#include "hl_sparse_flash_attention_bf16_d512_rope64.h"
#include <math.h>
#include <stdio.h>

#define CACHED(name) hl_sparse_flash_attention_antiquant_bf16_i8_656_d512_rope64##name
#define PLAIN(name) hl_sparse_flash_attention_bf16_d512_rope64##name

enum {
    BATCH = 2, STEPS = 300, EVERY = 50, HEADS = 16, DK = 512, D = 576,
    BLOCK = 64, PAGES = (STEPS + BLOCK - 1) / BLOCK,
    RECORD = HL_SPARSE_FLASH_ATTENTION_ANTIQUANT_BF16_I8_656_D512_ROPE64_RECORD
};

static uint16_t row[BATCH][D], query[BATCH][HEADS][D]; /* bfloat16 */
static uint16_t plain_rows[BATCH][STEPS][D];
static float cached[BATCH][HEADS][DK], exact[BATCH][HEADS][DK];
static float pool[BATCH * PAGES][BLOCK * RECORD / 4]; /* float: aligned to the scales */
static int32_t block_table[BATCH][PAGES], position[BATCH], length[BATCH];
static unsigned char workspace
    [HL_SPARSE_FLASH_ATTENTION_ANTIQUANT_BF16_I8_656_D512_ROPE64_WORKSPACE_BYTES(HEADS)];
static unsigned char plain_workspace
    [HL_SPARSE_FLASH_ATTENTION_BF16_D512_ROPE64_WORKSPACE_BYTES(HEADS)];
static const float scale = 0.05f;

static float random_number(void) /* of about a normal distribution */
{
    static uint32_t state = 1;
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        state = state * 1664525u + 1013904223u;
        sum += (float)(state >> 8) / 8388608.0f - 1.0f;
    }
    return sum;
}

static uint16_t bfloat16(float x)
{
    union { float number; uint32_t bits; } u = {x};
    return (uint16_t)((u.bits + 0x8000u) >> 16);
}

static int failed(hl_status status, const hl_error *error)
{
    char text[160];
    if (status != HL_OK) puts(hl_error_text(error, text, sizeof text));
    return status != HL_OK;
}

/* The new row of each batch becomes token `position` of it. */
static int append(void)
{
    static int32_t taken; /* pages of the pool */
    hl_error error;
    for (int32_t b = 0; b < BATCH; b++)
        if (position[b] % BLOCK == 0) block_table[b][position[b] / BLOCK] = taken++;
    const hl_kv_append_args args = {
        .nope = row, .key = pool, .block_table = block_table[0], .positions = position,
        .batch = BATCH, .rows = 1, .num_blocks = BATCH * PAGES, .block_size = BLOCK,
        .max_blocks = PAGES, .layout_kv = HL_LAYOUT_PA_BSND};
    return !failed(CACHED(_append)(&args, &error), &error);
}

static int attend(void)
{
    hl_error error;
    const hl_sparse_flash_attention_antiquant_args args = {
        .query = query, .key = pool, .block_table = block_table[0],
        .actual_seq_lengths_kv = length, .attention_out = cached, .out_f32 = 1,
        .batch = BATCH, .seq_q = 1, .heads_q = HEADS, .num_blocks = BATCH * PAGES,
        .block_size = BLOCK, .max_blocks = PAGES, .layout_kv = HL_LAYOUT_PA_BSND,
        .scale_value = scale};
    return !failed(CACHED()(&args, workspace, sizeof workspace, &error), &error);
}

static int attend_plain(void)
{
    hl_error error;
    const hl_sparse_flash_attention_args args = {
        .query = query, .key = plain_rows, .actual_seq_lengths_kv = length,
        .attention_out = exact, .out_f32 = 1, .batch = BATCH, .seq_q = 1, .seq_kv = STEPS,
        .heads_q = HEADS, .scale_value = scale};
    return !failed(PLAIN()(&args, plain_workspace, sizeof plain_workspace, &error), &error);
}

/* |cached - exact| / |exact|, over all heads. */
static double relative_error(void)
{
    double difference = 0, size = 0;
    for (int b = 0; b < BATCH; b++)
        for (int h = 0; h < HEADS; h++)
            for (int c = 0; c < DK; c++) {
                const double x = exact[b][h][c], d = cached[b][h][c] - x;
                difference += d * d;
                size += x * x;
            }
    return sqrt(difference / size);
}

int main(void)
{
    double worst = 0;
    for (int32_t step = 0; step < STEPS; step++) {
        for (int32_t b = 0; b < BATCH; b++) {
            for (int c = 0; c < D; c++)
                plain_rows[b][step][c] = row[b][c] = bfloat16(random_number());
            for (int h = 0; h < HEADS; h++)
                for (int c = 0; c < D; c++) query[b][h][c] = bfloat16(random_number());
            position[b] = step;
            length[b] = step + 1;
        }
        if (!append() || !attend()) return 1;
        if ((step + 1) % EVERY == 0) {
            if (!attend_plain()) return 1;
            const double error = relative_error();
            printf("%3d tokens: relative error %.2f %%\n", (int)step + 1, 100 * error);
            worst = error > worst ? error : worst;
        }
    }
    printf("%d bytes a token instead of %d\n", (int)RECORD, (int)sizeof row[0]);
    return !(worst > 0 && worst < 0.02);
}
