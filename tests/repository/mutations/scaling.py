"""What is taken out of `patches/scaling.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/scaling.py"
MUTATIONS = (
    Mutation(
        "the way back to the residual follows torch's default dtype",
        FILE,
        ", dtype=torch.float32, device=device)",
        ", device=device)",
        "tests/patches/test_default_dtype.py::test_planning_finds_the_same_constants[torch.float16]",
    ),
    Mutation(
        "linears that cast by themselves are taken for fp32",
        FILE,
        'return getattr(inner, "compute_dtype", None) == torch.float16',
        "return False",
        "tests/checkpoints/test_weights_elsewhere.py::test_linears_that_cast_fp32_to_float16_are_scaled[down_proj]",
    ),
    Mutation(
        "the way back to the residual in float16",
        FILE,
        "linear(scaled) * power_of_two(exponent)",
        "linear(scaled) * power_of_two(exponent).half()",
        "tests/patches/test_planning.py::test_scaling_by_token_holds_products_that_float16_cannot",
    ),
    Mutation(
        "the linear is handed fp32",
        FILE,
        "(activation * power_of_two(-exponent)).to(torch.float16)",
        "activation * power_of_two(-exponent)",
        "tests/patches/test_planning.py::test_scaling_by_token_is_as_good_as_the_plan",
    ),
    Mutation(
        "gradients stop where a token is scaled down",
        FILE,
        "(activation * power_of_two(-exponent)).to(torch.float16)",
        "torch.ldexp(activation, -exponent).to(torch.float16)",
        "tests/patches/test_gradients.py::test_every_gradient_passes_by_token[30.0-False]",
    ),
    Mutation(
        "a power of two is an integer, or torch's default dtype",
        FILE,
        "exponent = exponent.float()",
        "exponent = exponent.half()",
        "tests/patches/test_gradients.py::test_powers_of_two_are_exact[torch.float32]",
    ),
    Mutation(
        "a bias is taken off in float16",
        FILE,
        "(output.float() - rest)",
        "(output - rest)",
        "tests/patches/test_planning.py::test_a_bias_is_taken_off_in_fp32",
    ),
    Mutation(
        "a bias learns a difference of two roundings",
        FILE,
        "if trained := trained_biases(linear):",
        "if trained := {}:",
        "tests/patches/test_gradients.py::test_every_gradient_passes_by_token[1000.0-True]",
    ),
    Mutation(
        "a wrapped bias is scaled with the rest",
        FILE,
        "for module in linear.modules())",
        "for module in [linear])",
        "tests/patches/test_planning.py::test_a_bias_is_not_scaled[True]",
    ),
    Mutation(
        "a rank scales on its own",
        FILE,
        "        exponent = largest_in_group(exponent, linear)\n",
        "        pass\n",
        "tests/patches/test_planning.py::test_tensor_parallel_ranks_scale_in_step",
    ),
    Mutation(
        "a plan outlives a merge",
        FILE,
        "            self.set_exponent(None)\n        super",
        "            pass\n        super",
        "tests/patches/test_planning.py::test_merging_an_adapter_ends_a_plan[False]",
    ),
)
