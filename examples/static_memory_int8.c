/* cc -O2 -Iinclude examples/static_memory_int8.c -o static_memory_int8 -lm && ./static_memory_int8
 *
 * static_memory.c with an int8 cache, for memory that is counted in kilobytes: no heap, plain C99,
 * and a quarter of the bytes a token. A ring of the last WINDOW tokens, to which every step appends
 * one before it attends to all of them; the scales of the codes are constants that go into flash.
 * The same header runs as firmware in examples/embedded/. */
#include "hl_incre_flash_attention_f16_i8_d32.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

#define CACHED(name) hl_incre_flash_attention_f16_i8_d32##name

enum {
    HEADS = 8,
    KV_HEADS = 2, /* 4 query heads share one key head */
    GROUP = HEADS / KV_HEADS,
    WINDOW = 48,
    STEPS = 100,
    D = HL_INCRE_FLASH_ATTENTION_F16_I8_D32_DK,
    WORKSPACE = HL_INCRE_FLASH_ATTENTION_F16_I8_D32_WORKSPACE_BYTES(GROUP)
};

static int8_t key_cache[WINDOW][KV_HEADS][D], value_cache[WINDOW][KV_HEADS][D];
static unsigned char workspace[WORKSPACE];

/* Fails to compile if the cache and the workspace outgrow what this device has for them. */
typedef char memory_fits[sizeof key_cache + sizeof value_cache + WORKSPACE <= 12 * 1024 ? 1 : -1];

/* A number a channel (HL_ANTIQUANT_CHANNEL), of keys, then of values: as far as the channel reaches
 * in the data that the model was calibrated with, over 127. Here channel c reaches 1 or 1/4. */
#define REACH(c) ((c) % 4 == 0 ? 1.0f : 0.25f)
#define FOUR 1.0f / 127, 0.25f / 127, 0.25f / 127, 0.25f / 127
#define HEAD FOUR, FOUR, FOUR, FOUR, FOUR, FOUR, FOUR, FOUR
static const float scales[2][KV_HEADS][D] = {{{HEAD}, {HEAD}}, {{HEAD}, {HEAD}}};

static float new_key[KV_HEADS][D], new_value[KV_HEADS][D]; /* what the projections give */
static uint16_t query[HEADS][D];                           /* float16 */
static float out[HEADS][D];

/* For comparison only: a device has none of these. */
static float key[WINDOW][KV_HEADS][D], value[WINDOW][KV_HEADS][D], exact_query[HEADS][D];

static void fill(float *x, int heads)
{
    static uint32_t state = 1;
    for (int i = 0; i < heads * D; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = REACH(i % D) * ((float)(state >> 8) / 8388608.0f - 1.0f);
    }
}

/* To float16, nearest even; for normal numbers, and the sign of what is smaller. */
static uint16_t float16(float x)
{
    int e;
    const float m = frexpf(fabsf(x), &e); /* x = m * 2^e, m from 1/2 to 1 */
    const int bits = e < -13 ? 0 : (e + 13) * 1024 + (int)lrintf(m * 2048);
    return (uint16_t)(bits | (signbit(x) ? 0x8000 : 0));
}

static double float16_number(uint16_t bits)
{
    const int e = bits >> 10 & 31;
    const double x = e == 0 ? 0 : ldexp(1024 + (bits & 1023), e - 25);
    return bits & 0x8000 ? -x : x;
}

/* The formula, in float64: the largest difference of one head. From the codes of the cache, or from
 * the numbers that they stand for. */
static double error_of_head(int head, int keys, double scale, int codes)
{
    const int kv = head / GROUP;
    double p[WINDOW], max = -INFINITY, sum = 0, worst = 0;
    for (int j = 0; j < keys; j++) {
        p[j] = 0;
        for (int c = 0; c < D; c++)
            p[j] += scale * (codes ? float16_number(query[head][c]) : exact_query[head][c])
                * (codes ? key_cache[j][kv][c] * (double)scales[0][kv][c] : key[j][kv][c]);
        max = fmax(max, p[j]);
    }
    for (int j = 0; j < keys; j++) sum += p[j] = exp(p[j] - max);
    for (int c = 0; c < D; c++) {
        double o = 0;
        for (int j = 0; j < keys; j++)
            o += p[j] / sum
                * (codes ? value_cache[j][kv][c] * (double)scales[1][kv][c] : value[j][kv][c]);
        worst = fmax(worst, fabs(o - out[head][c]));
    }
    return worst;
}

int main(void)
{
    int32_t position, cached;
    const hl_decode_append_args append = {
        .key = new_key, .value = new_value, .numbers_f32 = 1, .key_cache = key_cache,
        .value_cache = value_cache, .positions = &position, .antiquant_scale = scales,
        .antiquant_f32 = 1, .batch = 1, .rows = 1, .heads_kv = KV_HEADS, .seq_kv = WINDOW};
    const hl_incre_flash_attention_args args = {
        .query = query, .key = key_cache, .value = value_cache, .actual_seq_lengths = &cached,
        .antiquant_scale = scales, .antiquant_f32 = 1, .attention_out = out, .out_f32 = 1,
        .batch = 1, .seq_kv = WINDOW, .heads_q = HEADS, .heads_kv = KV_HEADS, .scale_value = 0.5f};
    hl_error error;
    char text[160];
    double arithmetic = 0, codes = 0;

    for (int step = 0; step < STEPS; step++) {
        position = step % WINDOW;
        cached = step + 1 < WINDOW ? step + 1 : WINDOW;
        fill(exact_query[0], HEADS);
        fill(new_key[0], KV_HEADS);
        fill(new_value[0], KV_HEADS);
        for (int h = 0; h < HEADS; h++)
            for (int c = 0; c < D; c++) query[h][c] = float16(exact_query[h][c]);
        memcpy(key[position], new_key, sizeof new_key);
        memcpy(value[position], new_value, sizeof new_value);
        if (CACHED(_append)(&append, &error) != HL_OK
            || CACHED()(&args, workspace, sizeof workspace, &error) != HL_OK)
            return puts(hl_error_text(&error, text, sizeof text)), 1;
        for (int head = 0; head < HEADS; head++) {
            arithmetic = fmax(arithmetic, error_of_head(head, cached, args.scale_value, 1));
            codes = fmax(codes, error_of_head(head, cached, args.scale_value, 0));
        }
    }
    printf("%d steps, %d bytes of workspace, no heap\n", STEPS, WORKSPACE);
    printf("%d bytes of cache instead of %d in float32, %d of constants\n",
           (int)(sizeof key_cache + sizeof value_cache), (int)(sizeof key + sizeof value),
           (int)sizeof scales);
    printf("largest difference from float64 on the cache's own numbers: %.1e\n", arithmetic);
    printf("and on those that came in: %.1e (a step of int8 is %.1e of 1)\n", codes, 1.0 / 127);

    /* One byte short is refused, and the sentence says by how much. */
    const hl_status status = CACHED()(&args, workspace, sizeof workspace - 1, &error);
    printf("one byte short: %s\n", hl_error_text(&error, text, sizeof text));

    /* A weighted mean of values is off by half a step of theirs at most, and by what half a step of
     * the keys moves the weights: well under a step together, on these scores. */
    return !(arithmetic < 2e-6) || !(codes > 0 && codes < 1.0 / 127)
        || status != HL_ERR_WORKSPACE;
}
