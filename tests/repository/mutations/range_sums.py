"""What is taken out of `patches/range_sums.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/range_sums.py"
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
        "torch.maximum(float16_values(gain).abs(), gain.detach().float().abs())",
        "float16_values(gain).abs()",
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
        "a norm's output that is scaled is not rounded again",
        FILE,
        "lost = TINY * 2.0 ** (exponent + 1) if exponent else TINY",
        "lost = TINY",
        "tests/patches/test_range_plan.py::test_what_rounds_up_from_below_float16s_smallest_number_is_bounded",
    ),
    Mutation(
        "a scaled matmul is rounded as an unscaled one",
        FILE,
        "* TINY * 2.0**exponent",
        "* TINY",
        "tests/patches/test_range_plan.py::test_what_rounds_up_from_below_float16s_smallest_number_is_bounded",
    ),
)
