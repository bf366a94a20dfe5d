/* cc -O2 -Iinclude examples/threads.c -o threads -pthread && ./threads
 *
 * Threads of your own. A plan counts tasks; any thread runs any of them, in any order, each thread
 * with its own workspace. Memory for partials lets the plan cut one long row into many tasks, whose
 * results are merged after a barrier. The bits do not depend on the number of threads. */
#define _POSIX_C_SOURCE 200809L
#include "hl_sparse_flash_attention_f32_d64.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 16, KEYS = 20000, D = 64, MOST = 8 };

static float query[HEADS][D], key[KEYS][D], one_task[HEADS][D], out[HEADS][D];

typedef struct worker {
    pthread_t thread;
    const hl_sparse_flash_attention_plan *plan;
    int64_t first, step;
    unsigned char workspace[HL_SPARSE_FLASH_ATTENTION_F32_D64_WORKSPACE_BYTES(HEADS)];
} worker;

static void *run_tasks(void *arg)
{
    worker *w = arg;
    for (int64_t task = w->first; task < w->plan->n_tasks; task += w->step)
        hl_sparse_flash_attention_f32_d64_task(w->plan, task, w->workspace);
    return NULL;
}

static void *run_merges(void *arg)
{
    const worker *w = arg;
    for (int64_t merge = w->first; merge < w->plan->n_merges; merge += w->step)
        hl_sparse_flash_attention_f32_d64_merge(w->plan, merge);
    return NULL;
}

/* Runs one stage on n threads; that all are joined is the barrier between tasks and merges. */
static void on_threads(int n, void *(*stage)(void *), const hl_sparse_flash_attention_plan *plan)
{
    static worker workers[MOST];
    for (int i = 0; i < n; i++) {
        workers[i].plan = plan;
        workers[i].first = i;
        workers[i].step = n;
        if (pthread_create(&workers[i].thread, NULL, stage, &workers[i]) != 0) {
            perror("pthread_create");
            exit(1);
        }
    }
    for (int i = 0; i < n; i++) pthread_join(workers[i].thread, NULL);
}

static hl_sparse_flash_attention_plan make_plan(const hl_sparse_flash_attention_args *args)
{
    hl_sparse_flash_attention_plan plan;
    hl_error error;
    char text[160];
    if (hl_sparse_flash_attention_f32_d64_plan(&plan, args, &error) != HL_OK) {
        puts(hl_error_text(&error, text, sizeof text));
        exit(1);
    }
    return plan;
}

static void fill(float *x, int32_t n)
{
    static uint32_t state = 1;
    while (n-- > 0) {
        state = state * 1664525u + 1013904223u;
        *x++ = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
}

int main(void)
{
    hl_sparse_flash_attention_args args = {
        .query = query, .key = key, .attention_out = one_task,
        .batch = 1, .seq_q = 1, .seq_kv = KEYS, .heads_q = HEADS, .scale_value = 0.5f};
    int failed = 0;
    fill(&query[0][0], HEADS * D);
    fill(&key[0][0], KEYS * D);

    hl_sparse_flash_attention_plan plan = make_plan(&args);
    on_threads(1, run_tasks, &plan);
    printf("1 thread, no partials: %lld task of %d keys in %d chunks\n", (long long)plan.n_tasks,
           KEYS, (int)plan.chunks);

    args.attention_out = out;
    args.partials_bytes = plan.split_bytes; /* what the plan said it could use */
    args.partials = malloc(plan.split_bytes);
    if (args.partials == NULL) return 1;
    plan = make_plan(&args);
    for (int n = 1; n <= MOST; n *= 2) {
        memset(out, 0xff, sizeof out);
        on_threads(n, run_tasks, &plan);
        on_threads(n, run_merges, &plan);

        const int same = memcmp(out, one_task, sizeof out) == 0 && out[0][0] != 0;
        printf("%d thread%s %lld tasks, %lld merge, %s\n", n, n > 1 ? "s:" : ": ",
               (long long)plan.n_tasks, (long long)plan.n_merges,
               same ? "the same bits" : "DIFFERENT bits");
        failed |= !same;
    }
    free(args.partials);
    return failed || plan.n_tasks < 2;
}
