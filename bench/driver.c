/* Calls kernels and takes the time. Kernels come as the addresses of their functions, and structs
 * as gen/bind.py filled them: one text for every header and operator.
 *
 * Times are nanoseconds of the calling thread on a processor, so that other work on the machine
 * is not counted; on several threads, of the clock on the wall. A negative one is a status. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

/* The functions of every header, without their types: pointers and enums are passed alike on all
 * machines that the bench runs on. */
typedef int call_function(const void *args, void *workspace, size_t bytes, void *error);
typedef int plan_function(void *plan, const void *args, void *error);
typedef int routine_function(const void *args, void *error);
typedef void task_function(const void *plan, int64_t i, void *workspace);
typedef void merge_function(const void *plan, int64_t i);

static double nanoseconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* `count` calls with the structs number first, first + 1, .. modulo n, `size` bytes each. */
double bench_calls(call_function *call, const char *args, size_t size, int n, int first, int count,
                   void *workspace, size_t bytes)
{
    const double begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    for (int i = 0; i < count; i++) {
        const int status = call(args + size * (size_t)((first + i) % n), workspace, bytes, NULL);
        if (status != 0) {
            return (double)status;
        }
    }
    return nanoseconds(CLOCK_THREAD_CPUTIME_ID) - begin;
}

/* The checks alone, `count` times. */
double bench_plans(plan_function *make, void *plan, const void *args, int count)
{
    const double begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    for (int i = 0; i < count; i++) {
        const int status = make(plan, args, NULL);
        if (status != 0) {
            return (double)status;
        }
    }
    return nanoseconds(CLOCK_THREAD_CPUTIME_ID) - begin;
}

/* `count` calls of a routine that writes or reads records, all with the same arguments. */
double bench_routines(routine_function *call, const void *args, int count)
{
    const double begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    for (int i = 0; i < count; i++) {
        const int status = call(args, NULL);
        if (status != 0) {
            return (double)status;
        }
    }
    return nanoseconds(CLOCK_THREAD_CPUTIME_ID) - begin;
}

/* ---- threads: tasks are handed out by a counter --------------------------------------------- */

enum { MAX_THREADS = 64 };

typedef struct crew {
    const void *plan;
    task_function *task;
    int64_t tasks, next_task;
    char *workspace; /* task_bytes a worker */
    size_t task_bytes;
    int workers, ready, go, done;
} crew;

static void *work(void *argument)
{
    crew *c = argument;
    const int me = __atomic_fetch_add(&c->workers, 1, __ATOMIC_RELAXED);
    void *workspace = c->workspace + (size_t)me * c->task_bytes;
    __atomic_add_fetch(&c->ready, 1, __ATOMIC_RELEASE);
    while (!__atomic_load_n(&c->go, __ATOMIC_ACQUIRE)) {
        sched_yield(); /* where others want the processor, waiting must not keep it from them */
    }
    for (;;) {
        const int64_t task = __atomic_fetch_add(&c->next_task, 1, __ATOMIC_RELAXED);
        if (task >= c->tasks) {
            break;
        }
        c->task(c->plan, task, workspace);
    }
    __atomic_add_fetch(&c->done, 1, __ATOMIC_RELEASE);
    return NULL;
}

/* A plan's tasks and merges on threads that wait for them, as a thread pool's would. The workspace
 * has task_bytes for each thread. */
double bench_threads(const void *plan, task_function *task, merge_function *merge, int64_t tasks,
                     int64_t merges, size_t task_bytes, int threads, void *workspace)
{
    crew c = {plan, task, tasks, 0, workspace, task_bytes, 0, 0, 0, 0};
    pthread_t ids[MAX_THREADS];
    if (threads > MAX_THREADS) {
        abort();
    }
    for (int i = 1; i < threads; i++) {
        if (pthread_create(&ids[i], NULL, work, &c) != 0) {
            abort(); /* those before it wait for a start that will not come */
        }
    }
    while (__atomic_load_n(&c.ready, __ATOMIC_ACQUIRE) < threads - 1) {
        sched_yield();
    }
    const double begin = nanoseconds(CLOCK_MONOTONIC);
    __atomic_store_n(&c.go, 1, __ATOMIC_RELEASE);
    work(&c);
    while (__atomic_load_n(&c.done, __ATOMIC_ACQUIRE) < threads) {
        sched_yield();
    }
    for (int64_t i = 0; i < merges; i++) {
        merge(plan, i);
    }
    const double end = nanoseconds(CLOCK_MONOTONIC);
    for (int i = 1; i < threads; i++) {
        pthread_join(ids[i], NULL);
    }
    return end - begin;
}
