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
)
