/* The same rows again and again, and all that may not change their bits: which call they are part
 * of, where its buffers lie, what they held before, who runs which task when. Driven by
 * helpers_repeat.py, which loads it beside a kernel's own library.
 *
 * A variant is a call that holds the watched rows somewhere; a repeat makes one of them in one way.
 * Its watched elements, in their own order, have to be those of the first repeat, bit by bit.
 *
 * Or as a program for another processor, header.h beside it:
 *     cc -DKERNEL=name -DOPERATOR=its_operator [-DWITHOUT_MERGES] repeats.c -pthread
 *     program variants count          prints repeats that differ, bits, and the first one's way
 * A file of variants: bytes watched, variants; of each: args' bytes, pieces, args; of each piece:
 * offset, bytes, element, alignment, elements watched, whether it is an output; its bytes if not;
 * the watched elements. All numbers int64. */
#define _DEFAULT_SOURCE 1
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_WORKERS = 16, LINE = 64 };

typedef struct repeat_kernel {
    int (*run)(const void *args, void *workspace, size_t bytes, void *error);
    int (*plan)(void *plan, const void *args, void *error);
    void (*task)(const void *plan, int64_t task, void *workspace);
    void (*merge)(const void *plan, int64_t merge); /* NULL: there is nothing to merge */
    size_t (*workspace_bytes)(const void *args);
    int64_t args_bytes;
    int64_t plan_bytes;
    int64_t n_tasks; /* offsets in the plan; -1 where it has none */
    int64_t task_bytes;
    int64_t n_merges;
    int64_t split_bytes;
    int64_t partials; /* offsets in the arguments; -1 where there are none */
    int64_t partials_bytes;
} repeat_kernel;

typedef struct repeat_piece {
    const void *data; /* NULL: an output */
    int64_t offset;   /* of the pointer in the arguments */
    int64_t bytes;
    int64_t element;
    int64_t align;
    const int64_t *watched; /* of an output: which elements */
    int64_t n_watched;
} repeat_piece;

typedef struct repeat_variant {
    const void *args;
    const repeat_piece *piece;
    int64_t pieces;
} repeat_variant;

/* How a repeat went about it. */
typedef struct repeat_way {
    int64_t repeat;
    int64_t variant;
    int64_t workers; /* 0: the one call */
    int64_t partials;
    int64_t shift; /* bytes that the first buffer lies behind a line of 64 */
    int64_t status;
} repeat_way;

typedef struct crew {
    const repeat_kernel *kernel;
    const void *plan;
    const int64_t *order;
    int64_t n;
    int64_t next; /* shared by the workers */
    int merges;
} crew;

typedef struct worker {
    crew *crew;
    void *workspace;
    pthread_t thread;
} worker;

static uint64_t mixed(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static int64_t read_number(const void *from, int64_t offset)
{
    int64_t x;
    memcpy(&x, (const char *)from + offset, sizeof x);
    return x;
}

/* Memory whose address is `shift` past a line of 64 bytes; *whole is what to free. */
static unsigned char *at_shift(size_t bytes, size_t shift, int fill, void **whole)
{
    unsigned char *const all = malloc(bytes + 3 * LINE);
    const size_t over = (uintptr_t)all % LINE;
    *whole = all;
    memset(all, fill, bytes + 3 * LINE);
    return all + (LINE - over) % LINE + shift;
}

static void *work(void *arg)
{
    worker *const me = arg;
    crew *const c = me->crew;
    for (;;) {
        const int64_t i = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED);
        if (i >= c->n) {
            return NULL;
        }
        if (c->merges) {
            c->kernel->merge(c->plan, c->order[i]);
        } else {
            c->kernel->task(c->plan, c->order[i], me->workspace);
        }
    }
}

/* Tasks, or merges, in an order of their own, on some threads. */
static void all_of(const repeat_kernel *kernel, const void *plan, int64_t n, int merges,
                   worker *list, int64_t workers, uint64_t seed)
{
    int64_t *const order = malloc((size_t)(n + 1) * sizeof *order);
    crew c = {kernel, plan, order, n, 0, merges};
    for (int64_t i = 0; i < n; ++i) {
        const int64_t j = (int64_t)(mixed(seed + (uint64_t)i) % (uint64_t)(i + 1));
        order[i] = order[j];
        order[j] = i;
    }
    for (int64_t w = 0; w < workers; ++w) {
        list[w].crew = &c;
        if (workers == 1) {
            work(&list[w]);
        } else {
            pthread_create(&list[w].thread, NULL, work, &list[w]);
        }
    }
    for (int64_t w = 0; w < workers && workers > 1; ++w) {
        pthread_join(list[w].thread, NULL);
    }
    free(order);
}

static int by_task(const repeat_kernel *kernel, unsigned char *args, const repeat_way *way,
                   uint64_t seed)
{
    unsigned char error[256];
    void *const plan = calloc(1, (size_t)kernel->plan_bytes);
    void *partials = NULL;
    void *whole[MOST_WORKERS];
    worker list[MOST_WORKERS];
    int status = kernel->plan(plan, args, error);
    if (status == 0 && way->partials && kernel->partials >= 0) {
        const int64_t bytes = read_number(plan, kernel->split_bytes);
        unsigned char *const room = at_shift((size_t)bytes, 4 * (seed % 16), 0xff, &partials);
        memcpy(args + kernel->partials, &room, sizeof room);
        memcpy(args + kernel->partials_bytes, &bytes, sizeof bytes);
        status = kernel->plan(plan, args, error);
    }
    if (status == 0) {
        const size_t bytes = (size_t)read_number(plan, kernel->task_bytes);
        for (int64_t w = 0; w < way->workers; ++w) {
            const uint64_t x = mixed(seed + (uint64_t)w);
            list[w].workspace = at_shift(bytes, x % LINE, (int)(x >> 56), &whole[w]);
        }
        all_of(kernel, plan, read_number(plan, kernel->n_tasks), 0, list, way->workers, seed);
        if (kernel->merge != NULL) {
            all_of(kernel, plan, read_number(plan, kernel->n_merges), 1, list, way->workers,
                   seed + 1);
        }
        for (int64_t w = 0; w < way->workers; ++w) {
            free(whole[w]);
        }
    }
    free(partials);
    free(plan);
    return status;
}

/* Makes the call of a way; its watched elements into `to`. */
static int once(const repeat_kernel *kernel, const repeat_variant *v, const repeat_way *way,
                uint64_t seed, unsigned char *to)
{
    unsigned char *const args = malloc((size_t)kernel->args_bytes);
    void **const whole = malloc((size_t)v->pieces * sizeof *whole);
    unsigned char **const start = malloc((size_t)v->pieces * sizeof *start);
    int status;
    memcpy(args, v->args, (size_t)kernel->args_bytes);
    for (int64_t i = 0; i < v->pieces; ++i) {
        const repeat_piece *const p = &v->piece[i];
        const int64_t shift = (way->shift + 13 * p->align * i) % LINE / p->align * p->align;
        start[i] = at_shift((size_t)p->bytes, (size_t)shift, 0xff, &whole[i]);
        if (p->data != NULL) {
            memcpy(start[i], p->data, (size_t)p->bytes);
        }
        memcpy(args + p->offset, &start[i], sizeof start[i]);
    }
    if (way->workers == 0) {
        unsigned char error[256];
        void *room;
        const size_t bytes = kernel->workspace_bytes(args);
        void *const workspace = at_shift(bytes, seed % LINE, (int)(seed >> 56), &room);
        status = kernel->run(args, workspace, bytes, error);
        free(room);
    } else {
        status = by_task(kernel, args, way, seed);
    }
    for (int64_t i = 0; i < v->pieces; ++i) {
        const repeat_piece *const p = &v->piece[i];
        for (int64_t j = 0; j < p->n_watched; ++j) {
            memcpy(to, start[i] + p->watched[j] * p->element, (size_t)p->element);
            to += p->element;
        }
        free(whole[i]);
    }
    free(start);
    free(whole);
    free(args);
    return status;
}

/* How many of the repeats differ from the first one, or were refused; the first such in *found.
 * `watched` bytes are compared, of which *bits are told to differ. */
int64_t repeats(const repeat_kernel *kernel, const repeat_variant *variant, int64_t variants,
                int64_t first, int64_t count, int64_t watched, unsigned char *want,
                repeat_way *found, int64_t *bits)
{
    static const int64_t crews[] = {0, 1, 2, 3, 5, 8, 16};
    unsigned char *const got = malloc((size_t)watched + 1);
    int64_t differing = 0;
    for (int64_t r = first; r < first + count; ++r) {
        const uint64_t seed = mixed((uint64_t)r);
        repeat_way way = {r, r % variants, crews[r / variants % 7], (int64_t)(seed >> 32 & 1),
                          (r + r / LINE) % LINE, 0};
        int64_t apart = 0;
        way.status = once(kernel, &variant[way.variant], &way, seed, got);
        if (r == 0 && way.status == 0) {
            memcpy(want, got, (size_t)watched);
        }
        for (int64_t i = 0; i < watched; ++i) {
            apart += __builtin_popcount((unsigned)(got[i] ^ want[i]));
        }
        if (apart != 0 || way.status != 0) {
            if (differing++ == 0) {
                *found = way;
            }
            *bits += apart;
        }
    }
    free(got);
    return differing;
}

#ifdef KERNEL
#include "header.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define PART(suffix) JOIN(KERNEL, suffix)

typedef JOIN(OPERATOR, _args) args_t;
typedef JOIN(OPERATOR, _plan) plan_t;

static int run(const void *args, void *workspace, size_t bytes, void *error)
{
    return (int)KERNEL(args, workspace, bytes, error);
}
static int plan(void *plan, const void *args, void *error)
{
    return (int)PART(_plan)(plan, args, error);
}
static void task(const void *plan, int64_t i, void *workspace)
{
    PART(_task)(plan, i, workspace);
}
static size_t workspace_bytes(const void *args)
{
    return PART(_workspace_bytes)(args);
}
#ifndef WITHOUT_MERGES
static void merge(const void *plan, int64_t i)
{
    PART(_merge)(plan, i);
}
#endif

static void take(FILE *from, void *to, int64_t bytes)
{
    if (bytes != 0 && fread(to, (size_t)bytes, 1, from) != 1) {
        fprintf(stderr, "repeats: the file of variants is too short\n");
        exit(3);
    }
}

static void *taken(FILE *from, int64_t bytes)
{
    void *const made = malloc((size_t)bytes + 1);
    take(from, made, bytes);
    return made;
}

static repeat_variant read_variant(FILE *from)
{
    int64_t size[2];
    repeat_variant v;
    repeat_piece *list;
    take(from, size, sizeof size);
    if (size[0] != (int64_t)sizeof(args_t)) {
        fprintf(stderr, "repeats: args have another size here\n");
        exit(3);
    }
    v.args = taken(from, size[0]);
    v.pieces = size[1];
    list = malloc((size_t)v.pieces * sizeof *list);
    for (int64_t i = 0; i < v.pieces; ++i) {
        int64_t x[6];
        take(from, x, sizeof x);
        list[i] = (repeat_piece){NULL, x[0], x[1], x[2], x[3], NULL, x[4]};
        if (!x[5]) {
            list[i].data = taken(from, x[1]);
        }
        list[i].watched = taken(from, x[4] * (int64_t)sizeof(int64_t));
    }
    v.piece = list;
    return v;
}

int main(int argc, char **argv)
{
    repeat_kernel kernel = {run, plan, task, NULL, workspace_bytes, sizeof(args_t), sizeof(plan_t),
                            offsetof(plan_t, n_tasks), offsetof(plan_t, task_bytes), -1, -1, -1, -1};
    FILE *const from = argc == 3 ? fopen(argv[1], "rb") : NULL;
    repeat_way way = {0, 0, 0, 0, 0, 0};
    int64_t head[2];
    int64_t bits = 0;
    int64_t differing;
    repeat_variant *variant;
    if (from == NULL) {
        fprintf(stderr, "repeats: usage: repeats variants count\n");
        return 2;
    }
#ifndef WITHOUT_MERGES
    kernel.merge = merge;
    kernel.n_merges = offsetof(plan_t, n_merges);
    kernel.split_bytes = offsetof(plan_t, split_bytes);
    kernel.partials = offsetof(args_t, partials);
    kernel.partials_bytes = offsetof(args_t, partials_bytes);
#endif
    take(from, head, sizeof head);
    variant = malloc((size_t)head[1] * sizeof *variant);
    for (int64_t i = 0; i < head[1]; ++i) {
        variant[i] = read_variant(from);
    }
    fclose(from);
    differing = repeats(&kernel, variant, head[1], 0, atoll(argv[2]), head[0],
                        malloc((size_t)head[0] + 1), &way, &bits);
    printf("%lld %lld %lld %lld %lld %lld %lld %lld\n", (long long)differing, (long long)bits,
           (long long)way.repeat, (long long)way.variant, (long long)way.workers,
           (long long)way.partials, (long long)way.shift, (long long)way.status);
    return 0;
}
#endif
