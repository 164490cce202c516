"""The kinds of input by their names."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from tests.fuzz.worker import Attempt

KINDS = ("configs", "weights", "jsons", "models")


def module(kind: str) -> Any:
    """The module of a kind."""
    return import_module(f"tests.fuzz.{kind}")


def count(kind: str) -> int:
    """How many inputs of the kind there are in a full run."""
    found: int = module(kind).COUNT
    return found


def attempt(kind: str) -> Attempt:
    """What runs one input of the kind."""
    torch.set_num_threads(1)  # a fork with torch's threads would wait for those that it has not
    found: Attempt = module(kind).attempt
    return found


def prepare(kind: str, numbers: Sequence[int]) -> None:
    """Makes what these inputs of the kind are damaged copies of, once, before the forks."""
    module(kind).prepare(numbers)
