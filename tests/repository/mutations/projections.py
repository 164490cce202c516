"""What is taken out of `patches/projections.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/projections.py"
MUTATIONS = (
    Mutation(
        "a value that was scaled in fp32 stays fp32",
        FILE,
        "found = exact.to(attention_form.matmul_dtype(attention, hidden_states))",
        "found = exact",
        "tests/patches/test_exponents.py::test_hooks_see_what_stocks_would_and_leave_the_model_as_exact",
    ),
    Mutation(
        "rotation is not rounded for the cache",
        FILE,
        "return query, key.to(value.dtype), value",
        "return query, key, value",
        "tests/patches/test_blocks.py::test_a_fused_kernel_is_called_with_keys_rounded_once",
    ),
    Mutation(
        "a key's bias is rounded with what it says",
        FILE,
        "product.transpose(1, 2), factor, out=heads)",
        "product.transpose(1, 2), factor.half(), out=heads)",
        "tests/patches/test_key_centring.py::test_a_spiked_layer_agrees_with_attention_from_scratch[slow-sdpa]",
    ),
    Mutation(
        "queries and keys wait for their rotation in float16",
        FILE,
        "dtype=torch.float32, device=scaled.device)",
        "dtype=torch.float16, device=scaled.device)",
        "tests/patches/test_centred_projections.py::test_projections_are_the_same_to_the_bit_with_autograd",
    ),
    Mutation(
        "keys are not centred",
        FILE,
        "cos, sin, form.shift)",
        "cos, sin)",
        "tests/patches/test_key_centring.py::test_a_spiked_layer_agrees_with_attention_from_scratch[slow-sdpa]",
    ),
    Mutation(
        "values are not as wide as keys",
        FILE,
        "nn.functional.pad(value, (0, form.split.extra))",
        "value",
        "tests/patches/test_two_part_caches.py::test_a_cache_that_is_copied_or_cut_stays_wide[by_pickle]",
    ),
    Mutation(
        "keys are stored without their exponent",
        FILE,
        "    if form.rotated:\n",
        "    if False:\n",
        "tests/patches/test_cache_marks.py::test_exponents_change_nothing_but_the_range[all-planned-eager]",
    ),
    Mutation(
        "the bias of a value is not scaled",
        FILE,
        "2.0**-form.values, 2.0 ** (form.input",
        "1.0, 2.0 ** (form.input",
        "tests/patches/test_cache_marks.py::test_exponents_change_nothing_but_the_range[values-planned-eager]",
    ),
)
