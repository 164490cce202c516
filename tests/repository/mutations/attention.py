"""What is taken out of `patches/attention.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/attention.py"
MUTATIONS = (
    Mutation(
        "eager hands fp32 on",
        FILE,
        "output.transpose(1, 2).to(value.dtype, memory_format=torch.contiguous_format)",
        "output.transpose(1, 2).contiguous()",
        "tests/patches/test_blocks.py::test_eager_attention_hands_on_the_dtype_of_the_values",
    ),
    Mutation(
        "output projection by token in float16",
        FILE,
        "linear_by_token(attention.o_proj, output.float() * 2.0**exponent, width)",
        "linear_by_token(attention.o_proj, output * 2.0**exponent, width)",
        "tests/patches/test_planning.py::test_scaling_by_token_is_handed_fp32",
    ),
    Mutation(
        "a kernel of the user's is handed an fp32 query",
        FILE,
        "return laid_out_by_token(as_wide_as_keys(query, form, value.dtype), value.dtype), key, value, mask",
        "return as_wide_as_keys(query, form, value.dtype), key, value, mask",
        "tests/patches/test_blocks.py::test_a_fused_kernel_is_called_with_keys_rounded_once",
    ),
    Mutation(
        "the output projection is handed fp32",
        FILE,
        "    output = output.reshape(*hidden_states.shape[:-1], -1).to(dtype)",
        "    output = output.reshape(*hidden_states.shape[:-1], -1)",
        "tests/patches/test_blocks.py::test_the_output_projection_is_handed_the_models_dtype",
    ),
    Mutation(
        "a token's output is not scaled back by the exponent of the values",
        FILE,
        "output.float() * 2.0**exponent",
        "output.float()",
        "tests/patches/test_cache_marks.py::test_a_cache_keeps_the_exponent_of_its_values[by token-5-3-eager]",
    ),
    Mutation(
        "values of another plan are taken for this one's",
        FILE,
        "    if exponent != scale.exponent:  #",
        "    if False:  #",
        "tests/patches/test_cache_marks.py::test_a_cache_keeps_the_exponent_of_its_values[planned-5-3-eager]",
    ),
    Mutation(
        "a rounded query loses what it is rounded by",
        FILE,
        "rounded = None if sdpa_takes_fp32(value) else value.dtype\n        return",
        "rounded = None\n        return",
        "tests/patches/test_two_part_keys.py::test_queries_may_be_spiked_as_well[a GPU's-sdpa]",
    ),
    Mutation(
        "a tool's function around stock's eager attention counts as its own",
        FILE,
        'return "wrapped" if any(',
        'return "own" if any(',
        "tests/registration/test_attention_functions.py::test_stocks_eager_inside_something_else_is_refused[closure]",
    ),
)
