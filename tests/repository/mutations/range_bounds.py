"""What is taken out of `patches/range_bounds.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/range_bounds.py"
MUTATIONS = (
    Mutation(
        "a norm's own output goes unbounded",
        FILE,
        '"post_norm": bound_norm(gain_before(weights, "gate"), exponents.post_norm)',
        '"post_norm": 0.0',
        "tests/patches/test_range_plan.py::test_a_norm_that_overflows_by_itself_is_scaled",
    ),
    Mutation(
        "a bias of v goes unbounded",
        FILE,
        '"value": largest(biased["v"])',
        '"value": largest(sums["v"])',
        "tests/patches/test_range_plan.py::test_a_bias_is_bounded_where_it_is_stored",
    ),
    Mutation(
        "a negative scale of cos and sin makes bounds negative",
        FILE,
        "abs(shape.rotation_scale)",
        "shape.rotation_scale",
        "tests/certification/test_assumptions.py::test_a_fixed_model_is_planned_for_the_magnitude_too",
    ),
)
