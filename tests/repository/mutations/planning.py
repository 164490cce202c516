"""What is taken out of `patches/planning.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/planning.py"
MUTATIONS = (
    Mutation(
        "a bias that no bound knows is planned for",
        FILE,
        " or (linear.bias is not None and name not in BIASED)",
        "",
        "tests/patches/test_planning.py::test_a_bias_is_not_scaled[False]",
    ),
    Mutation(
        "a plan outlives an edit",
        FILE,
        "elif not plan.suspect and plan.fingerprint == fingerprint(layer):",
        "elif not plan.suspect:",
        "tests/patches/test_stale_plans.py::test_weights_edited_just_before_a_compiler_runs[compile-in_place]",
    ),
    Mutation(
        "a plan outlives a write before a cast",
        FILE,
        "    drop_stale_plan(layer)\n    plan = layer.plan\n    yield",
        "    plan = layer.plan\n    yield",
        "tests/patches/test_stale_plans.py::test_a_cast_keeps_no_plan_that_was_stale",
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
        "status believes a plan",
        FILE,
        "    if layer.plan is not None and exponents_for",
        "    if False and exponents_for",
        "tests/patches/test_stale_plans.py::test_status_and_certify_believe_no_plan[by_data]",
    ),
    Mutation(
        "a graph to train with keeps the plan",
        FILE,
        "    if in_grad_mode and any",
        "    if False and any",
        "tests/patches/test_stale_plans.py::test_a_graph_to_train_with_scales_by_token",
    ),
    Mutation(
        "a plan outlives a cast to bfloat16",
        FILE,
        "w.dtype not in (torch.float16, torch.float32)",
        "False",
        "tests/patches/test_planning.py::test_a_cast_to_float16_keeps_a_plan_and_one_to_bfloat16_ends_it",
    ),
)
