/* cc -O2 -Iinclude examples/minimal.c -o minimal && ./minimal */
#include "hl_sparse_flash_attention_f32_d64.h"
#include <stdio.h>

static float query[64], key[1000][64], out[64];
static unsigned char workspace[HL_SPARSE_FLASH_ATTENTION_F32_D64_WORKSPACE_BYTES(1)];

int main(void)
{
    const int32_t selected[2] = {3, 4};
    hl_sparse_flash_attention_args args = {
        .query = query, .key = key, .sparse_indices = selected, .attention_out = out, .batch = 1,
        .seq_q = 1, .seq_kv = 1000, .heads_q = 1, .list_length = 2, .scale_value = 1.0986123f};
    hl_error error;
    char text[160];

    query[0] = 1; /* the score of key j is j ln 3: key 4 weighs three times as much as key 3 */
    for (int j = 0; j < 1000; j++) key[j][0] = (float)j;
    if (hl_sparse_flash_attention_f32_d64(&args, workspace, sizeof workspace, &error) != HL_OK)
        return puts(hl_error_text(&error, text, sizeof text)), 1;
    printf("%.5f, expected 3/4 * 4 + 1/4 * 3 = 3.75\n", out[0]);
    return !(out[0] > 3.74999f && out[0] < 3.75001f);
}
