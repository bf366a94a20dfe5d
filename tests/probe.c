/* Asks a header what it says to calls that are not made: addresses are numbers, behind which there
 * is nothing, but for address 1, which stands for zeros.
 *
 *     cc -DSTRUCT=args_struct '-DASK(a, e)=call' probe.c       header.h beside it
 *     probe asked answers
 *
 * Asked: how many; of each its args, as laid out here. Answered, each an int64: status, argument,
 * rule, value, limit. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "header.h"

static const int32_t zeros[1 << 16];

int main(int argc, char **argv)
{
    FILE *const in = argc == 3 ? fopen(argv[1], "rb") : NULL;
    FILE *const out = argc == 3 ? fopen(argv[2], "wb") : NULL;
    int64_t count;
    if (in == NULL || out == NULL || fread(&count, sizeof count, 1, in) != 1) {
        return 3;
    }
    for (; count > 0; --count) {
        static const size_t pointers[] = {POINTERS};
        STRUCT args;
        hl_error error;
        int64_t answer[5];
        if (fread(&args, sizeof args, 1, in) != 1) {
            return 4;
        }
        for (size_t i = 0; i < sizeof pointers / sizeof pointers[0]; ++i) {
            const void *const real = zeros;
            uintptr_t address;
            memcpy(&address, (char *)&args + pointers[i], sizeof address);
            if (address == 1) {
                memcpy((char *)&args + pointers[i], &real, sizeof real);
            }
        }
        memset(&error, 0, sizeof error);
        answer[0] = ASK(&args, &error);
        answer[1] = error.argument;
        answer[2] = error.rule;
        answer[3] = error.value;
        answer[4] = error.limit;
        fwrite(answer, sizeof answer, 1, out);
    }
    fclose(in);
    return fclose(out) != 0;
}
