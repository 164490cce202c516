"""What is taken out of `patches/layer_plan.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/layer_plan.py"
MUTATIONS = (
    Mutation(
        "a plan outlives an edit",
        FILE,
        "elif not plan.suspect and plan.versions == weight_versions(layer):",
        "elif not plan.suspect:",
        "tests/patches/test_stale_plans.py::test_weights_edited_just_before_a_compiler_runs[compile-in_place]",
    ),
    Mutation(
        "a plan outlives a fused optimiser",
        FILE,
        "elif not plan.suspect and plan",
        "elif plan",
        "tests/patches/test_stale_plans.py::test_a_fused_optimiser_ends_every_plan[SGD]",
    ),
    Mutation(
        "a plan outlives an overflow",
        FILE,
        "    if layer.watch.has_overflowed():",
        "    if False:",
        "tests/patches/test_stale_plans.py::test_a_forward_that_overflowed_is_told_of_by_the_next[by_data]",
    ),
    Mutation(
        "a norm rounds what float16 cannot hold",
        FILE,
        "= is_wide and can_read",
        "= False",
        "tests/patches/test_exponents.py::test_what_asks_for_an_exponent_is_proven_and_exact[eager-wide post_norm]",
    ),
    Mutation(
        "a cache meets values of another exponent once a plan has ended",
        FILE,
        "    layer.__dict__.update(plan=None,",
        "    keep_ranges(layer, Exponents())\n    layer.__dict__.update(plan=None,",
        "tests/patches/test_exponents.py::test_a_plan_that_ends_leaves_the_exponents_of_what_is_stored[v]",
    ),
)
