"""What is taken out of `patches/attention.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/attention.py"
MUTATIONS = (
    Mutation(
        "output projection by token in float16",
        FILE,
        "linear_by_token(attention.o_proj, output.float(), width)",
        "linear_by_token(attention.o_proj, output, width)",
        "tests/patches/test_planning.py::test_scaling_by_token_is_handed_fp32",
    ),
    Mutation(
        "a kernel of the user's is handed an fp32 query",
        FILE,
        "return laid_out_by_token(query, value.dtype), key, value, mask",
        "return query, key, value, mask",
        "tests/patches/test_blocks.py::test_a_fused_kernel_is_called_with_keys_rounded_once",
    ),
    Mutation(
        "eager hands fp32 on",
        FILE,
        "output.transpose(1, 2).to(value.dtype, memory_format=torch.contiguous_format)",
        "output.transpose(1, 2).contiguous()",
        "tests/patches/test_blocks.py::test_eager_attention_hands_on_the_dtype_of_the_values",
    ),
    Mutation(
        "the output projection is handed fp32",
        FILE,
        "output, scale = output.to(dtype), attention.scale",
        "scale = attention.scale",
        "tests/patches/test_blocks.py::test_the_output_projection_is_handed_the_models_dtype",
    ),
    Mutation(
        "rotation is not rounded for the cache",
        FILE,
        "return query, key.to(value.dtype), value",
        "return query, key, value",
        "tests/patches/test_blocks.py::test_a_fused_kernel_is_called_with_keys_rounded_once",
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
        "tests/patches/test_centred_projections.py::test_projections_are_the_same_to_the_bit_with_autograd",
    ),
    Mutation(
        "keys are not centred",
        FILE,
        "hidden_states), cos, sin, shift)",
        "hidden_states), cos, sin)",
        "tests/patches/test_key_centring.py::test_a_spiked_layer_agrees_with_attention_from_scratch[slow-sdpa]",
    ),
)
