"""Says which of the packages that the fix needs cannot be imported here."""

import importlib
import importlib.util
import sys

from .errors import BrokenInstallationError, first_line
from .patches.errors import Qwen2FP16FixError, UnsupportedTransformersError
from .patches.version_map import NEWEST_TESTED, range_for

#: In this order: transformers does without torch until somebody asks it for a model, and then names one of its own
#: modules. The last two are where it reads most of what it needs.
NEEDED = ("torch", "transformers", "transformers.modeling_utils", "transformers.models.auto.auto_factory")


def refuse_if_broken(error: Exception) -> None:
    """Raises BrokenInstallationError from `error` if that came of a package that cannot be imported."""
    if isinstance(error, Qwen2FP16FixError):
        return
    problem = broken_requirement()
    if problem is not None:
        raise BrokenInstallationError(problem) from error


def broken_requirement() -> str | None:
    """A sentence about the first package that cannot be imported, or whose release is not supported; or None."""
    for name in NEEDED:
        try:
            found = importlib.import_module(name)
            if name == "transformers":
                range_for(getattr(found, "__version__", NEWEST_TESTED))
        except UnsupportedTransformersError as error:
            return str(error)
        except Exception as error:
            return _sentence(name.partition(".")[0], f"{type(error).__name__}: {first_line(error)}")
    return None


def _sentence(package: str, reason: str) -> str:
    found = sys.modules.get(package) or importlib.util.find_spec(package)
    places = getattr(found, "__path__", None) or getattr(found, "submodule_search_locations", None)
    where = f" in {next(iter(places))}" if places else ""
    return (
        f"{package}{where} cannot be imported ({reason}), and nothing here works without it: repair it, for example by "
        f"`{sys.executable} -m pip install --force-reinstall {package}`."
    )
