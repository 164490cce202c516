"""What is taken out of `patches/keys.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/keys.py"
MUTATIONS = (
    Mutation(
        "rotation is not rounded for the cache",
        FILE,
        "return query, key.to(value.dtype), value",
        "return query, key, value",
        "tests/patches/test_blocks.py::test_a_fused_kernel_is_called_with_keys_rounded_once",
    ),
    Mutation(
        "a centre of NaN is kept",
        FILE,
        "shift.to(device) if shift.isfinite().all() else None",
        "shift.to(device)",
        "tests/patches/test_key_centring.py::test_a_centre_that_is_not_finite_is_not_kept[bias]",
    ),
    Mutation(
        "a key's bias is rounded with what it says",
        FILE,
        "linear.bias.view(-1, 1, head_dim), one, out=heads)",
        "linear.bias.view(-1, 1, head_dim), one.half(), out=heads)",
        "tests/patches/test_key_centring.py::test_a_spiked_layer_agrees_with_attention_from_scratch[slow-sdpa]",
    ),
    Mutation(
        "queries and keys wait for their rotation in float16",
        FILE,
        "dtype=torch.float32, device=hidden_states.device)",
        "dtype=torch.float16, device=hidden_states.device)",
        "tests/patches/test_key_centring.py::test_projections_are_the_same_to_the_bit_with_autograd",
    ),
    Mutation(
        "keys are centred for a bias that an adapter changes",
        FILE,
        "None if may_change_bias(self.k_proj) else loaded_bias",
        "loaded_bias",
        "tests/patches/test_linears.py::test_an_adapter_that_changes_the_bias_gets_no_centre_and_is_no_worse_than_stock[IA3-wrapped]",
    ),
    Mutation(
        "a centre outlives an adapter that changes the bias",
        FILE,
        "isinstance(value, nn.Module) and may_change_bias(value)",
        "False",
        "tests/patches/test_linears.py::test_an_adapter_that_changes_the_bias_gets_no_centre_and_is_no_worse_than_stock[IA3-fixed]",
    ),
    Mutation(
        "keys are not centred",
        FILE,
        "hidden_states), cos, sin, shift)",
        "hidden_states), cos, sin)",
        "tests/patches/test_key_centring.py::test_a_spiked_layer_agrees_with_attention_from_scratch[slow-sdpa]",
    ),
    Mutation(
        "the centre is fp64, and all that meets it",
        FILE,
        "torch.cat((nothing, -centre), dim=1).float()",
        "torch.cat((nothing, -centre), dim=1)",
        "tests/patches/test_key_centring.py::test_the_centre_follows_a_move_and_not_a_cast",
    ),
)
