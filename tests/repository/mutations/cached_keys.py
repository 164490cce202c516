"""What is taken out of `patches/cached_keys.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/cached_keys.py"
MUTATIONS = (
    Mutation(
        "a quantised cache is given wide keys",
        FILE,
        '"Quantized" in x or "Sink" in x',
        '"Sink" in x',
        "tests/patches/test_two_part_caches.py::test_a_quantised_cache_holds_centred_keys",
    ),
    Mutation(
        "a cache of another module is given wide keys",
        FILE,
        'return kind.__module__ == "transformers.cache_utils" and not any(',
        "return not any(",
        "tests/patches/test_two_part_caches.py::test_other_caches_hold_centred_keys[a CPU's-own class-eager]",
    ),
    Mutation(
        "a cache that is allocated beforehand is given wide keys",
        FILE,
        "        return held.shape[-1]\n",
        "        pass\n",
        "tests/patches/test_two_part_caches.py::test_other_caches_hold_centred_keys[a CPU's-allocated-eager]",
    ),
)
