"""What is taken out of `qwen2_fp16_fix/verification/divergence.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "qwen2_fp16_fix/verification/divergence.py"
MUTATIONS = (
    Mutation(
        "verify takes KL the other way round",
        FILE,
        "log_p.exp() * (log_p - log_q)",
        "log_q.exp() * (log_q - log_p)",
        "tests/verification/test_divergence.py::test_sums_are_the_direct_formulas",
    ),
    Mutation(
        "verify scores a token twice",
        FILE,
        "found[-1].end if found else 1",
        "start + 1",
        "tests/verification/test_divergence.py::test_every_token_but_the_first_is_scored_once_with_all_its_context[100-16-5]",
    ),
)
