"""What is taken out of `patches/range_plan.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/range_plan.py"
MUTATIONS = (
    Mutation(
        "the bounds are those without the exponents",
        FILE,
        "while exponents._replace(mlp=0) != bounded:",
        "while False:",
        "tests/patches/test_range_plan.py::test_the_bounds_are_those_with_the_exponents",
    ),
    Mutation(
        "values are scaled less than what they are computed of",
        FILE,
        'max(needed["o_proj"], needed["input_norm"])',
        'needed["o_proj"]',
        "tests/patches/test_range_plan.py::test_one_bit_past_the_limit_asks_for_one_exponent",
    ),
)
