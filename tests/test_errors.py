"""Each error has the exit code of the command line, and the trees in the docstrings name them all."""

import re
from types import ModuleType

import pytest

from qwen2_fp16_fix import errors
from qwen2_fp16_fix.patches import errors as patches_errors
from qwen2_fp16_fix.patches.errors import Qwen2FP16FixError

#: As scripts around the command line rely on them: 1 a finding, 2 wrong usage, 3 not supported, 4 the Hub.
EXIT_CODES = {
    "BrokenInstallationError": 3,
    "CheckpointError": 2,
    "ExportError": 2,
    "ForeignCacheError": 3,
    "HalfPrecisionScoresError": 3,
    "HubError": 4,
    "LockError": 1,
    "LockFileError": 2,
    "MetaTensorError": 2,
    "NotQwen2Error": 2,
    "PatchConflictError": 3,
    "PublishError": 2,
    "Qwen2FP16FixError": 3,
    "RegistrationError": 3,
    "ScanError": 2,
    "ShardedRangeError": 3,
    "SymbolicTraceError": 3,
    "UnsupportedTransformersError": 3,
    "VerificationError": 2,
}


def all_errors() -> dict[str, type[Qwen2FP16FixError]]:
    found = {**vars(patches_errors), **vars(errors)}.items()
    return {name: kind for name, kind in found if isinstance(kind, type) and issubclass(kind, Qwen2FP16FixError)}


def test_every_error_has_its_exit_code() -> None:
    assert {name: kind.exit_code for name, kind in all_errors().items()} == EXIT_CODES


def test_no_error_is_one_that_pipeline_swallows() -> None:
    """`pipeline()` catches these four and goes on with the stock class, which switched the fix off without a word."""
    for kind in all_errors().values():
        assert not issubclass(kind, OSError | ValueError | TypeError | RuntimeError), kind


@pytest.mark.parametrize("module", [errors, patches_errors], ids=lambda module: module.__name__)
def test_the_tree_in_the_docstring_is_true(module: ModuleType) -> None:
    own = {name for name, kind in vars(module).items() if isinstance(kind, type) and kind.__module__ == module.__name__}
    drawn = re.findall(r"^ +(?:[│├└─ ]*)(\w+(?:Error|Warning))(?: +(\d))?", module.__doc__ or "", re.M)
    assert own <= {name for name, _ in drawn}
    for name, code in drawn:
        assert not code or int(code) == EXIT_CODES[name], name


def test_the_first_line_of_another_librarys_error_is_kept() -> None:
    assert errors.first_line(ValueError("\nfirst\nsecond")) == "first"
    assert errors.first_line(KeyError()) == "KeyError"
