"""What is taken out of `patches/planning.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/planning.py"
MUTATIONS = (
    Mutation(
        "a bias that no bound knows is planned for",
        FILE,
        " or (child.bias is not None and not known[name].bias)",
        "",
        "tests/patches/test_planning.py::test_a_bias_is_not_scaled[False]",
    ),
    Mutation(
        "an adapter takes the exponents away",
        FILE,
        "if planned is not None or boundable_weights(layer) is not None:",
        "if True:",
        "tests/patches/test_exponents.py::test_an_adapter_leaves_the_exponents_of_the_linears_inside[v]",
    ),
    Mutation(
        "a plan outlives a write before a cast",
        FILE,
        "    drop_stale_plan(layer)\n    plan = layer.plan\n    yield",
        "    plan = layer.plan\n    yield",
        "tests/patches/test_stale_plans.py::test_a_cast_keeps_no_plan_that_was_stale",
    ),
    Mutation(
        "status believes a plan",
        FILE,
        "    if layer.plan is not None:\n        planned = proven_plan",
        "    if False:\n        planned = proven_plan",
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
    Mutation(
        "another thread runs a layer that is planned in part",
        FILE,
        "layer.watch.reset()\n        drop_plan(layer, due=True)",
        "layer.watch.reset()\n        drop_plan(layer)",
        "tests/patches/test_exponents.py::test_threads_that_meet_in_their_first_forward_make_one_plan",
    ),
    Mutation(
        "each thread makes the plan anew",
        FILE,
        "            if layer.plan_due:  # another thread",
        "            if True:  # another thread",
        "tests/patches/test_exponents.py::test_threads_that_meet_in_their_first_forward_make_one_plan",
    ),
)
