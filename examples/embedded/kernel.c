/* The kernel, in a translation unit of its own: freestanding, and the one place that holds its
 * code. Other files define HL_API alone and get the declarations. HL_NO_TEXT leaves out the words
 * of error messages; status, argument and numbers stay. */
#define HL_API extern
#define HL_IMPLEMENTATION
#define HL_NO_TEXT
#include "hl_sparse_flash_attention_f32_d32_rope8.h"
