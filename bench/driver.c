/* Calls one kernel and takes the time. bench/run.py compiles this text behind a header, in the
 * same file, with KERNEL defined as the kernel's name; gen/bind.py fills the structs.
 *
 * Times are nanoseconds of the calling thread on a processor, so that other work on the machine is
 * not counted; on several threads, of the clock on the wall. A negative one is an hl_status. */
#include "words.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#define PASTE(kernel, suffix) kernel##suffix
#define NAME(kernel, suffix) PASTE(kernel, suffix)
#define OF_KERNEL(suffix) NAME(KERNEL, suffix)

typedef hl_sparse_flash_attention_args args;
typedef hl_sparse_flash_attention_plan plan;

static double nanoseconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* `count` calls, with a[first], a[first + 1], .. modulo n. */
double bench_run(const args *a, int n, int first, int count, void *workspace, size_t bytes)
{
    const double begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    for (int i = 0; i < count; i++) {
        const hl_status status = KERNEL(&a[(first + i) % n], workspace, bytes, NULL);
        if (status != HL_OK) {
            return (double)status;
        }
    }
    return nanoseconds(CLOCK_THREAD_CPUTIME_ID) - begin;
}

/* The same for the checks alone. */
double bench_plan(const args *a, int n, int first, int count)
{
    const double begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    for (int i = 0; i < count; i++) {
        plan p;
        const hl_status status = OF_KERNEL(_plan)(&p, &a[(first + i) % n], NULL);
        if (status != HL_OK) {
            return (double)status;
        }
    }
    return nanoseconds(CLOCK_THREAD_CPUTIME_ID) - begin;
}

/* ---- threads: tasks are handed out by a counter --------------------------------------------- */

enum { MAX_THREADS = 64 };

typedef struct crew {
    const plan *plan;
    char *workspace; /* plan->task_bytes a worker */
    int64_t next_task;
    int workers, ready, go, done;
} crew;

static void *work(void *argument)
{
    crew *c = argument;
    const int me = __atomic_fetch_add(&c->workers, 1, __ATOMIC_RELAXED);
    void *workspace = c->workspace + (size_t)me * c->plan->task_bytes;
    __atomic_add_fetch(&c->ready, 1, __ATOMIC_RELEASE);
    while (!__atomic_load_n(&c->go, __ATOMIC_ACQUIRE)) {
    }
    for (;;) {
        const int64_t task = __atomic_fetch_add(&c->next_task, 1, __ATOMIC_RELAXED);
        if (task >= c->plan->n_tasks) {
            break;
        }
        OF_KERNEL(_task)(c->plan, task, workspace);
    }
    __atomic_add_fetch(&c->done, 1, __ATOMIC_RELEASE);
    return NULL;
}

/* One call's tasks and merges on threads that wait for them, as a thread pool's would. */
double bench_threads(const args *a, int threads, void *workspace, size_t bytes)
{
    plan p;
    const hl_status status = OF_KERNEL(_plan)(&p, a, NULL);
    if (status != HL_OK) {
        return (double)status;
    }
    if (threads > MAX_THREADS || (size_t)threads * p.task_bytes > bytes) {
        return (double)HL_ERR_WORKSPACE;
    }
    crew c = {&p, workspace, 0, 0, 0, 0, 0};
    pthread_t ids[MAX_THREADS];
    for (int i = 1; i < threads; i++) {
        if (pthread_create(&ids[i], NULL, work, &c) != 0) {
            abort(); /* those before it wait for a start that will not come */
        }
    }
    while (__atomic_load_n(&c.ready, __ATOMIC_ACQUIRE) < threads - 1) {
    }
    const double begin = nanoseconds(CLOCK_MONOTONIC);
    __atomic_store_n(&c.go, 1, __ATOMIC_RELEASE);
    work(&c);
    while (__atomic_load_n(&c.done, __ATOMIC_ACQUIRE) < threads) {
    }
    for (int64_t i = 0; i < p.n_merges; i++) {
        OF_KERNEL(_merge)(&p, i);
    }
    const double end = nanoseconds(CLOCK_MONOTONIC);
    for (int i = 1; i < threads; i++) {
        pthread_join(ids[i], NULL);
    }
    return end - begin;
}

/* ---- 2^x alone ------------------------------------------------------------------------------ */

/* `count` times over n numbers, n a multiple of 16. */
double bench_exp2(int isa, const float *x, float *y, size_t n, int count)
{
    word_loop *loop = exp2_loop(isa);
    if (!loop) {
        return (double)HL_ERR_UNSUPPORTED;
    }
    const double begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    for (int i = 0; i < count; i++) {
        loop(x, y, n);
    }
    return nanoseconds(CLOCK_THREAD_CPUTIME_ID) - begin;
}
