/* Attention of one query row as one composes it from oneDNN (its C interface of version 2):
 * matmul with the scale as output scale, softmax, matmul. Primitives are made once and run on
 * plain strided memory, as a cache lies. */
#include <math.h>
#include <oneapi/dnnl/dnnl.h>
#include <oneapi/dnnl/dnnl_version.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct product {
    dnnl_primitive_t primitive;
    dnnl_memory_t left, right, out;
} product;

typedef struct attention {
    const char *query, *key, *value;
    const int32_t *const *lists;
    const int32_t *seen; /* keys that each head of a group sees; NULL: all */
    char *rows, *out; /* rows: what a list names, copied */
    float *scores;
    void *weights; /* softmax in the type of the values */
    int keys, heads, kv_heads, dk, dv, n, apart;
    size_t size; /* bytes of an element */
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    product qk, pv;
    dnnl_primitive_t softmax, narrow; /* narrow: NULL for float32 */
    dnnl_memory_t s, p;
} attention;

int peer_onednn_version(void)
{
    return 100 * dnnl_version()->major + dnnl_version()->minor;
}

static int describe(dnnl_memory_desc_t *d, int rows, int columns, int row_stride, int column_stride,
                    dnnl_data_type_t type)
{
    const dnnl_dims_t sizes = {rows, columns}, strides = {row_stride, column_stride};
    return dnnl_memory_desc_init_by_strides(d, 2, sizes, type, strides);
}

static int make_product(attention *a, product *made, const dnnl_memory_desc_t *left,
                        const dnnl_memory_desc_t *right, const dnnl_memory_desc_t *out, float scale)
{
    dnnl_matmul_desc_t description;
    dnnl_primitive_attr_t attributes;
    dnnl_primitive_desc_t chosen;
    return dnnl_matmul_desc_init(&description, left, right, NULL, out)
        || dnnl_primitive_attr_create(&attributes)
        || dnnl_primitive_attr_set_output_scales(attributes, 1, 0, &scale)
        || dnnl_primitive_desc_create(&chosen, &description, attributes, a->engine, NULL)
        || dnnl_primitive_create(&made->primitive, chosen)
        || dnnl_primitive_desc_destroy(chosen) || dnnl_primitive_attr_destroy(attributes)
        || dnnl_memory_create(&made->left, left, a->engine, DNNL_MEMORY_NONE)
        || dnnl_memory_create(&made->right, right, a->engine, DNNL_MEMORY_NONE)
        || dnnl_memory_create(&made->out, out, a->engine, DNNL_MEMORY_NONE);
}

static int run_product(const attention *a, const product *made, const void *left, const void *right,
                       void *out)
{
    const dnnl_exec_arg_t arguments[] = {{DNNL_ARG_SRC, made->left},
                                         {DNNL_ARG_WEIGHTS, made->right},
                                         {DNNL_ARG_DST, made->out}};
    return dnnl_memory_set_data_handle(made->left, (void *)left)
        || dnnl_memory_set_data_handle(made->right, (void *)right)
        || dnnl_memory_set_data_handle(made->out, out)
        || dnnl_primitive_execute(made->primitive, a->stream, 3, arguments);
}

/* Softmax over the keys; for bf16 a reorder makes the weights narrow. */
static int make_softmax(attention *a, const dnnl_memory_desc_t *s, const dnnl_memory_desc_t *p,
                        int same_type)
{
    dnnl_softmax_v2_desc_t description;
    dnnl_primitive_desc_t chosen;
    int failed = dnnl_softmax_v2_forward_desc_init(&description, dnnl_forward_inference,
                                                   dnnl_softmax_accurate, s, s, 1)
        || dnnl_primitive_desc_create(&chosen, &description, NULL, a->engine, NULL)
        || dnnl_primitive_create(&a->softmax, chosen) || dnnl_primitive_desc_destroy(chosen)
        || dnnl_memory_create(&a->s, s, a->engine, a->scores)
        || dnnl_memory_create(&a->p, p, a->engine, a->weights);
    if (failed || same_type) {
        return failed;
    }
    return dnnl_reorder_primitive_desc_create(&chosen, s, a->engine, p, a->engine, NULL)
        || dnnl_primitive_create(&a->narrow, chosen) || dnnl_primitive_desc_destroy(chosen);
}

static int run_softmax(const attention *a)
{
    for (int g = 0; a->seen && g < a->heads / a->kv_heads; g++) {
        for (int j = a->seen[g]; j < a->keys; j++) {
            a->scores[(size_t)g * (size_t)a->keys + (size_t)j] = -INFINITY;
        }
    }
    const dnnl_exec_arg_t soft[] = {{DNNL_ARG_SRC, a->s}, {DNNL_ARG_DST, a->s}};
    const dnnl_exec_arg_t narrow[] = {{DNNL_ARG_FROM, a->s}, {DNNL_ARG_TO, a->p}};
    return dnnl_primitive_execute(a->softmax, a->stream, 2, soft)
        || (a->narrow && dnnl_primitive_execute(a->narrow, a->stream, 2, narrow));
}

void peer_onednn_free(attention *a)
{
    dnnl_primitive_t primitives[] = {a->qk.primitive, a->pv.primitive, a->softmax, a->narrow};
    dnnl_memory_t memories[] = {a->qk.left, a->qk.right, a->qk.out, a->pv.left,
                                a->pv.right, a->pv.out, a->s, a->p};
    for (size_t i = 0; i < sizeof primitives / sizeof *primitives; i++) {
        if (primitives[i]) {
            dnnl_primitive_destroy(primitives[i]);
        }
    }
    for (size_t i = 0; i < sizeof memories / sizeof *memories; i++) {
        if (memories[i]) {
            dnnl_memory_destroy(memories[i]);
        }
    }
    if (a->stream) {
        dnnl_stream_destroy(a->stream);
    }
    if (a->engine) {
        dnnl_engine_destroy(a->engine);
    }
    if (a->weights != a->scores) {
        free(a->weights);
    }
    free(a->scores);
    free(a->rows);
    free(a);
}

/* NULL on failure. lists: NULL, or n of them (one kv head then); value == key: its first dv
 * channels; bf16: 0 for float32; seen: NULL, or how many keys each head of a group sees. */
attention *peer_onednn_make(const void *query, const void *key, const void *value,
                            const int32_t *const *lists, int keys, int heads, int kv_heads, int dk,
                            int dv, int n, float scale, int bf16, void *out,
                            const int32_t *seen)
{
    attention *a = calloc(1, sizeof *a);
    if (!a) {
        return NULL;
    }
    const dnnl_data_type_t type = bf16 ? dnnl_bf16 : dnnl_f32;
    const int group = heads / kv_heads;
    const size_t cells = (size_t)group * (size_t)keys;
    a->query = query, a->key = key, a->value = value, a->lists = lists, a->out = out;
    a->keys = keys, a->heads = heads, a->kv_heads = kv_heads, a->dk = dk, a->dv = dv, a->n = n;
    a->apart = value != key;
    a->seen = seen;
    a->size = bf16 ? 2 : 4;
    a->scores = aligned_alloc(64, (cells * sizeof(float) + 63) / 64 * 64);
    a->weights = bf16 ? aligned_alloc(64, (cells * a->size + 63) / 64 * 64) : a->scores;
    if (lists) {
        a->rows = aligned_alloc(64, ((size_t)keys * (size_t)dk * a->size + 63) / 64 * 64);
    }
    const int v_stride = kv_heads * (a->apart ? dv : dk);
    dnnl_memory_desc_t q, kt, s, p, v, o;
    if (!a->scores || !a->weights || (lists && !a->rows)
        || describe(&q, group, dk, dk, 1, type) || describe(&kt, dk, keys, 1, kv_heads * dk, type)
        || describe(&s, group, keys, keys, 1, dnnl_f32) || describe(&p, group, keys, keys, 1, type)
        || describe(&v, keys, dv, v_stride, 1, type) || describe(&o, group, dv, dv, 1, type)
        || dnnl_engine_create(&a->engine, dnnl_cpu, 0)
        || dnnl_stream_create(&a->stream, a->engine, dnnl_stream_default_flags)
        || make_product(a, &a->qk, &q, &kt, &s, scale) || make_product(a, &a->pv, &p, &v, &o, 1)
        || make_softmax(a, &s, &p, !bf16)) {
        peer_onednn_free(a);
        return NULL;
    }
    return a;
}

/* `count` calls, with the lists first, first + 1, .. modulo n. */
int peer_onednn_run(attention *a, int first, int count)
{
    const size_t row = (size_t)a->dk * a->size, group = (size_t)(a->heads / a->kv_heads);
    for (int i = first; i < first + count; i++) {
        const char *k = a->key, *v = a->value;
        if (a->lists) {
            for (int j = 0; j < a->keys; j++) {
                const size_t id = (size_t)a->lists[i % a->n][j];
                memcpy(a->rows + (size_t)j * row, a->key + id * row, row);
            }
            k = v = a->rows;
        }
        for (int h = 0; h < a->kv_heads; h++) {
            const size_t v_row = (size_t)(a->apart ? a->dv : a->dk) * a->size;
            if (run_product(a, &a->qk, a->query + (size_t)h * group * row, k + (size_t)h * row,
                            a->scores)
                || run_softmax(a)
                || run_product(a, &a->pv, a->weights, v + (size_t)h * v_row,
                               a->out + (size_t)h * group * (size_t)a->dv * a->size)
                || dnnl_stream_wait(a->stream)) {
                return 1;
            }
        }
    }
    return 0;
}
