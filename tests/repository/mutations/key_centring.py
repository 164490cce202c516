"""What is taken out of `patches/key_centring.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/key_centring.py"
MUTATIONS = (
    Mutation(
        "the channels of split pairs stay where they were",
        FILE,
        "channels=split.channels.to(where)",
        "channels=split.channels",
        "tests/patches/test_stale_plans.py::test_constants_go_where_the_layer_computes",
    ),
    Mutation(
        "a shift stays where it was",
        FILE,
        "shift=centre.shift.to(where)",
        "shift=centre.shift",
        "tests/patches/test_stale_plans.py::test_constants_go_where_the_layer_computes",
    ),
    Mutation(
        "a centre of NaN is kept",
        FILE,
        "if not shift.isfinite().all():",
        "if False:",
        "tests/patches/test_key_centring.py::test_a_centre_that_is_not_finite_is_not_kept[bias]",
    ),
    Mutation(
        "keys are centred for a bias that an adapter changes",
        FILE,
        "None if may_change_bias(self.k_proj) else loaded_bias",
        "loaded_bias",
        "tests/patches/test_adapters.py::test_an_adapter_that_changes_the_bias_gets_no_centre_and_is_no_worse_than_stock[IA3-wrapped]",
    ),
    Mutation(
        "a centre outlives an adapter that changes the bias",
        FILE,
        "isinstance(value, nn.Module) and may_change_bias(value)",
        "False",
        "tests/patches/test_adapters.py::test_an_adapter_that_changes_the_bias_gets_no_centre_and_is_no_worse_than_stock[IA3-fixed]",
    ),
    Mutation(
        "the centre is fp64, and all that meets it",
        FILE,
        "torch.cat((nothing, -centre), dim=1).float()",
        "torch.cat((nothing, -centre), dim=1)",
        "tests/patches/test_centred_projections.py::test_the_centre_follows_a_move_and_not_a_cast",
    ),
)
