/* What a call says that its memory is: where every tensor's elements lie, and how many entries its
 * lists have. Written from the manuals, in numbers that do not overflow, so that it can be held
 * against what the checks let pass; of a call that has to be refused it may say anything. */
#ifndef MODEL_H
#define MODEL_H

enum { T_NUMBER, T_FLOAT, T_BF16, T_CODE, T_RECORD, T_MASK, T_BITS, T_LIST, T_ENTRIES };

typedef struct span {
    int32_t slot;
    int32_t written;
    int32_t align;
    int32_t type;
    wide bytes;
    int64_t count[3]; /* batches, rows, heads; channels: elements side by side. 0: one block */
    int64_t channels;
    int64_t step[3];
    int64_t element;
} span;

typedef struct model {
    int32_t refused; /* it has to be */
    int32_t n;
    wide loops;      /* how often a check may go round */
    span span[40];
} model;

static void refuse_if(model *m, int32_t wrong)
{
    m->refused |= wrong;
}

static span *add_span(model *m, int32_t slot, wide bytes, int32_t align, int32_t written,
                      int32_t type)
{
    span *const s = &m->span[m->n++];
    memset(s, 0, sizeof *s);
    s->slot = slot;
    s->bytes = bytes > 0 ? bytes : 0;
    s->align = align;
    s->written = written;
    s->type = type;
    return s;
}

/* The same for what may be NULL. */
static void add_wanted(model *m, const int64_t *v, int32_t slot, wide bytes, int32_t align,
                       int32_t written, int32_t type)
{
    if (v[slot] != 0) {
        add_span(m, slot, bytes, align, written, type);
    }
}

static wide most(wide a, wide b)
{
    return a > b ? a : b;
}

/* A strided tensor. heads_first: BNSD. */
static span *add_tensor(model *m, const int64_t *v, int32_t slot, int32_t stride, int64_t batches,
                        int64_t rows, int64_t heads, int64_t channels, int64_t element,
                        int32_t heads_first, int32_t written, int32_t type)
{
    span *const s = add_span(m, slot, 0, (int32_t)element, written, type);
    const wide head = heads_first ? (wide)rows * channels : channels;
    const wide row = heads_first ? channels : (wide)heads * channels;
    const wide packed[3] = {(wide)rows * heads * channels, row, head};
    wide step[3];
    for (int32_t i = 0; i < 3; ++i) {
        step[i] = v[stride + i] != 0 ? (wide)v[stride + i] : packed[i];
        refuse_if(m, step[i] < 0);
        s->step[i] = (int64_t)step[i];
    }
    s->count[0] = batches;
    s->count[1] = rows;
    s->count[2] = heads;
    s->channels = channels;
    s->element = element;
    if (batches > 0 && rows > 0 && heads > 0 && !m->refused) {
        const wide last = (batches - 1) * step[0] + (rows - 1) * step[1] + (heads - 1) * step[2];
        s->bytes = (last + channels) * element;
        refuse_if(m, s->bytes > INT64_MAX);
    }
    return s;
}

static int32_t in_mask(int32_t mask, int64_t bit)
{
    return bit >= 0 && bit < 31 && (mask >> bit & 1) != 0;
}

/* Rows of records, whose scales may lie behind each page. */
static void add_records(model *m, const kernel *k, const int64_t *v, int32_t slot, int32_t stride,
                        int64_t pages, int64_t rows, int64_t heads, int32_t written)
{
    span *const s = add_tensor(m, v, slot, stride, pages, rows, heads, k->record, 1, 0, written,
                               T_RECORD);
    s->align = k->record_align;
    if (k->record_behind != 0 && s->bytes != 0) {
        const wide all = (wide)rows * (s->step[1] + k->record_behind);
        const wide unit = k->record_multiple;
        const wide page = v[stride] != 0 ? v[stride] : (all + unit - 1) / unit * unit;
        s->step[0] = (int64_t)page;
        s->bytes = all + (pages - 1) * page;
        refuse_if(m, s->bytes > INT64_MAX);
    }
}

static void paged_sizes(model *m, const int64_t *v, int64_t per_entry)
{
    refuse_if(m, V(block_size) < 1 || V(num_blocks) < 0 || V(max_blocks) < 0);
    refuse_if(m, (wide)V(max_blocks) * per_entry > INT32_MAX);
}

static int64_t or_else(int64_t x, int64_t otherwise)
{
    return x != 0 ? x : otherwise;
}

static void model_sparse(const kernel *k, const int64_t *v, model *m)
{
    const int32_t paged = V(layout_kv) == HL_LAYOUT_PA_BSND;
    const int32_t tnd_q = V(layout_query) == HL_LAYOUT_TND;
    const int32_t tnd_kv = V(layout_kv) == HL_LAYOUT_TND;
    const int64_t b_q = tnd_q ? 1 : V(batch);
    const int64_t b_kv = paged ? V(num_blocks) : tnd_kv ? 1 : V(batch);
    const int64_t s_kv = paged ? V(block_size) : V(seq_kv);
    const int64_t n1 = V(heads_q);
    const int64_t given = or_else(V(heads_kv), 1);
    const int64_t n2 = n1 > 0 ? given : 0;
    const int64_t d_q = k->dk + (V(query_rope) != 0 ? 0 : k->rope);
    const int64_t d_k = k->dk + (V(key_rope) != 0 ? 0 : k->rope);
    const wide rows = (wide)b_q * V(seq_q);
    const int32_t any = rows != 0 && n1 != 0;
    const int64_t out = V(out_f32) ? 4 : k->bytes;
    refuse_if(m, V(batch) < 0 || V(seq_q) < 0 || n1 < 0 || given < 0 || V(list_length) < 0);
    refuse_if(m, !in_mask(k->layouts_q, V(layout_query)) || !in_mask(k->layouts_kv, V(layout_kv)));
    refuse_if(m, V(out_f32) < 0 || V(out_f32) > 1 || (given > 0 && n1 % given != 0));
    if (paged) {
        paged_sizes(m, v, V(block_size));
    }
    refuse_if(m, !paged && s_kv < 0);
    if (m->refused) {
        return;
    }
    m->loops = V(batch) * (1 + (paged ? (wide)V(max_blocks) : 0));
    if (V(sparse_lengths) != 0 || V(strict_lists) != 0) {
        const wide length = V(strict_lists) ? 1 + V(list_length) : 1;
        m->loops += rows * n2 * (V(batch) * tnd_q + length);
    }
    add_tensor(m, v, S_query, S_query_stride, b_q, V(seq_q), n1, d_q, k->bytes, 0, 0, T_NUMBER);
    if (V(query_rope) != 0) {
        add_tensor(m, v, S_query_rope, S_query_rope_stride, b_q, V(seq_q), n1, k->rope, k->bytes, 0,
                   0, T_NUMBER);
    }
    if (!any) {
        /* nothing is read */
    } else if (k->record) {
        add_records(m, k, v, S_key, S_key_stride, b_kv, s_kv, n2, 0);
    } else {
        add_tensor(m, v, S_key, S_key_stride, b_kv, s_kv, n2, d_k, k->bytes, 0, 0, T_NUMBER);
        if (V(key_rope) != 0) {
            add_tensor(m, v, S_key_rope, S_key_rope_stride, b_kv, s_kv, n2, k->rope, k->bytes, 0,
                       0, T_NUMBER);
        }
        if (V(value) != 0) {
            add_tensor(m, v, S_value, S_value_stride, b_kv, s_kv, n2, k->dv, k->bytes, 0, 0,
                       T_NUMBER);
        }
    }
    add_wanted(m, v, S_sparse_indices, 4 * rows * n2 * V(list_length), 4, 0, T_LIST);
    add_wanted(m, v, S_sparse_lengths, 4 * rows * n2, 4, 0, T_LIST);
    add_wanted(m, v, S_block_table, (wide)4 * V(batch) * V(max_blocks), 4, 0, T_LIST);
    add_wanted(m, v, S_actual_seq_lengths_query, (wide)4 * V(batch), 4, 0, T_LIST);
    add_wanted(m, v, S_actual_seq_lengths_kv, (wide)4 * V(batch), 4, 0, T_LIST);
    add_wanted(m, v, S_sinks, (wide)4 * n1, 4, 0, T_FLOAT);
    add_tensor(m, v, S_attention_out, S_out_stride, b_q, V(seq_q), n1, k->dv, out, 0, 1,
               V(out_f32) ? T_FLOAT : T_NUMBER);
    add_wanted(m, v, S_softmax_max, 4 * rows * n1, 4, 1, T_FLOAT);
    add_wanted(m, v, S_softmax_sum, 4 * rows * n1, 4, 1, T_FLOAT);
    add_wanted(m, v, S_softmax_lse, 4 * rows * n1, 4, 1, T_FLOAT);
    add_wanted(m, v, S_partials, (wide)(uint64_t)V(partials_bytes), 1, 1, T_MASK);
}

static int64_t decode_limit(const int64_t *v)
{
    const int32_t paged = V(layout_kv) == HL_LAYOUT_PA_BSND || V(layout_kv) == HL_LAYOUT_PA_BNSD;
    const int64_t each = V(index_kind) == HL_INDEX_SLOTS ? 1 : V(block_size);
    return paged ? V(max_blocks) * each : V(seq_kv);
}

static void model_decode(const kernel *k, const int64_t *v, model *m)
{
    const int32_t paged = V(layout_kv) == HL_LAYOUT_PA_BSND || V(layout_kv) == HL_LAYOUT_PA_BNSD;
    const int32_t first_q = V(layout_query) == HL_LAYOUT_BNSD;
    const int32_t first_kv = V(layout_kv) == HL_LAYOUT_BNSD || V(layout_kv) == HL_LAYOUT_PA_BNSD;
    const int64_t rows = or_else(V(seq_q), 1);
    const int64_t n1 = or_else(V(heads_q), 1);
    const int64_t n2 = or_else(V(heads_kv), n1);
    const int64_t b_kv = paged ? V(num_blocks) : V(batch);
    const int64_t s_kv = paged ? V(block_size) : V(seq_kv);
    const int64_t lengths = or_else(V(lengths), V(batch));
    const int32_t wide_scales = V(antiquant_f32) || V(antiquant_mode) == HL_ANTIQUANT_TOKEN;
    const int64_t number = wide_scales ? 4 : k->bytes;
    const int32_t any = V(batch) != 0;
    const int64_t out = V(quant_scale2) != 0 ? 1 : V(out_f32) ? 4 : k->bytes;
    const int64_t quant = V(quant_bf16) ? 2 : 4;
    refuse_if(m, V(batch) < 0 || rows < 0 || rows > 16 || n1 < 0 || n2 < 0 || lengths < 0
                 || V(pse_batch) < 0 || V(pse_width) < 0 || V(mask_batch) < 0 || V(mask_rows) < 0
                 || V(mask_width) < 0);
    refuse_if(m, !in_mask(k->layouts_q, V(layout_query)) || !in_mask(k->layouts_kv, V(layout_kv)));
    refuse_if(m, V(out_f32) < 0 || V(out_f32) > 1 || (n2 > 0 && n1 % n2 != 0));
    refuse_if(m, V(antiquant_mode) < 0 || V(antiquant_mode) > 2);
    if (paged) {
        paged_sizes(m, v, V(index_kind) == HL_INDEX_SLOTS ? 1 : V(block_size));
    }
    refuse_if(m, !paged && s_kv < 0);
    if (m->refused) {
        return;
    }
    m->loops = V(batch) * (1 + (paged ? (wide)V(max_blocks) : 0));
    add_tensor(m, v, S_query, S_query_stride, V(batch), rows, n1, k->dk, k->bytes, first_q, 0,
               T_NUMBER);
    if (any && V(key_pages) == 0) {
        span *const s = add_tensor(m, v, S_key, S_key_stride, b_kv, s_kv, n2, k->key_width,
                                   k->key_element, first_kv, 0,
                                   k->code_sides ? T_CODE : T_NUMBER);
        s->align = k->key_align;
    }
    if (any && V(key_pages) == 0 && (V(value) != 0 || !k->value_shared)) {
        span *const s = add_tensor(m, v, S_value, S_value_stride, b_kv, s_kv, n2, k->value_width,
                                   k->value_element, first_kv, 0,
                                   k->code_sides ? T_CODE : T_NUMBER);
        s->align = k->value_align;
    }
    add_wanted(m, v, S_pse_shift,
               (wide)or_else(V(pse_batch), V(batch)) * n1 * rows * k->bytes
               * or_else(V(pse_width), decode_limit(v)), k->bytes, 0, T_NUMBER);
    add_wanted(m, v, S_atten_mask,
               (wide)or_else(V(mask_batch), V(batch)) * or_else(V(mask_rows), 1)
               * or_else(V(mask_width), decode_limit(v)), 1, 0, T_MASK);
    add_wanted(m, v, S_actual_seq_lengths, lengths == 1 ? 4 : (wide)4 * V(batch), 4, 0, T_LIST);
    add_wanted(m, v, S_kv_padding_size, paged ? 0 : 4, 4, 0, T_LIST);
    add_wanted(m, v, S_block_table, (wide)4 * V(batch) * V(max_blocks), 4, 0, T_LIST);
    add_wanted(m, v, S_key_pages, (wide)8 * V(batch) * V(max_blocks), 8, 0, T_ENTRIES);
    add_wanted(m, v, S_value_pages, (wide)8 * V(batch) * V(max_blocks), 8, 0, T_ENTRIES);
    if (k->code_sides && any) {
        const wide count = V(antiquant_mode) == HL_ANTIQUANT_TOKEN
            ? (wide)V(batch) * k->code_sides * decode_limit(v)
            : V(antiquant_mode) == HL_ANTIQUANT_TENSOR ? k->code_sides : (wide)n2 * k->code_channels;
        add_span(m, S_antiquant_scale, number * count, (int32_t)number, 0,
                 wide_scales ? T_FLOAT : T_NUMBER);
        add_wanted(m, v, S_antiquant_offset, number * count, (int32_t)number, 0,
                   wide_scales ? T_FLOAT : T_NUMBER);
    }
    add_wanted(m, v, S_quant_scale2, quant * (V(quant_per_channel) ? (wide)n1 * k->dv : 1),
               (int32_t)quant, 0, V(quant_bf16) ? T_BF16 : T_FLOAT);
    add_wanted(m, v, S_quant_offset2, quant * (V(quant_per_channel) ? (wide)n1 * k->dv : 1),
               (int32_t)quant, 0, V(quant_bf16) ? T_BF16 : T_FLOAT);
    add_wanted(m, v, S_alibi_slopes, (wide)4 * n1, 4, 0, T_FLOAT);
    add_wanted(m, v, S_sinks, (wide)4 * n1, 4, 0, T_FLOAT);
    add_tensor(m, v, S_attention_out, S_out_stride, V(batch), rows, n1, k->dv, out, first_q, 1,
               out == 1 ? T_CODE : out == 4 ? T_FLOAT : T_NUMBER);
    add_wanted(m, v, S_softmax_max, (wide)4 * V(batch) * rows * n1, 4, 1, T_FLOAT);
    add_wanted(m, v, S_softmax_sum, (wide)4 * V(batch) * rows * n1, 4, 1, T_FLOAT);
    add_wanted(m, v, S_softmax_lse, (wide)4 * V(batch) * rows * n1, 4, 1, T_FLOAT);
    add_wanted(m, v, S_partials, (wide)(uint64_t)V(partials_bytes), 1, 1, T_MASK);
}

/* (row, key) pairs; of TND by its ends, which have to be there. */
static wide pairs_of(const int64_t *v, const int64_t *ends_q, const int64_t *ends_kv)
{
    wide pairs = 0;
    int64_t last[2] = {0, 0};
    if (V(input_layout) != HL_LAYOUT_TND) {
        return (wide)V(batch) * V(seq_q) * V(seq_kv);
    }
    for (int64_t b = 0; b < V(batch); ++b) {
        const int64_t q = ends_q[b] > last[0] ? ends_q[b] - last[0] : 0;
        const int64_t kv = ends_kv[b] > last[1] ? ends_kv[b] - last[1] : 0;
        pairs += (wide)q * kv;
        last[0] = ends_q[b] > last[0] ? ends_q[b] : last[0];
        last[1] = ends_kv[b] > last[1] ? ends_kv[b] : last[1];
    }
    return pairs;
}

static int64_t longest_of(const int64_t *v, const int64_t *ends, int64_t all)
{
    int64_t last = 0;
    int64_t longest = 0;
    if (V(input_layout) != HL_LAYOUT_TND) {
        return all;
    }
    for (int64_t b = 0; b < V(batch); ++b) {
        longest = ends[b] - last > longest ? ends[b] - last : longest;
        last = ends[b] > last ? ends[b] : last;
    }
    return longest;
}

/* Strides of a training tensor in the call's layout, where they are 0. */
static span *add_train(model *m, const int64_t *v, int32_t slot, int32_t stride, int64_t rows,
                       int64_t heads, int64_t channels, int64_t element, int32_t written,
                       int32_t type)
{
    const int64_t b = V(input_layout) == HL_LAYOUT_TND ? 1 : V(batch);
    int64_t given[S_query_stride + 3];
    if (V(input_layout) == HL_LAYOUT_SBH && (wide)V(batch) * heads * channels <= INT64_MAX) {
        given[S_query_stride] = or_else(v[stride], heads * channels);
        given[S_query_stride + 1] = or_else(v[stride + 1], V(batch) * heads * channels);
    } else {
        given[S_query_stride] = v[stride];
        given[S_query_stride + 1] = v[stride + 1];
    }
    given[S_query_stride + 2] = v[stride + 2];
    return add_tensor(m, given, slot, S_query_stride, b, rows, heads, channels, element,
                      V(input_layout) == HL_LAYOUT_BNSD, written, type);
}

static int32_t train_by_bytes(const int64_t *v)
{
    return V(sparse_mode) < 2 || V(sparse_mode) == 5;
}

static int32_t train_needs_prefix(const int64_t *v)
{
    return (V(sparse_mode) == 6 && (V(atten_mask) != 0 || V(mask_from_mode) != 0))
           || (V(sparse_mode) == 5 && V(atten_mask) == 0 && V(mask_from_mode) != 0);
}

/* The lists alone: they have to lie somewhere before sizes that depend on them can be known. */
static void model_train_lists(const kernel *k, const int64_t *v, model *m)
{
    const int32_t tnd = V(input_layout) == HL_LAYOUT_TND;
    const wide each = (wide)8 * V(batch);
    (void)k;
    m->loops = V(batch);
    add_wanted(m, v, S_prefix, train_needs_prefix(v) ? each : 0, 8, 0, T_LIST);
    add_wanted(m, v, S_actual_seq_qlen, tnd ? each : 0, 8, 0, T_LIST);
    add_wanted(m, v, S_actual_seq_kvlen, tnd ? each : 0, 8, 0, T_LIST);
}

static void model_train(const kernel *k, const int64_t *v, const int64_t *ends_q,
                        const int64_t *ends_kv, model *m)
{
    const int32_t tnd = V(input_layout) == HL_LAYOUT_TND;
    const int32_t grad = k->family == GRAD;
    const int64_t n1 = V(heads_q);
    const int64_t n2 = or_else(V(heads_kv), n1);
    const int64_t out = V(out_f32) ? 4 : k->bytes;
    const int64_t width = or_else(V(stats_width), 8);
    const int64_t pse_batch = or_else(V(pse_batch), V(batch));
    const int32_t numbers = V(out_f32) ? T_FLOAT : T_NUMBER;
    wide rows;
    wide pairs;
    wide pse;
    refuse_if(m, V(batch) < 0 || V(seq_q) < 0 || V(seq_kv) < 0 || n1 < 1 || n2 < 1
                 || (n2 > 0 && n1 % n2 != 0) || V(mask_batch) < 0 || V(mask_heads) < 0
                 || V(mask_rows) < 0 || V(mask_width) < 0 || pse_batch < 0 || V(pse_width) < 0
                 || (width != 1 && width != 8) || V(out_f32) < 0 || V(out_f32) > 1
                 || V(pse_type) < 0 || V(pse_type) > 3 || V(pse_shape) < 0 || V(pse_shape) > 2
                 || V(sparse_mode) < 0 || V(sparse_mode) > 8);
    refuse_if(m, !in_mask(k->layouts_q, V(input_layout)));
    if (m->refused) {
        return;
    }
    rows = (wide)(tnd ? 1 : V(batch)) * V(seq_q) * n1;
    pairs = pairs_of(v, ends_q, ends_kv);
    pse = (wide)pse_batch * n1;
    pse = V(pse_type) >= PSE_SLOPE ? 4 * pse
        : V(pse_shape) == PSE_LAST_ROWS
            ? pse * 1024 * k->bytes * or_else(V(pse_width), longest_of(v, ends_kv, V(seq_kv)))
        : tnd ? k->bytes * n1 * (V(pse_shape) == PSE_ONE_ROW ? (wide)V(seq_kv) : pairs)
        : pse * k->bytes * V(seq_kv) * (V(pse_shape) == PSE_ONE_ROW ? 1 : V(seq_q));
    add_train(m, v, S_query, S_query_stride, V(seq_q), n1, k->dk, k->bytes, 0, T_NUMBER);
    add_train(m, v, S_key, S_key_stride, V(seq_kv), n2, k->dk, k->bytes, 0, T_NUMBER);
    add_train(m, v, S_value, S_value_stride, V(seq_kv), n2, k->dv, k->bytes, 0, T_NUMBER);
    add_train(m, v, S_attention_out, S_out_stride, V(seq_q), n1, k->dv, grad ? k->bytes : out,
              !grad, grad ? T_NUMBER : numbers);
    if (grad) {
        add_train(m, v, S_dout, S_dout_stride, V(seq_q), n1, k->dv, k->bytes, 0, T_NUMBER);
        if (V(dquery) != 0) {
            add_train(m, v, S_dquery, S_dquery_stride, V(seq_q), n1, k->dk, out, 1, numbers);
        }
        if (V(dkey) != 0) {
            add_train(m, v, S_dkey, S_dkey_stride, V(seq_kv), n2, k->dk, out, 1, numbers);
        }
        if (V(dvalue) != 0) {
            add_train(m, v, S_dvalue, S_dvalue_stride, V(seq_kv), n2, k->dv, out, 1, numbers);
        }
        add_span(m, S_softmax_max, 4 * rows * width, 4, 0, T_FLOAT);
        add_span(m, S_softmax_sum, 4 * rows * width, 4, 0, T_FLOAT);
        add_wanted(m, v, S_dpse, V(pse) != 0 ? pse / k->bytes * out : 0, (int32_t)out, 1, numbers);
    } else {
        add_wanted(m, v, S_sinks, (wide)4 * n1, 4, 0, T_FLOAT);
        add_wanted(m, v, S_softmax_max, 4 * rows * width, 4, 1, T_FLOAT);
        add_wanted(m, v, S_softmax_sum, 4 * rows * width, 4, 1, T_FLOAT);
        add_wanted(m, v, S_softmax_lse, 4 * rows, 4, 1, T_FLOAT);
        add_wanted(m, v, S_dropout_state, 24, 8, 1, T_LIST);
    }
    add_wanted(m, v, S_pse, pse, V(pse_type) >= PSE_SLOPE ? 4 : k->bytes, 0,
               V(pse_type) >= PSE_SLOPE ? T_FLOAT : T_NUMBER);
    add_wanted(m, v, S_atten_mask, train_by_bytes(v)
               ? (wide)or_else(V(mask_batch), 1) * or_else(V(mask_heads), 1)
                 * or_else(V(mask_rows), longest_of(v, ends_q, V(seq_q)))
                 * or_else(V(mask_width), longest_of(v, ends_kv, V(seq_kv))) : 0, 1, 0, T_MASK);
    add_wanted(m, v, S_dropout_mask, float_of(V(keep_prob)) < 1 && float_of(V(keep_prob)) > 0
               ? (pairs * n1 + 7) / 8 : 0, 1, 0, T_BITS);
}

/* One step from row to row. */
static wide step_of(model *m, int64_t given, int64_t row, int64_t align)
{
    const wide step = or_else(given, row);
    refuse_if(m, step < row || step % align != 0);
    return step;
}

static void add_rows(model *m, int32_t slot, int64_t rows, wide step, int64_t channels,
                     int64_t element, int32_t written, int32_t type)
{
    span *const s = add_span(m, slot, rows > 0 ? ((rows - 1) * step + channels) * element : 0,
                             (int32_t)element, written, type);
    s->count[0] = 1;
    s->count[1] = rows > 0 ? rows : 0;
    s->count[2] = 1;
    s->step[1] = (int64_t)step;
    s->channels = channels;
    s->element = element;
    refuse_if(m, s->bytes > INT64_MAX);
}

static void model_bulk(const kernel *k, const int64_t *v, int32_t encodes, model *m)
{
    const int64_t number = V(numbers_f32) ? 4 : k->bytes;
    const int32_t type = V(numbers_f32) ? T_FLOAT : T_NUMBER;
    const int64_t d = V(rope) != 0 ? k->dk : k->dk + k->rope;
    const wide nope = step_of(m, V(nope_stride), d, 1);
    const wide rope = step_of(m, V(rope_stride), k->rope, 1);
    const wide step = step_of(m, V(record_stride), k->record, k->record_align);
    refuse_if(m, V(rows) < 0);
    if (m->refused) {
        return;
    }
    add_rows(m, S_nope, V(rows), nope, d, number, !encodes, type);
    if (V(rope) != 0) {
        add_rows(m, S_rope, V(rows), rope, k->rope, number, !encodes, type);
    }
    if (k->record_behind != 0) {
        const int64_t size = V(block_size);
        const int64_t before = V(rows) > 0 && size > 0 ? (V(rows) - 1) / size : 0;
        const wide all = size * (step + k->record_behind);
        const wide unit = k->record_multiple;
        const wide page = V(page_stride) != 0 ? V(page_stride) : (all + unit - 1) / unit * unit;
        span *s;
        refuse_if(m, size < 1 || page < all || page % k->record_align != 0 || all > INT64_MAX);
        s = add_span(m, S_records, V(rows) > 0 ? before * page + size * step
                     + (V(rows) - before * size) * k->record_behind : 0, k->record_align, encodes,
                     T_RECORD);
        s->step[0] = (int64_t)page;
        s->step[1] = (int64_t)step;
        s->count[0] = before + 1;
        s->count[1] = size;
        s->count[2] = V(rows) > 0;
        s->channels = k->record;
        s->element = 1;
    } else {
        refuse_if(m, V(block_size) != 0 || V(page_stride) != 0);
        add_rows(m, S_records, V(rows), step, k->record, 1, encodes, T_RECORD);
        m->span[m->n - 1].align = k->record_align;
    }
}

static void model_convert(const kernel *k, const int64_t *v, model *m)
{
    const wide from = step_of(m, V(from_stride), k->record, k->record_align);
    const wide to = step_of(m, V(to_stride), k->record, k->record_align);
    refuse_if(m, V(rows) < 0);
    add_rows(m, S_from, V(rows), from, k->record, 1, 0, T_RECORD);
    add_rows(m, S_to, V(rows), to, k->record, 1, 1, T_RECORD);
    m->span[0].align = m->span[1].align = k->record_align;
}

static void model_kv_append(const kernel *k, const int64_t *v, model *m)
{
    const int32_t paged = V(layout_kv) == HL_LAYOUT_PA_BSND;
    const int64_t number = V(numbers_f32) ? 4 : k->bytes;
    const int32_t type = V(numbers_f32) ? T_FLOAT : T_NUMBER;
    const int64_t d = V(rope) != 0 ? k->dk : k->dk + k->rope;
    const int64_t n2 = or_else(V(heads_kv), 1);
    const int32_t any = V(batch) > 0 && V(rows) > 0;
    refuse_if(m, V(batch) < 0 || V(rows) < 0 || n2 < 0);
    refuse_if(m, !paged && (V(layout_kv) != HL_LAYOUT_BSND || V(seq_kv) < 0));
    if (paged) {
        paged_sizes(m, v, V(block_size));
    }
    if (m->refused) {
        return;
    }
    m->loops = any ? V(batch) * (1 + (paged ? (wide)V(max_blocks) : 0)) : 0;
    add_tensor(m, v, S_nope, S_nope_stride, V(batch), V(rows), n2, d, number, 0, 0, type);
    if (V(rope) != 0) {
        add_tensor(m, v, S_rope, S_rope_stride, V(batch), V(rows), n2, k->rope, number, 0, 0,
                   type);
    }
    add_wanted(m, v, S_block_table, (wide)4 * V(batch) * V(max_blocks), 4, 0, T_LIST);
    add_span(m, S_positions, any ? (wide)4 * V(batch) : 0, 4, 0, T_LIST);
    add_wanted(m, v, S_lengths_list, (wide)4 * V(batch), 4, 0, T_LIST);
    if (any) {
        add_records(m, k, v, S_key, S_key_stride, paged ? V(num_blocks) : V(batch),
                    paged ? V(block_size) : V(seq_kv), n2, 1);
    }
}

static void model_append(const kernel *k, const int64_t *v, model *m)
{
    const int32_t paged = V(layout_kv) == HL_LAYOUT_PA_BSND || V(layout_kv) == HL_LAYOUT_PA_BNSD;
    const int32_t pages = V(key_pages) != 0 || V(value_pages) != 0;
    const int32_t new_first = V(layout_new) == HL_LAYOUT_BNSD;
    const int32_t kv_first = V(layout_kv) == HL_LAYOUT_BNSD || V(layout_kv) == HL_LAYOUT_PA_BNSD;
    const int32_t codes = k->code_sides;
    const int64_t number = V(numbers_f32) ? 4 : k->bytes;
    const int32_t type = V(numbers_f32) ? T_FLOAT : T_NUMBER;
    const int64_t n2 = or_else(V(heads_kv), 1);
    const int32_t any = V(batch) > 0 && V(rows) > 0;
    const int32_t sides = k->value_shared && V(value) == 0 && V(value_cache) == 0
                          && V(value_pages) == 0 ? 1 : 2;
    const int64_t blocks = pages ? 1 : paged ? V(num_blocks) : V(batch);
    const int64_t tokens = paged ? V(block_size) : V(seq_kv);
    const int64_t given = V(antiquant_f32) ? 4 : k->bytes;
    refuse_if(m, V(batch) < 0 || V(rows) < 0 || n2 < 0 || V(antiquant_mode) < 0
                 || V(antiquant_mode) > 2 || (!paged && V(seq_kv) < 0));
    refuse_if(m, !in_mask(k->layouts_kv, V(layout_kv)));
    if (paged) {
        paged_sizes(m, v, V(index_kind) == HL_INDEX_SLOTS ? 1 : V(block_size));
    }
    if (m->refused) {
        return;
    }
    m->loops = any ? V(batch) * (1 + (paged ? (wide)V(max_blocks) : 0)) : 0;
    add_tensor(m, v, S_key, S_key_stride, V(batch), V(rows), n2, k->dk, number, new_first, 0, type);
    if (sides > 1) {
        add_tensor(m, v, S_value, S_value_stride, V(batch), V(rows), n2, k->dv, number, new_first,
                   0, type);
    }
    add_span(m, S_positions, any ? (wide)4 * V(batch) : 0, 4, 0, T_LIST);
    add_wanted(m, v, S_lengths_list, (wide)4 * V(batch), 4, 0, T_LIST);
    add_wanted(m, v, S_block_table, (wide)4 * V(batch) * V(max_blocks), 4, 0, T_LIST);
    add_wanted(m, v, S_key_pages, (wide)8 * V(batch) * V(max_blocks), 8, 0, T_ENTRIES);
    add_wanted(m, v, S_value_pages, (wide)8 * V(batch) * V(max_blocks), 8, 0, T_ENTRIES);
    if (codes && any && V(antiquant_mode) == HL_ANTIQUANT_TOKEN) {
        add_span(m, S_token_scales, (wide)4 * V(batch) * codes * decode_limit(v), 4, 1, T_FLOAT);
    } else if (codes && any) {
        const wide count = V(antiquant_mode) == HL_ANTIQUANT_TENSOR ? codes
                                                                    : (wide)n2 * k->code_channels;
        add_span(m, S_antiquant_scale, given * count, (int32_t)given, 0,
                 given == 4 ? T_FLOAT : T_NUMBER);
        add_wanted(m, v, S_antiquant_offset, given * count, (int32_t)given, 0,
                   given == 4 ? T_FLOAT : T_NUMBER);
    }
    if (any && !pages) {
        span *s = add_tensor(m, v, S_key_cache, S_key_cache_stride, blocks, tokens, n2,
                             k->key_width, k->key_element, kv_first, 2,
                             codes ? T_CODE : T_NUMBER);
        s->align = k->key_align;
        if (sides > 1) {
            s = add_tensor(m, v, S_value_cache, S_value_cache_stride, blocks, tokens, n2,
                           k->value_width, k->value_element, kv_first, 2,
                           codes ? T_CODE : T_NUMBER);
            s->align = k->value_align;
        }
    }
}

static void model_parts(const kernel *k, const int64_t *v, model *m)
{
    const int64_t n2 = or_else(V(heads_kv), 1);
    const wide stats = (wide)V(batch) * V(seq_q) * V(heads_q);
    const int64_t out = V(out_f32) ? 4 : k->bytes;
    refuse_if(m, V(parts) < 1 || V(batch) < 0 || V(seq_q) < 0 || V(heads_q) < 0 || n2 < 0
                 || V(out_f32) < 0 || V(out_f32) > 1 || (n2 > 0 && V(heads_q) % n2 != 0));
    refuse_if(m, !m->refused && stats * 4 * k->dv > INT64_MAX);
    if (m->refused || stats == 0) {
        return;
    }
    m->loops = V(parts);
    add_span(m, S_out, (wide)8 * V(parts), 8, 0, T_ENTRIES);
    add_span(m, S_max, (wide)8 * V(parts), 8, 0, T_ENTRIES);
    add_span(m, S_sum, (wide)8 * V(parts), 8, 0, T_ENTRIES);
    add_span(m, S_attention_out, stats * out * k->dv, (int32_t)out, 1,
             V(out_f32) ? T_FLOAT : T_NUMBER);
    add_wanted(m, v, S_softmax_max, 4 * stats, 4, 1, T_FLOAT);
    add_wanted(m, v, S_softmax_sum, 4 * stats, 4, 1, T_FLOAT);
    add_wanted(m, v, S_softmax_lse, 4 * stats, 4, 1, T_FLOAT);
}

/* ---- lists ---- */

/* A call's values and lists say nothing that would lead out of its memory; NULL, or what does. */
static const char *unsound_lengths(const int64_t *v, const int32_t *list, int32_t ends,
                                   int64_t limit)
{
    int64_t before = 0;
    for (int64_t b = 0; list != NULL && b < V(batch); ++b) {
        if (list[b] < (ends ? before : 0) || list[b] > limit) {
            return "a length out of its range";
        }
        before = list[b];
    }
    return NULL;
}

static const char *unsound_table(const int64_t *v, const int32_t *table, int64_t b, int64_t first,
                                 int64_t end, int64_t each, int64_t blocks)
{
    for (int64_t i = first / each; end > first && i <= (end - 1) / each; ++i) {
        const int64_t id = table == NULL ? -1 : table[b * V(max_blocks) + i];
        if (id < 0 || id >= blocks) {
            return "an entry that is needed names no block";
        }
    }
    return NULL;
}

static const char *unsound_sparse(const int64_t *v, const void *const *list)
{
    const int32_t *const ends_q = list[S_actual_seq_lengths_query];
    const int32_t *const ends_kv = list[S_actual_seq_lengths_kv];
    const int32_t paged = V(layout_kv) == HL_LAYOUT_PA_BSND;
    const int64_t limit = paged ? V(max_blocks) * V(block_size) : V(seq_kv);
    const char *wrong = unsound_lengths(v, ends_q, V(layout_query) == HL_LAYOUT_TND, V(seq_q));
    if (wrong != NULL || V(index_kind) == HL_INDEX_SLOTS) {
        return wrong;
    }
    wrong = unsound_lengths(v, ends_kv, V(layout_kv) == HL_LAYOUT_TND, limit);
    for (int64_t b = 0; wrong == NULL && paged && b < V(batch); ++b) {
        wrong = unsound_table(v, list[S_block_table], b, 0, ends_kv != NULL ? ends_kv[b] : limit,
                              V(block_size), V(num_blocks));
    }
    return wrong;
}

static const char *unsound_decode(const int64_t *v, const void *const *list)
{
    const int32_t *const lengths = list[S_actual_seq_lengths];
    const int32_t *const padding = list[S_kv_padding_size];
    const int32_t paged = V(layout_kv) == HL_LAYOUT_PA_BSND || V(layout_kv) == HL_LAYOUT_PA_BNSD;
    const int32_t slots = V(index_kind) == HL_INDEX_SLOTS;
    const int64_t limit = decode_limit(v);
    const int64_t each = slots ? 1 : V(block_size);
    const int64_t blocks = V(num_blocks) * (slots ? V(block_size) : 1);
    for (int64_t b = 0; b < V(batch); ++b) {
        const int64_t n = lengths == NULL ? limit : lengths[V(lengths) == 1 ? 0 : b];
        const char *wrong = NULL;
        int64_t first = 0;
        int64_t end;
        if (n < 0 || n > limit) {
            return "a length out of its range";
        }
        if (padding != NULL && lengths != NULL && !paged) { /* none, where they do not fit */
            first = limit - (padding[0] < 0 ? 0 : padding[0]) - n;
        }
        end = first < 0 || n == 0 ? 0 : first + n;
        if (paged && V(key_pages) == 0) {
            wrong = unsound_table(v, list[S_block_table], b, 0, n, each, blocks);
        }
        if (V(pse_shift) != 0 && or_else(V(pse_width), limit) < end) {
            wrong = "pse_shift is too narrow";
        }
        if (V(atten_mask) != 0 && or_else(V(mask_width), limit) < end) {
            wrong = "atten_mask is too narrow";
        }
        if (wrong != NULL) {
            return wrong;
        }
    }
    return NULL;
}

static const char *unsound_append(const int64_t *v, const void *const *list)
{
    const int32_t *const lengths = list[S_lengths_list];
    const int32_t *const positions = list[S_positions];
    const int32_t paged = V(layout_kv) == HL_LAYOUT_PA_BSND || V(layout_kv) == HL_LAYOUT_PA_BNSD;
    const int32_t slots = V(index_kind) == HL_INDEX_SLOTS;
    const int64_t limit = decode_limit(v);
    const int64_t blocks = V(num_blocks) * (slots ? V(block_size) : 1);
    for (int64_t b = 0; V(rows) > 0 && b < V(batch); ++b) {
        const int64_t n = lengths == NULL ? V(rows) : lengths[b];
        const int64_t first = n == 0 || positions == NULL ? 0 : positions[b];
        if (positions == NULL) {
            return "no positions";
        }
        if (n < 0 || n > V(rows) || first < 0 || first > limit - n) {
            return "new rows out of range";
        }
        if (paged && n > 0 && V(key_pages) == 0 && V(value_pages) == 0
            && unsound_table(v, list[S_block_table], b, first, first + n,
                             slots ? 1 : V(block_size), blocks) != NULL) {
            return "an entry that is needed names no block";
        }
    }
    return NULL;
}

static const char *unsound_ends(const int64_t *v, const int64_t *ends, int64_t total)
{
    int64_t last = 0;
    for (int64_t b = 0; b < V(batch); ++b) {
        if (ends[b] < 0 || ends[b] > total || (ends[b] < last && ends[b] != 0)) {
            return "an end out of its range";
        }
        last = ends[b] > last ? ends[b] : last;
    }
    return NULL;
}

static const char *unsound_train(const int64_t *v, const void *const *list)
{
    const char *wrong = NULL;
    const int64_t *const ends_q = list[S_actual_seq_qlen];
    const int64_t *const ends_kv = list[S_actual_seq_kvlen];
    if (V(input_layout) == HL_LAYOUT_TND && V(batch) > 0) {
        if (ends_q == NULL || ends_kv == NULL) {
            return "no ends";
        }
        wrong = unsound_ends(v, ends_q, V(seq_q));
        wrong = wrong != NULL ? wrong : unsound_ends(v, ends_kv, V(seq_kv));
    }
    if (wrong == NULL && V(atten_mask) != 0 && train_by_bytes(v)
        && ((V(mask_rows) != 0 && V(mask_rows) < longest_of(v, ends_q, V(seq_q)))
            || (V(mask_width) != 0 && V(mask_width) < longest_of(v, ends_kv, V(seq_kv))))) {
        return "atten_mask is too small";
    }
    return wrong;
}

/* ---- all of them ---- */

/* list: where the lists lie, by slot; NULL: not known yet. */
static void model_of(const routine *q, const int64_t *v, const void *const *list, model *m)
{
    const kernel *const k = q->of;
    m->refused = 0;
    m->n = 0;
    m->loops = 0;
    switch (q->what) {
    case PLAN:
        if (k->family == SPARSE || k->family == RECORDS) {
            model_sparse(k, v, m);
        } else if (k->family == DECODE) {
            model_decode(k, v, m);
        } else {
            model_train_lists(k, v, m);
            if (list != NULL) {
                model_train(k, v, list[S_actual_seq_qlen], list[S_actual_seq_kvlen], m);
            }
        }
        break;
    case PARTS: model_parts(k, v, m); break;
    case DECODE_APPEND: model_append(k, v, m); break;
    case KV_APPEND: model_kv_append(k, v, m); break;
    case CONVERT: model_convert(k, v, m); break;
    default: model_bulk(k, v, q->what == QUANTISE, m); break;
    }
}

static const char *unsound(const routine *q, const int64_t *v, const void *const *list)
{
    const int32_t family = q->of->family;
    switch (q->what) {
    case PLAN:
        return family == SPARSE || family == RECORDS ? unsound_sparse(v, list)
               : family == DECODE ? unsound_decode(v, list) : unsound_train(v, list);
    case DECODE_APPEND:
    case KV_APPEND:
        return unsound_append(v, list);
    default:
        return NULL;
    }
}

#endif
