"""What is taken out of `patches/cache_origin.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/cache_origin.py"
MUTATIONS = (
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
        "the empty places of a static cache count as keys",
        FILE,
        "count = keys.any(-1).any(1).sum()",
        "count = torch.tensor(keys.shape[0] * keys.shape[2])",
        "tests/patches/test_caches.py::test_every_sort_of_cache_is_measured[stock-static]",
    ),
)
