"""What is taken out of `patches/rotary.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/rotary.py"
MUTATIONS = (
    Mutation(
        "rotation tables in float16",
        FILE,
        "self.frequencies().to(x.device, torch.float32)",
        "self.frequencies().to(x.device, torch.float16)",
        "tests/patches/test_blocks.py::test_rotation_tables_are_fp32",
    ),
    Mutation(
        "frequencies that follow the length do so in torch's default dtype",
        FILE,
        "position_ids.amax().view(1, 1).float()",
        "position_ids.amax().view(1, 1)",
        "tests/patches/test_default_dtype.py::test_frequencies_that_a_cast_has_rounded_are_found_again[dynamic-torch.float16]",
    ),
    Mutation(
        "a cast rounds the frequencies",
        FILE,
        "after.dtype != exact.dtype",
        "False",
        "tests/patches/test_blocks.py::test_a_cast_after_the_fix_does_not_reach_the_tables",
    ),
    Mutation(
        "frequencies rounded before the fix stay so",
        FILE,
        "buffer.dtype != torch.float32 and buffer.device.type",
        "False and buffer.device.type",
        "tests/patches/test_blocks.py::test_a_cast_before_the_fix_does_not_reach_the_tables",
    ),
    Mutation(
        "frequencies without numbers are kept",
        FILE,
        "del rounded[name]  # it holds",
        "pass  # it holds",
        "tests/patches/test_blocks.py::test_frequencies_without_numbers_are_not_kept",
    ),
    Mutation(
        "frequencies stay on the meta device",
        FILE,
        'self.frequencies().is_meta and device.type != "meta"',
        "False",
        "tests/patches/test_meta_device.py::test_weights_may_come_any_way[assigned-on meta]",
    ),
    Mutation(
        "frequencies are what to_empty leaves",
        FILE,
        "self._buffers[name] = exact.to(after.device)",
        "self._buffers[name] = exact.to(after.device) if after.dtype != exact.dtype else after",
        "tests/patches/test_meta_device.py::test_weights_may_come_any_way[into empty memory-parameters on meta]",
    ),
)
