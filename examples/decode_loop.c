/* cc -O2 -Iinclude examples/decode_loop.c -o decode_loop -lm && ./decode_loop
 *
 * A whole decode loop: a small language model with random weights (2 layers, 8 query heads on 2 key
 * heads of 128 channels, rotary positions) reads a prompt, up to 16 tokens a step, and then writes
 * 256 tokens, one a step, each the likeliest. Its keys and values live in a paged int8 cache.
 * Beside it runs the same model with attention in float on an unquantised cache, as plain as the
 * formula, fed the same tokens: what int8 costs is what the two differ by.
 *
 * The cache has a scale a token (HL_ANTIQUANT_TOKEN): append finds it as the row comes in. A scale
 * a channel (HL_ANTIQUANT_CHANNEL) would need to know how large each channel will be before the
 * first token is there; examples/embedded/ does that. */
#include "hl_incre_flash_attention_bf16_i8_d128.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

#define CACHED(name) hl_incre_flash_attention_bf16_i8_d128##name

enum {
    LAYERS = 2, MODEL = 256, HIDDEN = 512, WORDS = 200,
    HEADS = 8, KV_HEADS = 2, GROUP = HEADS / KV_HEADS, D = 128,
    ROWS = 16, /* the most that one call takes */
    PROMPT = 40, NEW = 256, TOKENS = PROMPT + NEW, EVERY = 32,
    BLOCK = 16, BLOCKS = 24, /* tokens of a page, pages of the pool */
    MAX_BLOCKS = (TOKENS + BLOCK - 1) / BLOCK /* pages of the longest sequence */
};

static struct {
    float embedding[WORDS][MODEL];
    struct {
        float query[MODEL][HEADS * D], key[MODEL][KV_HEADS * D], value[MODEL][KV_HEADS * D];
        float out[HEADS * D][MODEL], up[MODEL][HIDDEN], down[HIDDEN][MODEL];
    } layer[LAYERS];
    float words[MODEL][WORDS];
} weight;

/* What a run of either model shows of itself: attention of every row, logits of the last one. */
typedef struct {
    float attention[LAYERS][ROWS][HEADS * D], logits[WORDS];
} trace;

/* Attention of one layer: stores keys and values of new tokens, the first of which is number
 * `position`, and answers their queries. 0 if that failed. */
typedef int attend(int layer, int32_t position, int32_t rows, float query[][HEADS * D],
                   float key[][KV_HEADS * D], float value[][KV_HEADS * D], float out[][HEADS * D]);

static const float scale = 0.08838835f; /* 1 / sqrt(D) */

/* ---- attention from a paged int8 cache ------------------------------------------------------- */

static int8_t key_pool[LAYERS][BLOCKS][BLOCK][KV_HEADS][D];
static int8_t value_pool[LAYERS][BLOCKS][BLOCK][KV_HEADS][D];
static float token_scales[LAYERS][2][MAX_BLOCKS * BLOCK]; /* of keys, then of values */
static int32_t block_table[MAX_BLOCKS], blocks_taken;     /* all layers use the same pages */
static unsigned char
    workspace[HL_INCRE_FLASH_ATTENTION_BF16_I8_D128_WORKSPACE_BYTES(GROUP * ROWS)];

/* Sees to it that there are pages for so many tokens. A pool that has served for a while hands them
 * out in no order: here one in 7, which meets each once, as 7 and BLOCKS have no common factor. */
static void take_pages(int32_t tokens)
{
    for (; blocks_taken * BLOCK < tokens; blocks_taken++)
        block_table[blocks_taken] = (blocks_taken * 7 + 3) % BLOCKS;
}

static uint16_t bfloat16(float x)
{
    union { float number; uint32_t bits; } u = {x};
    return (uint16_t)((u.bits + 0x7fffu + (u.bits >> 16 & 1)) >> 16);
}

static int said(hl_status status, const hl_error *error)
{
    char text[160];
    if (status != HL_OK) puts(hl_error_text(error, text, sizeof text));
    return status == HL_OK;
}

static int attend_int8(int layer, int32_t position, int32_t rows, float query[][HEADS * D],
                       float key[][KV_HEADS * D], float value[][KV_HEADS * D],
                       float out[][HEADS * D])
{
    static uint16_t q[ROWS][HEADS * D];
    const int32_t length = position + rows;
    hl_error error;
    take_pages(length);
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < HEADS * D; c++) q[i][c] = bfloat16(query[i][c]);

    const hl_decode_append_args append = {
        .key = key, .value = value, .numbers_f32 = 1, .key_cache = key_pool[layer],
        .value_cache = value_pool[layer], .block_table = block_table, .positions = &position,
        .token_scales = token_scales[layer][0], .antiquant_mode = HL_ANTIQUANT_TOKEN,
        .batch = 1, .rows = rows, .heads_kv = KV_HEADS, .num_blocks = BLOCKS,
        .block_size = BLOCK, .max_blocks = MAX_BLOCKS, .layout_kv = HL_LAYOUT_PA_BSND};
    if (!said(CACHED(_append)(&append, &error), &error)) return 0;

    /* The new tokens are already in: row i of them sees those up to itself. */
    const hl_incre_flash_attention_args args = {
        .query = q, .key = key_pool[layer], .value = value_pool[layer],
        .block_table = block_table, .actual_seq_lengths = &length,
        .antiquant_scale = token_scales[layer][0], .antiquant_mode = HL_ANTIQUANT_TOKEN,
        .attention_out = out, .out_f32 = 1, .batch = 1, .seq_q = rows, .heads_q = HEADS,
        .heads_kv = KV_HEADS, .num_blocks = BLOCKS, .block_size = BLOCK,
        .max_blocks = MAX_BLOCKS, .layout_kv = HL_LAYOUT_PA_BSND, .scale_value = scale};
    return said(CACHED()(&args, workspace, sizeof workspace, &error), &error);
}

/* ---- attention in float ---------------------------------------------------------------------- */

static float all_keys[LAYERS][TOKENS][KV_HEADS * D], all_values[LAYERS][TOKENS][KV_HEADS * D];

static int attend_float(int layer, int32_t position, int32_t rows, float query[][HEADS * D],
                        float key[][KV_HEADS * D], float value[][KV_HEADS * D],
                        float out[][HEADS * D])
{
    memcpy(all_keys[layer][position], key, (size_t)rows * sizeof *key);
    memcpy(all_values[layer][position], value, (size_t)rows * sizeof *value);
    for (int i = 0; i < rows; i++)
        for (int h = 0; h < HEADS; h++) {
            const float *q = &query[i][h * D];
            const int kv = h / GROUP * D, keys = position + i + 1;
            float p[TOKENS], max = -INFINITY, sum = 0, *o = &out[i][h * D];
            for (int j = 0; j < keys; j++) {
                p[j] = 0;
                for (int c = 0; c < D; c++) p[j] += scale * q[c] * all_keys[layer][j][kv + c];
                max = fmaxf(max, p[j]);
            }
            for (int j = 0; j < keys; j++) sum += p[j] = expf(p[j] - max);
            for (int c = 0; c < D; c++) o[c] = 0;
            for (int j = 0; j < keys; j++)
                for (int c = 0; c < D; c++) o[c] += p[j] / sum * all_values[layer][j][kv + c];
        }
    return 1;
}

/* ---- the model ------------------------------------------------------------------------------- */

static float random_number(void) /* of about a normal distribution, of size 1 */
{
    static uint32_t state = 1;
    float sum = 0;
    for (int i = 0; i < 3; i++) {
        state = state * 1664525u + 1013904223u;
        sum += (float)(state >> 8) / 8388608.0f - 1.0f;
    }
    return sum;
}

static void fill(float *matrix, int n, float size)
{
    while (n-- > 0) *matrix++ = size * random_number();
}

/* Weights that keep numbers of size 1 at size 1; queries of size 2, so that heads have opinions:
 * scores spread by 2, and the likeliest keys weigh about a hundred times the average. */
static void make_weights(void)
{
    fill(weight.embedding[0], WORDS * MODEL, 1);
    for (int l = 0; l < LAYERS; l++) {
        fill(weight.layer[l].query[0], MODEL * HEADS * D, 2 / sqrtf(MODEL));
        fill(weight.layer[l].key[0], MODEL * KV_HEADS * D, 1 / sqrtf(MODEL));
        fill(weight.layer[l].value[0], MODEL * KV_HEADS * D, 1 / sqrtf(MODEL));
        fill(weight.layer[l].out[0], HEADS * D * MODEL, 1 / sqrtf(HEADS * D));
        fill(weight.layer[l].up[0], MODEL * HIDDEN, 1 / sqrtf(MODEL));
        fill(weight.layer[l].down[0], HIDDEN * MODEL, 1 / sqrtf(HIDDEN));
    }
    fill(weight.words[0], MODEL * WORDS, 1 / sqrtf(MODEL));
}

/* y = x W, or y += x W. */
static void multiply(const float *x, int n, const float *matrix, float *y, int m, int add)
{
    if (!add) memset(y, 0, (size_t)m * sizeof *y);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < m; j++) y[j] += x[i] * matrix[i * m + j];
}

static void normalise(const float *x, float *y) /* RMSNorm */
{
    float sum = 0;
    for (int c = 0; c < MODEL; c++) sum += x[c] * x[c];
    for (int c = 0; c < MODEL; c++) y[c] = x[c] / sqrtf(sum / MODEL + 1e-6f);
}

/* Turns channels c and c + D/2 of each head by an angle that grows with the position. */
static void rotate(float *x, int heads, int position)
{
    for (int c = 0; c < D / 2; c++) {
        const float angle = (float)position * powf(10000, -2.0f * (float)c / D);
        const float cosine = cosf(angle), sine = sinf(angle);
        for (int h = 0; h < heads; h++) {
            float *a = x + h * D + c, *b = a + D / 2, old = *a;
            *a = old * cosine - *b * sine;
            *b = old * sine + *b * cosine;
        }
    }
}

/* One step: tokens number position .. position + rows - 1 go in, logits of the next come out. */
static int step(attend *attention, const int *tokens, int32_t position, int32_t rows, trace *out)
{
    static float x[ROWS][MODEL], q[ROWS][HEADS * D], k[ROWS][KV_HEADS * D], v[ROWS][KV_HEADS * D];
    float y[MODEL], hidden[HIDDEN];

    for (int i = 0; i < rows; i++) memcpy(x[i], weight.embedding[tokens[i]], sizeof x[i]);
    for (int l = 0; l < LAYERS; l++) {
        for (int i = 0; i < rows; i++) {
            normalise(x[i], y);
            multiply(y, MODEL, weight.layer[l].query[0], q[i], HEADS * D, 0);
            multiply(y, MODEL, weight.layer[l].key[0], k[i], KV_HEADS * D, 0);
            multiply(y, MODEL, weight.layer[l].value[0], v[i], KV_HEADS * D, 0);
            rotate(q[i], HEADS, position + i);
            rotate(k[i], KV_HEADS, position + i);
        }
        if (!attention(l, position, rows, q, k, v, out->attention[l])) return 0;
        for (int i = 0; i < rows; i++) {
            multiply(out->attention[l][i], HEADS * D, weight.layer[l].out[0], x[i], MODEL, 1);
            normalise(x[i], y);
            multiply(y, MODEL, weight.layer[l].up[0], hidden, HIDDEN, 0);
            for (int c = 0; c < HIDDEN; c++) hidden[c] /= 1 + expf(-hidden[c]); /* SiLU */
            multiply(hidden, HIDDEN, weight.layer[l].down[0], x[i], MODEL, 1);
        }
    }
    normalise(x[rows - 1], y);
    multiply(y, MODEL, weight.words[0], out->logits, WORDS, 0);
    return 1;
}

static int likeliest(const float *logits)
{
    int best = 0;
    for (int w = 1; w < WORDS; w++) best = logits[w] > logits[best] ? w : best;
    return best;
}

/* ---- the loop -------------------------------------------------------------------------------- */

/* What int8 explains. The largest of a token's 256 numbers is about 3 times their size and becomes
 * 127 steps; rounding to a step is off by 1 / sqrt(12) of one: 3 / 127 / sqrt(12) = 0.7 % of a
 * number's size. Values hand that on as it is, keys times the spread of the scores, which is 2:
 * 0.7 % * sqrt(1 + 2 * 2) = 1.5 % of the output of an attention. (Queries in bfloat16 are off by
 * less than 0.2 %.) The second layer also starts from what the first was off by. The largest of
 * 592 rows may be twice the usual one; a key that is missing, or is one too many, costs more. */
static const double bound = 0.03;

/* |got - exact| / |exact|; a NaN stays one. */
static double error_of(const float *got, const float *exact, int n)
{
    double difference = 0, size = 0;
    for (int i = 0; i < n; i++) {
        difference += pow((double)got[i] - exact[i], 2);
        size += pow(exact[i], 2);
    }
    return sqrt(difference / size);
}

static double larger(double worst, double error) { return error <= worst ? worst : error; }

int main(void)
{
    static trace cached, exact;
    int token[TOKENS + 1], same = 0, steps = 0, all_same = 0, all_steps = 0;
    double attention = 0, logits = 0, worst = 0;

    make_weights();
    for (int i = 0; i < PROMPT; i++) token[i] = i * 37 % WORDS;
    puts("    tokens   attention      logits   likeliest token");
    for (int32_t position = 0, rows; position < TOKENS; position += rows) {
        rows = position >= PROMPT ? 1 : PROMPT - position < ROWS ? PROMPT - position : ROWS;
        if (!step(attend_int8, token + position, position, rows, &cached)
            || !step(attend_float, token + position, position, rows, &exact))
            return 1;
        for (int l = 0; l < LAYERS; l++)
            for (int i = 0; i < rows; i++)
                attention = larger(attention, error_of(cached.attention[l][i],
                                                       exact.attention[l][i], HEADS * D));
        logits = larger(logits, error_of(cached.logits, exact.logits, WORDS));

        const int next = likeliest(cached.logits), length = position + rows;
        if (length >= PROMPT) token[length] = next; /* both models go on with the int8 one's */
        same += next == likeliest(exact.logits);
        steps++;
        if (length == PROMPT || (length > PROMPT && (length - PROMPT) % EVERY == 0)) {
            printf("%4d .. %3d     %.2f %%      %.2f %%   same in %d of %d steps\n",
                   length == PROMPT ? 0 : length - EVERY, length - 1, 100 * attention,
                   100 * logits, same, steps);
            worst = larger(worst, larger(attention, logits));
            all_same += same;
            all_steps += steps;
            attention = logits = same = steps = 0;
        }
    }
    printf("%d of %d tokens the same; largest error %.2f %%, of %.2f %% that int8 explains\n",
           all_same, all_steps, 100 * worst, 100 * bound);
    printf("%d bytes a token and layer instead of %d\n",
           (int)(sizeof key_pool[0][0][0] + sizeof value_pool[0][0][0] + 2 * sizeof(float)),
           (int)(sizeof all_keys[0][0] + sizeof all_values[0][0]));
    return !(worst > 0 && worst < bound);
}
