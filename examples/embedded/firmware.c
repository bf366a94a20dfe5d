/* Firmware for a Cortex-M4F: one decode step against a small paged cache, compared on the target
 * with numbers from float64 (vectors.h, written by run.py), its stack and instructions measured.
 *
 * All memory is static. printf comes from picolibc and leaves through the debugger (semihosting);
 * the kernel itself uses neither. Built and run by run.py. */
#define HL_API extern
#define HL_NO_TEXT
#include "hl_sparse_flash_attention_f32_d32_rope8.h"
#include "measure.h"
#include "vectors.h"

enum {
    WORKSPACE = HL_SPARSE_FLASH_ATTENTION_F32_D32_ROPE8_WORKSPACE_BYTES(HEADS),
    DV = HL_SPARSE_FLASH_ATTENTION_F32_D32_ROPE8_DV
};

static unsigned char workspace[WORKSPACE];
static float out[HEADS * DV], lse[HEADS];
static hl_sparse_flash_attention_args args;
static hl_status status;

static void decode(void)
{
    status = hl_sparse_flash_attention_f32_d32_rope8(&args, workspace, sizeof workspace, NULL);
}

static int run(const char *name, const int32_t *list, int list_length, const float *expected_out,
               const float *expected_lse)
{
    args = (hl_sparse_flash_attention_args){
        .query = query, .query_rope = query_rope, .key = key, .key_rope = key_rope,
        .sparse_indices = list, .block_table = block_table, .actual_seq_lengths_kv = &cached,
        .attention_out = out, .softmax_lse = lse,
        .batch = 1, .seq_q = 1, .heads_q = HEADS, .list_length = list_length,
        .num_blocks = BLOCKS, .block_size = BLOCK_SIZE, .max_blocks = BLOCKS,
        .layout_kv = HL_LAYOUT_PA_BSND, .scale_value = SCALE};
    decode();
    const float out_error = largest_error(out, expected_out, HEADS * DV);
    const float lse_error = largest_error(lse, expected_lse, HEADS);

    printf("%s status %d out_error %ld lse_error %ld", name, (int)status, billionths(out_error),
           billionths(lse_error));
    print_costs(decode);
    return status == HL_OK && out_error <= 1e-6f && lse_error <= 4e-6f;
}

int main(void)
{
    start_instruments(WORKSPACE);
    int good = run("sparse", selected, SELECTED, sparse_out, sparse_lse);
    good &= run("dense", NULL, 0, dense_out, dense_lse);
    return !good;
}
