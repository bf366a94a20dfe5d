/* Attention of one query row as one composes it from OpenBLAS: sgemm, softmax with expf, sgemm. */
#include <cblas.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* S = scale Q K^T, or with one head a product with a vector, which is faster. */
static void scores(const float *q, const float *k, int heads, int keys, int dk, int stride,
                   float scale, float *s)
{
    if (heads == 1) {
        cblas_sgemv(CblasRowMajor, CblasNoTrans, keys, dk, scale, k, stride, q, 1, 0, s, 1);
    } else {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, heads, keys, dk, scale, q, dk, k,
                    stride, 0, s, keys);
    }
}

/* Over the first `seen` keys; the others weigh nothing. */
static void softmax(float *s, int seen, int keys)
{
    float max = s[0], sum = 0;
    for (int j = 1; j < seen; j++) {
        max = s[j] > max ? s[j] : max;
    }
    for (int j = 0; j < seen; j++) {
        s[j] = expf(s[j] - max);
        sum += s[j];
    }
    for (int j = 0; j < seen; j++) {
        s[j] /= sum;
    }
    for (int j = seen; j < keys; j++) {
        s[j] = 0;
    }
}

static void values(const float *p, const float *v, int heads, int keys, int dv, int stride,
                   float *out)
{
    if (heads == 1) {
        cblas_sgemv(CblasRowMajor, CblasTrans, keys, dv, 1, v, stride, p, 1, 0, out, 1);
    } else {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, heads, dv, keys, 1, p, keys, v,
                    stride, 0, out, dv);
    }
}

/* `count` calls. lists: NULL, or n of them; value == key: the first dv channels of the key. With a
 * list there is one kv head, and memory holds the copied rows behind the scores. seen: NULL, or how
 * many keys each head of a group sees. */
void peer_openblas(const float *query, const float *key, const float *value,
                   const int32_t *const *lists, int keys, int heads, int kv_heads, int dk, int dv,
                   int n, float scale, float *memory, float *out, int first, int count,
                   const int32_t *seen)
{
    const int group = heads / kv_heads;
    float *rows = memory + (size_t)group * (size_t)keys;
    for (int i = first; i < first + count; i++) {
        const float *k = key, *v = value;
        if (lists) {
            for (int j = 0; j < keys; j++) {
                memcpy(rows + (size_t)j * (size_t)dk, key + (size_t)lists[i % n][j] * (size_t)dk,
                       (size_t)dk * sizeof(float));
            }
            k = v = rows;
        }
        for (int h = 0; h < kv_heads; h++) {
            const int apart = value != key;
            scores(query + h * group * dk, k + h * dk, group, keys, dk, kv_heads * dk, scale,
                   memory);
            for (int g = 0; g < group; g++) {
                softmax(memory + (size_t)g * (size_t)keys, seen ? seen[g] : keys, keys);
            }
            values(memory, v + h * (apart ? dv : dk), group, keys, dv, kv_heads * (apart ? dv : dk),
                   out + h * group * dv);
        }
    }
}
