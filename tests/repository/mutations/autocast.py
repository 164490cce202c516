"""What is taken out of `patches/autocast.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/autocast.py"
MUTATIONS = (
    Mutation(
        "fp32 weights under autocast take stock's path",
        FILE,
        " and not autocast_is_on(hidden_states.device.type)",
        "",
        "tests/patches/test_numerics.py::test_full_precision_means_fp32_without_autocast",
    ),
)
