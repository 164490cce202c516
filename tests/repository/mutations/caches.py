"""What is taken out of `patches/caches.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/caches.py"
MUTATIONS = (
    Mutation(
        "a cache is not marked",
        FILE,
        "    marks[layer] = mark\n",
        "",
        "tests/patches/test_centred_caches.py::test_a_cache_of_another_sort_is_refused",
    ),
    Mutation(
        "a learned prefix is taken for anything",
        FILE,
        "not is_learned_prefix() and look_ours",
        "look_ours",
        "tests/patches/test_caches.py::test_a_learned_prefix_is_uncentred_and_learns[-eager-fixed]",
    ),
    Mutation(
        "compiled code reads no mark",
        FILE,
        "own if known is None else known.get(attention.layer_idx, own)",
        "own",
        "tests/patches/test_caches.py::test_compiled_code_reads_the_mark",
    ),
    Mutation(
        "the mark of a cache leaves out the exponent of its keys",
        FILE,
        " ^ 2 * ranges.rotated, ranges.values)",
        ", ranges.values)",
        "tests/patches/test_cache_marks.py::test_keys_of_another_exponent_are_refused[True-True]",
    ),
    Mutation(
        "a wide cache without marks is taken for a stock model's",
        FILE,
        "(own[1], attention.ranges.rotated, keys.shape[-1]) != (0, 0, attention.head_dim)",
        "(own[1], attention.ranges.rotated) != (0, 0)",
        "tests/patches/test_two_part_caches.py::test_a_wide_cache_without_marks_is_asked_about_where_there_is_no_centre_to_speak_of",
    ),
    Mutation(
        "keys with an exponent are taken for a stock model's",
        FILE,
        "(own[1], attention.ranges.rotated, keys.shape[-1]) != (0, 0, attention.head_dim)",
        "(own[1], keys.shape[-1]) != (0, attention.head_dim)",
        "tests/patches/test_cache_marks.py::test_a_stock_models_keys_have_no_exponent[0]",
    ),
    Mutation(
        "a mark of an older release is not read",
        FILE,
        "        mark = mark_before(attention, cache)\n",
        "        mark = None\n",
        "tests/patches/test_cache_marks.py::test_a_mark_of_an_older_release_is_read[0]",
    ),
    Mutation(
        "an older release's centre is taken for none",
        FILE,
        "UNKNOWN if attention.centre is None else attention.centre.version",
        "0 if attention.centre is None else attention.centre.version",
        "tests/patches/test_cache_marks.py::test_a_mark_of_an_older_release_is_refused[without a centre]",
    ),
)
