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
)
