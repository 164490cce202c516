"""The weights of a Qwen2 by the names of a checkpoint, checked, from a folder or a model in memory."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from ..errors import CheckpointError
from ..patches.architecture import QWEN2
from ..patches.range_bounds import LayerShape
from ..patches.scaling import FLOAT_DTYPES
from ..patches.version_map import NUMERICS

#: The linears of a layer, by their names below it.
LINEARS = tuple(linear.name for linear in QWEN2.linears)
#: Modules that end a model. Qwen2 has no `classifier`, but classes that users derive from it have.
OUTPUT_LAYERS = (*QWEN2.output_layers(), "classifier")
ROWS_READ = 8192  # of an embedding or a head read at a time


class UnboundedWeightError(Exception):
    """The values of a weight cannot be bounded: it is not loaded, wrapped or quantised."""


class WeightSource(Protocol):
    """A Qwen2 whose weights can be read one by one: a loaded model, or a checkpoint folder."""

    prefix: str  # of the names of a base model: "model." in most checkpoints
    layers: int
    intermediate: int
    shape: LayerShape
    warnings: tuple[str, ...]  # sentences about the model that its weights do not show

    def layer_names(self, number: int) -> list[str]:
        """The weights and biases of a layer, by their names below it."""

    def heads(self) -> list[str]:
        """The weights of the output layers."""

    def has(self, name: str) -> bool:
        """Whether there is such a weight."""

    def read(self, name: str) -> Tensor:
        """A weight. Raises CheckpointError, or UnboundedWeightError if its values cannot be bounded."""

    def rows(self, name: str) -> Iterator[Tensor]:
        """A weight (rows, columns), some rows at a time."""


def older_code(numerics: int) -> str:
    """Why nothing is said about a checkpoint whose exported code has another arithmetic: it has other exponents."""
    return (
        f"the code that was exported with it has numerics {numerics} and this package {NUMERICS}: with "
        "trust_remote_code=True the former loads, which was not examined here; export the checkpoint again"
    )


def weight_names() -> list[str]:
    """The weights of a layer, by their names below it: first those of the norms."""
    return [f"{name}.weight" for name in (*QWEN2.norms(), *LINEARS)]


def check_shape(name: str, weight: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """The weight. Raises CheckpointError if it has another shape: broadcasting would bound something else."""
    compare_shapes(name, tuple(weight.shape), wanted)
    return weight


def compare_shapes(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises CheckpointError if the shapes differ."""
    if found != wanted:
        raise CheckpointError(f"{name} has shape {list(found)}, but its config asks for {list(wanted)}.")


def check_values(name: str, weight: Tensor) -> Tensor:
    """The weight. Raises UnboundedWeightError unless it is loaded and a plain tensor of a floating-point type."""
    if weight.is_meta:
        raise UnboundedWeightError(f"{name} is not loaded")
    if type(weight) not in (nn.Parameter, Tensor):
        raise UnboundedWeightError(f"{name} is a {type(weight).__name__}, whose values cannot be bounded here")
    if weight.dtype not in FLOAT_DTYPES:  # in another type it needs its scales
        raise UnboundedWeightError(
            f"{name} is stored as {str(weight.dtype).removeprefix('torch.')}: quantised weights are not bounded"
        )
    return weight.detach()
