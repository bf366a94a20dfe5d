/* The checks of every function alone: tensors lie where nobody may read or write, lists and masks
 * that checks do read are exactly as large as the arguments say. The headers are cut behind their
 * checks (helpers_fuzz.py). What is looked for, besides what sanitizers and forbidden pages see:
 *
 * - a refused call has written nothing; arguments are never written;
 * - its error names an argument of the struct, with a sentence that fits and has that name in it;
 * - an accepted call's memory is there, aligned, addressable and apart, and its lists lead nowhere
 *   else, by the arithmetic of model.h;
 * - the same call gets the same answer, with and without an error struct.
 *
 * Each input is tried with COUSINS others, which differ from it by a number or two: a call's checks
 * take less time than libFuzzer takes for an input. */
#include "fuzz.h"

enum { COUSINS = 31 };
enum { ENTRIES = 1024, LOOPS = ENTRIES, REGION = 16 * PAGE, TRIANGLE = 3072 * 2048 };

static region lists[LISTS + 2];
static region triangles[3]; /* of 2048 rows, of 3072, and one that is none */
static uint64_t counts[2];
static int32_t cousins;        /* which of an input's it is: only the first takes its time */

static void say_counts(void);

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    for (int32_t i = 0; i < LISTS + 2; ++i) {
        lists[i] = make_region(REGION);
    }
    for (int32_t i = 0; i < 3; ++i) {
        triangles[i] = make_region(TRIANGLE);
    }
    atexit(say_counts);
    for (int32_t i = 0; i < 3072; ++i) {
        for (int32_t j = 0; j < 2048; ++j) {
            const unsigned char hidden = i < 2048 ? j > i : j >= 1024;
            triangles[1].first[i * 2048 + j] = hidden;
            if (i < 2048) {
                triangles[0].first[(i + 1024) * 2048 + j] = hidden;
            }
        }
    }
    return 0;
}

/* Where a tensor that nobody may touch is said to be. */
static int64_t own_place(int32_t i)
{
    return ((int64_t)0x20 << 40) + ((int64_t)i << 38);
}

/* A pointer of the record. The low byte says what the rest, an offset, counts from: 0 with 0:
 * NULL; up to 127 its own place; up to 191 that of another field; then nothing at all. */
static int64_t place_pointer(const table *t, int32_t i, int64_t x, const int64_t *base)
{
    const int32_t from = (int32_t)(x & 255);
    const int64_t offset = x >> 8;
    if (from == 0 && offset == 0) {
        return 0;
    }
    if (from < 128) {
        return (int64_t)((uint64_t)base[i] + (uint64_t)offset);
    }
    if (from < 192) {
        return (int64_t)((uint64_t)base[(from - 128) % t->count] + (uint64_t)offset);
    }
    return from < 224 ? offset : (int64_t)~(uint64_t)offset;
}

/* Entries of a list: at most so many, however many the call says. */
static int32_t entries_of(const model *m, const field *f, wide *said)
{
    *said = 0;
    for (int32_t i = 0; i < m->n; ++i) {
        if (m->span[i].slot == f->slot) {
            *said = m->span[i].bytes / f->list_bytes;
        }
    }
    return *said > ENTRIES ? ENTRIES : (int32_t)*said;
}

static void *place_list(const record *r, const field *f, int32_t n, int32_t bad, int32_t off)
{
    unsigned char *const at =
        flush(&lists[f->list], (size_t)n * (size_t)f->list_bytes + (size_t)(off ? 8 : 0),
              r->flags & FLUSH_LEFT) + off;
    for (int32_t i = 0; i < n; ++i) {
        const int32_t word = bad ? -1 : r->word[f->list][i % WORDS];
        int64_t x = word == INT32_MIN ? INT64_MIN : word == INT32_MAX ? INT64_MAX : word;
        if (f->kind == KIND_POINTERS) {
            x = word == 0 ? 0 : own_place(128) + (int64_t)word * 64 + (word % 7 == 0);
        }
        if (f->list_bytes == 4) {
            memcpy(at + 4 * i, &word, 4);
        } else {
            memcpy(at + 8 * i, &x, 8);
        }
    }
    return at;
}

/* Calls of so many batches, blocks or parts that going round them would take long: refused for a
 * tensor that is missing, once every size has been looked at, or made smaller. */
static void limit(const routine *q, const record *r, int64_t *v, model *m)
{
    const int32_t trains = q->of->family == TRAIN || q->of->family == GRAD;
    if (m->refused || m->loops <= LOOPS || (q->what == PLAN && trains)) {
        return;
    }
    if (r->flags & TAME) {
        V(batch) &= 7;
        V(max_blocks) &= 15;
        V(seq_q) &= 7;
        V(list_length) &= 15;
        V(heads_kv) &= 7;
        V(heads_q) &= 63;
        V(parts) &= 7;
    } else {
        V(attention_out) = 0;
        V(positions) = 0;
    }
    model_of(q, v, NULL, m);
    if (q->what == PLAN && m->loops > LOOPS && (V(seq_q) == 0 || V(heads_q) == 0
                                               || q->of->family == DECODE || r->flags & TAME)) {
        V(batch) = 0;
        model_of(q, v, NULL, m);
    }
}

/* A mask that the checks read, element by element; mostly one that is wrong at once. */
static int64_t triangle(const record *r, const int64_t *v)
{
    const int32_t tall = V(mask_rows) == 3072;
    const region *const found = &triangles[r->seed[0] != 90 || cousins > 0 ? 2 : tall];
    return (int64_t)flush(found, (size_t)2048 * (tall ? 3072 : 2048), 0);
}

static int32_t reads_mask(const int64_t *v)
{
    return V(atten_mask) != 0 && V(mask_check) == 1 && V(mask_width) == 2048
           && (V(mask_rows) == 2048 || V(mask_rows) == 3072);
}

static void check_error(const routine *q, int32_t status, const hl_error *e, int32_t refused_once)
{
    char small[24];
    char text[160];
    const char *name = NULL;
    size_t n;
    memset(text, 0x7f, sizeof text);
    if (status == HL_OK) {
        if (e->status != HL_OK || e->argument != HL_ARG_NONE || e->rule != HL_RULE_NONE) {
            FAIL("%s: accepted, with an error", q->name);
        }
        return;
    }
    if (status > 0 || status < HL_ERR_UNSUPPORTED || (int32_t)e->status != status) {
        FAIL("%s: status %d, error %d", q->name, status, (int)e->status);
    }
    if (e->rule <= HL_RULE_NONE || e->rule > HL_RULE_GENERATED || e->positions < 0
        || e->positions > 2) {
        FAIL("%s: rule %d, %d positions", q->name, (int)e->rule, e->positions);
    }
    for (int32_t i = 0; i < q->args->count; ++i) {
        if (q->args->fields[i].argument == (int32_t)e->argument) {
            name = q->args->fields[i].name;
        }
    }
    name = e->argument == HL_ARG_WORKSPACE ? "workspace" : e->argument == HL_ARG_ARGS ? "args"
           : e->argument == HL_ARG_PARTS ? "parts" : e->argument == HL_ARG_PLAN ? "plan" : name;
    if (name == NULL) {
        FAIL("%s: argument %d is none of the struct", q->name, (int)e->argument);
    }
    if (refused_once) {
        return;
    }
    if (hl_error_text(e, text, sizeof text) != text || memchr(text, 0, sizeof text) == NULL) {
        FAIL("%s: a sentence without an end", q->name);
    }
    n = strlen(text);
    if (strncmp(text, name, strlen(name)) != 0 || n < strlen(name) + 5 || n + 1 >= sizeof text) {
        FAIL("%s: '%s' does not begin with %s, or is too long", q->name, text, name);
    }
    if (strlen(hl_error_text(e, small, sizeof small)) != (n < 23 ? n : 23)
        || memcmp(small, text, n < 23 ? n : 23) != 0) {
        FAIL("%s: '%s' was cut to '%s'", q->name, text, small);
    }
}

/* Memory of an accepted call: there, aligned, addressable; what is written is apart. */
static void check_memory(const routine *q, const int64_t *p, const model *m)
{
    for (int32_t i = 0; i < m->n; ++i) {
        const span *const s = &m->span[i];
        const uint64_t at = (uint64_t)p[s->slot];
        const char *const name = slot_names[s->slot];
        if (s->bytes == 0) {
            continue;
        }
        if (at == 0) {
            FAIL("%s: accepted, but %s is NULL", q->name, name);
        }
        if (at % (uint64_t)s->align != 0) {
            FAIL("%s: accepted, but %s is not aligned", q->name, name);
        }
        if (s->bytes > PTRDIFF_MAX || (wide)at + s->bytes > UINT64_MAX) {
            FAIL("%s: accepted, but %s is too large", q->name, name);
        }
        for (int32_t j = 0; s->written && j < m->n; ++j) {
            const span *const t = &m->span[j];
            const wide other = (uint64_t)p[t->slot];
            if (i != j && t->bytes != 0 && !(s->written == 2 && t->written == 2)
                && (wide)at < other + t->bytes && other < (wide)at + s->bytes) {
                FAIL("%s: accepted, but %s overlaps %s", q->name, name, slot_names[t->slot]);
            }
        }
    }
}

static void check_accepted(const routine *q, const int64_t *v, const int64_t *p,
                           const void *const *list)
{
    model m;
    const char *wrong;
    model_of(q, v, NULL, &m);
    wrong = m.refused ? "a size or layout is out of its range" : unsound(q, v, list);
    if (wrong != NULL) {
        FAIL("%s: accepted, but %s", q->name, wrong);
    }
    model_of(q, v, list, &m);
    if (m.refused) {
        FAIL("%s: accepted, but a size or layout is out of its range", q->name);
    }
    check_memory(q, p, &m);
}

static void check_same(const routine *q, const table *t, const void *one, const void *two)
{
    for (int32_t i = 0; i < t->count; ++i) {
        if (read_field(one, &t->fields[i]) != read_field(two, &t->fields[i])) {
            FAIL("%s: another %s the second time", q->name, t->fields[i].name);
        }
    }
}

/* plan, workspace_bytes and the call itself, whose workspace is as wild as the rest. */
static int32_t call_plan(const routine *q, const record *r, const void *args, hl_error *e)
{
    static unsigned char plans[2][2048] __attribute__((aligned(16)));
    static unsigned char before[2048];
    const size_t size = (size_t)q->plan->bytes;
    hl_error again;
    int32_t status;
    int32_t whole;
    size_t bytes;
    memset(before, 0xa5, size + 64);
    memcpy(plans[0], before, size + 64);
    status = q->make(plans[0], args, e);
    bytes = q->needs(args);
    if (status != HL_OK && memcmp(plans[0], before, size) != 0) {
        FAIL("%s: refused, but the plan was written", q->name);
    }
    if ((status == HL_OK) != (bytes != 0)) {
        FAIL("%s: status %d, %zu bytes of workspace", q->name, status, bytes);
    }
    if (memcmp(plans[0] + size, before, 64) != 0) {
        FAIL("%s: more than the plan was written", q->name);
    }
    memset(&again, 0x5a, sizeof again);
    if (q->make(plans[1], args, r->flags & NO_ERROR ? NULL : &again) != status) {
        FAIL("%s: another status the second time", q->name);
    }
    if (!(r->flags & NO_ERROR)) {
        check_error(q, status, &again, 1);
    }
    if (status == HL_OK) {
        int32_t fits;
        check_same(q, q->plan, plans[0], plans[1]);
        whole = q->whole(args, (void *)own_place(200), bytes, &again);
        check_error(q, whole, &again, 0);
        fits = whole == HL_OK;
        whole = q->whole(args, (void *)own_place(200), bytes - 1, &again);
        check_error(q, whole, &again, 1);
        if (fits && whole != HL_OK && again.argument != HL_ARG_WORKSPACE) {
            FAIL("%s: with too small a workspace argument %d was refused", q->name,
                 (int)again.argument);
        }
    } else {
        whole = q->whole(args, NULL, 0, &again);
        if (whole != status || memcmp(e, &again, sizeof again) != 0) {
            FAIL("%s: the call says %d, plan said %d", q->name, whole, status);
        }
    }
    return status;
}

static void try_call(const record *r)
{
    static unsigned char args[1024] __attribute__((aligned(16)));
    static unsigned char kept[1024];
    const routine *q;
    model m;
    hl_error error;
    int64_t v[SLOTS];
    int64_t p[SLOTS]; /* values as they are passed */
    int64_t base[128];
    const void *list[SLOTS] = {NULL};
    int32_t status;
    int32_t bad;
    q = routine_of(r);
    read_values(r, q->args, v);
    for (int32_t i = 0; i < q->args->count; ++i) { /* the address 0 is NULL, too */
        const field *const f = &q->args->fields[i];
        const int64_t x = v[f->slot];
        if (f->kind >= KIND_POINTER && (x & 255) >= 192 && (x & 255) < 224 && x >> 8 == 0) {
            v[f->slot] = 0;
        }
    }
    model_of(q, v, NULL, &m);
    limit(q, r, v, &m);
    bad = m.loops > LOOPS;
    memset(p, 0, sizeof p);
    for (int32_t i = 0; i < q->args->count; ++i) {
        const field *const f = &q->args->fields[i];
        base[i] = own_place(i);
        if (f->list >= 0) {
            wide said;
            const int32_t n = m.refused ? 0 : entries_of(&m, f, &said);
            const int32_t off = (v[f->slot] >> 8) % f->list_bytes ? 1 : 0;
            void *const at = place_list(r, f, n, bad || (n == ENTRIES && said > n), off);
            base[i] = (int64_t)at;
            list[f->slot] = v[f->slot] != 0 ? at : NULL;
        }
    }
    memset(args, 0xa5, sizeof args);
    memset(args, 0, (size_t)q->args->bytes);
    for (int32_t i = 0; i < q->args->count; ++i) {
        const field *const f = &q->args->fields[i];
        int64_t x = v[f->slot];
        if (f->list >= 0) {
            x = x != 0 ? base[i] : 0;
        } else if (f->slot == S_atten_mask && reads_mask(v)) {
            x = triangle(r, v);
        } else if (f->kind == KIND_POINTER) {
            x = place_pointer(q->args, i, x, base);
        }
        v[f->slot] = f->kind == KIND_POINTER || f->kind == KIND_POINTERS ? x != 0 : x;
        p[f->slot] = x;
        write_field(args, f, x);
    }
    tried = q;
    tried_args = args;
    memcpy(kept, args, sizeof args);
    memset(&error, 0x5a, sizeof error);
    if (q->what == PLAN) {
        status = call_plan(q, r, args, &error);
    } else {
        hl_error again;
        status = q->call(args, &error);
        memset(&again, 0xa5, sizeof again);
        if (q->call(args, r->flags & NO_ERROR ? NULL : &again) != status
            || (!(r->flags & NO_ERROR) && memcmp(&error, &again, sizeof error) != 0)) {
            FAIL("%s: another answer the second time", q->name);
        }
    }
    if (memcmp(kept, args, sizeof args) != 0) {
        FAIL("%s: arguments were written", q->name);
    }
    check_error(q, status, &error, 0);
    if (status == HL_OK) {
        check_accepted(q, v, p, list);
    }
    ++counts[status == HL_OK];
}

static void say_counts(void)
{
    fprintf(stderr, "fuzz: %llu calls, %llu of them accepted\n",
            (unsigned long long)(counts[0] + counts[1]), (unsigned long long)counts[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    record r;
    record cousin;
    read_record(&r, data, size);
    cousins = 0;
    try_call(&r);
    memcpy(&chance_state, &r, sizeof chance_state);
    for (int32_t i = 0; size >= sizeof r && i < COUSINS; ++i) {
        cousin = r;
        ++cousins;
        mutate(&cousin, between(1, 2));
        try_call(&cousin);
    }
    return 0;
}

#pragma clang attribute pop
