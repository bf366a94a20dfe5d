/* cc -O2 -Iinclude examples/train_step.c -o train_step -lm && ./train_step
 *
 * Attention learns: one layer is to say, at every place of a sequence of random words, which word
 * stood BACK places earlier. It has to find out by itself where to look (positions have random
 * vectors, too) and what to bring from there. Two headers: forward, with dropout and the numbers
 * that the way back needs; backward, with the same dropout by its seed and offset. Everything else
 * is plain loops. First, one gradient is held against a difference of two losses. */
#include "hl_fusion_attention_f32_d64_pse_types_softcap_sinks.h"
#include "hl_fusion_attention_grad_f32_d64_pse_types_softcap.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FORWARD(name) hl_fusion_attention_f32_d64_pse_types_softcap_sinks##name
#define BACKWARD(name) hl_fusion_attention_grad_f32_d64_pse_types_softcap##name

#define BYTES_FORWARD HL_FUSION_ATTENTION_F32_D64_PSE_TYPES_SOFTCAP_SINKS_WORKSPACE_BYTES
#define BYTES_BACKWARD HL_FUSION_ATTENTION_GRAD_F32_D64_PSE_TYPES_SOFTCAP_WORKSPACE_BYTES
#define ENOUGH (BYTES_FORWARD > BYTES_BACKWARD ? BYTES_FORWARD : BYTES_BACKWARD)

enum { BATCH = 4, LENGTH = 32, BACK = 5, WORDS = 16, MODEL = 64, D = 64, STEPS = 400 };
enum { ROWS = BATCH * LENGTH };

typedef struct { /* what is learned; of the same shape: its gradient, and what Adam keeps */
    float query[MODEL][D], key[MODEL][D], value[MODEL][D], out[D][WORDS];
} weights;
enum { WEIGHTS = sizeof(weights) / sizeof(float) };

static weights w, dw, mean, square;
static float word_vector[WORDS][MODEL], place_vector[LENGTH][MODEL]; /* random, and stay so */
static int word[ROWS];
static float x[ROWS][MODEL], q[ROWS][D], k[ROWS][D], v[ROWS][D], o[ROWS][D], logit[ROWS][WORDS];
static float dq[ROWS][D], dk[ROWS][D], dv[ROWS][D], d_o[ROWS][D], dlogit[ROWS][WORDS];
static float max[ROWS][8], sum[ROWS][8];
static int64_t dropout_state[3];
static unsigned char workspace[ENOUGH]; /* for either of both */

static float uniform(void) /* in [-1, 1) */
{
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(state >> 40) / 8388608.0f - 1.0f;
}

static void fill(float *to, size_t n, float scale)
{
    while (n-- > 0) *to++ = scale * uniform();
}

/* c = a b, of [rows][inner] and [inner][columns]. */
static void product(const float *a, const float *b, float *c, int rows, int inner, int columns)
{
    memset(c, 0, sizeof *c * (size_t)(rows * columns));
    for (int i = 0; i < rows; i++)
        for (int m = 0; m < inner; m++)
            for (int j = 0; j < columns; j++)
                c[i * columns + j] += a[i * inner + m] * b[m * columns + j];
}

/* Of c = a b: db = a^T dc, and, if there is room for it, da = dc b^T. */
static void back(const float *a, const float *b, const float *dc, float *da, float *db, int rows,
                 int inner, int columns)
{
    memset(db, 0, sizeof *db * (size_t)(inner * columns));
    for (int i = 0; i < rows; i++)
        for (int m = 0; m < inner; m++) {
            float total = 0;
            for (int j = 0; j < columns; j++) {
                db[m * columns + j] += a[i * inner + m] * dc[i * columns + j];
                total += dc[i * columns + j] * b[m * columns + j];
            }
            if (da != NULL) da[i * inner + m] = total;
        }
}

static void need(hl_status status, const hl_error *error)
{
    char text[160];
    if (status == HL_OK) return;
    puts(hl_error_text(error, text, sizeof text));
    exit(1);
}

static void new_batch(void)
{
    for (int row = 0; row < ROWS; row++) {
        word[row] = (int)((uniform() + 1) * WORDS / 2);
        for (int c = 0; c < MODEL; c++)
            x[row][c] = word_vector[word[row]][c] + place_vector[row % LENGTH][c];
    }
}

/* The mean of -ln(probability of the right word), and its gradient by logits. */
static double forward(float keep_prob, int64_t offset)
{
    const hl_fusion_attention_args args = {
        .query = q, .key = k, .value = v, .attention_out = o, .softmax_max = max[0],
        .softmax_sum = sum[0], .dropout_state = dropout_state, .batch = BATCH, .seq_q = LENGTH,
        .seq_kv = LENGTH, .heads_q = 1, .scale_value = 0.125f, .sparse_mode = 3,
        .mask_from_mode = 1, .keep_prob = keep_prob, .dropout_seed = 7, .dropout_offset = offset};
    const int counted = BATCH * (LENGTH - BACK);
    hl_error error;
    double loss = 0;
    product(x[0], w.query[0], q[0], ROWS, MODEL, D);
    product(x[0], w.key[0], k[0], ROWS, MODEL, D);
    product(x[0], w.value[0], v[0], ROWS, MODEL, D);
    need(FORWARD()(&args, workspace, sizeof workspace, &error), &error);
    product(o[0], w.out[0], logit[0], ROWS, D, WORDS);
    for (int row = 0; row < ROWS; row++) {
        double total = 0;
        memset(dlogit[row], 0, sizeof dlogit[row]);
        if (row % LENGTH < BACK) continue; /* nothing stood there */
        for (int j = 0; j < WORDS; j++) total += exp((double)logit[row][j]);
        for (int j = 0; j < WORDS; j++) {
            const int right = j == word[row - BACK];
            const double p = exp((double)logit[row][j]) / total;
            dlogit[row][j] = (float)((p - right) / counted);
            if (right) loss -= log(p) / counted;
        }
    }
    return loss;
}

/* The gradient of what `forward` did last, into dw. */
static void backward(float keep_prob)
{
    const hl_fusion_attention_grad_args args = {
        .query = q, .key = k, .value = v, .attention_out = o, .dout = d_o, .softmax_max = max[0],
        .softmax_sum = sum[0], .dquery = dq, .dkey = dk, .dvalue = dv, .batch = BATCH,
        .seq_q = LENGTH, .seq_kv = LENGTH, .heads_q = 1, .scale_value = 0.125f, .sparse_mode = 3,
        .mask_from_mode = 1, .keep_prob = keep_prob, .dropout_seed = dropout_state[0],
        .dropout_offset = dropout_state[1]}; /* the same weights are dropped */
    hl_error error;
    back(o[0], w.out[0], dlogit[0], d_o[0], dw.out[0], ROWS, D, WORDS);
    need(BACKWARD()(&args, workspace, sizeof workspace, &error), &error);
    back(x[0], w.query[0], dq[0], NULL, dw.query[0], ROWS, MODEL, D);
    back(x[0], w.key[0], dk[0], NULL, dw.key[0], ROWS, MODEL, D);
    back(x[0], w.value[0], dv[0], NULL, dw.value[0], ROWS, MODEL, D);
}

/* The largest gradient of w.query, and what two losses say about it. */
static int check_gradient(void)
{
    float *const all = (float *)w.query;
    const float *const gradient = (const float *)dw.query;
    int at = 0;
    forward(0.9f, 1);
    backward(0.9f);
    for (int i = 0; i < MODEL * D; i++)
        if (fabsf(gradient[i]) > fabsf(gradient[at])) at = i;
    const float was = all[at], step = 0.02f;
    all[at] = was + step;
    const double above = forward(0.9f, 1);
    all[at] = was - step;
    const double below = forward(0.9f, 1);
    all[at] = was;
    const double wanted = (above - below) / (2 * (double)step), got = (double)gradient[at];
    printf("gradient %.6f, by differences %.6f\n", got, wanted);
    return !(fabs(got - wanted) <= 0.02 * fabs(wanted));
}

/* Kingma and Ba 2015. */
static void adam(int step)
{
    float *const to = (float *)&w, *const m = (float *)&mean, *const s = (float *)&square;
    const float *const g = (const float *)&dw;
    const float rate = 0.003f * sqrtf(1 - powf(0.99f, (float)step)) / (1 - powf(0.9f, (float)step));
    for (int i = 0; i < WEIGHTS; i++) {
        m[i] += 0.1f * (g[i] - m[i]);
        s[i] += 0.01f * (g[i] * g[i] - s[i]);
        to[i] -= rate * m[i] / (sqrtf(s[i]) + 1e-8f);
    }
}

int main(void)
{
    fill((float *)&w, WEIGHTS, 0.2f);
    fill(word_vector[0], WORDS * MODEL, 1);
    fill(place_vector[0], LENGTH * MODEL, 1);
    new_batch();
    int failed = check_gradient();
    const double start = forward(1, 0);
    for (int step = 1; step <= STEPS; step++) {
        new_batch();
        const double loss = forward(0.9f, step); /* an offset of its own for every call */
        backward(0.9f);
        adam(step);
        if (step % 50 == 0) printf("step %3d: loss %.3f\n", step, loss);
    }
    new_batch();
    const double end = forward(1, 0);
    printf("on new words, nothing dropped: %.4f, at the start %.4f\n", end, start);
    return failed | !(end < 0.05 * start);
}
