/* Calls a function as nobody else would: every register that it has to give back filled, and says
 * what it left behind. x86-64 and AArch64. runner.c includes it under -DENVIRONMENT; tests load it.
 *
 * env_call(function, arguments, control, report): control is what MXCSR (FPCR) is set to for the
 * call; report->left has the registers as they were after it, callee-saved ones in the order of
 * report->given. */
#include <stdint.h>
#include <string.h>

enum { REGISTERS = 18 };

typedef struct env_report {
    uint64_t given[REGISTERS]; /* what callee-saved registers held                        */
    uint64_t left[REGISTERS];  /* and what they hold after the call                       */
    uint64_t result;
    uint64_t control;          /* MXCSR; FPCR                                             */
    uint64_t status;           /* 0; FPSR                                                 */
    uint64_t flags;            /* x86: RFLAGS                                             */
    uint64_t x87[4];           /* x86: the image of fnstenv: control, status, tags        */
} env_report;

uint64_t env_raw(void *function, void *const *arguments, uint64_t control, env_report *report);
int env_call(void *function, void *const *arguments, uint64_t control, env_report *report);
int env_registers(void);

#if defined(__x86_64__)
#define USED 6
__asm__(".text\n.globl env_raw\n.type env_raw, @function\nenv_raw:\n"
        "  pushq %rbx\n  pushq %rbp\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
        "  subq $24, %rsp\n" /* 0: report, 8: this one's MXCSR, 12: that of the call */
        "  movq %rcx, (%rsp)\n  stmxcsr 8(%rsp)\n  movl %edx, 12(%rsp)\n  ldmxcsr 12(%rsp)\n"
        "  movq %rdi, %rax\n  movq %rsi, %r10\n  movq %rcx, %r11\n"
        "  movq (%r10), %rdi\n  movq 8(%r10), %rsi\n  movq 16(%r10), %rdx\n  movq 24(%r10), %rcx\n"
        "  movq (%r11), %rbx\n  movq 8(%r11), %rbp\n  movq 16(%r11), %r12\n"
        "  movq 24(%r11), %r13\n  movq 32(%r11), %r14\n  movq 40(%r11), %r15\n"
        "  call *%rax\n"
        "  pushfq\n  popq %rdx\n  cld\n" /* the flags before anything else changes them */
        "  movq (%rsp), %r11\n"
        "  movq %rbx, 144(%r11)\n  movq %rbp, 152(%r11)\n  movq %r12, 160(%r11)\n"
        "  movq %r13, 168(%r11)\n  movq %r14, 176(%r11)\n  movq %r15, 184(%r11)\n"
        "  movq %rax, 288(%r11)\n  stmxcsr 296(%r11)\n  movl $0, 300(%r11)\n"
        "  movq $0, 304(%r11)\n  movq %rdx, 312(%r11)\n"
        "  fnstenv 320(%r11)\n  fninit\n  ldmxcsr 8(%rsp)\n"
        "  addq $24, %rsp\n"
        "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbp\n  popq %rbx\n"
        "  ret\n.size env_raw, .-env_raw\n"
        ".section .note.GNU-stack,\"\",@progbits\n.text\n");
#elif defined(__aarch64__)
#define USED 18
__asm__(".text\n.globl env_raw\n.type env_raw, %function\nenv_raw:\n"
        "  stp x29, x30, [sp, #-192]!\n  mov x29, sp\n"
        "  stp x19, x20, [sp, #16]\n  stp x21, x22, [sp, #32]\n  stp x23, x24, [sp, #48]\n"
        "  stp x25, x26, [sp, #64]\n  stp x27, x28, [sp, #80]\n"
        "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n"
        "  stp d14, d15, [sp, #144]\n  str x3, [sp, #160]\n"
        "  mrs x9, fpcr\n  str x9, [sp, #168]\n  msr fpcr, x2\n  msr fpsr, xzr\n"
        "  mov x16, x0\n  mov x10, x1\n  mov x11, x3\n"
        "  ldp x0, x1, [x10]\n  ldp x2, x3, [x10, #16]\n"
        "  ldp x19, x20, [x11]\n  ldp x21, x22, [x11, #16]\n  ldp x23, x24, [x11, #32]\n"
        "  ldp x25, x26, [x11, #48]\n  ldp x27, x28, [x11, #64]\n"
        "  ldp d8, d9, [x11, #80]\n  ldp d10, d11, [x11, #96]\n  ldp d12, d13, [x11, #112]\n"
        "  ldp d14, d15, [x11, #128]\n"
        "  blr x16\n"
        "  ldr x11, [sp, #160]\n  add x12, x11, #144\n"
        "  stp x19, x20, [x12]\n  stp x21, x22, [x12, #16]\n  stp x23, x24, [x12, #32]\n"
        "  stp x25, x26, [x12, #48]\n  stp x27, x28, [x12, #64]\n"
        "  stp d8, d9, [x12, #80]\n  stp d10, d11, [x12, #96]\n  stp d12, d13, [x12, #112]\n"
        "  stp d14, d15, [x12, #128]\n"
        "  str x0, [x11, #288]\n  mrs x9, fpcr\n  str x9, [x11, #296]\n"
        "  mrs x9, fpsr\n  str x9, [x11, #304]\n"
        "  ldr x9, [sp, #168]\n  msr fpcr, x9\n"
        "  ldp x19, x20, [sp, #16]\n  ldp x21, x22, [sp, #32]\n  ldp x23, x24, [sp, #48]\n"
        "  ldp x25, x26, [sp, #64]\n  ldp x27, x28, [sp, #80]\n"
        "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n"
        "  ldp d14, d15, [sp, #144]\n  ldp x29, x30, [sp], #192\n  ret\n"
        ".size env_raw, .-env_raw\n");
#endif

int env_registers(void)
{
    return USED;
}

/* Bits of what is not as it has to be: 1 a register, 2 the control word, 4 the direction flag,
 * 8 x87's control word, 16 x87's stack (MMX was left on). */
int env_call(void *function, void *const *arguments, uint64_t control, env_report *report)
{
    int wrong = 0;
    memset(report, 0, sizeof *report);
    for (int i = 0; i < USED; ++i) {
        report->given[i] = 0x5ca1ab1e00000000u + 0x01010101u * (unsigned)(i + 1);
    }
    (void)env_raw(function, arguments, control, report);
    for (int i = 0; i < USED; ++i) {
        wrong |= report->given[i] != report->left[i];
    }
#if defined(__x86_64__)
    wrong |= ((report->control ^ control) & ~0x3fu) != 0 ? 2 : 0;
    wrong |= (report->flags & 0x400u) != 0 ? 4 : 0;
    wrong |= (report->x87[0] & 0xffffu) != 0x37fu ? 8 : 0;
    wrong |= (report->x87[1] & 0xffffu) != 0xffffu ? 16 : 0;
#else
    wrong |= report->control != control ? 2 : 0;
#endif
    return wrong;
}

/* ---- controls: functions that leave something behind ---- */

int env_bad_register(void);
int env_bad_control(void);
int env_divide(volatile float *x);
int env_good(void);

#if defined(__x86_64__)
void env_set(uint64_t control);
void env_set(uint64_t control)
{
    const uint32_t mxcsr = (uint32_t)control;
    __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr));
}
#endif

int env_good(void)
{
    return 0;
}

int env_divide(volatile float *x)
{
    x[0] = x[0] / x[1];
    return 0;
}
#if defined(__x86_64__)
__asm__(".text\n.globl env_bad_register\nenv_bad_register:\n  xorl %r13d, %r13d\n"
        "  xorl %eax, %eax\n  ret\n"
        ".globl env_bad_control\nenv_bad_control:\n  stmxcsr -8(%rsp)\n  xorl $0x8000, -8(%rsp)\n"
        "  ldmxcsr -8(%rsp)\n  xorl %eax, %eax\n  ret\n"
        ".globl env_bad_flag\nenv_bad_flag:\n  std\n  xorl %eax, %eax\n  ret\n"
        ".globl env_bad_x87\nenv_bad_x87:\n  movw $0x27f, -8(%rsp)\n  fldcw -8(%rsp)\n"
        "  xorl %eax, %eax\n  ret\n"
        ".globl env_bad_mmx\nenv_bad_mmx:\n  pxor %mm0, %mm0\n  xorl %eax, %eax\n  ret\n");
#else
__asm__(".text\n.globl env_bad_register\nenv_bad_register:\n  fmov d11, xzr\n  mov w0, #0\n  ret\n"
        ".globl env_bad_control\nenv_bad_control:\n  mrs x9, fpcr\n  eor x9, x9, #0x1000000\n"
        "  msr fpcr, x9\n  mov w0, #0\n  ret\n");
#endif
