"""What is taken out of `patches/caches.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/caches.py"
MUTATIONS = (
    Mutation(
        "a cache is not marked",
        FILE,
        "    marks[layer] = centred\n",
        "",
        "tests/patches/test_centred_caches.py::test_a_cache_of_another_sort_is_refused",
    ),
    Mutation(
        "new keys are centred beside a stock model's",
        FILE,
        "return shift if centred else None",
        "return shift",
        "tests/patches/test_centred_caches.py::test_a_cache_of_plain_keys_is_gone_on_with",
    ),
    Mutation(
        "keys are added up in float16",
        FILE,
        "keys.detach()[:, :, :TOKENS].float()",
        "keys.detach()[:, :, :TOKENS]",
        "tests/patches/test_caches.py::test_keys_are_added_up_in_fp32",
    ),
    Mutation(
        "what tells keys is fp64, which not every device has",
        FILE,
        "(torch.cat((x.real, x.imag), -1).float() for x",
        "(torch.cat((x.real, x.imag), -1) for x",
        "tests/patches/test_caches.py::test_witnesses_come_and_go_with_the_fix",
    ),
    Mutation(
        "a cache without marks is taken for one of ours",
        FILE,
        "if not marks_last or (TRACED and (not is_told or abs(along) <= NEAR * centre)):",
        "if True:",
        "tests/patches/test_caches.py::test_a_cache_that_lost_its_mark_is_asked_about[by_constructor]",
    ),
    Mutation(
        "a learned prefix is taken for anything",
        FILE,
        "not is_learned_prefix() and look_centred",
        "look_centred",
        "tests/patches/test_caches.py::test_a_learned_prefix_is_uncentred_and_learns[-eager-fixed]",
    ),
    Mutation(
        "the empty places of a static cache count as keys",
        FILE,
        "count = keys.any(-1).any(1).sum()",
        "count = torch.tensor(keys.shape[0] * keys.shape[2])",
        "tests/patches/test_caches.py::test_every_sort_of_cache_is_measured[stock-static]",
    ),
    Mutation(
        "compiled code reads no mark",
        FILE,
        "return None if known is not None and known.get(attention.layer_idx) is False else shift",
        "return shift",
        "tests/patches/test_caches.py::test_compiled_code_reads_the_mark",
    ),
)
