"""What is taken out of `patches/linears.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/linears.py"
MUTATIONS = (
    Mutation(
        "a key's bias is rounded with what it says where autograd looks on, or the linear is not plain",
        FILE,
        "return product + bias.to(product.device).float()",
        "return product + bias.to(product.device)",
        "tests/patches/test_centred_projections.py::test_projections_are_the_same_to_the_bit_with_autograd",
    ),
    Mutation(
        "a product is taken past a hook",
        FILE,
        "(is_plain(projection) and not is_watched(projection))",
        "is_plain(projection)",
        "tests/patches/test_linears.py::test_a_hook_that_changes_something_changes_the_result",
    ),
    Mutation(
        "to look changes what is looked at",
        FILE,
        "exact = torch.where(whole == kept, exact, whole.float())",
        "exact = whole.float()",
        "tests/patches/test_linears.py::test_a_hook_that_only_looks_changes_nothing[hook]",
    ),
    Mutation(
        "what a hook writes is not seen",
        FILE,
        "torch.where(whole == kept, exact, whole.float())",
        "exact.clone()",
        (
            "tests/patches/test_linears.py::test_a_hook_that_changes_something_changes_the_result[hook in "
            "place-False-no_grad]"
        ),
    ),
    Mutation(
        "a view is taken past a hook",
        FILE,
        'is_watched(module) or ("forward"',
        '("forward"',
        "tests/patches/test_linears.py::test_a_hook_on_what_goes_through_a_view_is_called_with_the_whole[quantised]",
    ),
    Mutation(
        "a bias is taken off by an attribute of the class",
        FILE,
        "NO_BIAS = property(lambda module: None)",
        "NO_BIAS = None",
        "tests/patches/test_linears.py::test_a_replica_adds_its_bias_once[quantised]",
    ),
    Mutation(
        "a forward bound to the module is called for the product",
        FILE,
        ' or ("forward" in module.__dict__ and not is_aligned(module))',
        "",
        "tests/patches/test_loaded_linears.py::test_a_wrapper_of_linears_forward_meets_the_original_signature",
    ),
    Mutation(
        "accelerate's forward stays bound to the module",
        FILE,
        'if "forward" not in own:',
        "if True:",
        "tests/patches/test_linears.py::test_offloaded_weights_are_where_they_are_needed_and_gone_again[alone]",
    ),
    Mutation(
        "a linear that nobody has looked at is taken to add its bias last",
        FILE,
        "kind is not nn.Linear and not kind.__module__.startswith(ADDING_LAST)",
        "False",
        "tests/patches/test_linears.py::test_a_linear_that_nobody_has_looked_at_is_rounded_as_in_stock",
    ),
    Mutation(
        "an adapter takes itself out of the weights through a view",
        FILE,
        "not about_to_unmerge and ",
        "",
        "tests/patches/test_adapters.py::test_adapters_are_exact_on_merged_and_off[Lora]",
    ),
    Mutation(
        "the sum beside a hook is rounded",
        FILE,
        "linear.weight) + bias.to(hidden_states.device).float()",
        "linear.weight) + bias.to(hidden_states.device)",
        "tests/patches/test_linears.py::test_a_hook_that_only_looks_changes_nothing[hook]",
    ),
    Mutation(
        "what a hook was shown is cut out of the graph",
        FILE,
        " + (whole.float() - whole.detach().float()) if whole.requires_grad else exact",
        "",
        "tests/patches/test_linears.py::test_gradients_reach_what_a_hook_was_shown[q_proj]",
    ),
    Mutation(
        "a scaled product is brought back in float16",
        FILE,
        "exact = product.float() * 2.0**exponent",
        "exact = product * 2.0**exponent",
        "tests/patches/test_exponents.py::test_an_adversary_finds_no_number_beyond_its_limit[wide post_norm]",
    ),
    Mutation(
        "a hook takes a projection past its exponent",
        FILE,
        "    if is_only_hooked(projection):\n\n",
        "    if False:\n\n",
        (
            "tests/patches/test_exponents.py::test_hooks_see_what_stocks_would_and_leave_the_model_as_exact"
            "[no_grad-wide input_norm]"
        ),
    ),
    Mutation(
        "a projection that cannot be split is handed fp32",
        FILE,
        "projection(hidden_states.to(torch.float16))",
        "projection(hidden_states)",
        "tests/patches/test_exponents.py::test_a_projection_that_cannot_be_split_runs_behind_a_wide_norm",
    ),
)
