/* Runs recorded calls of one kernel: every buffer between pages that may not be touched, workspace
 * and partials of exactly the bytes asked for. Compiled for other processors and run under qemu,
 * or with sanitizers. All numbers of the file, and the args in it, are laid out as on the machine
 * that runs this (helpers_wide.py).
 *
 *     cc -DKERNEL=name -DOPERATOR=its_operator runner.c        header.h beside it
 *     -DWITHOUT_MERGES: of an operator whose tasks have nothing to merge, and no partials
 *     -DFROM_HEAP: buffers of exactly their bytes from malloc, for tools that watch the heap
 *     -DWORKERS=16: tasks and merges on so many threads, task i on thread i % 16; -DRACY: all of
 *     them in one workspace, which TSan has to notice
 *     -DENVIRONMENT: registers and control words are looked at after each call (environment.c
 *     beside it); -DSPOIL=function: and that function called behind each, which is to be noticed
 *     runner calls results
 *
 * A file of calls: count, then for each call: size of args, mode, pieces; args; for each piece its
 * offset in args, bytes, whether it is an output, and (inputs) its bytes. All numbers int64. */
#define _DEFAULT_SOURCE 1
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(WORKERS)
#include <pthread.h>
#endif
#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
#include <sanitizer/msan_interface.h>
#define POISON(start, bytes) __msan_poison((start), (bytes))
#endif
#endif
#if !defined(POISON)
#define POISON(start, bytes) ((void)0) /* what is not written yet is told to MSan only */
#endif

#include "header.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

typedef JOIN(OPERATOR, _args) args_t;
typedef JOIN(OPERATOR, _plan) plan_t;

enum { BY_TASK = 1, PARTIALS = 2, FLUSH_LEFT = 4, FLUSH_TO_ZERO = 8, CANARY = 0xC3, PIECES = 32 };

typedef struct piece {
    unsigned char *map;   /* with a forbidden page on both sides */
    unsigned char *start;
    size_t inner;
    size_t bytes;
    int64_t offset;
    int64_t written;
} piece;

static size_t page;

static void stop(const char *why)
{
    fprintf(stderr, "runner: %s\n", why);
    exit(3);
}

static int64_t number(FILE *file)
{
    int64_t x;
    if (fread(&x, sizeof x, 1, file) != 1) {
        stop("the file of calls is too short");
    }
    return x;
}

static piece room(size_t bytes, int64_t mode)
{
    piece p;
    size_t i;
    p.bytes = bytes;
    p.offset = -1;
    p.written = 1;
#if defined(FROM_HEAP)
    (void)mode;
    (void)i;
    p.inner = 0;
    p.map = malloc(bytes);
    p.start = p.map;
    if (p.map == NULL) {
        stop("no memory");
    }
    POISON(p.start, bytes);
    return p;
#endif
    p.inner = (bytes + page - 1) / page * page;
    p.map = mmap(NULL, p.inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p.map == MAP_FAILED
        || (p.inner != 0 && mprotect(p.map + page, p.inner, PROT_READ | PROT_WRITE) != 0)) {
        stop("no memory");
    }
    p.start = p.map + page + (mode & FLUSH_LEFT ? 0 : p.inner - bytes);
    for (i = 0; i < p.inner; ++i) {
        p.map[page + i] = CANARY;
    }
    if (bytes != 0) {
        memset(p.start, 0xFF, bytes);
    }
    return p;
}

static void leave(piece *p)
{
    size_t i;
#if defined(FROM_HEAP)
    free(p->map);
    return;
#endif
    for (i = 0; i < p->inner; ++i) {
        const unsigned char *const at = p->map + page + i;
        if ((at < p->start || at >= p->start + p->bytes) && *at != CANARY) {
            stop("a byte beside a buffer was written");
        }
    }
    munmap(p->map, p->inner + 2 * page);
}

static void set_pointer(args_t *args, int64_t offset, void *value)
{
    memcpy((unsigned char *)args + offset, &value, sizeof value);
}

#if defined(ENVIRONMENT)
#include "environment.c"

/* A call of the kernel's, with a full set of registers. */
static int64_t enter(void *function, void *x, void *y, void *z, void *u, int64_t mode)
{
    void *const arguments[4] = {x, y, z, u};
    env_report report;
#if defined(__x86_64__)
    const uint64_t control = mode & FLUSH_TO_ZERO ? 0x9fc0u : 0x1f80u;
#else
    const uint64_t control = mode & FLUSH_TO_ZERO ? 0x1000000u : 0u;
#endif
    int wrong = env_call(function, arguments, control, &report);
#if defined(SPOIL)
    env_report other;
    wrong |= env_call((void *)SPOIL, arguments, control, &other);
#endif
    if (wrong != 0) {
        fprintf(stderr, "runner: environment %d\n", wrong);
        exit(5);
    }
    return (int32_t)report.result;
}
#define ENTER(function, x, y, z, u) \
    enter((void *)(function), (void *)(x), (void *)(y), (void *)(z), (void *)(u), mode)
#define PLAN(plan, args, error) (hl_status)ENTER(JOIN(KERNEL, _plan), plan, args, error, NULL)
#define TASK(plan, i, space) (void)ENTER(JOIN(KERNEL, _task), plan, (intptr_t)(i), space, NULL)
#define MERGE(plan, i) (void)ENTER(JOIN(KERNEL, _merge), plan, (intptr_t)(i), NULL, NULL)
#define CALL(args, space, bytes, error) (hl_status)ENTER(KERNEL, args, space, bytes, error)
#else
#define PLAN(plan, args, error) JOIN(KERNEL, _plan)((plan), (args), (error))
#define TASK(plan, i, space) JOIN(KERNEL, _task)((plan), (i), (space))
#define MERGE(plan, i) JOIN(KERNEL, _merge)((plan), (i))
#define CALL(args, space, bytes, error) KERNEL((args), (space), (bytes), (error))
#endif

#if defined(WORKERS)
enum { THREADED = 1 };
static pthread_barrier_t begun, done; /* two: who wakes late at one is not to learn from the other */

typedef struct worker {
    const plan_t *plan;
    void *workspace;
    int64_t number;
} worker;

static void *work(void *own)
{
    const worker *const w = own;
    int64_t i;
    pthread_barrier_wait(&begun);
    for (i = w->number; i < w->plan->n_tasks; i += WORKERS) {
        JOIN(KERNEL, _task)(w->plan, i, w->workspace);
    }
    pthread_barrier_wait(&done);
#ifndef WITHOUT_MERGES
    for (i = w->number; i < w->plan->n_merges; i += WORKERS) {
        JOIN(KERNEL, _merge)(w->plan, i);
    }
#endif
    return NULL;
}

static void run_plan(const plan_t *plan, int64_t mode)
{
    pthread_t thread[WORKERS];
    worker all[WORKERS];
    piece workspace[WORKERS];
    int i;
    pthread_barrier_init(&begun, NULL, WORKERS);
    pthread_barrier_init(&done, NULL, WORKERS);
    for (i = 0; i < WORKERS; ++i) {
        workspace[i] = room(plan->task_bytes, mode);
        all[i].plan = plan;
        all[i].number = i;
#if defined(RACY)
        all[i].workspace = workspace[0].start;
#else
        all[i].workspace = workspace[i].start;
#endif
        if (pthread_create(&thread[i], NULL, work, &all[i]) != 0) {
            stop("no thread");
        }
    }
    for (i = 0; i < WORKERS; ++i) {
        pthread_join(thread[i], NULL);
    }
    for (i = 0; i < WORKERS; ++i) {
        leave(&workspace[i]);
    }
    pthread_barrier_destroy(&begun);
    pthread_barrier_destroy(&done);
}
#else
enum { THREADED = 0 };

static void run_plan(const plan_t *plan, int64_t mode)
{
    piece workspace = room(plan->task_bytes, mode);
    int64_t i;
    for (i = plan->n_tasks - 1; i >= 0; --i) {
        TASK(plan, i, workspace.start);
    }
#ifndef WITHOUT_MERGES
    for (i = plan->n_merges - 1; i >= 0; --i) {
        MERGE(plan, i);
    }
#endif
    leave(&workspace);
}
#endif

static hl_status call(args_t *args, int64_t mode)
{
#ifndef WITHOUT_MERGES
    piece partials = room(0, mode);
#endif
    plan_t plan;
    hl_error error;
    hl_status status = PLAN(&plan, args, &error);
    if (status != HL_OK) {
        return status;
    }
#ifndef WITHOUT_MERGES
    if (mode & PARTIALS && plan.split_bytes != 0) {
        leave(&partials);
        partials = room(plan.split_bytes, mode);
        args->partials = partials.start;
        args->partials_bytes = partials.bytes;
        status = PLAN(&plan, args, &error);
    }
#endif
    if (status == HL_OK && (THREADED || mode & BY_TASK)) {
        run_plan(&plan, mode);
    } else if (status == HL_OK) {
        piece workspace = room(JOIN(KERNEL, _workspace_bytes)(args), mode);
        status = CALL(args, workspace.start, workspace.bytes, &error);
        leave(&workspace);
    }
#ifndef WITHOUT_MERGES
    leave(&partials);
#endif
    return status;
}

int main(int argc, char **argv)
{
    FILE *const in = argc == 3 ? fopen(argv[1], "rb") : NULL;
    FILE *const out = argc == 3 ? fopen(argv[2], "wb") : NULL;
    int64_t calls;
    uint32_t isas = JOIN(KERNEL, _isas)();
    if (in == NULL || out == NULL) {
        stop("usage: runner calls results");
    }
    page = (size_t)sysconf(_SC_PAGESIZE);
    fwrite(&isas, sizeof isas, 1, out);
    for (calls = number(in); calls > 0; --calls) {
        const int64_t size = number(in);
        const int64_t mode = number(in);
        const int64_t pieces = number(in);
        piece list[PIECES];
        args_t args;
        int64_t status;
        int64_t i;
        if (size != (int64_t)sizeof args || pieces > PIECES
            || fread(&args, sizeof args, 1, in) != 1) {
            stop("args have another size here");
        }
        for (i = 0; i < pieces; ++i) {
            const int64_t offset = number(in);
            const size_t bytes = (size_t)number(in);
            list[i] = room(bytes, mode);
            list[i].offset = offset;
            list[i].written = number(in);
            set_pointer(&args, offset, list[i].start);
            if (!list[i].written) {
                if (bytes != 0 && fread(list[i].start, bytes, 1, in) != 1) {
                    stop("the file of calls is too short");
                }
                if (list[i].inner != 0) {
                    mprotect(list[i].map + page, list[i].inner, PROT_READ);
                }
            }
        }
        status = call(&args, mode);
        fwrite(&status, sizeof status, 1, out);
        for (i = 0; i < pieces; ++i) {
            if (list[i].written && list[i].bytes != 0) {
                fwrite(list[i].start, list[i].bytes, 1, out);
            }
            leave(&list[i]);
        }
    }
    fclose(in);
    return fclose(out) != 0;
}
