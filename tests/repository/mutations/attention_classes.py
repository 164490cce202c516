"""What is taken out of `patches/attention_classes.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/attention_classes.py"
MUTATIONS = (
    Mutation(
        "flash of old releases is handed fp32",
        FILE,
        "return rotate(query, cos, sin).to(query.dtype), rotate(key, cos, sin, key_shift).to(key.dtype)",
        "return rotate(query, cos, sin), rotate(key, cos, sin, key_shift)",
        "tests/patches/test_blocks.py::test_flash_attention_of_old_releases_rotates_in_fp32[before 4.45]",
    ),
    Mutation(
        "flash of old releases goes uncentred",
        FILE,
        "rotate(key, cos, sin, key_shift)",
        "rotate(key, cos, sin)",
        "tests/patches/test_blocks.py::test_flash_attention_of_old_releases_rotates_in_fp32[before 4.45]",
    ),
)
