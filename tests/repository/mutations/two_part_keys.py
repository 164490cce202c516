"""What is taken out of `patches/two_part_keys.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/two_part_keys.py"
MUTATIONS = (
    Mutation(
        "the upper part of a key is all of it",
        FILE,
        "return exact.to(dtype).float()",
        "return exact",
        "tests/patches/test_two_part_keys.py::test_both_parts_of_a_key_are_the_key",
    ),
    Mutation(
        "keys in two parts are stored in fp32",
        FILE,
        "torch.cat((keys.to(dtype), high.to(dtype), (split - high).to(dtype)), -1)",
        "torch.cat((keys, high, split - high), -1)",
        "tests/patches/test_two_part_keys.py::test_memory_of_a_cache",
    ),
    Mutation(
        "a compiler loses the lower parts",
        FILE,
        "    if not torch.compiler.is_compiling() or dtype not in DROPPED_BITS:\n",
        "    if True:\n",
        "tests/patches/test_two_part_keys.py::test_compiled_code_has_lower_parts",
    ),
    Mutation(
        "a dtype without fewer bits is an error in compiled code",
        FILE,
        " or dtype not in DROPPED_BITS",
        "",
        "tests/patches/test_two_part_keys.py::test_a_dtype_that_drops_nothing_has_one_part",
    ),
    Mutation(
        "bits cut the gradient",
        FILE,
        "return exact + (rounded - exact.detach()) if exact.requires_grad else rounded",
        "return rounded",
        "tests/patches/test_two_part_caches.py::test_bits_cut_no_gradient",
    ),
    Mutation(
        "ties are rounded up",
        FILE,
        "(2 ** (dropped - 1) - 1) + odd",
        "2 ** (dropped - 1)",
        "tests/patches/test_two_part_keys.py::test_a_compiler_rounds_as_a_cast_does[torch.bfloat16]",
    ),
    Mutation(
        "a query without a bias reads no spike",
        FILE,
        "queries.clamp(min=LEAST_QUERY)",
        "queries",
        "tests/patches/test_two_part_keys.py::test_a_model_without_a_bias_of_queries_has_pairs_too",
    ),
    Mutation(
        "the first query head speaks for all that read a key",
        FILE,
        "queries.shape[-1]).amax(1)",
        "queries.shape[-1])[:, 0]",
        "tests/patches/test_two_part_keys.py::test_the_longest_query_of_the_heads_that_read_a_key_counts",
    ),
    Mutation(
        "pairs ask whether they turn or not",
        FILE,
        "weight = keys * rest * queries",
        "weight = keys * queries",
        "tests/patches/test_two_part_keys.py::test_a_spike_that_does_not_turn_is_left_to_the_centre",
    ),
    Mutation(
        "an odd number of pairs",
        FILE,
        "asked + asked % 2",
        "asked",
        "tests/patches/test_two_part_keys.py::test_memory_of_a_cache[scores]",
    ),
    Mutation(
        "any number of pairs",
        FILE,
        "min(asked + asked % 2, MOST_PAIRS, weight.shape[-1])",
        "min(asked + asked % 2, weight.shape[-1])",
        "tests/patches/test_two_part_keys.py::test_an_even_number_of_pairs_if_a_head_has_as_many[64-20-16-4]",
    ),
    Mutation(
        "what is left is not named",
        FILE,
        "max(0, asked - count)",
        "0",
        "tests/patches/test_two_part_keys.py::test_status_names_what_is_left",
    ),
)
