/* Included in front of every library that is compiled for coverage (tests/cover.py). A forked child
 * ends without what the C library does at exit, and the profile's own functions are hidden. */
#include <stddef.h>
#include <stdint.h>

void __llvm_profile_reset_counters(void);
int __llvm_profile_write_file(void);
char *__llvm_profile_begin_counters(void);
char *__llvm_profile_end_counters(void);

void hl_cover_begin(void);
void hl_cover_end(void);

/* In a child: what it inherited is its parent's to write. */
void hl_cover_begin(void)
{
    __llvm_profile_reset_counters();
}

/* Adds what ran since then to the profile, if anything did. */
void hl_cover_end(void)
{
    const char *at = __llvm_profile_begin_counters();
    const char *const end = __llvm_profile_end_counters();
    while (at < end && *at == 0) {
        ++at;
    }
    if (at < end) {
        (void)__llvm_profile_write_file();
    }
}
