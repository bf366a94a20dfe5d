/* Accepted calls, run. Every buffer is exactly as large as the arguments say, between pages that
 * may not be touched, and NaN (for MSan: uninitialised) wherever nothing has to be. What is looked
 * for, besides what sanitizers and forbidden pages see:
 *
 * - a call whose memory and lists are sound is accepted, unless its options refuse it;
 * - every element of the outputs is written, and nothing between them;
 * - tasks in the opposite order, long rows split or not, give the same bits as one call;
 * - instruction sets agree: rows of a cache to the byte, results within a bound of rounding.
 *
 * FUZZ_DUMP=file: the call, its inputs and outputs, for the oracle (helpers_fuzz.py). */
#include "fuzz.h"
#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
#include <sanitizer/msan_interface.h>
#define POISON(at, n) __msan_poison((at), (n))
#define CLEAN(at, n) __msan_unpoison((at), (n))
#define DEFINED(at, n) __msan_check_mem_is_initialized((at), (n))
#endif
#endif
#ifndef POISON
#define POISON(at, n) ((void)(at), (void)(n))
#define CLEAN(at, n) ((void)(at), (void)(n))
#define DEFINED(at, n) ((void)(at), (void)(n))
#endif

enum { ROOM = 1 << 22, MOST = 1 << 20, PIECES = 40, WORK = 3000000, ENTRY_ROOM = 1 << 16 };

typedef struct sizes {
    double q_sum; /* largest sum of |q| over channels */
    double k_most, v_most, bias_most;
} sizes;

static region rooms[PIECES];
static region list_rooms[LISTS];
static region work_room, split_room, page_rooms[2];
static unsigned char *copy_of[PIECES]; /* outputs of the scalar code */
static unsigned char *again[PIECES];
static unsigned char *used_of[PIECES]; /* a byte each: part of an element */
static uint64_t counts[4];             /* refused, accepted, run, compared */

static void say_counts(void)
{
    fprintf(stderr, "fuzz: %llu calls, %llu of them run, %llu of these on several sets\n",
            (unsigned long long)(counts[0] + counts[1]), (unsigned long long)counts[2],
            (unsigned long long)counts[3]);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    for (int32_t i = 0; i < PIECES; ++i) {
        rooms[i] = make_region(ROOM);
        copy_of[i] = make_region(ROOM).first;
        again[i] = make_region(ROOM).first;
        used_of[i] = make_region(ROOM).first;
    }
    for (int32_t i = 0; i < LISTS; ++i) {
        list_rooms[i] = make_region(ENTRY_ROOM);
    }
    work_room = make_region((size_t)1 << 26);
    split_room = make_region((size_t)1 << 26);
    page_rooms[0] = make_region(ROOM);
    page_rooms[1] = make_region(ROOM);
    atexit(say_counts);
    return 0;
}

/* ---- numbers ---- */

static float number_of(const void *at, int32_t type, const kernel *k)
{
    uint16_t half;
    uint32_t bits;
    float x;
    if (type == T_FLOAT || (type == T_NUMBER && k->bytes == 4)) {
        memcpy(&x, at, sizeof x);
        return x;
    }
    memcpy(&half, at, sizeof half);
    if (type == T_NUMBER && k->float16) {
        const int32_t e = half >> 10 & 31;
        const float m = (float)(half & 1023) / 1024.0f;
        x = e == 0 ? m * 0x1p-14f : e == 31 ? (m != 0 ? __builtin_nanf("") : __builtin_inff())
            : (1.0f + m) * (float)(e < 15 ? 1.0 / (1 << (15 - e)) : (double)(1 << (e - 15)));
        return half >> 15 ? -x : x;
    }
    bits = (uint32_t)half << 16;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A few bits of mantissa: every type holds it exactly. */
static void put_number(void *at, double x, int32_t type, const kernel *k)
{
    const float f = (float)x;
    uint32_t bits;
    uint16_t half;
    memcpy(&bits, &f, sizeof bits);
    if (type == T_FLOAT || (type == T_NUMBER && k->bytes == 4)) {
        memcpy(at, &f, sizeof f);
        return;
    }
    half = (uint16_t)(bits >> 16);
    if (type == T_NUMBER && k->float16) {
        const int32_t e = (int32_t)(bits >> 23 & 255) - 127 + 15;
        half = (uint16_t)((bits >> 16 & 0x8000) | (e <= 0 ? 0 : (uint32_t)e << 10)
                          | (e <= 0 ? 0 : bits >> 13 & 1023));
    }
    memcpy(at, &half, sizeof half);
}

static double random_number(double most)
{
    return (double)between(-63, 63) / 64.0 * most;
}

/* ---- a call made small ---- */

static int64_t at_most(int64_t x, int64_t most)
{
    return x >= 0 && x <= most ? x : (int64_t)((uint64_t)x % (uint64_t)(most + 1));
}

static void shrink(const routine *q, int64_t *v)
{
    static const struct {
        int32_t slot;
        int32_t most;
    } limits[] = {
        {S_batch, 4}, {S_seq_q, 70}, {S_seq_kv, 300}, {S_heads_q, 40}, {S_heads_kv, 4},
        {S_list_length, 40}, {S_num_blocks, 12}, {S_block_size, 130}, {S_max_blocks, 8},
        {S_rows, 40}, {S_parts, 5}, {S_pse_width, 1100}, {S_mask_width, 2048},
        {S_mask_rows, 3072}, {S_mask_heads, 40}, {S_mask_batch, 4}, {S_pse_batch, 4}
    };
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; ++i) {
        v[limits[i].slot] = at_most(v[limits[i].slot], limits[i].most);
    }
    for (int32_t i = 0; i < q->args->count; ++i) {
        const field *const f = &q->args->fields[i];
        if (strstr(f->name, "_stride") != NULL) {
            v[f->slot] = at_most(v[f->slot], 1 << 17);
        }
    }
    V(partials) = 0;
    V(partials_bytes) = 0;
}

/* Words that a list can hold, unless the record wants them as they are. */
static void mend(const routine *q, const record *r, const int64_t *v, int32_t word[LISTS][WORDS])
{
    const int32_t family = q->of->family;
    const int32_t trains = family == TRAIN || family == GRAD;
    const int32_t slots = V(index_kind) == HL_INDEX_SLOTS;
    const int32_t rows = V(layout_query) == HL_LAYOUT_TND || trains;
    const int32_t keys = V(layout_kv) == HL_LAYOUT_TND || trains;
    const int32_t by_slot = slots && family == DECODE;
    const int64_t limit = trains ? V(seq_kv) : decode_limit(v);
    memcpy(word, r->word, sizeof r->word);
    if (r->flags & STRICT) {
        return;
    }
    for (int32_t i = 0; i < WORDS; ++i) {
        int32_t *const w = &word[0][i];
        w[LIST_TABLE * WORDS] = (int32_t)at_most(w[LIST_TABLE * WORDS],
            or_one(V(num_blocks)) * (by_slot ? or_one(V(block_size)) : 1) - 1);
        w[LIST_LENGTHS * WORDS] = (int32_t)at_most(w[LIST_LENGTHS * WORDS],
            q->what == PLAN ? limit : V(rows));
        w[LIST_ENDS * WORDS] = (int32_t)at_most(w[LIST_ENDS * WORDS],
            q->what == PLAN ? V(seq_q) : limit > V(rows) ? limit - V(rows) : 0);
        w[LIST_COUNTS * WORDS] = family == DECODE ? w[LIST_COUNTS * WORDS] % 64
            : (int32_t)at_most(w[LIST_COUNTS * WORDS], trains ? 300 : V(list_length));
        for (int32_t j = i; j > 0; --j) { /* ends do not fall */
            for (int32_t l = LIST_LENGTHS; l <= LIST_ENDS; ++l) {
                int32_t *const x = &word[l][j];
                if ((l == LIST_LENGTHS ? keys : rows) && q->what == PLAN && x[-1] > x[0]) {
                    const int32_t kept = x[0];
                    x[0] = x[-1];
                    x[-1] = kept;
                }
            }
        }
    }
}

/* ---- what has to be there ---- */

static int32_t in_use(const int64_t *v, const int32_t *ends, int32_t tnd, int64_t outer,
                      int64_t inner)
{
    return tnd ? ends != NULL && V(batch) > 0 && inner < ends[V(batch) - 1]
               : ends == NULL || inner < ends[outer];
}

static int32_t needed(const routine *q, const int64_t *v, const void *const *list, int32_t slot,
                      int64_t outer, int64_t inner)
{
    const kernel *const k = q->of;
    const int32_t *const table = list[S_block_table];
    const int32_t paged = V(layout_kv) == HL_LAYOUT_PA_BSND || V(layout_kv) == HL_LAYOUT_PA_BNSD;
    const int32_t of_keys = slot == S_key || slot == S_key_rope || slot == S_value;
    const int32_t *lengths = list[S_actual_seq_lengths_kv];
    if (q->what != PLAN || k->family == TRAIN || k->family == GRAD) {
        return 1;
    }
    if (k->family != DECODE && (slot == S_query || slot == S_query_rope)) {
        return in_use(v, list[S_actual_seq_lengths_query], V(layout_query) == HL_LAYOUT_TND, outer,
                      inner);
    }
    if (!of_keys || V(index_kind) == HL_INDEX_SLOTS) {
        return 1;
    }
    if (k->family == DECODE) {
        const int32_t *const pad = list[S_kv_padding_size];
        lengths = list[S_actual_seq_lengths];
        if (lengths == NULL || (paged && table == NULL)) {
            return 1;
        }
        if (!paged) {
            const int64_t n = lengths[V(lengths) == 1 ? 0 : outer];
            const int64_t first = pad == NULL ? 0 : V(seq_kv) - n - (pad[0] > 0 ? pad[0] : 0);
            return first >= 0 && inner >= first && inner < first + n;
        }
    }
    if (!paged) {
        return in_use(v, lengths, V(layout_kv) == HL_LAYOUT_TND, outer, inner);
    }
    for (int64_t b = 0; b < V(batch); ++b) {
        const int64_t n = lengths == NULL ? V(max_blocks) * V(block_size)
            : lengths[k->family == DECODE && V(lengths) == 1 ? 0 : b];
        for (int64_t i = 0; i * V(block_size) < n; ++i) {
            if (table != NULL && table[b * V(max_blocks) + i] == outer
                && i * V(block_size) + inner < n) {
                return 1;
            }
        }
    }
    return 0;
}

/* Records come from the header's own quantise_rows: codes and scales that are what they should. */
static void fill_records(const routine *q, const span *s, unsigned char *at, const int64_t *v,
                         const void *const *list)
{
    static float row[4096];
    const routine *encode = NULL;
    for (int32_t i = 0; i < ROUTINES; ++i) {
        if (routines[i].of == q->of && routines[i].what == QUANTISE) {
            encode = &routines[i];
        }
    }
    for (int64_t b = 0; encode != NULL && b < s->count[0]; ++b) {
        for (int64_t i = 0; i < s->count[1]; ++i) {
            for (int64_t h = 0; h < s->count[2]; ++h) {
                unsigned char args[256] = {0};
                unsigned char made[2048];
                unsigned char *const to = at + b * s->step[0] + i * s->step[1] + h * s->step[2];
                int64_t x[SLOTS] = {0};
                if (!needed(q, v, list, s->slot, b, i)) {
                    continue;
                }
                for (int32_t c = 0; c < q->of->dk + q->of->rope; ++c) {
                    row[c] = (float)random_number(1.0);
                }
                x[S_nope] = (int64_t)row;
                x[S_records] = (int64_t)made;
                x[S_rows] = 1;
                x[S_numbers_f32] = 1;
                x[S_block_size] = q->of->record_behind != 0;
                x[S_isa] = HL_ISA_SCALAR;
                for (int32_t f = 0; f < encode->args->count; ++f) {
                    write_field(args, &encode->args->fields[f], x[encode->args->fields[f].slot]);
                }
                if (encode->call(args, NULL) != HL_OK) {
                    FAIL("%s: a row was refused", encode->name);
                }
                if (to + q->of->record > at + s->bytes) {
                    continue; /* of the last page only so many rows are there */
                }
                memcpy(to, made, (size_t)q->of->record);
                CLEAN(to, (size_t)q->of->record);
                if (q->of->record_behind != 0) {
                    unsigned char *const behind = at + b * s->step[0] + s->count[1] * s->step[1]
                                                  + i * q->of->record_behind;
                    if (behind + q->of->record_behind <= at + s->bytes) {
                        memcpy(behind, made + q->of->record, (size_t)q->of->record_behind);
                        CLEAN(behind, (size_t)q->of->record_behind);
                    }
                }
            }
        }
    }
}

static double most_of(const span *s)
{
    switch (s->slot) {
    case S_antiquant_scale: case S_quant_scale2: return -1.0 / 64; /* above 0 */
    case S_softmax_max: return -8.0;
    case S_softmax_sum: return -16.0;
    case S_alibi_slopes: return 0.125;
    default: return 1.0;
    }
}

static void fill_element(const routine *q, const span *s, unsigned char *at, double most)
{
    switch (s->type) {
    case T_NUMBER: case T_FLOAT: case T_BF16:
        put_number(at, most < 0 ? -most * (double)between(1, 64) / 64.0 : random_number(most),
                   s->type, q->of);
        CLEAN(at, (size_t)(s->type == T_FLOAT ? 4 : s->type == T_BF16 ? 2 : q->of->bytes));
        break;
    case T_MASK:
        *at = below(3) == 0 ? (unsigned char)chance() : 0;
        CLEAN(at, 1);
        break;
    default:
        *at = (unsigned char)chance();
        CLEAN(at, 1);
        break;
    }
}

static int64_t element_of(const span *s, const kernel *k)
{
    return s->type == T_FLOAT ? 4 : s->type == T_BF16 ? 2 : s->type == T_NUMBER ? k->bytes : 1;
}

/* Poison all of it, then write what may be read. */
static void fill_span(const routine *q, const span *s, unsigned char *at, const int64_t *v,
                      const void *const *list)
{
    const int64_t each = element_of(s, q->of);
    const double most = most_of(s);
    memset(at, 0xff, (size_t)s->bytes);
    POISON(at, (size_t)s->bytes);
    if (s->type == T_RECORD && (q->what != CONVERT)) {
        fill_records(q, s, at, v, list);
        return;
    }
    if (s->channels == 0) {
        for (int64_t i = 0; i < (int64_t)s->bytes / each; ++i) {
            fill_element(q, s, at + i * each, most);
        }
        return;
    }
    for (int64_t b = 0; b < s->count[0]; ++b) {
        for (int64_t i = 0; i < s->count[1]; ++i) {
            for (int64_t h = 0; needed(q, v, list, s->slot, b, i) && h < s->count[2]; ++h) {
                unsigned char *const to =
                    at + (b * s->step[0] + i * s->step[1] + h * s->step[2]) * s->element;
                for (int64_t c = 0; c < s->channels * s->element / each; ++c) {
                    fill_element(q, s, to + c * each, most);
                }
            }
        }
    }
}

/* Which bytes of an output are elements. */
static void mark_span(const span *s, unsigned char *used)
{
    memset(used, s->channels == 0, (size_t)s->bytes);
    for (int64_t b = 0; b < s->count[0]; ++b) {
        for (int64_t i = 0; i < s->count[1]; ++i) {
            for (int64_t h = 0; h < s->count[2]; ++h) {
                memset(used + (b * s->step[0] + i * s->step[1] + h * s->step[2]) * s->element, 1,
                       (size_t)(s->channels * s->element));
            }
        }
    }
}

static void measure(const routine *q, const model *m, unsigned char *const *at, sizes *z)
{
    double scale = 0;
    double offset = 0;
    memset(z, 0, sizeof *z);
    for (int32_t i = 0; i < m->n; ++i) {
        const span *const s = &m->span[i];
        double most = 0;
        if (s->written || s->bytes == 0) {
            continue;
        }
        if (s->type == T_NUMBER || s->type == T_FLOAT || s->type == T_BF16) {
            const int64_t each = element_of(s, q->of);
            for (int64_t j = 0; j < (int64_t)s->bytes / each; ++j) {
                const double x = (double)number_of(at[i] + j * each, s->type, q->of);
                most = x > most ? x : -x > most ? -x : most; /* not NaN */
            }
        }
        switch (s->slot) {
        case S_query: case S_query_rope: z->q_sum += most * (double)s->channels; break;
        case S_key: case S_key_rope:
            z->k_most = z->k_most > most ? z->k_most : most;
            z->v_most = z->v_most > most ? z->v_most : most;
            break;
        case S_value: case S_dout: z->v_most = z->v_most > most ? z->v_most : most; break;
        case S_pse: case S_pse_shift: z->bias_most += most; break;
        case S_alibi_slopes: z->bias_most += most * 512; break;
        case S_sinks: z->bias_most += most; break;
        case S_antiquant_scale: scale = most; break;
        case S_antiquant_offset: offset = most; break;
        default: break;
        }
        if (s->type == T_RECORD) {
            z->k_most = z->v_most = 1.1;
        }
    }
    if (q->of->code_sides) {
        z->k_most = z->v_most = scale * (128 + offset);
    }
}

/* ---- running it ---- */

typedef struct call {
    const routine *q;
    const int64_t *v;
    const model *m;
    unsigned char *at[PIECES];
    unsigned char args[1024] __attribute__((aligned(16)));
    int32_t flags;
    sizes size;
} call;

static void set_field(call *c, int32_t slot, int64_t x)
{
    for (int32_t i = 0; i < c->q->args->count; ++i) {
        if (c->q->args->fields[i].slot == slot) {
            write_field(c->args, &c->q->args->fields[i], x);
        }
    }
}

static void poison_outputs(const call *c, int32_t byte)
{
    for (int32_t i = 0; i < c->m->n; ++i) {
        if (c->m->span[i].written) {
            CLEAN(c->at[i], (size_t)c->m->span[i].bytes);
            memset(c->at[i], byte, (size_t)c->m->span[i].bytes);
            if (c->q->what == PLAN) {
                POISON(c->at[i], (size_t)c->m->span[i].bytes);
            }
        }
    }
}

static unsigned char *workspace_of(const call *c, size_t bytes)
{
    unsigned char *const at = flush(&work_room, bytes, c->flags & FLUSH_LEFT);
    CLEAN(at, bytes);
    memset(at, 0xff, bytes);
    POISON(at, bytes);
    return at;
}

/* 0: it was refused. */
static int32_t run_whole(call *c)
{
    hl_error error;
    const size_t bytes = c->q->what == PLAN ? c->q->needs(c->args) : 0;
    if (c->q->what != PLAN) {
        return c->q->call(c->args, &error) == HL_OK;
    }
    if (bytes == 0) {
        return 0;
    }
    if (c->q->whole(c->args, workspace_of(c, bytes), bytes, &error) != HL_OK) {
        FAIL("%s: planned, then refused", c->q->name);
    }
    return 1;
}

/* The same by tasks, the last one first, long rows split if there is any. */
static void run_tasks(call *c)
{
    static unsigned char plan[2048] __attribute__((aligned(16)));
    const int32_t args = c->q->args->count;
    int64_t n_tasks = 0;
    int64_t n_merges = 0;
    int64_t task_bytes = 0;
    int64_t split_bytes = 0;
    for (int32_t turn = 0; turn < 2; ++turn) {
        if (c->q->make(plan, c->args, NULL) != HL_OK) {
            FAIL("%s: accepted, then refused", c->q->name);
        }
        for (int32_t i = args; i < c->q->plan->count; ++i) {
            const field *const f = &c->q->plan->fields[i];
            const int64_t x = read_field(plan, f);
            n_tasks = strcmp(f->name, "n_tasks") == 0 ? x : n_tasks;
            n_merges = strcmp(f->name, "n_merges") == 0 ? x : n_merges;
            task_bytes = strcmp(f->name, "task_bytes") == 0 ? x : task_bytes;
            split_bytes = strcmp(f->name, "split_bytes") == 0 ? x : split_bytes;
        }
        if (turn == 0 && c->flags & SPLIT && split_bytes > 0
            && split_bytes < (int64_t)split_room.bytes) {
            unsigned char *const at = flush(&split_room, (size_t)split_bytes,
                                            c->flags & FLUSH_LEFT);
            CLEAN(at, (size_t)split_bytes);
            memset(at, 0xff, (size_t)split_bytes);
            POISON(at, (size_t)split_bytes);
            set_field(c, S_partials, (int64_t)at);
            set_field(c, S_partials_bytes, split_bytes);
        } else {
            break;
        }
    }
    for (int64_t i = n_tasks; i-- > 0;) {
        c->q->task(plan, i, workspace_of(c, (size_t)task_bytes));
    }
    for (int64_t i = n_merges; i-- > 0;) {
        c->q->merge(plan, i);
    }
    set_field(c, S_partials, 0);
    set_field(c, S_partials_bytes, 0);
}

static const char *isa_name(int32_t isa)
{
    static const char *const names[] = {"best", "scalar", "neon", "avx2", "avx512", "amx"};
    return names[isa];
}

/* Elements are written, by both ways the same; what lies between them is not. */
static void check_outputs(const call *c, int32_t isa)
{
    for (int32_t i = 0; i < c->m->n; ++i) {
        const span *const s = &c->m->span[i];
        const int64_t each = element_of(s, c->q->of);
        for (int64_t j = 0; s->written && j < (int64_t)s->bytes; j += each) {
            const unsigned char *const one = again[i] + j;
            const unsigned char *const two = c->at[i] + j;
            if (!used_of[i][j]) {
                for (int64_t l = 0; l < each && j + l < (int64_t)s->bytes; ++l) {
                    if (one[l] != 0xff || two[l] != 0x5a) {
                        FAIL("%s: %s: a byte between elements of %s was written", c->q->name,
                             isa_name(isa), slot_names[s->slot]);
                    }
                }
                continue;
            }
            DEFINED(two, (size_t)each);
            if (memcmp(one, two, (size_t)each) != 0) {
                int32_t left = 1;
                for (int64_t l = 0; l < each; ++l) {
                    left &= one[l] == 0xff && two[l] == 0x5a;
                }
                FAIL("%s: %s: element %lld of %s %s", c->q->name, isa_name(isa),
                     (long long)(j / each), slot_names[s->slot],
                     left ? "was not written" : "depends on tasks");
            }
        }
    }
}

/* What two orders of float32 sums may differ by. */
static double bound_of(const call *c, const span *s, double x)
{
    const int64_t *const v = c->v;
    const kernel *const k = c->q->of;
    const double magnitude = x < 0 ? -x : x;
    const double scale = float_of(V(scale_value)) != 0 || k->family == SPARSE || k->family == RECORDS
                         ? (double)float_of(V(scale_value)) : 1.0;
    const double kept = float_of(V(keep_prob)) > 0 ? (double)float_of(V(keep_prob)) : 1.0;
    const double score = (scale < 0 ? -scale : scale) * c->size.q_sum * c->size.k_most
                         + c->size.bias_most + (double)float_of(V(softcap)) + 1;
    const double delta = score * (double)(k->dk + k->rope + 64) * 0x1p-23;
    const double r = 4 * delta + 2e-5;
    const double u = element_of(s, k) == 4 ? 0x1p-22 : k->float16 ? 0x1p-10 : 0x1p-7;
    if (r > 0.25 || !(r >= 0) || (k->family == GRAD && score > 30)) { /* no promise is left */
        return 1e300;
    }
    switch (s->slot) {
    case S_softmax_max: return delta * 4 + magnitude * 1e-5;
    case S_softmax_sum: return magnitude * r;
    case S_softmax_lse: return r + magnitude * 1e-5;
    default: return r * (c->size.v_most / kept + magnitude) + u * magnitude + 1e-30;
    }
}

static double largest(const span *s, const unsigned char *at, const kernel *k, int32_t i)
{
    double most = 0;
    for (int64_t j = 0; j < (int64_t)s->bytes; j += element_of(s, k)) {
        const double x = used_of[i][j] ? (double)number_of(at + j, s->type, k) : 0;
        most = x > most ? x : -x > most ? -x : most;
    }
    return most;
}

/* This instruction set against plain C. */
static void compare(const call *c, int32_t isa)
{
    for (int32_t i = 0; i < c->m->n; ++i) {
        const span *const s = &c->m->span[i];
        const int64_t each = element_of(s, c->q->of);
        double most = 0;
        if (!s->written) {
            continue;
        }
        if (c->q->what != PLAN) {
            if (memcmp(copy_of[i], c->at[i], (size_t)s->bytes) != 0) {
                FAIL("%s: %s: other bytes in %s", c->q->name, isa_name(isa), slot_names[s->slot]);
            }
            continue;
        }
        if (s->slot == S_dropout_state || s->type == T_CODE) {
            for (int64_t j = 0; s->type == T_CODE && j < (int64_t)s->bytes; ++j) {
                const int32_t gap = (int8_t)copy_of[i][j] - (int8_t)c->at[i][j];
                if (used_of[i][j] && (gap < -2 || gap > 2)) {
                    FAIL("%s: %s: code %lld", c->q->name, isa_name(isa), (long long)j);
                }
            }
            continue;
        }
        most = c->q->of->family == GRAD ? largest(s, copy_of[i], c->q->of, i) : 0;
        for (int64_t j = 0; j < (int64_t)s->bytes; j += each) {
            const double x = used_of[i][j] ? (double)number_of(copy_of[i] + j, s->type, c->q->of)
                                           : 0;
            const double y = used_of[i][j] ? (double)number_of(c->at[i] + j, s->type, c->q->of) : 0;
            const double gap = x > y ? x - y : y - x;
            double bound = bound_of(c, s, x);
            if (bound > 1e299) {
                break;
            }
            bound = c->q->of->family == GRAD ? most * 2e-3 + (x < 0 ? -x : x) * 0x1p-6 + 1e-30
                                             : bound;
            if (x != y && !(gap <= bound) && !(x != x && y != y)) {
                FAIL("%s: %s: element %lld of %s is %.9g, plain C says %.9g, bound %.3g",
                     c->q->name, isa_name(isa), (long long)(j / each), slot_names[s->slot], y, x,
                     bound);
            }
            if (x != x) {
                FAIL("%s: element %lld of %s is no number", c->q->name, (long long)(j / each),
                     slot_names[s->slot]);
            }
        }
    }
}

static void dump(const call *c, const void *const *list, const model *m);

static void keep_outputs(const call *c, unsigned char *const *to)
{
    for (int32_t i = 0; i < c->m->n; ++i) {
        if (c->m->span[i].written) {
            CLEAN(c->at[i], (size_t)c->m->span[i].bytes);
            memcpy(to[i], c->at[i], (size_t)c->m->span[i].bytes);
        }
    }
}

static void run_call(call *c, const void *const *list)
{
    const int32_t sets[] = {HL_ISA_SCALAR, HL_ISA_AVX2, HL_ISA_AVX512};
    int32_t done = 0;
    for (int32_t i = 0; i < c->m->n; ++i) {
        if (c->m->span[i].written) {
            mark_span(&c->m->span[i], used_of[i]);
        }
    }
    for (int32_t i = 0; i < 3; ++i) {
        if ((c->q->of->isas >> sets[i] & 1) == 0) {
            continue;
        }
        set_field(c, S_isa, sets[i]);
        poison_outputs(c, 0xff);
        if (!run_whole(c)) {
            ++counts[0];
            return;
        }
        if (c->q->what == PLAN) {
            keep_outputs(c, again);
            poison_outputs(c, 0x5a);
            run_tasks(c);
            if (c->v[S_dropout_state] != 0) {
                for (int32_t j = 0; j < c->m->n; ++j) { /* not a task's to write */
                    if (c->m->span[j].slot == S_dropout_state) {
                        memcpy(c->at[j], again[j], (size_t)c->m->span[j].bytes);
                    }
                }
            }
            check_outputs(c, sets[i]);
        }
        if (done == 0) {
            keep_outputs(c, copy_of);
            if (getenv("FUZZ_DUMP") != NULL) {
                dump(c, list, c->m);
            }
        }
        compare(c, sets[i]); /* of plain C: whether results are numbers */
        ++done;
    }
    ++counts[1];
    counts[2] += done > 0;
    counts[3] += done > 1;
}

/* For the oracle: args, then every list, input and output of plain C, as runner.c has pieces. */
static void dump(const call *c, const void *const *list, const model *m)
{
    FILE *const file = fopen(getenv("FUZZ_DUMP"), "ab");
    int64_t head[4] = {0, c->q - routines, c->q->args->bytes, 0};
    (void)list;
    if (file == NULL) {
        FAIL("cannot write FUZZ_DUMP");
    }
    for (int32_t i = 0; i < m->n; ++i) {
        head[3] += m->span[i].bytes != 0;
    }
    fwrite(head, sizeof head, 1, file);
    fwrite(c->args, (size_t)c->q->args->bytes, 1, file);
    for (int32_t i = 0; i < m->n; ++i) {
        const span *const s = &m->span[i];
        const int64_t piece[12] = {
            s->slot, s->type, (int64_t)s->bytes, s->written, s->count[0], s->count[1], s->count[2],
            s->channels, s->step[0], s->step[1], s->step[2], s->element
        };
        if (s->bytes != 0) {
            CLEAN(c->at[i], (size_t)s->bytes);
            fwrite(piece, sizeof piece, 1, file);
            fwrite(c->at[i], (size_t)s->bytes, 1, file);
        }
    }
    fclose(file);
}

/* Records that share bytes hold no numbers of their own: nothing is known of such a cache. */
static int32_t entangled(const kernel *k, const model *m)
{
    for (int32_t i = 0; i < m->n; ++i) {
        const span *const s = &m->span[i];
        const wide head = s->count[2] > 1 ? (wide)(s->count[2] - 1) * s->step[2] + k->record
                                          : k->record;
        const wide page = (wide)(s->count[1] - 1) * s->step[1] + head;
        if (s->type == T_RECORD && !s->written
            && ((s->count[2] > 1 && s->step[2] < k->record)
                || (s->count[1] > 1 && s->step[1] < head)
                || (s->count[0] > 1 && s->step[0] < page))) {
            return 1;
        }
    }
    return 0;
}

static int32_t too_much(const routine *q, const int64_t *v, const model *m)
{
    wide work = (wide)or_one(V(batch)) * or_one(V(seq_q)) * or_one(V(heads_q))
                * or_one(V(seq_kv) > V(max_blocks) * V(block_size) ? V(seq_kv)
                         : V(max_blocks) * V(block_size)) * (q->of->dk + q->of->dv);
    wide all = 0;
    for (int32_t i = 0; i < m->n; ++i) {
        if (m->span[i].bytes > MOST) {
            return 1;
        }
        all += m->span[i].bytes;
    }
    return all > 2 * MOST || (q->what == PLAN && work > WORK);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static call c;
    static model m;
    record r;
    int64_t v[SLOTS];
    int32_t word[LISTS][WORDS];
    const void *list[SLOTS] = {NULL};
    const routine *q;
    read_record(&r, data, size);
    q = routine_of(&r);
    if (size < sizeof r) { /* so that there is something to cover */
        (void)routines[0].needs(c.args);
        return 0;
    }
    read_values(&r, q->args, v);
    shrink(q, v);
    if (q->what == PARTS || V(key_pages) != 0 || V(value_pages) != 0 || V(mask_check) == 1) {
        return 0; /* pages and parts: test_decode.py and test_properties.py */
    }
    mend(q, &r, v, word);
    memcpy(&chance_state, &r, sizeof chance_state);
    model_of(q, v, NULL, &m);
    if (m.refused || too_much(q, v, &m)) {
        return 0;
    }
    for (int32_t i = 0; i < q->args->count; ++i) { /* lists first: sizes may depend on them */
        const field *const f = &q->args->fields[i];
        int64_t n = 0;
        for (int32_t j = 0; j < m.n; ++j) {
            n = m.span[j].slot == f->slot ? (int64_t)m.span[j].bytes / or_one(f->list_bytes) : n;
        }
        if (f->list >= 0 && v[f->slot] != 0 && n * f->list_bytes <= ENTRY_ROOM) {
            unsigned char *const at = flush(&list_rooms[f->list], (size_t)(n * f->list_bytes),
                                            r.flags & FLUSH_LEFT);
            for (int64_t j = 0; j < n; ++j) {
                const int64_t x = word[f->list][j % WORDS];
                memcpy(at + j * f->list_bytes, &x, (size_t)f->list_bytes);
            }
            list[f->slot] = at;
        }
    }
    if (unsound(q, v, list) != NULL) {
        return 0; /* checks.c */
    }
    model_of(q, v, list, &m);
    if (m.refused || too_much(q, v, &m) || entangled(q->of, &m)) {
        return 0;
    }
    memset(&c, 0, sizeof c);
    c.q = q;
    c.v = v;
    c.m = &m;
    c.flags = r.flags;
    for (int32_t i = 0; i < q->args->count; ++i) {
        const field *const f = &q->args->fields[i];
        const int32_t tensor = f->kind == KIND_POINTER || f->kind == KIND_POINTERS;
        write_field(c.args, f, tensor ? (v[f->slot] != 0 ? (int64_t)list[f->slot] : 0)
                                      : v[f->slot]);
    }
    for (int32_t i = 0; i < m.n; ++i) {
        span *const s = &m.span[i];
        if (list[s->slot] != NULL || s->type == T_LIST && !s->written) {
            c.at[i] = (unsigned char *)list[s->slot];
            continue;
        }
        if (s->bytes % s->align != 0 || v[s->slot] == 0) {
            s->bytes += s->bytes % s->align ? s->align - s->bytes % s->align : 0;
        }
        c.at[i] = flush(&rooms[i], (size_t)s->bytes, r.flags & FLUSH_LEFT);
        if (v[s->slot] != 0) {
            fill_span(q, s, c.at[i], v, list);
        } else {
            c.at[i] = NULL;
            s->bytes = 0;
            s->count[0] = 0;
            s->written = 0;
        }
        set_field(&c, s->slot, (int64_t)c.at[i]);
    }
    measure(q, &m, c.at, &c.size);
    tried = q;
    tried_args = c.args;
    run_call(&c, list);
    return 0;
}

#pragma clang attribute pop
