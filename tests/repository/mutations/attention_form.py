"""What is taken out of `patches/attention_form.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/attention_form.py"
MUTATIONS = (
    Mutation(
        "somebody else's attention is handed a wide cache",
        FILE,
        "        if not is_known(attention",
        "        if False and not is_known(attention",
        "tests/patches/test_two_part_caches.py::test_an_implementation_of_somebody_else_is_handed_no_wide_cache",
    ),
    Mutation(
        "the factor of a product is float16",
        FILE,
        "2.0**ranges.input, dtype=torch.float32",
        "2.0**ranges.input, dtype=torch.float16",
        "tests/patches/test_centred_projections.py::test_projections_are_the_same_to_the_bit_with_autograd",
    ),
    Mutation(
        "somebody else's attention gets keys with an exponent",
        FILE,
        "if attention.ranges.rotated and not is_known(",
        "if False and not is_known(",
        "tests/patches/test_exponents.py::test_an_attention_that_may_not_scale_scores_back_is_refused",
    ),
    Mutation(
        "a sink cache is centred",
        FILE,
        "None if is_sink(type(cache)) else attention.centre",
        "attention.centre",
        "tests/patches/test_centred_caches.py::test_a_cache_that_turns_its_keys_gets_them_uncentred",
    ),
    Mutation(
        "new keys are centred beside a stock model's",
        FILE,
        "            raise ForeignCacheError(MIXED.format(attention.layer_idx))\n        centre = None\n",
        "            raise ForeignCacheError(MIXED.format(attention.layer_idx))\n",
        "tests/patches/test_centred_caches.py::test_a_cache_of_plain_keys_is_gone_on_with",
    ),
    Mutation(
        "keys with an exponent are stored beside a stock model's",
        FILE,
        "        if ranges.rotated:  #",
        "        if False:  #",
        "tests/patches/test_cache_marks.py::test_a_stock_models_keys_have_no_exponent[0]",
    ),
    Mutation(
        "somebody else's attention is given wide keys",
        FILE,
        '        return f"{name} is not transformers\' own and may expect heads of head_dim channels"\n',
        "        pass\n",
        "tests/patches/test_two_part_caches.py::test_an_implementation_of_somebody_else_gets_heads_of_head_dim",
    ),
    Mutation(
        "flash is given 264 channels",
        FILE,
        "if width > 256 and",
        "if width > 512 and",
        "tests/patches/test_two_part_caches.py::test_which_implementations_take_wider_heads[flash_attention_2-264-True-False]",
    ),
    Mutation(
        "quantised projections behind a wide norm count as fp32",
        FILE,
        " or (attention.ranges.input > 0 and dtype not in FLOAT_DTYPES)",
        "",
        "tests/patches/test_exponents.py::test_linears_quantised_later_run_behind_a_wide_norm[self_attn]",
    ),
    Mutation(
        "the fourth flash is given 136 channels",
        FILE,
        'if width > 128 and ("flash_attention_4" in name',
        'if width > 136 and ("flash_attention_4" in name',
        "tests/patches/test_two_part_caches.py::test_which_implementations_take_wider_heads[flash_attention_4-136-False-False]",
    ),
    Mutation(
        "continuous batching is given wide keys",
        FILE,
        'if "paged" in name:',
        'if "paged" == name:',
        "tests/patches/test_two_part_caches.py::test_which_implementations_take_wider_heads[paged|sdpa-136-False-False]",
    ),
    Mutation(
        "flex pads on a GPU",
        FILE,
        'if "flex" in name and pads:',
        "if False:",
        "tests/patches/test_two_part_caches.py::test_which_implementations_take_wider_heads[flex_attention-136-True-False]",
    ),
    Mutation(
        "keys of another number of pairs are gone on with",
        FILE,
        "    else:\n        raise ForeignCacheError(MIXED.format(attention.layer_idx))\n",
        "    else:\n        reason = None\n",
        "tests/patches/test_two_part_caches.py::test_another_number_of_pairs_is_refused",
    ),
    Mutation(
        "a cut cache is given wide keys",
        FILE,
        "elif held == attention.head_dim:",
        "elif False:",
        "tests/patches/test_two_part_caches.py::test_a_cache_that_was_cut_to_head_dim_is_gone_on_with[eager]",
    ),
    Mutation(
        "constants stay where weights were",
        FILE,
        "    if factor is not None and factor.device != device:",
        "    if False:",
        "tests/patches/test_stale_plans.py::test_constants_go_where_the_layer_computes[eager-True]",
    ),
    Mutation(
        "each layer is compiled anew for the version of its centre",
        FILE,
        "(0, ranges.values) if cache is None else own_mark(centre, ranges)",
        "own_mark(centre, ranges)",
        "tests/patches/test_compile.py::test_layers_compiled_one_by_one_share_their_graphs[]",
    ),
)
