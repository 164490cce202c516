"""What is taken out of `patches/overflow.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/overflow.py"
MUTATIONS = (
    Mutation(
        "hidden states are summed in float16",
        FILE,
        "sum(dtype=torch.float32)",
        "sum()",
        "tests/patches/test_stale_plans.py::test_sums_that_pass_float16_are_no_overflow",
    ),
    Mutation(
        "sums of hidden states are kept in float16",
        FILE,
        "torch.zeros((), dtype=torch.float32, device=device)",
        "torch.zeros((), dtype=torch.float16, device=device)",
        "tests/patches/test_stale_plans.py::test_sums_that_pass_float16_are_no_overflow",
    ),
)
