"""What is taken out of `patches/v4_37.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/v4_37.py"
MUTATIONS = (
    Mutation(
        "tables of 4.37 follow the default dtype",
        FILE,
        "torch.arange(0, self.dim, 2, device=device).float() / self.dim",
        "torch.arange(0, self.dim, 2, device=device) / self.dim",
        "tests/patches/test_blocks.py::test_rotation_tables_of_old_releases_are_fp32_whatever_the_default_dtype",
    ),
    Mutation(
        "positions of 4.37 in float16",
        FILE,
        "torch.arange(length, device=device, dtype=torch.float32)",
        "torch.arange(length, device=device, dtype=torch.float16)",
        "tests/patches/test_blocks.py::test_rotation_tables_of_old_releases_are_fp32_whatever_the_default_dtype",
    ),
)
