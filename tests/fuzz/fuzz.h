/* What both fuzz targets share: a call as a record of numbers, how libFuzzer changes it, and memory
 * for what it points to. glue.h, generated from the headers' text, has the tables. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef __int128 wide; /* sizes that cannot overflow here, whatever a call says */

enum { KIND_I32, KIND_I64, KIND_F32, KIND_POINTER, KIND_POINTERS };
enum { PLAN, PARTS, DECODE_APPEND, QUANTISE, DEQUANTISE, KV_APPEND, CONVERT };
enum { PSE_SLOPE = 2, PSE_ONE_ROW = 1, PSE_LAST_ROWS = 2 };
enum { SPARSE, RECORDS, DECODE, TRAIN, GRAD };
enum { LISTS = 6, WORDS = 16 };

/* A field of a C struct, or one of the three numbers of a stride. */
typedef struct field {
    int32_t slot;
    int32_t offset;
    int32_t kind;
    int32_t list; /* which of the record's lists of words it points to; -1: none */
    int32_t list_bytes; /* of an entry                                           */
    int32_t argument;   /* what an error calls it                                */
    const char *name;
} field;

typedef struct table {
    const field *fields;
    int32_t count;
    int32_t bytes;
} table;

typedef struct kernel {
    const char *name;
    int32_t family;
    int32_t bytes; /* of a number of the query */
    int32_t dk, dv, rope, d;
    int32_t key_width, key_element, key_align;
    int32_t value_width, value_element, value_align;
    int32_t value_shared, code_sides, code_channels;
    int32_t record, record_align, record_behind, record_multiple; /* record: bytes, 0: none */
    int32_t layouts_q, layouts_kv; /* a bit each */
    int32_t slots, pages, stats, sinks, window, softcap, alibi, pse_types;
    int32_t isas; /* a bit each */
    int32_t float16; /* numbers are IEEE half, not bfloat16 */
} kernel;

typedef struct hl_error hl_error;

/* One function of a header, on plain addresses. */
typedef struct routine {
    const kernel *of;
    int32_t what;
    const table *args;
    const table *plan;
    const char *name;
    int32_t (*call)(const void *args, hl_error *error); /* all but PLAN */
    int32_t (*make)(void *plan, const void *args, hl_error *error);
    int32_t (*whole)(const void *args, void *workspace, size_t bytes, hl_error *error);
    size_t (*needs)(const void *args);
    void (*task)(const void *plan, int64_t task, void *workspace);
    void (*merge)(const void *plan, int64_t merge);
} routine;

#include "glue.h"

/* From here on nothing is under test: no sanitizer, no coverage. */
#pragma clang attribute push(__attribute__((no_sanitize("address", "undefined", "coverage", "memory"))), \
                             apply_to = function)

/* One input of the fuzzer. Numbers are those of the fields; of a pointer see place_pointer. */
typedef struct record {
    uint8_t routine;
    uint8_t flags;
    uint8_t seed[6];
    int64_t slot[SLOTS];
    int32_t word[LISTS][WORDS]; /* what lists hold, again and again */
} record;

enum { FLUSH_LEFT = 1, NO_ERROR = 2, TAME = 4, SPLIT = 8, STRICT = 16, WILD = 32 };

#define V(name) (v[S_##name])

/* What is being tried, for whoever has to find out why it fails. */
static const routine *tried;
static const unsigned char *tried_args;
static void show(void);

#define FAIL(...) (fprintf(stderr, "fuzz: " __VA_ARGS__), fputc('\n', stderr), show(), abort())

/* ---- chance ---- */

static uint64_t chance_state;

static uint64_t chance(void)
{
    uint64_t x = chance_state += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static int64_t below(int64_t n)
{
    return n > 0 ? (int64_t)(chance() % (uint64_t)n) : 0;
}

static int64_t between(int64_t low, int64_t high)
{
    return low + below(high - low + 1);
}

static int32_t bits_of(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(int64_t bits)
{
    const int32_t low = (int32_t)bits;
    float x;
    memcpy(&x, &low, sizeof x);
    return x;
}

/* One of the bits that are set. */
static int32_t one_of(int32_t mask)
{
    int32_t n = __builtin_popcount((unsigned)mask);
    int64_t pick = below(n);
    for (int32_t i = 0; i < 31; ++i) {
        if ((mask >> i & 1) != 0 && pick-- == 0) {
            return i;
        }
    }
    return 0;
}

/* ---- memory between forbidden pages ---- */

enum { PAGE = 4096 };

typedef struct region {
    unsigned char *first;
    size_t bytes;
} region;

static region make_region(size_t bytes)
{
    region r;
    unsigned char *const map =
        mmap(NULL, bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED || mprotect(map + PAGE, bytes, PROT_READ | PROT_WRITE) != 0) {
        FAIL("no memory");
    }
    r.first = map + PAGE;
    r.bytes = bytes;
    return r;
}

/* So many bytes, flush with the forbidden page behind (or in front of) them. */
static unsigned char *flush(const region *r, size_t bytes, int32_t left)
{
    if (bytes > r->bytes) {
        FAIL("a region of %zu bytes is too small for %zu", r->bytes, bytes);
    }
    return r->first + (left ? 0 : r->bytes - bytes);
}

#include "fresh.h"
#include "model.h"

/* ---- records ---- */

static void read_record(record *r, const uint8_t *data, size_t size)
{
    memset(r, 0, sizeof *r);
    memcpy(r, data, size < sizeof *r ? size : sizeof *r);
}

/* The numbers as the fields' types hold them; 0 where the routine has no such field. */
static void read_values(const record *r, const table *t, int64_t *v)
{
    memset(v, 0, sizeof(int64_t) * SLOTS);
    for (int32_t i = 0; i < t->count; ++i) {
        const int64_t x = r->slot[t->fields[i].slot];
        const int32_t kind = t->fields[i].kind;
        v[t->fields[i].slot] = kind == KIND_I32 || kind == KIND_F32 ? (int32_t)x : x;
    }
}

static void write_field(void *args, const field *f, int64_t x)
{
    const int32_t small = (int32_t)x;
    if (f->kind == KIND_I32 || f->kind == KIND_F32) {
        memcpy((char *)args + f->offset, &small, sizeof small);
    } else {
        memcpy((char *)args + f->offset, &x, sizeof x);
    }
}

static int64_t read_field(const void *args, const field *f)
{
    int32_t small;
    int64_t x;
    if (f->kind == KIND_I32 || f->kind == KIND_F32) {
        memcpy(&small, (const char *)args + f->offset, sizeof small);
        return small;
    }
    memcpy(&x, (const char *)args + f->offset, sizeof x);
    return x;
}

/* ---- what libFuzzer does to a record ---- */

/* A number that something may go wrong at: limits, and the numbers around another field's. */
static int64_t edge(const record *r, const routine *q)
{
    static const int64_t fixed[] = {
        INT32_MIN, INT32_MIN + 1, -2, -1, 0, 0, 1, 1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128,
        129, 255, 256, 512, 1023, 1024, 2048, 3072, 65535, 65536, 65537, 1 << 30, INT32_MAX - 1,
        INT32_MAX, (int64_t)1 << 31, (int64_t)1 << 32, (int64_t)1 << 40, ((int64_t)1 << 40) + 1,
        INT64_MAX, INT64_MIN, INT64_MAX - 1, INT64_MAX / 2, INT64_MAX / 4, INT64_MAX / 8
    };
    const int64_t other = r->slot[q->args->fields[below(q->args->count)].slot];
    const int64_t word = r->word[below(LISTS)][below(WORDS)];
    switch (below(4)) {
    case 0: return (int64_t)((uint64_t)other + (uint64_t)between(-1, 1));
    case 1: return (int64_t)((uint64_t)word + (uint64_t)between(-1, 1));
    default: return fixed[below((int64_t)(sizeof fixed / sizeof fixed[0]))];
    }
}

static int64_t float_edge(void)
{
    static const int32_t fixed[] = {
        0, INT32_MIN, 0x3f800000, 0x3f7fffff, 0x3f800001, 0x7f800000, (int32_t)0xff800000u,
        0x7fc00000, 0x7f800001, 1, 0x00800000, 0x7f7fffff, 0x3f000000, 0x41f00000, -1
    };
    return below(4) ? fixed[below((int64_t)(sizeof fixed / sizeof fixed[0]))] : (int32_t)chance();
}

/* A pointer as a record holds it: see place_pointer. */
static int64_t pointer_edge(void)
{
    static const int32_t near[] = {0, 0, 0, 1, 2, 3, 4, 7, 8, 16, -1, -4, -8, 64, 4096};
    const uint64_t offset = (uint64_t)near[below((int64_t)(sizeof near / sizeof near[0]))];
    switch (below(6)) {
    case 0: return 0;
    case 1: return 1;
    case 2: return (int64_t)(1 | offset << 8);
    case 3: return (int64_t)((uint64_t)between(128, 191) | offset << 8);
    case 4: return (int64_t)((uint64_t)between(128, 191) | (uint64_t)below(1 << 20) << 8);
    default: return (int64_t)((uint64_t)between(192, 255) | (uint64_t)below(1 << 24) << 8);
    }
}

static void mutate_words(record *r, const routine *q)
{
    int32_t *const w = r->word[below(LISTS)];
    const int64_t at = below(WORDS);
    switch (below(6)) {
    case 0: w[at] = (int32_t)edge(r, q); break;
    case 1: w[at] = w[below(WORDS)]; break;
    case 2: w[at] = (int32_t)((uint32_t)w[at] + (uint32_t)between(-2, 2)); break;
    case 3: w[at] = -1; break;
    case 4: w[at] = (int32_t)below(20); break;
    default: {
        const int64_t to = below(WORDS);
        const int32_t kept = w[at];
        w[at] = w[to];
        w[to] = kept;
        break;
    }
    }
}

static void mutate_field(record *r, const routine *q)
{
    const field *const f = &q->args->fields[below(q->args->count)];
    const field *const g = &q->args->fields[below(q->args->count)];
    int64_t *const x = &r->slot[f->slot];
    if (f->kind == KIND_POINTER || f->kind == KIND_POINTERS) {
        *x = pointer_edge();
        return;
    }
    if (f->kind == KIND_F32) {
        *x = float_edge();
        return;
    }
    switch (below(10)) {
    case 0: case 1: case 2: *x = edge(r, q); break;
    case 3: *x = (int64_t)((uint64_t)*x + (uint64_t)between(-2, 2)); break;
    case 4: *x = between(0, 9); break;
    case 5: *x = r->slot[g->slot]; break;
    case 6: *x ^= (int64_t)1 << below(63); break;
    case 7: *x = (int64_t)((uint64_t)*x << below(8)); break;
    case 8: {
        const int64_t kept = *x;
        *x = r->slot[g->slot];
        r->slot[g->slot] = kept;
        break;
    }
    default: *x = 0; break;
    }
}

static void show(void)
{
    for (int32_t i = 0; tried != NULL && i < tried->args->count; ++i) {
        const field *const f = &tried->args->fields[i];
        const int64_t x = read_field(tried_args, f);
        if (x != 0 && f->kind >= KIND_POINTER) {
            fprintf(stderr, "fuzz:   %s = 0x%llx\n", slot_names[f->slot], (unsigned long long)x);
        } else if (x != 0 && f->kind == KIND_F32) {
            fprintf(stderr, "fuzz:   %s = %.9g\n", slot_names[f->slot], (double)float_of(x));
        } else if (x != 0) {
            fprintf(stderr, "fuzz:   %s = %lld\n", slot_names[f->slot], (long long)x);
        }
    }
}

static const routine *routine_of(const record *r)
{
    return &routines[r->routine % ROUTINES];
}

static void mutate(record *r, int64_t n)
{
    while (n-- > 0) {
        switch (below(16)) {
        case 0: r->flags = (uint8_t)chance(); break;
        case 1: r->seed[below(6)] = (uint8_t)chance(); break;
        case 2: case 3: case 4: mutate_words(r, routine_of(r)); break;
        case 5: r->routine = below(4) ? r->routine : (uint8_t)below(ROUTINES); break;
        default: mutate_field(r, routine_of(r)); break;
        }
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    record r;
    int64_t n = 1;
    chance_state = seed;
    read_record(&r, data, size);
    if (size < sizeof r || below(8) == 0) { /* a call that is accepted, to start from */
        memset(&r, 0, sizeof r);
        r.routine = (uint8_t)below(ROUTINES);
        fresh(&r, routine_of(&r));
        n = below(3);
    } else {
        n = 1 + (below(2) ? 0 : below(5));
    }
    mutate(&r, n);
    if (most < sizeof r) {
        return 0;
    }
    memcpy(data, &r, sizeof r);
    return sizeof r;
}

size_t LLVMFuzzerCustomCrossOver(const uint8_t *one, size_t n_one, const uint8_t *two,
                                 size_t n_two, uint8_t *out, size_t most, unsigned seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *one, size_t n_one, const uint8_t *two,
                                 size_t n_two, uint8_t *out, size_t most, unsigned seed)
{
    record a;
    record b;
    chance_state = seed;
    read_record(&a, one, n_one);
    read_record(&b, two, n_two);
    for (int32_t i = 0; i < SLOTS; ++i) {
        a.slot[i] = below(2) ? a.slot[i] : b.slot[i];
    }
    for (int32_t i = 0; i < LISTS; ++i) {
        if (below(2)) {
            memcpy(a.word[i], b.word[i], sizeof a.word[i]);
        }
    }
    if (most < sizeof a) {
        return 0;
    }
    memcpy(out, &a, sizeof a);
    return sizeof a;
}

#endif
