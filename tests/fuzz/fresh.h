/* Calls that are accepted, by chance: what the fuzzer starts from. */
#ifndef FRESH_H
#define FRESH_H

#define SET(name, x) (r->slot[S_##name] = (x))
#define GET(name) (r->slot[S_##name])

enum { LIST_TABLE, LIST_LENGTHS, LIST_ENDS, LIST_IDS, LIST_COUNTS, LIST_MORE };

static void fill_words(record *r, int32_t list, int64_t low, int64_t high)
{
    for (int32_t i = 0; i < WORDS; ++i) {
        r->word[list][i] = (int32_t)(high < low ? low : between(low, high));
    }
}

/* Ends of `n` batches, the last of them at most `total`. */
static void fill_ends(record *r, int32_t list, int64_t n, int64_t total)
{
    int64_t at = 0;
    for (int32_t i = 0; i < WORDS; ++i) {
        at = i < n ? between(at, at + (total - at) / (n - i)) : at;
        r->word[list][i] = (int32_t)at;
    }
}

static int64_t or_one(int64_t x)
{
    return x > 1 ? x : 1;
}

static void present(record *r, const int32_t *slots, int32_t n, int32_t always)
{
    for (int32_t i = 0; i < n; ++i) {
        r->slot[slots[i]] = always || below(3) == 0;
    }
}

#define PRESENT(always, ...) \
    present(r, (const int32_t[]){__VA_ARGS__}, \
            (int32_t)(sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t)), always)

static void fresh_pages(record *r, int64_t each_is_a_token)
{
    const int64_t size = between(1, below(4) ? 5 : 40);
    const int64_t blocks = between(1, 8);
    SET(block_size, size);
    SET(num_blocks, blocks);
    SET(max_blocks, between(1, each_is_a_token ? 16 : 4));
    SET(block_table, 1);
    fill_words(r, LIST_TABLE, 0, each_is_a_token ? size * blocks - 1 : blocks - 1);
}

static void fresh_sparse(record *r, const kernel *k)
{
    const int64_t batch = between(1, 3);
    const int64_t rows = between(1, below(3) ? 3 : 9);
    const int64_t keys = between(1, below(3) ? 20 : 150);
    const int32_t layout_kv = one_of(k->layouts_kv);
    const int32_t paged = layout_kv == HL_LAYOUT_PA_BSND;
    const int32_t layout_q = paged ? one_of(k->layouts_q) : layout_kv;
    const int32_t slots = k->slots && below(2);
    int64_t limit = keys;
    SET(batch, batch);
    SET(seq_q, rows);
    SET(seq_kv, keys);
    SET(heads_kv, k->record_behind ? 1 : between(1, 2));
    SET(heads_q, GET(heads_kv) * between(1, below(3) ? 4 : 20));
    SET(layout_query, layout_q);
    SET(layout_kv, layout_kv);
    SET(scale_value, bits_of(0.1f));
    SET(sparse_mode, slots || below(2) ? 0 : 3);
    SET(chunk_keys, below(2) ? 0 : 128 * between(1, 2));
    SET(out_f32, below(2));
    SET(isa, below(3) ? 0 : one_of(k->isas));
    PRESENT(1, S_query, S_key, S_attention_out);
    PRESENT(0, S_softmax_max, S_softmax_sum, S_softmax_lse, S_sinks);
    if (k->rope != 0) {
        SET(query_rope, below(2));
        SET(key_rope, !k->record && below(2));
    }
    SET(value, !k->record && below(2));
    if (paged) {
        fresh_pages(r, 0);
        limit = GET(max_blocks) * GET(block_size);
    }
    if (layout_q == HL_LAYOUT_TND || below(2)) {
        SET(actual_seq_lengths_query, 1);
        fill_ends(r, LIST_ENDS, layout_q == HL_LAYOUT_TND ? batch : 1, rows);
    }
    if (layout_kv == HL_LAYOUT_TND) {
        SET(actual_seq_lengths_kv, 1);
        fill_ends(r, LIST_LENGTHS, batch, keys);
    } else if (below(2)) {
        SET(actual_seq_lengths_kv, 1);
        fill_words(r, LIST_LENGTHS, 0, limit);
    }
    if (slots || below(2)) {
        SET(sparse_indices, 1);
        SET(list_length, between(0, 16));
        SET(sparse_block_size, slots ? 1 : (int64_t)1 << below(4));
        SET(index_kind, slots ? HL_INDEX_SLOTS : HL_INDEX_BLOCKS);
        SET(strict_lists, below(6) == 0);
        fill_words(r, LIST_IDS, 0, limit - 1);
        for (int32_t i = 0; below(2) && i < WORDS; ++i) { /* each of them once */
            r->word[LIST_IDS][i] = i < limit ? i : -1;
        }
        if (slots && below(2)) {
            SET(sparse_lengths, 1);
            fill_words(r, LIST_COUNTS, 0, GET(list_length));
        }
    }
    if (k->record && below(3) == 0) {
        SET(key_quant_mode, 2);
        SET(quant_scale_repo_mode, 1);
        SET(rope_head_dim, k->rope);
    }
    if (below(4) == 0) {
        SET(partials, 1);
        SET(partials_bytes, 1 << 20);
    }
}

static void fresh_decode(record *r, const kernel *k)
{
    const int64_t batch = between(1, 3);
    const int64_t rows = below(2) ? 1 : between(1, 16);
    const int64_t keys = between(1, below(3) ? 20 : 150);
    const int32_t layout_kv = one_of(k->layouts_kv);
    const int32_t pa = layout_kv == HL_LAYOUT_PA_BSND || layout_kv == HL_LAYOUT_PA_BNSD;
    int64_t limit = keys;
    SET(batch, batch);
    SET(seq_q, rows);
    SET(seq_kv, keys);
    SET(heads_kv, between(1, 2));
    SET(heads_q, GET(heads_kv) * between(1, below(3) ? 4 : 18));
    SET(layout_kv, layout_kv);
    SET(layout_query, layout_kv == HL_LAYOUT_PA_BNSD ? HL_LAYOUT_BNSD
                      : pa ? one_of(k->layouts_q) : layout_kv);
    SET(scale_value, bits_of(0.1f));
    SET(chunk_keys, below(2) ? 0 : 128 * between(1, 2));
    SET(out_f32, below(2));
    SET(inner_precise, below(2));
    SET(isa, below(3) ? 0 : one_of(k->isas));
    PRESENT(1, S_query, S_key, S_attention_out);
    SET(value, !k->value_shared || below(2));
    PRESENT(0, S_pse_shift, S_atten_mask);
    if (k->stats) {
        PRESENT(0, S_softmax_max, S_softmax_sum, S_softmax_lse);
    }
    SET(sinks, k->sinks && below(2));
    SET(alibi_slopes, k->alibi && below(2));
    SET(window, k->window && below(2) ? between(1, keys) : 0);
    SET(softcap, k->softcap && below(2) ? bits_of(5.0f) : 0);
    if (pa) {
        fresh_pages(r, 0);
        limit = GET(max_blocks) * GET(block_size);
    }
    if (pa || below(2)) {
        SET(actual_seq_lengths, 1);
        SET(lengths, below(3) ? 0 : below(2) ? 1 : batch);
        fill_words(r, LIST_LENGTHS, 0, limit);
        if (below(3) == 0) {
            SET(kv_padding_size, 1);
            fill_words(r, LIST_COUNTS, -1, 5);
        }
    }
    if (GET(pse_shift)) {
        SET(pse_batch, below(2) ? 0 : 1);
        SET(pse_width, below(2) ? 0 : limit + below(3));
    }
    if (GET(atten_mask)) {
        SET(mask_batch, below(2) ? 0 : 1);
        SET(mask_rows, below(2) ? 0 : rows);
        SET(mask_width, below(2) ? 0 : limit + below(3));
    }
    if (k->code_sides) {
        SET(antiquant_scale, 1);
        SET(antiquant_offset, below(2));
        SET(antiquant_mode, below(3));
        SET(antiquant_f32, below(2));
    }
    if (below(4) == 0) {
        SET(quant_scale2, 1);
        SET(quant_offset2, below(2));
        SET(quant_per_channel, below(2));
        SET(quant_bf16, below(2));
        SET(out_f32, 0);
    }
    if (below(4) == 0) {
        SET(partials, 1);
        SET(partials_bytes, 1 << 20);
    }
}

static void fresh_train(record *r, const kernel *k)
{
    const int32_t layout = one_of(k->layouts_q);
    const int32_t tnd = layout == HL_LAYOUT_TND;
    const int64_t batch = between(1, 3);
    const int64_t rows = between(1, below(3) ? 12 : 60);
    const int64_t keys = below(2) ? rows : between(1, below(3) ? 12 : 90);
    const int64_t heads = between(1, 2);
    SET(batch, batch);
    SET(seq_q, rows);
    SET(seq_kv, keys);
    SET(heads_kv, heads);
    SET(heads_q, heads * between(1, 3));
    SET(input_layout, layout);
    SET(stats_width, below(2) ? 0 : below(2) ? 1 : 8);
    SET(scale_value, bits_of(0.1f));
    SET(out_f32, below(2));
    SET(inner_precise, below(3));
    SET(isa, below(3) ? 0 : one_of(k->isas));
    SET(sparse_mode, tnd ? below(9) : below(7));
    PRESENT(1, S_query, S_key, S_value, S_attention_out);
    if (k->family == GRAD) {
        PRESENT(1, S_dout, S_softmax_max, S_softmax_sum, S_dkey);
        SET(dquery, below(4) != 0);
        SET(dvalue, below(4) != 0);
    } else {
        PRESENT(0, S_softmax_max, S_softmax_sum, S_softmax_lse, S_dropout_state);
        SET(sinks, k->sinks && below(2));
    }
    if (tnd) {
        SET(actual_seq_qlen, 1);
        SET(actual_seq_kvlen, 1);
        fill_ends(r, LIST_ENDS, batch, rows);
        fill_ends(r, LIST_LENGTHS, batch, keys);
        if (below(3) == 0) {
            memcpy(r->word[LIST_LENGTHS], r->word[LIST_ENDS], sizeof r->word[LIST_ENDS]);
            SET(seq_kv, rows);
        }
    }
    if (below(2)) {
        SET(mask_from_mode, 1);
    } else if (GET(sparse_mode) < 2 || GET(sparse_mode) == 5) {
        SET(atten_mask, 1);
        SET(sparse_mode, tnd ? below(2) : GET(sparse_mode));
        SET(mask_batch, below(2) ? 0 : batch);
        SET(mask_heads, below(2) ? 0 : GET(heads_q));
        SET(mask_rows, below(2) ? 0 : rows + below(3));
        SET(mask_width, below(2) ? 0 : keys + below(3));
    } else if (below(4) == 0) {
        SET(atten_mask, 1);
        SET(mask_check, below(2));
        SET(mask_rows, GET(sparse_mode) == 6 ? 3072 : 2048);
        SET(mask_width, 2048);
    }
    SET(prefix, 1);
    fill_words(r, LIST_COUNTS, 0, keys);
    if (below(2)) {
        SET(band, 1);
        SET(pre_tokens, between(-5, keys));
        SET(next_tokens, between(-5, keys));
    }
    if (below(3) == 0 && GET(sparse_mode) < 7) {
        SET(pse, 1);
        SET(pse_type, below(k->pse_types ? 4 : 2));
        SET(pse_shape, below(GET(sparse_mode) == 4 || GET(sparse_mode) == 6 ? 2 : 3));
        if (GET(pse_shape) == PSE_LAST_ROWS) {
            SET(seq_kv, tnd ? GET(seq_kv) : rows);
            SET(pse_width, 1024);
        }
        SET(pse_batch, below(2) ? 0 : 1);
        SET(q_start, below(9));
        SET(kv_start, below(9));
        SET(dpse, k->family == GRAD && GET(pse_shape) == 0 && GET(pse_type) < 2
                  && GET(pse_batch) == 0 && below(2));
    }
    if (below(3) == 0) {
        SET(keep_prob, bits_of(0.75f));
        SET(dropout_mask, below(2));
        SET(dropout_seed, (int64_t)chance());
        SET(dropout_offset, below(100));
    }
    SET(softcap, k->softcap && below(2) ? bits_of(5.0f) : 0);
    SET(stats_order, below(2));
}

static void fresh_bulk(record *r, const kernel *k)
{
    SET(rows, between(0, 20));
    SET(numbers_f32, below(2));
    SET(power_of_2, below(2));
    SET(block_size, k->record_behind ? between(1, 8) : 0);
    SET(isa, below(3) ? 0 : one_of(k->isas & ~(1 << HL_ISA_AMX)));
    SET(back, below(2));
    PRESENT(1, S_nope, S_records, S_from, S_to);
    SET(rope, below(2));
}

static void fresh_append(record *r, const kernel *k, int32_t decode)
{
    const int32_t layout_kv = one_of(decode ? k->layouts_kv
                                     : k->layouts_kv & ~(1 << HL_LAYOUT_TND));
    const int32_t pa = layout_kv == HL_LAYOUT_PA_BSND || layout_kv == HL_LAYOUT_PA_BNSD;
    const int64_t rows = between(1, 6);
    int64_t limit = rows + below(20);
    SET(batch, between(1, 3));
    SET(rows, rows);
    SET(heads_kv, k->record_behind ? 1 : between(1, 3));
    SET(seq_kv, limit);
    SET(layout_kv, layout_kv);
    SET(numbers_f32, below(2));
    SET(power_of_2, below(2));
    SET(isa, below(3) ? 0 : one_of(k->isas & ~(1 << HL_ISA_AMX)));
    PRESENT(1, S_nope, S_key, S_positions, S_key_cache);
    SET(rope, below(2));
    if (pa) {
        fresh_pages(r, 0);
        limit = GET(max_blocks) * GET(block_size);
        SET(rows, limit < rows ? limit : rows);
    }
    fill_words(r, LIST_ENDS, 0, limit - GET(rows)); /* positions */
    if (below(2)) {
        SET(lengths_list, 1);
        fill_words(r, LIST_LENGTHS, 0, GET(rows));
    }
    if (decode) {
        static const int32_t layouts[] = {HL_LAYOUT_BSND, HL_LAYOUT_BSH, HL_LAYOUT_BNSD};
        SET(layout_new, layouts[below(3)]);
        SET(value, !k->value_shared || below(2));
        SET(value_cache, GET(value));
        if (k->code_sides) {
            SET(antiquant_mode, below(3));
            SET(antiquant_f32, below(2));
            SET(antiquant_scale, GET(antiquant_mode) != 2);
            SET(antiquant_offset, GET(antiquant_mode) != 2 && below(2));
            SET(token_scales, GET(antiquant_mode) == 2);
        }
    }
}

static void fresh_parts(record *r, const kernel *k)
{
    (void)k;
    SET(parts, between(1, 4));
    SET(batch, between(1, 3));
    SET(seq_q, between(1, 3));
    SET(heads_kv, between(1, 2));
    SET(heads_q, GET(heads_kv) * between(1, 4));
    SET(out_f32, below(2));
    PRESENT(1, S_out, S_max, S_sum, S_attention_out);
    PRESENT(0, S_softmax_max, S_softmax_sum, S_softmax_lse);
    for (int32_t i = 0; i < WORDS; ++i) {
        r->word[0][i] = 3 * i + 1;
        r->word[1][i] = 3 * i + 2;
        r->word[2][i] = 3 * i + 3;
    }
}

static void fresh(record *r, const routine *q)
{
    const kernel *const k = q->of;
    r->flags = (uint8_t)chance();
    for (int32_t i = 0; i < 6; ++i) {
        r->seed[i] = (uint8_t)chance();
    }
    switch (q->what) {
    case PLAN:
        if (k->family == SPARSE || k->family == RECORDS) {
            fresh_sparse(r, k);
        } else if (k->family == DECODE) {
            fresh_decode(r, k);
        } else {
            fresh_train(r, k);
        }
        break;
    case PARTS: fresh_parts(r, k); break;
    case DECODE_APPEND: fresh_append(r, k, 1); break;
    case KV_APPEND: fresh_append(r, k, 0); break;
    default: fresh_bulk(r, k); break;
    }
    if (below(4) == 0) { /* rows and heads with gaps between them */
        static const int32_t strides[] = {S_query_stride, S_key_stride, S_value_stride,
                                          S_out_stride, S_dout_stride, S_dquery_stride};
        const int32_t s = strides[below((int64_t)(sizeof strides / sizeof strides[0]))];
        const int64_t channels = k->record ? k->record + 8 : k->dk + k->rope + between(1, 9);
        if (q->what == PLAN) {
            r->slot[s + 2] = channels;
            r->slot[s + 1] = channels * or_one(r->slot[S_heads_q]);
            r->slot[s] = r->slot[s + 1] * 160;
        }
    }
}

#endif
