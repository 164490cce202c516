"""The errors and warnings of the fix. Each message says what was found, what is supported and what to do.

With the exit code of the command line, 1 for a finding, 2 for wrong usage, 3 for what is not supported:

    Qwen2FP16FixError                3
    ├── UnsupportedTransformersError 3
    ├── NotQwen2Error                2
    ├── PatchConflictError           3
    ├── MetaTensorError              2
    ├── HalfPrecisionScoresError     3
    ├── ForeignCacheError            3
    ├── ShardedRangeError            3
    ├── RegistrationError            3
    ├── SymbolicTraceError           3
    └── LockError                    1
        └── LockFileError            2

    UserWarning
    ├── UntestedTransformersWarning
    ├── StalePlanWarning
    ├── PatchConflictWarning
    └── NotFixedWarning

None of them derives from OSError, ValueError, TypeError or RuntimeError: transformers' `pipeline()` catches those four
and goes on with the stock class, which would switch the fix off silently.
"""

from typing import ClassVar


class Qwen2FP16FixError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code: ClassVar[int] = 3


class UnsupportedTransformersError(Qwen2FP16FixError):
    """The installed transformers release is outside the version map, or its Qwen2 source has an unknown shape."""


class NotQwen2Error(Qwen2FP16FixError):
    """The object or folder holds no Qwen2 model."""

    exit_code = 2


class PatchConflictError(Qwen2FP16FixError):
    """Another tool (Liger, Unsloth, a hand-written patch) has already replaced parts of the Qwen2 classes."""


class MetaTensorError(Qwen2FP16FixError):
    """The model has weights on the meta device, and no hook that loads them."""

    exit_code = 2


class HalfPrecisionScoresError(Qwen2FP16FixError):
    """The chosen attention implementation keeps its scores in float16, where the fix cannot reach them.

    Or it is not transformers' own and may not scale back the scores of queries and keys that have an exponent.
    """


class ForeignCacheError(Qwen2FP16FixError):
    """A cache holds keys that new ones cannot join: of another centre or form, or the cache does not tell."""


class ShardedRangeError(Qwen2FP16FixError):
    """A sharded activation must be scaled like its other shards, and the ranks that hold them are unknown."""


class RegistrationError(Qwen2FP16FixError):
    """transformers did not take the fixed class: a look-up after registering still returns another one."""


class SymbolicTraceError(Qwen2FP16FixError):
    """torch.fx traces a fixed part, and no node can run it."""


class LockError(Qwen2FP16FixError):
    """Something that decides a model's numbers is not as its lock says."""

    exit_code = 1


class LockFileError(LockError):
    """A lock file is missing, broken or no lock, cannot be written, or would be overwritten."""

    exit_code = 2


class UntestedTransformersWarning(UserWarning):
    """The installed transformers is newer than the newest tested release, but its Qwen2 has the known shape."""


class StalePlanWarning(UserWarning):
    """A forward was not finite, so the exponents of all layers are no longer trusted."""


class PatchConflictWarning(UserWarning):
    """Another tool has replaced code of transformers' Qwen2 after a model was fixed, and the model does not run it."""


class NotFixedWarning(UserWarning):
    """A Qwen2 was built by other code that changes its parts, so the fix leaves it as it is."""
