/* As kernel.c: the decode operator and its append, for a cache of int8. */
#define HL_API extern
#define HL_IMPLEMENTATION
#define HL_NO_TEXT
#include "hl_incre_flash_attention_f16_i8_d32.h"
