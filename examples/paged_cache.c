/* cc -O2 -Iinclude examples/paged_cache.c -o paged_cache && ./paged_cache
 *
 * A paged KV cache. Keys live in pages of 16 or 64 tokens that lie anywhere in a pool; row b of
 * block_table says which page holds which part of sequence b. The ids in sparse_indices stay
 * positions in the sequence, so an engine may move pages without touching its lists. The result is
 * the same, bit for bit, as from keys that lie one behind the other. */
#include "hl_sparse_flash_attention_f32_d64.h"
#include <stdio.h>
#include <string.h>

enum { BATCH = 2, HEADS = 8, KEYS = 1024, SELECTED = 128, D = 64 };

static const int32_t length[BATCH] = {1024, 771}; /* tokens cached so far; the last page is open */
static float query[BATCH][HEADS][D], key[BATCH][KEYS][D], pool[BATCH * KEYS][D];
static float contiguous[BATCH][HEADS][D], paged[BATCH][HEADS][D];
static int32_t selected[BATCH][SELECTED], block_table[BATCH * KEYS / 16];
static unsigned char workspace[HL_SPARSE_FLASH_ATTENTION_F32_D64_WORKSPACE_BYTES(HEADS)];

static uint32_t random_bits(void)
{
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static void fill(float *x, int32_t n) /* with numbers between -1 and 1 */
{
    while (n-- > 0) *x++ = (float)random_bits() / 8388608.0f - 1.0f;
}

static int attend(hl_sparse_flash_attention_args *args)
{
    hl_error error;
    char text[160];
    if (hl_sparse_flash_attention_f32_d64(args, workspace, sizeof workspace, &error) == HL_OK)
        return 1;
    puts(hl_error_text(&error, text, sizeof text));
    return 0;
}

/* Moves the keys into pages in random order. What no sequence uses is NaN: nothing reads it. */
static void fill_pool(int32_t block_size)
{
    const int32_t blocks = BATCH * KEYS / block_size, each = KEYS / block_size;
    memset(pool, 0xff, sizeof pool);
    for (int32_t i = 0; i < blocks; i++) block_table[i] = i;
    for (int32_t i = blocks - 1; i > 0; i--) { /* Fisher and Yates */
        const int32_t j = (int32_t)(random_bits() % (uint32_t)(i + 1)), t = block_table[i];
        block_table[i] = block_table[j];
        block_table[j] = t;
    }
    for (int32_t b = 0; b < BATCH; b++)
        for (int32_t j = 0; j < length[b]; j++)
            memcpy(pool[block_table[b * each + j / block_size] * block_size + j % block_size],
                   key[b][j], sizeof key[b][j]);
}

int main(void)
{
    hl_sparse_flash_attention_args args = {
        .query = query, .key = key, .sparse_indices = selected[0],
        .actual_seq_lengths_kv = length, .attention_out = contiguous,
        .batch = BATCH, .seq_q = 1, .seq_kv = KEYS, .heads_q = HEADS, .list_length = SELECTED,
        .scale_value = 0.5f};
    int failed = 0;

    fill(&query[0][0][0], BATCH * HEADS * D);
    fill(&key[0][0][0], BATCH * KEYS * D);
    for (int32_t b = 0; b < BATCH; b++)
        for (int32_t n = 0; n < SELECTED; n++)
            selected[b][n] = n * (length[b] / SELECTED) + (int32_t)(random_bits() % 6);
    if (!attend(&args)) return 1;

    for (int32_t block_size = 16; block_size <= 64; block_size *= 4) {
        fill_pool(block_size);
        args.key = pool;
        args.attention_out = paged;
        args.layout_kv = HL_LAYOUT_PA_BSND;
        args.block_table = block_table;
        args.block_size = block_size;
        args.num_blocks = BATCH * KEYS / block_size;
        args.max_blocks = KEYS / block_size;
        if (!attend(&args)) return 1;

        const int same = memcmp(paged, contiguous, sizeof paged) == 0 && paged[0][0][0] != 0;
        printf("%3d shuffled pages of %2d tokens: %s\n", (int)args.num_blocks, (int)block_size,
               same ? "the same bits as contiguous keys" : "DIFFERENT from contiguous keys");
        failed |= !same;
    }

    /* A page id that is needed and does not exist is refused before anything is written. */
    hl_error error;
    char text[160];
    block_table[3] = 1000;
    const hl_status status =
        hl_sparse_flash_attention_f32_d64(&args, workspace, sizeof workspace, &error);
    printf("bad page id: %s\n", hl_error_text(&error, text, sizeof text));
    return failed || status != HL_ERR_BLOCK_ID;
}
