/* Runs recorded calls of one kernel: every buffer between pages that may not be touched, workspace
 * and partials of exactly the bytes asked for. Compiled for other processors and run under qemu,
 * or with sanitizers. Struct layouts are those of the machine that wrote the file (64 bit, little
 * endian, as here).
 *
 *     cc -DKERNEL=name -DOPERATOR=its_operator runner.c        header.h beside it
 *     -DWITHOUT_MERGES: of an operator whose tasks have nothing to merge, and no partials
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

#include "header.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

typedef JOIN(OPERATOR, _args) args_t;
typedef JOIN(OPERATOR, _plan) plan_t;

enum { BY_TASK = 1, PARTIALS = 2, FLUSH_LEFT = 4, CANARY = 0xC3, PIECES = 32 };

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

static hl_status call(args_t *args, int64_t mode)
{
    piece workspace;
#ifndef WITHOUT_MERGES
    piece partials = room(0, mode);
#endif
    plan_t plan;
    hl_error error;
    int64_t i;
    hl_status status = JOIN(KERNEL, _plan)(&plan, args, &error);
    if (status != HL_OK) {
        return status;
    }
#ifndef WITHOUT_MERGES
    if (mode & PARTIALS && plan.split_bytes != 0) {
        leave(&partials);
        partials = room(plan.split_bytes, mode);
        args->partials = partials.start;
        args->partials_bytes = partials.bytes;
        status = JOIN(KERNEL, _plan)(&plan, args, &error);
    }
#endif
    if (status == HL_OK && mode & BY_TASK) {
        workspace = room(plan.task_bytes, mode);
        for (i = plan.n_tasks - 1; i >= 0; --i) {
            JOIN(KERNEL, _task)(&plan, i, workspace.start);
        }
#ifndef WITHOUT_MERGES
        for (i = plan.n_merges - 1; i >= 0; --i) {
            JOIN(KERNEL, _merge)(&plan, i);
        }
#endif
    } else {
        workspace = room(JOIN(KERNEL, _workspace_bytes)(args), mode);
        status = KERNEL(args, workspace.start, workspace.bytes, &error);
    }
    leave(&workspace);
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
