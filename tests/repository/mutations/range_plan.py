"""What is taken out of `patches/range_plan.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/range_plan.py"
MUTATIONS = (
    Mutation(
        "fp64 is asked of a device",
        FILE,
        "return sums.cpu().double()",
        "return sums.double().cpu()",
        "tests/patches/test_devices.py::test_a_plan_is_made_on_a_device_without_fp64",
    ),
    Mutation(
        "a gain in fp32 is bounded by its rounding",
        FILE,
        "torch.maximum(exact(gain).abs(), gain.detach().float().abs())",
        "exact(gain).abs()",
        "tests/checkpoints/test_weights_elsewhere.py::test_a_gain_in_fp32_is_not_bounded_by_its_rounding",
    ),
    Mutation(
        "bounds summed in float16",
        FILE,
        "weight.detach().half().to(torch.float32, copy=copy)",
        "weight.detach().half()",
        "tests/patches/test_range_plan.py::test_fp32_sums_in_chunks_bound_the_exact_ones",
    ),
    Mutation(
        "a norm's own output goes unbounded",
        FILE,
        "norm=max(bound_norm(attention_gain), bound_norm(mlp_gain))",
        "norm=0.0",
        "tests/patches/test_range_plan.py::test_a_norm_that_overflows_by_itself_is_not_proven",
    ),
)
