"""What is taken out of `patches/swap.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/swap.py"
MUTATIONS = (
    Mutation(
        "accelerate's hook keeps stock's forward",
        FILE,
        "    for name in kept:\n",
        "    for name in ():\n",
        "tests/registration/test_ways_in.py::test_a_model_dispatched_by_a_device_map_is_fixed[fixed after loading]",
    ),
    Mutation(
        "what an older copy has put into a model stays there",
        FILE,
        'for name in ("on_unfixed", NAME_BEFORE):',
        'for name in ("on_unfixed",):',
        "tests/hub/test_older_remote_code.py::test_one_copy_undoes_the_other_whole[older]",
    ),
)
