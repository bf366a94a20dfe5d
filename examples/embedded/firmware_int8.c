/* Firmware for a Cortex-M4F: a new token goes into a small paged cache of int8, and its queries
 * attend to all tokens so far. Codes, and results from float64, are known beforehand
 * (vectors_int8.h, written by run.py); stack and instructions are measured as in firmware.c.
 *
 * The scales are a number a channel, in float16 and in flash: a device that has one model knows how
 * far each channel reaches, and then a token costs no more than its codes. */
#define HL_API extern
#define HL_NO_TEXT
#include "hl_incre_flash_attention_f16_i8_d32.h"
#include "measure.h"
#include "vectors_int8.h"
#include <string.h>

enum {
    WORKSPACE = HL_INCRE_FLASH_ATTENTION_F16_I8_D32_WORKSPACE_BYTES(HEADS / KV_HEADS),
    D = HL_INCRE_FLASH_ATTENTION_F16_I8_D32_DK,
    CACHE = BLOCKS * BLOCK_SIZE * KV_HEADS * D
};

static unsigned char workspace[WORKSPACE];
static int8_t key_cache[CACHE], value_cache[CACHE];
static float out[HEADS * D];
static int32_t position;
static hl_status status;

static hl_decode_append_args append_args = {
    .numbers_f32 = 1, .key_cache = key_cache, .value_cache = value_cache,
    .block_table = block_table, .positions = &position, .antiquant_scale = scales, .batch = 1,
    .heads_kv = KV_HEADS, .num_blocks = BLOCKS, .block_size = BLOCK_SIZE, .max_blocks = BLOCKS,
    .layout_kv = HL_LAYOUT_PA_BSND};

static const hl_incre_flash_attention_args args = {
    .query = query, .key = key_cache, .value = value_cache, .block_table = block_table,
    .actual_seq_lengths = &cached, .antiquant_scale = scales, .attention_out = out, .out_f32 = 1,
    .batch = 1, .heads_q = HEADS, .heads_kv = KV_HEADS, .num_blocks = BLOCKS,
    .block_size = BLOCK_SIZE, .max_blocks = BLOCKS, .layout_kv = HL_LAYOUT_PA_BSND,
    .scale_value = SCALE};

/* Rows first .. first + rows - 1 of the new keys and values. */
static void choose(int first, int rows)
{
    position = first;
    append_args.rows = rows;
    append_args.key = key + first * KV_HEADS * D;
    append_args.value = value + first * KV_HEADS * D;
}

static void append(void)
{
    status = hl_incre_flash_attention_f16_i8_d32_append(&append_args, NULL);
}

static void decode(void)
{
    status = hl_incre_flash_attention_f16_i8_d32(&args, workspace, sizeof workspace, NULL);
}

int main(void)
{
    start_instruments(WORKSPACE);
    choose(0, KEYS - 1); /* the prompt */
    append();
    int good = status == HL_OK;

    choose(KEYS - 1, 1);
    append();
    good &= status == HL_OK;
    const int same = memcmp(key_cache, key_codes, CACHE) == 0
        && memcmp(value_cache, value_codes, CACHE) == 0;
    printf("append status %d same_codes %d", (int)status, same);
    print_costs(append);

    decode();
    const float out_error = largest_error(out, code_out, HEADS * D);
    const float int8_error = largest_error(out, exact_out, HEADS * D);
    printf("decode status %d out_error %ld int8_error %ld", (int)status, billionths(out_error),
           billionths(int8_error));
    print_costs(decode);

    /* 2e-2 is a step of the largest values: a mean of them is off by half a step at most, and by
     * less than as much again from what the steps of the keys do to its weights. */
    return !(good && same && status == HL_OK && out_error <= 1e-6f && int8_error <= 2e-2f);
}
