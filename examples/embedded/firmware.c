/* Firmware for a Cortex-M4F: one decode step against a small paged cache, compared on the target
 * with numbers from float64 (vectors.h, written by run.py), its stack and instructions measured.
 *
 * All memory is static. printf comes from picolibc and leaves through the debugger (semihosting);
 * the kernel itself uses neither. Built and run by run.py. */
#define HL_API extern
#define HL_NO_TEXT
#include "hl_sparse_flash_attention_f32_d32_rope8.h"
#include "vectors.h"
#include <stdio.h>

enum {
    WORKSPACE = HL_SPARSE_FLASH_ATTENTION_F32_D32_ROPE8_WORKSPACE_BYTES(HEADS),
    DV = HL_SPARSE_FLASH_ATTENTION_F32_D32_ROPE8_DV
};

static unsigned char workspace[WORKSPACE];
static float out[HEADS * DV], lse[HEADS];

static hl_status decode(const hl_sparse_flash_attention_args *args)
{
    return hl_sparse_flash_attention_f32_d32_rope8(args, workspace, sizeof workspace, NULL);
}

/* ---- instructions ----------------------------------------------------------------------------
 * SysTick counts down at the core's 25 MHz, a tick every 40 ns. Under `qemu -icount shift=0` every
 * instruction takes 1 ns: a tick is 40 instructions. So the ticks of 40 decodes are the
 * instructions of one. main() proves the 40 with a loop of known length. */
#define SYST_CSR (*(volatile uint32_t *)0xe000e010u)
#define SYST_RVR (*(volatile uint32_t *)0xe000e014u)
#define SYST_CVR (*(volatile uint32_t *)0xe000e018u)

enum { PER_TICK = 40 };

static void start_ticks(void)
{
    SYST_CVR = 0; /* any write clears it, and the next tick is a whole one */
}

static uint32_t ticks(void)
{
    return (0 - SYST_CVR) & 0xffffff; /* 24 bits: 671 million instructions until it wraps */
}

static uint32_t instructions_of(const hl_sparse_flash_attention_args *args)
{
    start_ticks();
    for (int i = 0; i < PER_TICK; i++) decode(args);
    return ticks();
}

static uint32_t instructions_per_tick(void)
{
    uint32_t n = 500000; /* turns of two instructions */
    start_ticks();
    __asm__ volatile("1: subs %0, #1\n\tbne 1b" : "+r"(n) : : "cc");
    return 1000000 / ticks();
}

/* ---- stack -----------------------------------------------------------------------------------
 * Paint what lies below the stack pointer, decode, and see how far down the paint is gone. */
enum { PAINTED = 2048, COLOUR = 0x5eedf00d };

static __attribute__((noinline)) uint32_t stack_of(const hl_sparse_flash_attention_args *args)
{
    volatile uint32_t *top;
    int depth = PAINTED;
    __asm__ volatile("mov %0, sp" : "=r"(top));
    for (int i = 1; i <= PAINTED; i++) top[-i] = COLOUR;
    decode(args);
    while (depth > 0 && top[-depth] == COLOUR) depth--;
    return (uint32_t)depth * 4;
}

/* ---- the decode steps ------------------------------------------------------------------------ */

static float largest_error(const float *got, const float *expected, int n)
{
    float worst = 0;
    for (int i = 0; i < n; i++) {
        const float e = got[i] > expected[i] ? got[i] - expected[i] : expected[i] - got[i];
        if (!(e <= worst)) worst = e; /* a NaN stays */
    }
    return worst;
}

static int run(const char *name, const int32_t *list, int list_length, const float *expected_out,
               const float *expected_lse)
{
    const hl_sparse_flash_attention_args args = {
        .query = query, .query_rope = query_rope, .key = key, .key_rope = key_rope,
        .sparse_indices = list, .block_table = block_table, .actual_seq_lengths_kv = &cached,
        .attention_out = out, .softmax_lse = lse,
        .batch = 1, .seq_q = 1, .heads_q = HEADS, .list_length = list_length,
        .num_blocks = BLOCKS, .block_size = BLOCK_SIZE, .max_blocks = BLOCKS,
        .layout_kv = HL_LAYOUT_PA_BSND, .scale_value = SCALE};
    const hl_status status = decode(&args);
    const float out_error = largest_error(out, expected_out, HEADS * DV);
    const float lse_error = largest_error(lse, expected_lse, HEADS);
    const uint32_t stack = stack_of(&args);
    const uint32_t first = instructions_of(&args), second = instructions_of(&args);
    const int good = status == HL_OK && out_error <= 1e-6f && lse_error <= 4e-6f;

    printf("%s status %d out_error %ld lse_error %ld stack %lu instructions %lu %lu\n", name,
           (int)status, (long)(out_error * 1e9f), (long)(lse_error * 1e9f), (unsigned long)stack,
           (unsigned long)first, (unsigned long)second); /* errors in units of 1e-9 */
    return good;
}

int main(void)
{
    SYST_RVR = 0xffffff;
    SYST_CSR = 5; /* on, the core's clock, no interrupt */
    printf("instructions_per_tick %lu workspace %d\n", (unsigned long)instructions_per_tick(),
           WORKSPACE);

    int good = run("sparse", selected, SELECTED, sparse_out, sparse_lse);
    good &= run("dense", NULL, 0, dense_out, dense_lse);
    return !good;
}
