"""Qwen2 and Qwen2.5 in float16 without NaN.

    import qwen2_fp16_fix
    qwen2_fp16_fix.register()    # every Qwen2 is built fixed from here on

Importing this package imports neither torch nor transformers; the first use of a name does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .certification.certify import certify
    from .diagnosis.doctor import doctor
    from .errors import (
        BrokenInstallationError,
        CheckpointError,
        ExportError,
        HubError,
        PublishError,
        ScanError,
        VerificationError,
    )
    from .hub.export import export
    from .hub.push import push
    from .in_place import adopt_cache, fix, unfix
    from .locking import check, lock
    from .model_status import is_fixed, status
    from .patches.errors import (
        ForeignCacheError,
        HalfPrecisionScoresError,
        LockError,
        LockFileError,
        MetaTensorError,
        NotFixedWarning,
        NotQwen2Error,
        PatchConflictError,
        PatchConflictWarning,
        Qwen2FP16FixError,
        RegistrationError,
        ShardedRangeError,
        StalePlanWarning,
        SymbolicTraceError,
        UnsupportedTransformersError,
        UntestedTransformersWarning,
    )
    from .patches.modeling_qwen2_fp16 import (
        Qwen2ForCausalLM,
        Qwen2ForQuestionAnswering,
        Qwen2ForSequenceClassification,
        Qwen2ForTokenClassification,
        Qwen2Model,
    )
    from .patches.stock_wanted import stock_models
    from .registration.register import register, registered, unregister
    from .scanning.scan import scan
    from .verification.verify import verify

__all__ = [
    "register",
    "unregister",
    "registered",
    "stock_models",
    "fix",
    "unfix",
    "adopt_cache",
    "status",
    "is_fixed",
    "certify",
    "verify",
    "export",
    "push",
    "doctor",
    "lock",
    "check",
    "scan",
    "Qwen2Model",
    "Qwen2ForCausalLM",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2ForQuestionAnswering",
    "Qwen2FP16FixError",
    "UnsupportedTransformersError",
    "NotQwen2Error",
    "PatchConflictError",
    "PatchConflictWarning",
    "MetaTensorError",
    "ForeignCacheError",
    "HalfPrecisionScoresError",
    "RegistrationError",
    "ShardedRangeError",
    "SymbolicTraceError",
    "BrokenInstallationError",
    "CheckpointError",
    "VerificationError",
    "ExportError",
    "PublishError",
    "HubError",
    "LockError",
    "LockFileError",
    "ScanError",
    "StalePlanWarning",
    "UntestedTransformersWarning",
    "NotFixedWarning",
    "__version__",
]

_HOME = {
    "register": "registration.register",
    "unregister": "registration.register",
    "registered": "registration.register",
    "fix": "in_place",
    "unfix": "in_place",
    "adopt_cache": "in_place",
    "status": "model_status",
    "is_fixed": "model_status",
    "stock_models": "patches.stock_wanted",
    "certify": "certification.certify",
    "verify": "verification.verify",
    "export": "hub.export",
    "push": "hub.push",
    "doctor": "diagnosis.doctor",
    "lock": "locking",
    "check": "locking",
    "scan": "scanning.scan",
    **{name: "patches.modeling_qwen2_fp16" for name in __all__ if name.startswith(("Qwen2M", "Qwen2For"))},
    **{name: "patches.errors" for name in __all__ if name.endswith(("Error", "Warning"))},
    **dict.fromkeys(
        (
            "BrokenInstallationError",
            "CheckpointError",
            "ExportError",
            "HubError",
            "PublishError",
            "ScanError",
            "VerificationError",
        ),
        "errors",
    ),
}


def __getattr__(name: str) -> Any:
    """Finds a public name in its module at the first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    except Exception as error:
        importlib.import_module(f"{__name__}.requirements").refuse_if_broken(error)
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
