/* Runs Intel AMX instructions on processors that have none, inside the process under test and on
 * its own object code: an AMX instruction raises SIGILL there, and the handler below does what the
 * processor would have done. The rules are those of Intel's Software Developer's Manual for palette
 * 1, and Linux's for the permission to use tiles. What hardware would refuse ends the process, with
 * the reason on stderr. A load or store that faults raises an ordinary SIGSEGV, while the handler
 * runs.
 *
 * Virtual machines intercept invalid instructions, so that each costs some 15 us there and not 2.
 * The first time one is met, its first byte is therefore made a breakpoint in memory, as a debugger
 * does it; all of them begin with the same byte, so nothing has to be remembered.
 *
 * Linux hands out tiles by arch_prctl, which kernels call as a bare `syscall` instruction, so that
 * call has to be caught in the kernel. Two ways are there:
 * - Syscall User Dispatch ends at exec, but also at fork and at every new thread, and while it is
 *   on it catches each call outside one range of addresses: of no use for kernels on threads.
 * - A seccomp filter holds for threads and children. Answered by a signal (SECCOMP_RET_TRAP) it
 *   would kill the compiled programs that tests start: exec takes the handler away, the filter
 *   stays. Answered by a listener (SECCOMP_RET_USER_NOTIF) such a child gets the kernel's own
 *   answer, because the listener sees that it does not have this library's memory.
 * So tests that load this library get the listener; programs that are started with it in LD_PRELOAD
 * get the signal, for whatever they start has it too, and one task can have only one listener. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum { ABSENT, REFUSED, GRANTED };
static const char *const mode_names[] = {"absent", "refused", "granted"};

/* What is counted: instructions, and two more. */
enum {
    LDTILECFG, STTILECFG, TILERELEASE, TILELOADD, TILELOADDT1, TILESTORED, TILEZERO,
    TDPBF16PS, TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD, VIOLATIONS, REQUESTS, COUNTED
};
static const char *const names[COUNTED] = {
    "ldtilecfg", "sttilecfg", "tilerelease", "tileloadd", "tileloaddt1", "tilestored", "tilezero",
    "tdpbf16ps", "tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud", "violations", "requests"
};

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

/* ARCH_GET_XCOMP_SUPP, ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM; components of the state. */
enum { GET_SUPPORTED = 0x1021, GET_PERMITTED = 0x1022, REQUEST = 0x1023 };
enum { TILE_CONFIG = 17, TILE_DATA = 18 };
#define BIT(n) ((uint64_t)1 << (n))
#define TILE_BITS (BIT(TILE_CONFIG) | BIT(TILE_DATA))

/* The state of a process, which its listener reads and writes from outside. */
struct process {
    uint64_t cookie[2]; /* drawn once: a process that has it here is this one or its fork */
    uint64_t supported; /* components of the state that there are without tiles */
    int32_t mode;
    int32_t granted;
    uint64_t requests; /* how often ARCH_REQ_XCOMP_PERM was called */
};
static struct process process;

static uint64_t counts[VIOLATIONS + 1];
static int emulating;
static int listener = -1;
static int memory = -1; /* this process's own, where even code can be written */
static struct sigaction old_ill, old_trap, old_sys;

/* ---- tiles of threads ----------------------------------------------------------------------- */

/* A thread owns one of these from LDTILECFG to TILERELEASE. Static, because nothing may be
 * allocated in a signal handler, and because thread-local memory of this size cannot be had from a
 * library that is loaded late. */
struct tiles {
    unsigned char data[TILES][ROWS][ROW_BYTES];
    unsigned char wide[2][ROWS][ROW_BYTES]; /* room for one dot product */
    unsigned char config[64];
    uint16_t row_bytes[TILES];
    uint8_t rows[TILES];
} __attribute__((aligned(64)));

enum { POOL = 1024 };
static struct tiles pool[POOL];
static unsigned char taken[POOL];
static __thread int own __attribute__((tls_model("initial-exec"))); /* 1 + its place; 0: none */
static __thread int passing __attribute__((tls_model("initial-exec")));

static struct tiles *own_tiles(void)
{
    return own > 0 ? &pool[own - 1] : NULL;
}

static struct tiles *take_tiles(void)
{
    for (int i = 0; own == 0 && i < POOL; ++i)
        if (!__atomic_load_n(&taken[i], __ATOMIC_RELAXED) &&
            !__atomic_exchange_n(&taken[i], 1, __ATOMIC_ACQUIRE))
            own = i + 1;
    return own_tiles();
}

static void give_tiles(void)
{
    const int place = own;
    own = 0;
    if (place > 0)
        __atomic_store_n(&taken[place - 1], 0, __ATOMIC_RELEASE);
}

/* ---- violations ----------------------------------------------------------------------------- */

static char *append(char *to, const char *text)
{
    while (*text != '\0')
        *to++ = *text++;
    return to;
}

static void say(const char *name, uint64_t ip, const char *reason)
{
    char line[256];
    char *to = append(append(append(line, "tiles: "), name), " at 0x");
    for (int shift = 60; shift >= 0; shift -= 4)
        *to++ = "0123456789abcdef"[ip >> shift & 15];
    to = append(append(append(to, ": "), reason), "\n");
    if (write(2, line, (size_t)(to - line)) < 0) {
        /* The signal that follows says enough. */
    }
}

static void end_by(int signal_)
{
    struct sigaction plain;
    memset(&plain, 0, sizeof plain);
    plain.sa_handler = SIG_DFL;
    sigaction(signal_, &plain, NULL);
    raise(signal_);
}

/* To whoever was there before. Returns if that one does. */
static void pass_on(int signal_, siginfo_t *info, void *context, const struct sigaction *old)
{
    const int raised = info->si_code <= 0;
    if (old->sa_handler == SIG_IGN && raised)
        return;
    /* A handler that raises the signal again wants the one before it: by now that may be this one,
     * and going round for ever is no answer. */
    if (old->sa_handler == SIG_DFL || old->sa_handler == SIG_IGN || (raised && passing)) {
        end_by(signal_);
        return;
    }
    passing = 1;
    if (old->sa_flags & SA_SIGINFO)
        old->sa_sigaction(signal_, info, context);
    else
        old->sa_handler(signal_);
    passing = 0;
}

enum fault { UNDEFINED_OPCODE, GENERAL_PROTECTION };

/* The reason why hardware would refuse an instruction, and how: the signal of that exception. */
struct refusal {
    enum fault fault;
    const char *reason;
};

static void violate(int kind, uint64_t ip, struct refusal refusal, siginfo_t *info, void *context)
{
    __atomic_fetch_add(&counts[VIOLATIONS], 1, __ATOMIC_RELAXED);
    say(names[kind], ip, refusal.reason);
    if (refusal.fault == GENERAL_PROTECTION) {
        raise(SIGSEGV); /* not blocked here: its handler, or death */
        end_by(SIGSEGV);
    }
    pass_on(SIGILL, info, context, &old_ill);
    end_by(SIGILL); /* no handler may go on after this */
}

/* ---- instructions --------------------------------------------------------------------------- */

struct instruction {
    int kind;
    int length;
    int to, a, b;     /* tiles: of the reg, rm and vvvv fields */
    uint64_t address; /* of the first row */
    uint64_t stride;
};

static const int registers[16] = {
    REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15
};

static int kind_of(int opcode, int prefix, int mod, int reg, int rm)
{
    static const int loads[4] = {-1, TILELOADDT1, TILESTORED, TILELOADD};
    static const int bytes[4] = {TDPBUUD, TDPBUSD, TDPBSUD, TDPBSSD};
    switch (opcode) {
    case 0x49:
        if (mod == 3 && rm == 0)
            return prefix == 3 ? TILEZERO : prefix == 0 && reg == 0 ? TILERELEASE : -1;
        return mod == 3 || reg != 0 ? -1 : prefix == 0 ? LDTILECFG : prefix == 1 ? STTILECFG : -1;
    case 0x4b:
        return mod != 3 && rm == 4 ? loads[prefix] : -1; /* only with an index byte */
    case 0x5c:
        return mod == 3 && prefix == 2 ? TDPBF16PS : -1;
    case 0x5e:
        return mod == 3 ? bytes[prefix] : -1;
    default:
        return -1;
    }
}

static int64_t displacement(const unsigned char *from, int size)
{
    int32_t four;
    if (size == 1)
        return (int8_t)from[0];
    memcpy(&four, from, 4);
    return size == 4 ? four : 0;
}

/* The memory operand; its bytes start behind ModRM. */
static void read_address(const unsigned char *ip, const greg_t *regs, int mod, int rm, int extend_x,
                         int extend_b, struct instruction *it)
{
    int size = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    int base = rm, after_ip = 0;
    if (rm == 4) {
        const int sib = ip[it->length++];
        const int index = (sib >> 3 & 7) + 8 * extend_x;
        if (index != 4)
            it->stride = (uint64_t)regs[registers[index]] << (sib >> 6);
        base = sib & 7;
    }
    if (base == 5 && mod == 0) {
        size = 4;
        after_ip = rm == 5;
    } else {
        it->address = (uint64_t)regs[registers[base + 8 * extend_b]];
    }
    it->address += (uint64_t)displacement(ip + it->length, size);
    it->length += size;
    if (after_ip)
        it->address += (uint64_t)(uintptr_t)ip + (uint64_t)it->length;
}

enum { VEX = 0xc4, BREAKPOINT = 0xcc };

/* Bytes are read one after another: behind the instruction there may be no page. */
static int decode(const unsigned char *ip, const greg_t *regs, struct instruction *it)
{
    memset(it, 0, sizeof *it);
    if ((ip[0] != VEX && ip[0] != BREAKPOINT) || (ip[1] & 0x1f) != 2 || (ip[2] & 0x84) != 0)
        return 0; /* VEX, map 0F38, W0, 128 bits */
    const int extend_r = !(ip[1] & 0x80), extend_x = !(ip[1] & 0x40), extend_b = !(ip[1] & 0x20);
    const int v = ~(ip[2] >> 3) & 15, prefix = ip[2] & 3, opcode = ip[3];
    if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c && opcode != 0x5e)
        return 0;
    const int mod = ip[4] >> 6, reg = ip[4] >> 3 & 7, rm = ip[4] & 7;
    it->kind = kind_of(opcode, prefix, mod, reg, rm);
    if (it->kind < 0 || extend_r || (mod == 3 && (extend_b || extend_x)))
        return 0; /* there is no tile behind number 7 */
    if (it->kind >= TDPBF16PS ? v > 7 : v != 0)
        return 0;
    it->length = 5;
    it->to = reg;
    it->a = rm;
    it->b = v;
    if (mod != 3) {
        read_address(ip, regs, mod, rm, extend_x, extend_b, it);
        if (opcode == 0x49) { /* no rows: the index only adds to the address */
            it->address += it->stride;
            it->stride = 0;
        }
    }
    return 1;
}

#define REFUSE(fault, reason) return (struct refusal){fault, reason}
#define ACCEPT return (struct refusal){UNDEFINED_OPCODE, NULL}
/* The library has to load where there is no AVX-512. */
#define AVX512 __attribute__((target("avx512f,avx512bw")))

static struct refusal load_config(const struct instruction *it)
{
    unsigned char c[64];
    memcpy(c, (const void *)(uintptr_t)it->address, sizeof c);
    if (c[0] > 1)
        REFUSE(GENERAL_PROTECTION, "no such palette");
    if (c[0] == 0) {
        give_tiles();
        ACCEPT;
    }
    if (c[1] != 0)
        REFUSE(GENERAL_PROTECTION, "start_row is not 0, which nothing here has use for");
    for (int i = 2; i < 64; ++i)
        if (c[i] != 0 && (i < 16 || (i >= 32 && i < 48) || i >= 56))
            REFUSE(GENERAL_PROTECTION, "a reserved byte of the configuration is not 0");
    for (int t = 0; t < TILES; ++t) {
        const int row_bytes = c[16 + 2 * t] | c[17 + 2 * t] << 8, rows = c[48 + t];
        if (row_bytes > ROW_BYTES)
            REFUSE(GENERAL_PROTECTION, "more than 64 bytes a row");
        if (rows > ROWS)
            REFUSE(GENERAL_PROTECTION, "more than 16 rows");
        if ((rows == 0) != (row_bytes == 0))
            REFUSE(GENERAL_PROTECTION, "rows without bytes or bytes without rows");
    }
    struct tiles *const tiles = take_tiles();
    if (tiles == NULL)
        REFUSE(GENERAL_PROTECTION, "no room: too many threads ended without tilerelease");
    memcpy(tiles->config, c, sizeof c);
    for (int t = 0; t < TILES; ++t) {
        memcpy(&tiles->row_bytes[t], c + 16 + 2 * t, 2);
        tiles->rows[t] = c[48 + t];
    }
    memset(tiles->data, 0, sizeof tiles->data);
    ACCEPT;
}

static void store_config(const struct instruction *it)
{
    static const unsigned char none[64];
    const struct tiles *const tiles = own_tiles();
    memcpy((void *)(uintptr_t)it->address, tiles != NULL ? tiles->config : none, 64);
}

/* Bytes that are masked off are not touched. */
static __mmask64 first_bytes(int n)
{
    return n >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << n) - 1;
}

static AVX512 void load_rows(struct tiles *tiles, const struct instruction *it)
{
    const __mmask64 some = first_bytes(tiles->row_bytes[it->to]);
    const int rows = tiles->rows[it->to];
    uint64_t from = it->address;
    int r = 0;
    for (; r < rows; ++r, from += it->stride)
        _mm512_store_si512(tiles->data[it->to][r],
                           _mm512_maskz_loadu_epi8(some, (const void *)(uintptr_t)from));
    memset(tiles->data[it->to][r], 0, (size_t)(ROWS - r) * ROW_BYTES);
}

static AVX512 void store_rows(const struct tiles *tiles, const struct instruction *it)
{
    const __mmask64 some = first_bytes(tiles->row_bytes[it->to]);
    uint64_t to = it->address;
    for (int r = 0; r < tiles->rows[it->to]; ++r, to += it->stride)
        _mm512_mask_storeu_epi8((void *)(uintptr_t)to, some,
                                _mm512_load_si512(tiles->data[it->to][r]));
}

static void zero_rows_behind(struct tiles *tiles, int t)
{
    const int rows = tiles->rows[t];
    memset(tiles->data[t][rows], 0, (size_t)(ROWS - rows) * ROW_BYTES);
}

static inline AVX512 __m512i pair_at(const unsigned char *row, int k)
{
    int32_t pair;
    memcpy(&pair, row + 4 * k, 4);
    return _mm512_set1_epi32(pair);
}

/* The sums of even and of odd products each go over k in float32, then together, then onto C. The
 * caller has set rounding, denormals-are-zero and flush-to-zero: hence noinline. */
static AVX512 __attribute__((noinline)) void dot_bf16(struct tiles *tiles,
                                                      const struct instruction *it)
{
    enum { STEP = 4 }; /* rows at once: their chains of FMAs overlap */
    const __m512i high = _mm512_set1_epi32((int32_t)0xffff0000u);
    const int pairs = tiles->row_bytes[it->a] / 4, rows = tiles->rows[it->to];
    const __mmask16 columns = (__mmask16)((1u << tiles->row_bytes[it->to] / 4) - 1);
    for (int k = 0; k < pairs; ++k) {
        const __m512i b = _mm512_load_si512(tiles->data[it->b][k]);
        _mm512_store_si512(tiles->wide[0][k], _mm512_slli_epi32(b, 16));
        _mm512_store_si512(tiles->wide[1][k], _mm512_and_si512(b, high));
    }
    for (int r = 0; r < rows; r += STEP) {
        __m512 even[STEP], odd[STEP];
#pragma GCC unroll 4
        for (int i = 0; i < STEP; ++i)
            even[i] = odd[i] = _mm512_setzero_ps();
        for (int k = 0; k < pairs; ++k) {
            const __m512 b0 = _mm512_load_ps(tiles->wide[0][k]);
            const __m512 b1 = _mm512_load_ps(tiles->wide[1][k]);
#pragma GCC unroll 4
            for (int i = 0; i < STEP; ++i) {
                const __m512i a = pair_at(tiles->data[it->a][r + i], k);
                const __m512 a0 = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
                const __m512 a1 = _mm512_castsi512_ps(_mm512_and_si512(a, high));
                even[i] = _mm512_fmadd_ps(a0, b0, even[i]);
                odd[i] = _mm512_fmadd_ps(a1, b1, odd[i]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < STEP; ++i) {
            unsigned char *const c = tiles->data[it->to][r + i];
            const __m512 sum = _mm512_add_ps(even[i], odd[i]);
            _mm512_store_ps(c, _mm512_maskz_add_ps(columns, _mm512_load_ps(c), sum));
        }
    }
    zero_rows_behind(tiles, it->to); /* where the last step went too far */
}

/* Bytes 0 and 2 (or 1 and 3) of each four, widened to 16 bits. */
static inline AVX512 __m512i widen(__m512i fours, int second, int has_sign)
{
    const __m512i up = second ? fours : _mm512_slli_epi16(fours, 8);
    return has_sign ? _mm512_srai_epi16(up, 8) : _mm512_srli_epi16(up, 8);
}

/* Sums of four products, onto C; they wrap, so that order does not matter. */
static AVX512 void dot_bytes(struct tiles *tiles, const struct instruction *it)
{
    const int a_sign = it->kind == TDPBSSD || it->kind == TDPBSUD;
    const int b_sign = it->kind == TDPBSSD || it->kind == TDPBUSD;
    const int fours = tiles->row_bytes[it->a] / 4, rows = tiles->rows[it->to];
    const __mmask16 columns = (__mmask16)((1u << tiles->row_bytes[it->to] / 4) - 1);
    for (int k = 0; k < fours; ++k) {
        const __m512i b = _mm512_load_si512(tiles->data[it->b][k]);
        _mm512_store_si512(tiles->wide[0][k], widen(b, 0, b_sign));
        _mm512_store_si512(tiles->wide[1][k], widen(b, 1, b_sign));
    }
    for (int r = 0; r < rows; ++r) {
        unsigned char *const c = tiles->data[it->to][r];
        unsigned char a_wide[2][ROW_BYTES] __attribute__((aligned(64)));
        const __m512i a = _mm512_load_si512(tiles->data[it->a][r]);
        __m512i sum = _mm512_load_si512(c);
        _mm512_store_si512(a_wide[0], widen(a, 0, a_sign));
        _mm512_store_si512(a_wide[1], widen(a, 1, a_sign));
        for (int k = 0; k < fours; ++k)
            for (int i = 0; i < 2; ++i)
                sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pair_at(a_wide[i], k),
                          _mm512_load_si512(tiles->wide[i][k])));
        _mm512_store_si512(c, _mm512_maskz_mov_epi32(columns, sum));
    }
    zero_rows_behind(tiles, it->to);
}

static struct refusal dot(struct tiles *tiles, const struct instruction *it)
{
    const int to = it->to, a = it->a, b = it->b;
    if (to == a || to == b || a == b)
        REFUSE(UNDEFINED_OPCODE, "the same tile twice");
    if (tiles->rows[to] == 0 || tiles->rows[a] == 0 || tiles->rows[b] == 0)
        REFUSE(UNDEFINED_OPCODE, "a tile without a shape");
    if (tiles->row_bytes[to] % 4 != 0 || tiles->row_bytes[a] % 4 != 0 ||
        tiles->row_bytes[b] % 4 != 0)
        REFUSE(UNDEFINED_OPCODE, "a row that does not end with a group of four bytes");
    if (tiles->rows[to] != tiles->rows[a])
        REFUSE(UNDEFINED_OPCODE, "A and C differ in rows");
    if (tiles->row_bytes[a] / 4 != tiles->rows[b])
        REFUSE(UNDEFINED_OPCODE, "B does not have a row for each group of A");
    if (tiles->row_bytes[to] != tiles->row_bytes[b])
        REFUSE(UNDEFINED_OPCODE, "B and C differ in columns");
    if (it->kind == TDPBF16PS) {
        /* What the instruction has fixed; the interrupted program's MXCSR comes back with its other
         * registers. */
        const unsigned kept = _mm_getcsr(), fixed = 0x1f80u | 0x8000u | 0x40u;
        __asm__ volatile("ldmxcsr %0" : : "m"(fixed) : "memory");
        dot_bf16(tiles, it);
        __asm__ volatile("ldmxcsr %0" : : "m"(kept) : "memory");
    } else {
        dot_bytes(tiles, it);
    }
    ACCEPT;
}

/* Without permission hardware would let some of these pass that touch no tile; no kernel should
 * depend on that. */
static struct refusal execute(const struct instruction *it)
{
    struct tiles *const tiles = own_tiles();
    if (!__atomic_load_n(&process.granted, __ATOMIC_RELAXED))
        REFUSE(UNDEFINED_OPCODE, "this process has no permission to use tiles");
    switch (it->kind) {
    case LDTILECFG:
        return load_config(it);
    case STTILECFG:
        store_config(it);
        ACCEPT;
    case TILERELEASE:
        give_tiles();
        ACCEPT;
    default:
        break;
    }
    if (tiles == NULL)
        REFUSE(UNDEFINED_OPCODE, "tiles are not configured");
    if (it->kind >= TDPBF16PS)
        return dot(tiles, it);
    if (tiles->rows[it->to] == 0)
        REFUSE(UNDEFINED_OPCODE, "a tile without a shape");
    if (it->kind == TILEZERO)
        memset(tiles->data[it->to], 0, sizeof tiles->data[0]);
    else if (it->kind == TILESTORED)
        store_rows(tiles, it);
    else
        load_rows(tiles, it);
    ACCEPT;
}

/* The instruction at ip and those right behind it, which saves their traps. Returns whether there
 * was one. */
static int step(uint64_t ip, siginfo_t *info, void *context)
{
    greg_t *const regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    struct instruction it;
    int done = 0;
    for (; decode((const unsigned char *)(uintptr_t)ip, regs, &it); ++done) {
        regs[REG_RIP] = (greg_t)ip;
        const struct refusal refusal = execute(&it);
        if (refusal.reason != NULL) {
            violate(it.kind, ip, refusal, info, context);
            return 1;
        }
        __atomic_fetch_add(&counts[it.kind], 1, __ATOMIC_RELAXED);
        ip += (uint64_t)it.length;
        regs[REG_RIP] = (greg_t)ip;
    }
    return done;
}

static void on_ill(int signal_, siginfo_t *info, void *context)
{
    static const unsigned char breakpoint = BREAKPOINT;
    const greg_t ip = ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
    if (info->si_code <= 0 || !step((uint64_t)ip, info, context))
        pass_on(signal_, info, context, &old_ill);
    else if (memory >= 0 && pwrite(memory, &breakpoint, 1, ip) != 1)
        memory = -1; /* not allowed: then it stays slow */
}

static void on_trap(int signal_, siginfo_t *info, void *context)
{
    const uint64_t ip = (uint64_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] - 1;
    if (info->si_code == SI_USER || info->si_code == SI_TKILL || info->si_code == TRAP_TRACE ||
        *(const unsigned char *)(uintptr_t)ip != BREAKPOINT || !step(ip, info, context))
        pass_on(signal_, info, context, &old_trap);
}

/* ---- permission ----------------------------------------------------------------------------- */

/* What arch_prctl returns, and what it writes at its argument where it returns 0. */
static int64_t answer(struct process *p, uint64_t code, uint64_t argument, uint64_t *mask)
{
    *mask = p->supported;
    switch (code) {
    case GET_SUPPORTED:
        if (p->mode != ABSENT)
            *mask |= TILE_BITS;
        return 0;
    case GET_PERMITTED: /* the configuration needs no permission, only the 8 KiB of data do */
        if (p->mode != ABSENT)
            *mask |= BIT(TILE_CONFIG) | (p->granted ? BIT(TILE_DATA) : 0);
        return 0;
    default:
        p->requests++;
        if (p->mode == ABSENT || argument != TILE_DATA)
            return argument < 64 ? -EOPNOTSUPP : -EINVAL;
        if (p->mode == REFUSED)
            return -EPERM;
        p->granted = 1;
        return 0;
    }
}

static void on_sys(int signal_, siginfo_t *info, void *context)
{
    greg_t *const regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint64_t code = (uint64_t)regs[REG_RDI], argument = (uint64_t)regs[REG_RSI];
    uint64_t mask;
    if (info->si_code != 1 /* SYS_SECCOMP */ || info->si_syscall != SYS_arch_prctl) {
        pass_on(signal_, info, context, &old_sys);
        return;
    }
    regs[REG_RAX] = (greg_t)answer(&process, code, argument, &mask);
    if (code != REQUEST)
        memcpy((void *)(uintptr_t)argument, &mask, sizeof mask);
}

/* Both return whether all was copied. Process ids may be those of threads. */
static int peek(pid_t from, const void *address, void *to, size_t size)
{
    struct iovec here = {to, size}, there = {(void *)(uintptr_t)address, size};
    return process_vm_readv(from, &here, 1, &there, 1, 0) == (ssize_t)size;
}

static int poke(pid_t to, void *address, const void *from, size_t size)
{
    struct iovec here = {(void *)(uintptr_t)from, size}, there = {address, size};
    return process_vm_writev(to, &here, 1, &there, 1, 0) == (ssize_t)size;
}

static void serve_one(const struct seccomp_notif *asked, struct seccomp_notif_resp *reply)
{
    const pid_t task = (pid_t)asked->pid;
    const uint64_t code = asked->data.args[0], argument = asked->data.args[1];
    struct process its;
    uint64_t mask;
    if (!peek(task, &process, &its, sizeof its) ||
        memcmp(its.cookie, process.cookie, sizeof its.cookie) != 0) {
        reply->flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE; /* another program: the kernel's answer */
        return;
    }
    reply->error = (int32_t)answer(&its, code, argument, &mask);
    if (code != REQUEST) {
        if (!poke(task, (void *)(uintptr_t)argument, &mask, sizeof mask))
            reply->error = -EFAULT;
    } else {
        poke(task, &process.granted, &its.granted, sizeof its.granted);
        poke(task, &process.requests, &its.requests, sizeof its.requests);
    }
}

/* The listener's thread. Forked processes are served by their parent's. */
static void *serve(void *unused)
{
    static union { /* the kernel may know longer ones than the headers */
        struct seccomp_notif notif;
        struct seccomp_notif_resp resp;
        uint64_t room[128];
    } asked, reply;
    for (;;) {
        memset(&asked, 0, sizeof asked);
        memset(&reply, 0, sizeof reply);
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &asked.notif) != 0) {
            if (errno == EINTR || errno == ENOENT)
                continue; /* who asked is gone */
            return unused;
        }
        reply.resp.id = asked.notif.id;
        serve_one(&asked.notif, &reply.resp);
        ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &reply.resp);
    }
}

/* Means the process that opened it, so that a forked one opens it again. */
static void open_memory(void)
{
    if (memory >= 0)
        close(memory);
    memory = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
}

/* A process that outlives its parent is not to wait for it: with this end open it would. */
static void after_fork(void)
{
    if (listener >= 0)
        close(listener);
    listener = -1;
    open_memory();
}

static int add_filter(uint32_t action, unsigned flags)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 8),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 6),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0]) + 4),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, GET_SUPPORTED, 0, 2),
        BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, REQUEST, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof code[0], code};
    /* Threads that are there already get the filter too; where one of them has a filter of its own,
     * only this thread does. */
    const unsigned all = flags & SECCOMP_FILTER_FLAG_NEW_LISTENER
                             ? SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_TSYNC_ESRCH
                             : SECCOMP_FILTER_FLAG_TSYNC;
    /* Older kernels slow a filtered process down without this. */
    const unsigned quick = SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    const unsigned tries[] = {flags | quick | all, flags | quick};
    long made = -1;
    for (int i = 0; made != 0 && i < 2; ++i) {
        made = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, tries[i], &program);
        if (made < 0 && errno == EACCES) { /* only root may go without this */
            prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            made = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, tries[i], &program);
        }
        if (made >= 0 && (flags & SECCOMP_FILTER_FLAG_NEW_LISTENER))
            return (int)made; /* the listener */
        if (made > 0)
            made = -1; /* the thread that could not have it */
    }
    return made == 0 ? 0 : -errno;
}

/* Names that are younger than some <linux/seccomp.h>. Who asks waits for who answers, so that both
 * may as well share a processor. */
#define NOTIF_SET_FLAGS SECCOMP_IOW(4, uint64_t)
enum { WAKE_HERE = 1 };

static int listen_to_calls(void)
{
    sigset_t all, before;
    pthread_t thread;
    listener = add_filter(SECCOMP_RET_USER_NOTIF, SECCOMP_FILTER_FLAG_NEW_LISTENER);
    if (listener < 0)
        return listener;
    ioctl(listener, NOTIF_SET_FLAGS, WAKE_HERE); /* halves the time; Linux 6.6 */
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* signals are for the program's own threads */
    const int failed = pthread_create(&thread, NULL, serve, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        return -failed;
    pthread_detach(thread);
    return 0;
}

/* ---- what tests call ------------------------------------------------------------------------ */

static uint64_t enabled_components(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int has_avx512(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}

/* Whether processor and kernel have tiles of their own: AMX-TILE, AMX-BF16, and the state. */
int tiles_native(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1))
        return 0;
    return (enabled_components() & TILE_BITS) == TILE_BITS;
}

static void in_front(int signal_, void (*handler)(int, siginfo_t *, void *), struct sigaction *old)
{
    struct sigaction ours, found;
    memset(&ours, 0, sizeof ours);
    sigemptyset(&ours.sa_mask); /* SIGSEGV stays open: loads may fault */
    ours.sa_sigaction = handler;
    /* SA_NODEFER: a SIGSEGV handler may jump out of a load and not come back to unblock SIGILL. No
     * SA_ONSTACK: an alternate stack may be too small for two frames with all vector registers. */
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(signal_, NULL, &found);
    if ((found.sa_flags & SA_SIGINFO) && found.sa_sigaction == handler)
        return;
    *old = found;
    sigaction(signal_, &ours, NULL);
}

/* Puts the handlers back in front; whoever is there comes next. */
void tiles_in_front(void)
{
    if (!emulating)
        return;
    in_front(SIGILL, on_ill, &old_ill);
    in_front(SIGTRAP, on_trap, &old_trap);
    in_front(SIGSYS, on_sys, &old_sys);
}

/* Another answer to requests. Whoever had permission has none now. */
int tiles_mode(int mode)
{
    if (!emulating || mode < ABSENT || mode > GRANTED)
        return -EINVAL;
    __atomic_store_n(&process.mode, mode, __ATOMIC_RELAXED);
    __atomic_store_n(&process.granted, 0, __ATOMIC_RELAXED);
    return 0;
}

int tiles_mode_now(void)
{
    return emulating ? __atomic_load_n(&process.mode, __ATOMIC_RELAXED) : ABSENT;
}

static int install(int mode, int force, int by_signal)
{
    int status;
    if (mode < ABSENT || mode > GRANTED)
        return -EINVAL;
    if (emulating) {
        tiles_in_front();
        return tiles_mode(mode);
    }
    if (tiles_native() && !force)
        return 1;
    if (!has_avx512())
        return -ENOTSUP;
    /* Not by asking the kernel: a filter that the parent left may wait for that. */
    process.supported = enabled_components() & ~TILE_BITS;
    if (getrandom(process.cookie, sizeof process.cookie, 0) != sizeof process.cookie)
        return -EIO;
    process.mode = mode;
    emulating = 1;
    open_memory();
    pthread_atfork(NULL, NULL, after_fork);
    tiles_in_front();
    status = by_signal ? -EBUSY : listen_to_calls();
    if (status == -EBUSY || status == -EINVAL) /* someone else listens, or the kernel cannot */
        status = add_filter(SECCOMP_RET_TRAP, 0);
    return status;
}

/* 0: emulates from now on; 1: did nothing, this machine has tiles (force: emulate even so; the real
 * ones raise SIGILL as long as the kernel is not asked for them); negative: an errno. */
int tiles_install(int mode, int force)
{
    return install(mode, force, 0);
}

/* The palette in force on this thread; 0: none. */
int tiles_configured(void)
{
    unsigned char config[64] = {0};
    uint64_t permitted = 0;
    if (emulating)
        return own_tiles() != NULL;
    if (tiles_native() && syscall(SYS_arch_prctl, GET_PERMITTED, &permitted) == 0 &&
        (permitted >> TILE_DATA & 1))
        __asm__ volatile("sttilecfg %0" : "=m"(config));
    return config[0];
}

/* Fills this thread's tiles with NaNs, whatever their shape. LDTILECFG zeroes tiles, so that only
 * configured ones keep them; returns whether they were. */
int tiles_clobber(void)
{
    struct tiles *const tiles = own_tiles();
    if (tiles != NULL)
        memset(tiles->data, 0xff, sizeof tiles->data);
    return tiles != NULL;
}

const char *tiles_name(int counter)
{
    return counter >= 0 && counter < COUNTED ? names[counter] : NULL;
}

void tiles_counts(uint64_t *to, int n)
{
    for (int i = 0; i < n && i < COUNTED; ++i)
        to[i] = __atomic_load_n(i == REQUESTS ? &process.requests : &counts[i], __ATOMIC_RELAXED);
}

void tiles_reset(void)
{
    for (int i = 0; i <= VIOLATIONS; ++i)
        __atomic_store_n(&counts[i], 0, __ATOMIC_RELAXED);
    __atomic_store_n(&process.requests, 0, __ATOMIC_RELAXED);
}

/* In programs that have this library in LD_PRELOAD: HL_TILES is the mode, HL_TILES_FORCE forces. */
__attribute__((constructor)) static void preloaded(void)
{
    const char *const mode = getenv("HL_TILES");
    if (mode == NULL)
        return;
    for (int i = ABSENT; i <= GRANTED; ++i)
        if (strcmp(mode, mode_names[i]) == 0 &&
            install(i, getenv("HL_TILES_FORCE") != NULL, 1) >= 0)
            return;
    static const char text[] = "tiles: HL_TILES is set, but nothing can be emulated here\n";
    if (write(2, text, sizeof text - 1) < 0) {
        /* Then nobody reads this. */
    }
}
