/* cc -O2 -Iinclude examples/context_parallel_modes.c -o parallel_modes && ./parallel_modes
 *
 * A batch of sequences of several lengths (TND), cut in the middle of its second sequence and
 * computed by two processes: each has some of the query rows and all keys of their sequences. What
 * is cut off a causal mask is no causal mask any more: that piece is a band, which sparse modes 7
 * (the last sequence of a card is cut, the whole is mode 3) and 8 (the first one, mode 2) say. The
 * two examples are those of the operator's documents. Bits of a row depend on that row alone, so
 * that the pieces are the whole, bit for bit. */
#define _POSIX_C_SOURCE 200809L
#include "hl_fusion_attention_f32_d64_pse_types_softcap_sinks.h"
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST = 20, BATCHES = 4, HEADS = 2, D = 64 };

typedef struct { /* what one process computes */
    const char *name;
    int32_t mode, batch;
    int64_t pre, next, ends_q[BATCHES], ends_kv[BATCHES];
} card;

typedef struct {
    card whole, one, two;
    int32_t row_q, row_kv; /* where the rows and keys of `two` begin in the whole */
} example;

static const example examples[] = {
    {{"the whole, mode 3", 3, 4, 0, 0, {3, 7, 12, 16}, {3, 9, 14, 18}},
     {"card 1, mode 7", 7, 2, 6, -2, {3, 5}, {3, 9}},
     {"card 2, mode 3", 3, 3, 0, 0, {2, 7, 11}, {6, 11, 15}}, 5, 3},
    {{"the whole, mode 2", 2, 4, 0, 0, {3, 8, 13, 17}, {3, 7, 12, 16}},
     {"card 1, mode 2", 2, 2, 0, 0, {3, 5}, {3, 7}},
     {"card 2, mode 8", 8, 3, 4, 1, {3, 8, 12}, {4, 9, 13}}, 5, 3},
};

static float query[MOST][HEADS][D], key[MOST][HEADS][D], value[MOST][HEADS][D];
static float whole[MOST][HEADS][D], pieces[MOST][HEADS][D];
static unsigned char
    workspace[HL_FUSION_ATTENTION_F32_D64_PSE_TYPES_SOFTCAP_SINKS_WORKSPACE_BYTES];

/* Rows and keys from those numbers on; the result's rows, or -1. */
static int32_t attend(const card *c, int32_t row_q, int32_t row_kv, float out[][HEADS][D])
{
    const hl_fusion_attention_args args = {
        .query = query[row_q], .key = key[row_kv], .value = value[row_kv], .attention_out = out,
        .input_layout = HL_LAYOUT_TND, .actual_seq_qlen = c->ends_q,
        .actual_seq_kvlen = c->ends_kv, .batch = c->batch,
        .seq_q = (int32_t)c->ends_q[c->batch - 1], .seq_kv = (int32_t)c->ends_kv[c->batch - 1],
        .heads_q = HEADS, .scale_value = 0.5f, .sparse_mode = c->mode, .mask_from_mode = 1,
        .band = c->mode > 6, .pre_tokens = c->pre, .next_tokens = c->next};
    hl_error error;
    char text[160];
    if (hl_fusion_attention_f32_d64_pse_types_softcap_sinks(&args, workspace, sizeof workspace,
                                                            &error) != HL_OK) {
        printf("%s: %s\n", c->name, hl_error_text(&error, text, sizeof text));
        return -1;
    }
    printf("%s: %d sequences, %d rows, %d keys\n", c->name, (int)c->batch, (int)args.seq_q,
           (int)args.seq_kv);
    fflush(stdout);
    return args.seq_q;
}

static void fill(float *x, int n)
{
    static uint32_t state = 1;
    while (n-- > 0) {
        state = state * 1664525u + 1013904223u;
        *x++ = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
}

/* The second card is a process of its own, which sends its rows through a pipe. */
static int compare(const example *e)
{
    const int32_t all = attend(&e->whole, 0, 0, whole);
    int ends[2], status = 1;
    pid_t child;
    size_t held = 0;
    memset(pieces, 0xff, sizeof pieces);
    if (all < 0 || pipe(ends) != 0 || (child = fork()) < 0) return 1;
    if (child == 0) {
        const int32_t rows = attend(&e->two, e->row_q, e->row_kv, pieces);
        const size_t bytes = (size_t)(rows < 0 ? 0 : rows) * sizeof pieces[0];
        _exit(rows < 0 || write(ends[1], pieces, bytes) != (ssize_t)bytes);
    }
    close(ends[1]);
    if (attend(&e->one, 0, 0, pieces) != e->row_q) return 1;
    for (ssize_t n = 1; n > 0; held += (size_t)n) {
        char *const to = (char *)pieces[e->row_q] + held;
        n = read(ends[0], to, sizeof pieces - (size_t)(to - (char *)pieces));
        if (n < 0) return 1;
    }
    close(ends[0]);
    waitpid(child, &status, 0);

    const int same = status == 0 && held == (size_t)(all - e->row_q) * sizeof whole[0]
                     && memcmp(pieces, whole, (size_t)all * sizeof whole[0]) == 0;
    printf("both together: %s\n", same ? "the bits of the whole" : "DIFFERENT bits");
    return !same;
}

int main(void)
{
    int failed = 0;
    fill(&query[0][0][0], MOST * HEADS * D);
    fill(&key[0][0][0], MOST * HEADS * D);
    fill(&value[0][0][0], MOST * HEADS * D);
    for (size_t i = 0; i < sizeof examples / sizeof examples[0]; i++)
        failed |= compare(&examples[i]);
    return failed;
}
