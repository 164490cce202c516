"""What is taken out of `qwen2_fp16_fix/verification/judgement.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "qwen2_fp16_fix/verification/judgement.py"
MUTATIONS = (
    Mutation(
        "verify knows no largest KL",
        FILE,
        "if max_kl is not None and not within(row.kl_mean, max_kl):",
        "if False:",
        "tests/verification/test_judgement.py::test_thresholds_and_overflows_are_named",
    ),
    Mutation(
        "verify passes a drift downwards",
        FILE,
        "abs(value) <= limit",
        "value <= limit",
        "tests/verification/test_judgement.py::test_thresholds_and_overflows_are_named",
    ),
    Mutation(
        "verify forgets what is not finite",
        FILE,
        "if row.fixed and not row.finite:",
        "if False:",
        "tests/verification/test_judgement.py::test_thresholds_and_overflows_are_named",
    ),
)
