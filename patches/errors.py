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
and then builds the stock class, which would switch the fix off silently.
"""

from typing import ClassVar


class Qwen2FP16FixError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code: ClassVar[int] = 3


class UnsupportedTransformersError(Qwen2FP16FixError):
    """The installed transformers release is outside the version map, or its Qwen2 source has an unknown structure."""


class NotQwen2Error(Qwen2FP16FixError):
    """The object or folder does not hold a Qwen2 model."""

    exit_code = 2


class PatchConflictError(Qwen2FP16FixError):
    """Another tool (Liger, Unsloth, a hand-written patch) has already replaced parts of the Qwen2 classes."""


class MetaTensorError(Qwen2FP16FixError):
    """The model has weights on the meta device, and no hook will load them."""

    exit_code = 2


class HalfPrecisionScoresError(Qwen2FP16FixError):
    """The chosen attention implementation keeps its scores in float16, where the fix cannot reach them.

    Or it is not transformers' own and may not scale back the scores of queries and keys that have an exponent.
    """


class ForeignCacheError(Qwen2FP16FixError):
    """A cache holds keys of another centre or form than new ones would have, or does not say which its keys have."""


class ShardedRangeError(Qwen2FP16FixError):
    """A sharded activation must be scaled as its other shards are, and the ranks that hold those are unknown."""


class RegistrationError(Qwen2FP16FixError):
    """transformers did not accept the fixed class: a look-up after registering still returns another one."""


class SymbolicTraceError(Qwen2FP16FixError):
    """torch.fx was about to trace the inside of a fixed part, or a call of it that no node of a graph can hold."""


class LockError(Qwen2FP16FixError):
    """Something that decides a model's numbers is not as its lock says."""

    exit_code = 1


class LockFileError(LockError):
    """A lock file is missing, damaged or not a lock, cannot be written, or would be overwritten."""

    exit_code = 2


class UntestedTransformersWarning(UserWarning):
    """The installed transformers is newer than every tested release, but its Qwen2 source has the known structure."""


class StalePlanWarning(UserWarning):
    """A forward ended in inf or NaN, so the exponents of all layers are no longer trusted."""


class PatchConflictWarning(UserWarning):
    """Another tool has replaced code of transformers' Qwen2 after a model was fixed, and the model does not run it."""


class NotFixedWarning(UserWarning):
    """A Qwen2 is built by code that changes its parts, so it stays unfixed; or a model is traced before it ever ran."""
