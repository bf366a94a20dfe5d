"""What templates may ask about keys and values that are stored apart, and about the decode
operator: every name and expression already chosen."""

from types import SimpleNamespace

from gen.formats import STORED
from gen.isa import FORMAT_WORDS

TO_FLOAT = {"f32": "", "f16": "hl_float_of_f16", "bf16": "hl_float_of_bf16"}
WALK_MOST = 16  # kv heads that are decoded in turn
WALK_BYTES = 1 << 20  # of keys and values: less stays in the second-level cache
ROWS_MOST = 16  # query rows of a batch that are decoded together


def side(kernel, name):
    """How keys or values are stored; records count as float32, which they are read as."""
    if kernel.record:
        return STORED["f32"]
    return kernel.stored_key if name == "key" else kernel.stored_value


def side_stored(kernel, name):
    """Rows of the cache."""
    stored = side(kernel, name)
    return SimpleNamespace(
        title=stored.title,
        c_type=stored.c_type,
        width=stored.width(kernel.dk if name == "key" else kernel.dv),
        element=stored.element,
        align=stored.align,
        line=64 // stored.element,
        row_word=f"hl_vrow_{stored.name}",
        is_codes=stored.is_codes,
        packed=stored.packed,
    )


def side_read(kernel, name):
    """Rows as the products read them."""
    read = side(kernel, name).read_as
    words = FORMAT_WORDS[read]
    return SimpleNamespace(
        c_type=STORED[read].c_type,
        load=words["load"],
        load_n=words["load_n"],
        pair=words["pair"],
    )


def scaled(kernel, name):
    """Whether a side of the cache is of codes with numbers of antiquant_scale."""
    return side(kernel, name).is_codes and not kernel.integer


def rows_of(kernel):
    """Formats of which whole rows are loaded; None: those of the tensors."""
    if not kernel.decodes:
        return None
    if kernel.integer:
        return ()
    return tuple(dict.fromkeys((kernel.dtype, kernel.stored_key.name, kernel.stored_value.name)))


def absent(kernel):
    """(test, argument) of what a kernel was not generated with."""
    has = kernel.features
    codes = scaled(kernel, "key") or scaled(kernel, "value")
    pointers = [] if kernel.integer else ["dequant_scale1", "quant_scale1", "dequant_scale2"]
    pointers += [] if codes else ["antiquant_scale", "antiquant_offset"]
    pointers += [] if "stats" in has else ["softmax_max", "softmax_sum", "softmax_lse"]
    pointers += [] if "sinks" in has else ["sinks"]
    pointers += [] if "alibi" in has else ["alibi_slopes"]
    pointers += [] if "pages" in has else ["key_pages", "value_pages"]
    numbers = [] if "window" in has else ["window"]
    numbers += [] if "slots" in has else ["index_kind"]
    tests = [(f"a->{name} != NULL", name) for name in pointers]
    tests += [(f"a->{name} != 0", name) for name in numbers]
    if "softcap" not in has:
        tests.append(("a->softcap != 0.0f", "softcap"))
    return [SimpleNamespace(test=test, argument=name.upper()) for test, name in tests]


def listed(words):
    """a, b and c"""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


EXTRAS = {
    "stats": "max, sum and LSE",
    "sinks": "sinks",
    "window": "a sliding window",
    "softcap": "softcap",
    "alibi": "ALiBi",
    "slots": "tables of slots",
    "pages": "arrays of pages",
}


WINDOW_LINE = " *   (with window also j > n - S1 + i - window)\n"


def manual_words(kernel):
    """What the manual says of a kernel, where kernels differ."""
    has = kernel.features
    sides = [("K", kernel.stored_key, kernel.dk), ("V", kernel.stored_value, kernel.dv)]
    codes = [(name, channels) for name, side, channels in sides if side.is_codes]
    codes = [] if kernel.integer else codes
    packed = [(name, side) for name, side, _ in sides if side.packed]
    both = len(codes) == 2
    extras = [EXTRAS[name] for name in has]
    halves = [half for half in (extras[:4], extras[4:]) if half]
    first = "K's, then V's: " if both else ""
    none = ", max 0, sum 0, LSE -inf" if "stats" in has else ""
    none += ";\n *   with a sink: max = LSE = sink, sum 1" if none and "sinks" in has else ""
    table = []
    if "slots" in has:
        table.append("HL_INDEX_SLOTS: the table has an entry a token, block * block_size + token.")
    if "pages" in has:
        table.append("key_pages and value_pages: where blocks lie.")
    return {
        "extras": [", ".join(half) for half in halves],
        "softcap_words": " (softcap: c tanh(score / c))" if "softcap" in has else "",
        "alibi_words": " + slope * distance" if "alibi" in has else "",
        "window_lines": WINDOW_LINE if "window" in has else "",
        "none_words": none,
        "table_words": table,
        "code_words": "" if both or not codes else f" Only {codes[0][0]} has codes.",
        "channel_shape": first + " ".join(f"[N2][{channels}]" for _, channels in codes),
        "tensor_shape": first + " ".join("[1]" for _ in codes),
        "token_shape": first + " ".join("[B][W]" for _ in codes),
        "packed_words": " "
        + listed([f"{name}: GROUP = {side.group}" for name, side in packed])
        + "."
        if packed
        else "",
    }


def decode_view(kernel):
    """What differs between the decode operator and the others."""
    has = kernel.features
    if not kernel.decodes:
        return {
            "decodes": False,
            "integer": False,
            "splits": True,
            "walks": False,
            "has_stats": True,
            "has_sinks": True,
            "key_codes": False,
            "value_codes": False,
            "natural_q": bool(kernel.record),
            "value_shared": not kernel.record,
            "value_apart": "0" if kernel.record else "a->value != NULL",
            "query_at": "g->query + h * a->query_stride.head",
            "q_heads": "group",
            "stats_at": "g->stats + h",
            "head_at": "h",
            "has_keys": "t->l[h] != 0.0f || *t->seen != 0.0f",
            "group": "plan->group",
            "group_parameter": "",
            "group_argument": "",
            "queries_of_row": "(uint64_t)a->heads_q",
        }
    key, value = kernel.stored_key, kernel.stored_value
    paged = [n for n in kernel.layout_kv if n.startswith("PA_")]
    shared = key == value and kernel.dv <= kernel.dk
    pages, slots = "pages" in has, "slots" in has
    sides = [("key", kernel.dk), ("value", kernel.dv)]
    return {
        "decodes": True,
        "integer": kernel.integer,
        "splits": not kernel.integer,  # whether rows may be split over tasks
        # Small targets have little stack, and no far memory.
        "walks": kernel.isa != ("scalar",) and not kernel.integer,
        "has_stats": "stats" in has,
        "has_sinks": "sinks" in has,
        "has_window": "window" in has,
        "has_softcap": "softcap" in has,
        "has_alibi": "alibi" in has,
        "has_pages": pages,
        "slot_table": slots,
        "key_codes": scaled(kernel, "key"),
        "value_codes": scaled(kernel, "value"),
        "code_sides": sum(scaled(kernel, name) for name, _ in sides),
        "code_channels": sum(channels for name, channels in sides if scaled(kernel, name)),
        "value_second": int(key.is_codes),
        "value_numbers": f"(ptrdiff_t)a->heads_kv * {kernel.dk}" if key.is_codes else "0",
        "natural_q": key.read_as != kernel.dtype,
        "q_from": "plan" if key.is_codes else "a",
        "q_shift": ", w->shift" if key.is_codes else "",
        "value_shared": shared,
        "value_apart": "k_value_apart(a)",
        "key_needed": "any && a->key_pages == NULL" if pages else "any",
        "value_needed": "a->value != NULL" if shared else "a->key_pages == NULL" if pages else "1",
        "paged_test": " || ".join(f"a->layout_kv == HL_LAYOUT_{n}" for n in paged) or "a == NULL",
        "no_table": "a->block_table == NULL" + (" && a->key_pages == NULL" if pages else ""),
        "table_tokens": "(a->index_kind == HL_INDEX_SLOTS ? 1 : a->block_size)"
        if slots
        else "a->block_size",
        "positions_matter": "a->pse_shift != NULL"
        + (" || a->alibi_slopes != NULL" if "alibi" in has else ""),
        "scores_change": "a->pse_shift != NULL"
        + (" || a->alibi_slopes != NULL" if "alibi" in has else "")
        + (" || a->softcap != 0.0f" if "softcap" in has else ""),
        "to_float": TO_FLOAT[kernel.numbers],
        "query_at": "k_query_at(a, g, h)",
        "q_heads": "g->group",
        "stats_at": "g->stats + h % g->heads * g->rows + h / g->heads",
        "head_at": "h % g->heads",
        "has_keys": "t->l[h] != 0.0f",
        "group": "g->group",
        "group_parameter": "const hl_group *g, ",
        "group_argument": "g, ",
        "rows_most": ROWS_MOST,
        "walk_most": WALK_MOST,
        "walk_bytes": WALK_BYTES,
        "cache_bytes": key.width(kernel.dk) * key.element + value.width(kernel.dv) * value.element,
        "queries_of_row": "(uint64_t)a->heads_q * (uint64_t)a->seq_q",
        "absent": absent(kernel),
        **manual_words(kernel),
    }
