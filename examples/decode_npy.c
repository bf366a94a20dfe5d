/* cc -O2 -Iinclude examples/decode_npy.c -o decode_npy -lm && ./decode_npy
 *
 * One decode step of DeepSeek's sparse attention (512+64 channels, bf16) on tensors from .npy
 * files, compared with float64, timed, and held against what this machine can do.
 *
 *   ./decode_npy             makes tensors: 128 heads, 2048 of 32768 keys selected
 *   ./decode_npy DIR [OUT]   reads them from DIR, writes to OUT, else to DIR
 *
 *   query.npy                   (B, S1, N1, 512)   N2 divides N1, and is 1 in DeepSeek's models
 *   query_rope.npy              (B, S1, N1, 64)
 *   key.npy                     (B, S2, N2, 512)   or pages: (blocks, block_size, N2, 512)
 *   key_rope.npy                (B, S2, N2, 64)    or (blocks, block_size, N2, 64)
 *   sparse_indices.npy          (B, S1, N2, K)     int32; optional: without it all keys are read
 *   block_table.npy             (B, pages)         int32; only with pages
 *   actual_seq_lengths_kv.npy   (B,)               int32; optional
 *   scale_value.npy             () or (1,)         float32; optional, 1/sqrt(192) without it
 *
 * bf16 is '<V2' or '|V2' (as NumPy saves ml_dtypes' bfloat16) or '<u2'; '<f4' is rounded to bf16.
 * Written: attention_out.npy, typed as query.npy, and softmax_lse.npy. Queries are the last S1
 * tokens of their sequence (sparse_mode 3). Exit status: 1 wrong result, 2 bad input. */
#define _POSIX_C_SOURCE 200809L
#include "hl_sparse_flash_attention_bf16_d512_rope64.h"
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { DK = 512, ROPE = 64, RUNS = 15, MAX_DIMS = 4 };

static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("decode_npy: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

static void *allocate(size_t bytes)
{
    void *p = calloc(bytes > 0 ? bytes : 1, 1);
    if (p == NULL) fail("out of memory (%zu bytes)", bytes);
    return p;
}

/* ---- bf16: the upper half of a float ------------------------------------------------------- */

static uint16_t to_bf16(float x) /* to the nearest, ties to even; a NaN stays one */
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if (x != x) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t x)
{
    const uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* ---- .npy: magic, version, header length, a Python dict as text, then the elements ---------- */

typedef struct tensor {
    void *data; /* NULL: there was no such file */
    int dims;
    int64_t shape[MAX_DIMS];
    size_t count;
    char descr[8];
} tensor;

static const char *shape_text(const tensor *t)
{
    static char text[96];
    int n = sprintf(text, "(");
    for (int i = 0; i < t->dims; i++)
        n += sprintf(text + n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    sprintf(text + n, t->dims == 1 ? ",)" : ")");
    return text;
}

static const char *after_key(const char *header, const char *key, const char *path)
{
    const char *at = strstr(header, key);
    if (at == NULL) fail("%s: the .npy header has no %s", path, key);
    at += strlen(key);
    while (*at == ' ' || *at == ':') at++;
    return at;
}

static void parse_header(tensor *t, const char *header, const char *path)
{
    const char *at = after_key(header, "'descr'", path);
    size_t n = 0;
    if (*at++ != '\'') fail("%s: structured dtypes are not read, only plain ones", path);
    while (n + 1 < sizeof t->descr && *at != '\'' && *at != '\0') t->descr[n++] = *at++;
    if (*at != '\'') fail("%s: cannot read the dtype in the .npy header", path);

    if (strncmp(after_key(header, "'fortran_order'", path), "False", 5) != 0)
        fail("%s: is in Fortran order; fix: save np.ascontiguousarray(x)", path);

    at = after_key(header, "'shape'", path);
    if (*at++ != '(') fail("%s: cannot read the shape in the .npy header", path);
    t->count = 1;
    while (*at == ' ') at++;
    while (*at != ')') {
        char *end;
        const long long size = strtoll(at, &end, 10);
        if (end == at || size < 0 || size > INT32_MAX)
            fail("%s: cannot read the shape in the .npy header", path);
        if (t->dims == MAX_DIMS) fail("%s: has more than %d dimensions", path, MAX_DIMS);
        if (size > 0 && t->count > (size_t)PTRDIFF_MAX / 16 / (size_t)size)
            fail("%s: its shape is larger than memory can be", path);
        t->shape[t->dims++] = size;
        t->count *= (size_t)size;
        for (at = end; *at == ' ' || *at == ',';) at++;
    }
}

/* `types` lists the dtypes that are read. An optional file may be absent. */
static tensor read_npy(const char *dir, const char *name, int required, const char *types)
{
    tensor t = {0};
    unsigned char start[12];
    char path[4096], header[4096];

    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
        fail("the path %.40s... is too long", dir);
    FILE *file = fopen(path, "rb");
    if (file == NULL && !required) return t;
    if (file == NULL) fail("cannot open %s", path);
    if (fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY", 6) != 0)
        fail("%s: is not a .npy file", path);

    size_t bytes = (size_t)start[8] | (size_t)start[9] << 8;
    if (start[6] == 2) { /* version 2: four bytes of length instead of two */
        if (fread(start + 10, 1, 2, file) != 2) fail("%s: ends inside its header", path);
        bytes |= (size_t)start[10] << 16 | (size_t)start[11] << 24;
    } else if (start[6] != 1) {
        fail("%s: is .npy version %d, only 1 and 2 are read", path, start[6]);
    }
    if (bytes >= sizeof header) fail("%s: its header of %zu bytes is too long", path, bytes);
    if (fread(header, 1, bytes, file) != bytes) fail("%s: ends inside its header", path);
    header[bytes] = '\0';
    parse_header(&t, header, path);
    char quoted[sizeof t.descr + 2];
    snprintf(quoted, sizeof quoted, "'%s'", t.descr);
    if (strstr(types, quoted) == NULL) fail("%s: dtype %s, expected %s", path, quoted, types);

    const size_t size = (size_t)(t.descr[2] - '0');
    const long here = ftell(file);
    if (here < 0 || fseek(file, 0, SEEK_END) != 0) fail("%s: is not a regular file", path);
    const size_t present = (size_t)(ftell(file) - here);
    if (present < t.count * size)
        fail("%s: is truncated: shape %s of '%s' takes %zu bytes, %zu are there", path,
             shape_text(&t), t.descr, t.count * size, present);
    t.data = allocate(t.count * size);
    if (fseek(file, here, SEEK_SET) != 0 || fread(t.data, size, t.count, file) != t.count)
        fail("cannot read %s", path);
    fclose(file);
    return t;
}

/* -1 in `shape` stands for any size. */
static void expect_shape(const tensor *t, const char *name, int dims, const int64_t *shape)
{
    int good = t->dims == dims;
    tensor expected = {.dims = dims};
    for (int i = 0; i < dims; i++) {
        expected.shape[i] = shape[i];
        good = good && (shape[i] < 0 ? t->shape[i] > 0 : t->shape[i] == shape[i]);
    }
    if (good) return;
    fprintf(stderr, "decode_npy: %s: shape %s", name, shape_text(t));
    fprintf(stderr, ", expected %s, where -1 is any size above 0\n", shape_text(&expected));
    exit(2);
}

static tensor read_bf16(const char *dir, const char *name, const int64_t *shape)
{
    tensor t = read_npy(dir, name, 1,
                        "bf16 as '<V2', '|V2' or '<u2', or '<f4'; fix: save x.astype(np.float32)");
    expect_shape(&t, name, 4, shape);
    if (strcmp(t.descr, "<f4") == 0) {
        float *from = t.data;
        uint16_t *to = allocate(t.count * sizeof *to);
        for (size_t i = 0; i < t.count; i++) to[i] = to_bf16(from[i]);
        free(from);
        t.data = to;
    }
    return t;
}

static tensor read_int32(const char *dir, const char *name, int dims, const int64_t *shape)
{
    tensor t = read_npy(dir, name, 0, "'<i4'; fix: save x.astype(np.int32)");
    if (t.data != NULL) expect_shape(&t, name, dims, shape);
    return t;
}

static void write_npy(const char *dir, const char *name, const tensor *t)
{
    char path[4096], header[128];
    const size_t size = t->descr[2] == '2' ? 2 : 4;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int n =
        snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }",
                 t->descr, shape_text(t));
    while (n < 117) header[n++] = ' '; /* so that the elements start at byte 128 */
    header[n++] = '\n';
    FILE *file = fopen(path, "wb");
    if (file == NULL) fail("cannot write %s", path);
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, file);
    fwrite(header, 1, (size_t)n, file);
    const size_t written = fwrite(t->data, size, t->count, file);
    if (fclose(file) != 0 || written != t->count) fail("cannot write all of %s", path);
}

/* ---- the step: its tensors, read or made ----------------------------------------------------- */

typedef struct step {
    tensor query, query_rope, key, key_rope, indices, table, lengths;
    float scale;
} step;

static step read_step(const char *dir)
{
    step s = {.scale = 0.07216878f}; /* 1/sqrt(128 + 64): the width before it was made latent */
    s.query = read_bf16(dir, "query.npy", (int64_t[]){-1, -1, -1, DK});
    const int64_t *q = s.query.shape;
    s.query_rope = read_bf16(dir, "query_rope.npy", (int64_t[]){q[0], q[1], q[2], ROPE});
    s.table = read_int32(dir, "block_table.npy", 2, (int64_t[]){q[0], -1});
    s.key = read_bf16(dir, "key.npy", (int64_t[]){s.table.data ? -1 : q[0], -1, -1, DK});
    const int64_t *k = s.key.shape;
    s.key_rope = read_bf16(dir, "key_rope.npy", (int64_t[]){k[0], k[1], k[2], ROPE});
    s.indices = read_int32(dir, "sparse_indices.npy", 4, (int64_t[]){q[0], q[1], k[2], -1});
    s.lengths = read_int32(dir, "actual_seq_lengths_kv.npy", 1, (int64_t[]){q[0]});
    const tensor scale = read_npy(dir, "scale_value.npy", 0, "'<f4'; fix: save np.float32(x)");
    if (scale.data != NULL) {
        if (scale.count != 1) fail("scale_value.npy: holds %zu numbers, expected 1", scale.count);
        s.scale = *(float *)scale.data;
    }
    return s;
}

static float normal(void) /* nearly: the sum of 12 even numbers, seeded */
{
    static uint32_t state = 1;
    float sum = -6;
    for (int i = 0; i < 12; i++) {
        state = state * 1664525u + 1013904223u;
        sum += (float)(state >> 8) / 16777216.0f;
    }
    return sum;
}

static tensor make_tensor(int64_t rows, int64_t heads, int64_t width)
{
    tensor t = {.dims = 4, .shape = {1, rows, heads, width}, .descr = "<V2"};
    t.count = (size_t)(rows * heads * width);
    t.data = allocate(t.count * 4);
    return t;
}

typedef struct ranked {
    float score;
    int32_t key;
} ranked;

static int by_score(const void *a, const void *b)
{
    const float x = ((const ranked *)a)->score, y = ((const ranked *)b)->score;
    return (x < y) - (x > y);
}

/* Channel c of the 512+64 of a row that lies in two tensors. */
static uint16_t *channel(const tensor *nope, const tensor *rope, int64_t row, int c)
{
    return c < DK ? (uint16_t *)nope->data + row * DK + c
                  : (uint16_t *)rope->data + row * ROPE + c - DK;
}

/* Every query leans towards one topic and every key carries some of it, so the scores of a head
 * spread over several units, and a cheap guess at them (an indexer's) picks the keys to read. */
static step make_step(int heads, int keys, int selected)
{
    step s = {.scale = 0.07216878f};
    float topic[DK + ROPE];
    for (int c = 0; c < DK + ROPE; c++) topic[c] = normal();

    s.query = make_tensor(1, heads, DK);
    s.query_rope = make_tensor(1, heads, ROPE);
    for (int h = 0; h < heads; h++) {
        const float lean = 0.05f + 0.02f * normal();
        for (int c = 0; c < DK + ROPE; c++)
            *channel(&s.query, &s.query_rope, h, c) = to_bf16(lean * topic[c] + normal());
    }

    s.key = make_tensor(keys, 1, DK);
    s.key_rope = make_tensor(keys, 1, ROPE);
    ranked *rank = allocate((size_t)keys * sizeof *rank);
    for (int j = 0; j < keys; j++) {
        const float about = normal();
        rank[j] = (ranked){about + 0.3f * normal(), j};
        for (int c = 0; c < DK + ROPE; c++)
            *channel(&s.key, &s.key_rope, j, c) = to_bf16(about * topic[c] + normal());
    }
    qsort(rank, (size_t)keys, sizeof *rank, by_score);
    s.indices = make_tensor(1, 1, selected);
    for (int n = 0; n < selected; n++) ((int32_t *)s.indices.data)[n] = rank[n].key;
    free(rank);
    return s;
}

/* ---- the check: the operator's definition in float64 ---------------------------------------- */

typedef struct check {
    double difference, rounding, norm; /* squares: of out - exact, bf16(exact) - exact, exact */
    double lse;                        /* largest error, relative above 1                    */
    double lists, keys, entropy;       /* over all rows and heads: lists, their keys, spread  */
    int rows, rows_checked;
} check;

/* The rows of key that query row (b, i) and kv head n read, each as token * N2 + n. */
static int attended(int64_t *rows, const step *s, int b, int i, int n)
{
    const int64_t *q = s->query.shape, *k = s->key.shape;
    const int paged = s->table.data != NULL;
    const int pages = paged ? (int)s->table.shape[1] : 0;
    const int length = s->lengths.data ? ((int32_t *)s->lengths.data)[b]
                                       : (int)(paged ? pages * k[1] : k[1]);
    const int seen = length - (int)q[1] + i + 1;
    const int entries = s->indices.data ? (int)s->indices.shape[3] : length;
    const int32_t *list = s->indices.data;
    if (list != NULL) list += ((b * q[1] + i) * k[2] + n) * entries;
    int found = 0;
    for (int e = 0; e < entries && (list == NULL || list[e] >= 0); e++) {
        const int64_t j = list ? list[e] : e;
        if (j >= seen) continue;
        const int64_t block = paged ? ((int32_t *)s->table.data)[b * pages + j / k[1]] : b;
        rows[found++] = (block * k[1] + (paged ? j % k[1] : j)) * k[2] + n;
    }
    return found;
}

static void check_row(check *sum, const step *s, const uint16_t *out, const float *lse, int b,
                      int i, int n, int check_values)
{
    const int64_t *q = s->query.shape, *k = s->key.shape;
    const int group = (int)(q[2] / k[2]);
    const size_t longest = (size_t)(s->indices.data ? s->indices.shape[3]
                                    : s->table.data ? s->table.shape[1] * k[1] : k[1]);
    int64_t *rows = allocate(longest * sizeof *rows);
    const int keys = attended(rows, s, b, i, n);
    sum->rows++;
    sum->lists += group;
    sum->keys += (double)keys * group;
    if (check_values) {
        double(*kd)[DK + ROPE] = allocate((size_t)keys * sizeof *kd);
        double *p = allocate((size_t)keys * sizeof *p), o[DK], query[DK + ROPE];
        sum->rows_checked++;
        for (int j = 0; j < keys; j++)
            for (int c = 0; c < DK + ROPE; c++)
                kd[j][c] = from_bf16(*channel(&s->key, &s->key_rope, rows[j], c));
        for (int g = 0; g < group; g++) {
            const int64_t row = (b * q[1] + i) * q[2] + n * group + g;
            double max = -INFINITY, l = 0, entropy = 0;
            for (int c = 0; c < DK + ROPE; c++)
                query[c] = from_bf16(*channel(&s->query, &s->query_rope, row, c));
            for (int j = 0; j < keys; j++) {
                p[j] = 0;
                for (int c = 0; c < DK + ROPE; c++) p[j] += query[c] * kd[j][c];
                p[j] *= (double)s->scale;
                if (!(p[j] <= max)) max = p[j];
            }
            for (int j = 0; j < keys; j++) l += p[j] = exp(p[j] - max);
            memset(o, 0, sizeof o);
            for (int j = 0; j < keys; j++) {
                p[j] /= l;
                if (p[j] > 0) entropy -= p[j] * log(p[j]);
                for (int c = 0; c < DK; c++) o[c] += p[j] * kd[j][c];
            }
            sum->entropy += entropy;
            for (int c = 0; c < DK; c++) {
                const double got = from_bf16(out[row * DK + c]);
                if (isnan(got) && isnan(o[c])) continue; /* an input was NaN */
                sum->difference += pow(got - o[c], 2);
                sum->rounding += pow((double)from_bf16(to_bf16((float)o[c])) - o[c], 2);
                sum->norm += o[c] * o[c];
            }
            /* softmax_lse is [B][N2][S1][G]. */
            const double got = lse[((b * k[2] + n) * q[1] + i) * group + g];
            const double expected = max + log(l); /* a row without keys: -inf */
            if (got == expected || (isnan(got) && isnan(expected))) continue;
            const double e = fabs(got - expected) / fmax(1, fabs(expected));
            if (!(e <= sum->lse)) sum->lse = e;
        }
        free(p);
        free(kd);
    }
    free(rows);
}

/* All rows, or as many, evenly spread, as take a few seconds. */
static check check_all(const step *s, const uint16_t *out, const float *lse)
{
    const int64_t *q = s->query.shape, *k = s->key.shape;
    const double all = (double)(q[0] * q[1] * k[2]);
    const double longest = (double)(s->indices.data ? s->indices.shape[3] : k[0] * k[1]);
    const double affordable = 4e9 / (longest * (2 * DK + ROPE) * (double)(q[2] / k[2]));
    const int every = affordable >= all ? 1 : (int)(all / fmax(affordable, 1.0));
    check sum = {0};
    for (int b = 0; b < q[0]; b++)
        for (int i = 0; i < q[1]; i++)
            for (int n = 0; n < k[2]; n++)
                check_row(&sum, s, out, lse, b, i, n, sum.rows % every == 0);
    return sum;
}

/* ---- the machine's limit: independent multiply-adds on the widest vectors present ------------ */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* 15 chains and x fill the 16 registers of AVX2, and hide the delay of an FMA many times over. */
enum { PEAK_TURNS = 1000000, PEAK_CHAINS = 15 };
static volatile float peak_input = 0.5f, peak_output;

/* Every chain is v = v * x + x, which tends to 1: no overflow, no denormals. KEEP hides from the
 * compiler that all are equal. */
#define PEAK_LOOP(type, spread, fma, first)                                                \
    const type x = spread(peak_input);                                                     \
    type a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x;                           \
    type i = x, j = x, k = x, l = x, m = x, n = x, o = x;                                  \
    for (int turn = 0; turn < PEAK_TURNS; turn++) {                                        \
        a = fma(a, x, x), b = fma(b, x, x), c = fma(c, x, x), d = fma(d, x, x);            \
        e = fma(e, x, x), f = fma(f, x, x), g = fma(g, x, x), h = fma(h, x, x);            \
        i = fma(i, x, x), j = fma(j, x, x), k = fma(k, x, x), l = fma(l, x, x);            \
        m = fma(m, x, x), n = fma(n, x, x), o = fma(o, x, x);                              \
        KEEP(a); KEEP(b); KEEP(c); KEEP(d); KEEP(e); KEEP(f); KEEP(g); KEEP(h);            \
        KEEP(i); KEEP(j); KEEP(k); KEEP(l); KEEP(m); KEEP(n); KEEP(o);                     \
    }                                                                                      \
    peak_output = first(a) + first(b) + first(c) + first(d) + first(e) + first(f) +        \
                  first(g) + first(h) + first(i) + first(j) + first(k) + first(l) +        \
                  first(m) + first(n) + first(o);

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define KEEP(v) __asm__("" : "+v"(v))
__attribute__((target("avx512f"))) static void peak_avx512(void)
{
    PEAK_LOOP(__m512, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_cvtss_f32)
}
#undef KEEP
#define KEEP(v) __asm__("" : "+x"(v))
__attribute__((target("avx2,fma"))) static void peak_avx2(void)
{
    PEAK_LOOP(__m256, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_cvtss_f32)
}
#elif defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#define KEEP(v) __asm__("" : "+w"(v))
#define NEON_FMA(p, q, r) vfmaq_f32(r, p, q)
#define NEON_FIRST(v) vgetq_lane_f32(v, 0)
static void peak_neon(void)
{
    PEAK_LOOP(float32x4_t, vdupq_n_f32, NEON_FMA, NEON_FIRST)
}
#endif

typedef struct peak {
    void (*loop)(void); /* NULL: this file has no peak loop for this machine */
    const char *name;
    double flop; /* of one run */
} peak;

static peak widest(void)
{
    const double per_lane = 2.0 * PEAK_TURNS * PEAK_CHAINS;
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f")) return (peak){peak_avx512, "AVX-512", 16 * per_lane};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return (peak){peak_avx2, "AVX2", 8 * per_lane};
#elif defined(__aarch64__) && defined(__GNUC__)
    return (peak){peak_neon, "NEON", 4 * per_lane};
#endif
    return (peak){NULL, "none", per_lane};
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x)
{
    qsort(x, RUNS, sizeof *x, by_value);
    return x[RUNS / 2];
}

/* ---- main ------------------------------------------------------------------------------------ */

static tensor as_saved(const tensor *query, const uint16_t *out)
{
    tensor t = *query;
    t.data = (void *)out;
    if (strcmp(t.descr, "<f4") != 0) return t;
    float *wide = allocate(t.count * sizeof *wide);
    for (size_t i = 0; i < t.count; i++) wide[i] = from_bf16(out[i]);
    t.data = wide;
    return t;
}

int main(int argc, char **argv)
{
    static const char *const isa_names[] = {"best", "scalar", "NEON",
                                            "AVX2", "AVX-512", "AMX"};
    if (argc > 3 || (argc > 1 && argv[1][0] == '-')) fail("usage: decode_npy [DIR [OUT]]");
    const char *dir = argc > 2 ? argv[2] : argc > 1 ? argv[1] : ".";
    const step s = argc > 1 ? read_step(argv[1]) : make_step(128, 32768, 2048);
    const int64_t *q = s.query.shape, *k = s.key.shape;
    const int paged = s.table.data != NULL;

    uint16_t *out = allocate(s.query.count * sizeof *out);
    tensor lse = {.dims = 4, .shape = {q[0], k[2], q[1], q[2] / k[2]}, .descr = "<f4"};
    lse.count = (size_t)(q[0] * q[1] * q[2]);
    lse.data = allocate(lse.count * sizeof(float));
    const hl_sparse_flash_attention_args args = {
        .query = s.query.data, .query_rope = s.query_rope.data,
        .key = s.key.data, .key_rope = s.key_rope.data,
        .sparse_indices = s.indices.data, .block_table = s.table.data,
        .actual_seq_lengths_kv = s.lengths.data,
        .attention_out = out, .softmax_lse = lse.data,
        .batch = (int32_t)q[0], .seq_q = (int32_t)q[1], .seq_kv = paged ? 0 : (int32_t)k[1],
        .heads_q = (int32_t)q[2], .heads_kv = (int32_t)k[2],
        .list_length = s.indices.data ? (int32_t)s.indices.shape[3] : 0,
        .num_blocks = paged ? (int32_t)k[0] : 0, .block_size = paged ? (int32_t)k[1] : 0,
        .max_blocks = paged ? (int32_t)s.table.shape[1] : 0,
        .layout_kv = paged ? HL_LAYOUT_PA_BSND : HL_LAYOUT_BSND,
        .sparse_mode = 3, .scale_value = s.scale};

    hl_sparse_flash_attention_plan plan;
    hl_error error;
    char text[160];
    if (hl_sparse_flash_attention_bf16_d512_rope64_plan(&plan, &args, &error) != HL_OK)
        fail("%s", hl_error_text(&error, text, sizeof text));
    const size_t bytes = hl_sparse_flash_attention_bf16_d512_rope64_workspace_bytes(&args);
    void *workspace = allocate(bytes);

    /* The peak is measured beside every run: whatever slows this machine slows both. */
    const peak limit = widest();
    double seconds[RUNS], peaks[RUNS], shares[RUNS];
    for (int run = -1; run < RUNS; run++) { /* run -1 warms up */
        const double start = now();
        if (hl_sparse_flash_attention_bf16_d512_rope64(&args, workspace, bytes, &error) != HL_OK)
            fail("%s", hl_error_text(&error, text, sizeof text));
        const double middle = now();
        if (limit.loop != NULL) limit.loop();
        const double end = now();
        if (run < 0) continue;
        seconds[run] = middle - start;
        peaks[run] = limit.flop / (end - middle);
        shares[run] = 1 / (seconds[run] * peaks[run]);
    }

    const check c = check_all(&s, out, lse.data);
    const double flop = 2.0 * (2 * DK + ROPE) * c.keys;
    const double gathered = 2.0 * (DK + ROPE) * c.keys / (double)(q[2] / k[2]);
    const double time = median(seconds), checked = (double)c.rows_checked / c.rows;
    const double relative = sqrt(c.difference / c.norm), rounding = sqrt(c.rounding / c.norm);
    printf("query  (%lld, %lld, %lld, 512+64), key (%lld, %lld, %lld, 512+64) %s, %s\n",
           (long long)q[0], (long long)q[1], (long long)q[2], (long long)k[0], (long long)k[1],
           (long long)k[2], paged ? "in pages" : "contiguous",
           s.indices.data ? "selected keys" : "all keys");
    printf("spread %.0f keys a head, on average; their softmax is as wide as %.0f equal ones\n",
           c.keys / c.lists, exp(c.entropy / (c.lists * checked)));
    printf("error  output %.2e of its norm (rounding float64 to bf16: %.2e), LSE %.1e; "
           "%d of %d rows checked\n",
           relative, rounding, c.lse, c.rows_checked, c.rows);
    printf("time   %.3f ms, median of %d, %s\n", 1e3 * time, RUNS, isa_names[plan.args.isa]);
    printf("math   %.1f GFLOP/s", 1e-9 * flop / time);
    if (limit.loop != NULL)
        printf(", %.0f %% of the %s FMA peak of one core (%.1f)", 100 * flop * median(shares),
               limit.name, 1e-9 * median(peaks));
    putchar('\n');
    printf("memory %.2f MB of keys gathered, %.2f GB/s\n", 1e-6 * gathered, 1e-9 * gathered / time);

    const tensor saved = as_saved(&s.query, out);
    write_npy(dir, "attention_out.npy", &saved);
    write_npy(dir, "softmax_lse.npy", &lse);
    printf("wrote  %s/attention_out.npy and softmax_lse.npy\n", dir);
    const int good = c.norm == 0 ? c.difference == 0 : relative <= 1.5 * rounding + 1e-4;
    if (!good || !(c.lse <= 1e-4)) puts("WRONG: the error is larger than rounding explains");
    return !good || !(c.lse <= 1e-4);
}
