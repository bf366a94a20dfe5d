/* Instruments for firmware on the target: instructions and stack of a call, errors of its result.
 * For one C file each, which has included what it measures. */
#ifndef MEASURE_H
#define MEASURE_H

#include <stdint.h>
#include <stdio.h>

typedef void call(void);

/* ---- instructions ----------------------------------------------------------------------------
 * SysTick counts down at the core's 25 MHz, a tick every 40 ns. Under `qemu -icount shift=0` every
 * instruction takes 1 ns: a tick is 40 instructions. So the ticks of 40 calls are the instructions
 * of one. start_instruments proves the 40 with a loop of known length. */
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

static uint32_t instructions_of(call *measured)
{
    start_ticks();
    for (int i = 0; i < PER_TICK; i++) measured();
    return ticks();
}

static void start_instruments(int workspace)
{
    uint32_t n = 500000; /* turns of two instructions */
    SYST_RVR = 0xffffff;
    SYST_CSR = 5; /* on, the core's clock, no interrupt */
    start_ticks();
    __asm__ volatile("1: subs %0, #1\n\tbne 1b" : "+r"(n) : : "cc");
    printf("target instructions_per_tick %lu workspace %d\n", (unsigned long)(1000000 / ticks()),
           workspace);
}

/* ---- stack -----------------------------------------------------------------------------------
 * Paint what lies below the stack pointer, call, and see how far down the paint is gone. */
enum { PAINTED = 2048, COLOUR = 0x5eedf00d };

static __attribute__((noinline)) uint32_t stack_of(call *measured)
{
    volatile uint32_t *top;
    int depth = PAINTED;
    __asm__ volatile("mov %0, sp" : "=r"(top));
    for (int i = 1; i <= PAINTED; i++) top[-i] = COLOUR;
    measured();
    while (depth > 0 && top[-depth] == COLOUR) depth--;
    return (uint32_t)depth * 4;
}

/* The end of a line of results: what a call costs, instructions counted twice. */
static void print_costs(call *measured)
{
    const uint32_t stack = stack_of(measured);
    const uint32_t first = instructions_of(measured), second = instructions_of(measured);
    printf(" stack %lu instructions %lu again %lu\n", (unsigned long)stack, (unsigned long)first,
           (unsigned long)second);
}

/* ---- errors ---------------------------------------------------------------------------------- */

static float largest_error(const float *got, const float *expected, int n)
{
    float worst = 0;
    for (int i = 0; i < n; i++) {
        const float e = got[i] > expected[i] ? got[i] - expected[i] : expected[i] - got[i];
        if (!(e <= worst)) worst = e; /* a NaN stays */
    }
    return worst;
}

static long billionths(float x)
{
    return (long)(x * 1e9f);
}

#endif
