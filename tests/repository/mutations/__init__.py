"""What is taken out of the source, one at a time, and the test that must fail then: a module for each file of it.

After a rename, `pytest tests/repository/test_mutations.py -k place` names at once every line to be written anew.
"""

import importlib
from pathlib import Path

from tests.repository.mutations.mutation import Mutation, misplaced

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "mutation"))
MUTATIONS: tuple[Mutation, ...] = tuple(
    each for name in MODULES for each in importlib.import_module(f"{__name__}.{name}").MUTATIONS
)

__all__ = ["MUTATIONS", "Mutation", "misplaced"]
