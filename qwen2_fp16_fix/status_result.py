"""What `status` returns: the installation, and how far a model is fixed, layer by layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .results import Record, Result

if TYPE_CHECKING:  # `status` must not need what only a terminal does
    from rich.text import Text


@dataclass(frozen=True)
class PartCount(Record):
    """How many parts of one class a model has, and how many of them are fixed."""

    fixed: int
    total: int


@dataclass(frozen=True)
class LayerStatus(Record):
    """How a fixed layer keeps its numbers in range.

    An exponent is that of the layer's plan, "by token" without a plan, or "not scaled": o_proj under flash attention
    before 4.48. Those of the inputs and of rotated queries and keys stay when a plan ends. Keys are "centred";
    "centred, bias rounded before", if a query or key projection has a hook, a forward of its own or an unknown class,
    or is called by stock's code; or "not centred", if the bias could not be read or an adapter changes it.
    """

    layer: int
    mlp: int | str  # the exponent of the MLP's product
    o_proj: int | str  # the exponent of what o_proj reads
    keys: str
    pairs_in_two_parts: int = 0  # of each key head: rotary pairs that turn and are stored as two float16 numbers
    pairs_left: int = 0  # of a key head: pairs that ask for it and are not, in the last forward
    why_left: str | None = None
    input_norm: int = 0  # the exponent of what q_proj, k_proj and v_proj read
    post_norm: int = 0  # the exponent of what gate_proj and up_proj read
    rotated: int = 0  # the exponent of rotated queries and keys

    def summary(self) -> str:
        """The layer in one line."""
        others = {name: getattr(self, name) for name in ("input_norm", "post_norm", "rotated")}
        exponents = "".join(f", {name} {exponent}" for name, exponent in others.items() if exponent)
        found = f"mlp {self.mlp}, o_proj {self.o_proj}{exponents}, keys {self.keys}"
        if self.pairs_in_two_parts:
            found += f", {self.pairs_in_two_parts} rotary pairs in two parts"
        if not self.pairs_left:
            return found
        pairs = "1 rotary pair" if self.pairs_left == 1 else f"{self.pairs_left} rotary pairs"
        return f"{found}, {pairs} not in two parts: {self.why_left}"


@dataclass(frozen=True, repr=False)
class ModelStatus(Result):
    """How far the Qwen2 inside a model is fixed."""

    class_name: str  # with its module; "class" in `to_dict`
    fixed: bool  # every part is fixed, and nothing overrides a part
    code: str | None  # "package", "remote" for code that came with the checkpoint, None while nothing is fixed
    module: str | None  # the entry module of that code
    numerics: int | None  # the version of the arithmetic of that code: an older export's is older than the package's
    parts: dict[str, PartCount]  # by the name of the stock class
    dtype: str | None  # of the first weight
    attention: str | None
    ranges: list[LayerStatus]  # of the fixed layers
    problem: str | None  # why the model is not fixed, or why its numbers cannot be trusted
    uncovered: list[str]  # what no certificate covers in the model as it is now

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        found = super().to_dict()
        return {"class": found.pop("class_name"), **found}

    def summary(self) -> str:
        """The result in one line."""
        state = "; ".join(("fixed", *self.uncovered)) if self.fixed else self.problem or "not fixed"
        return f"{self.class_name} in {self.dtype}, {self.attention}: {state}"

    def __rich__(self) -> "Text":
        """A line for each attribute, and for each layer."""
        from rich.text import Text

        shown = {name: value for name, value in self.to_dict().items() if name not in ("parts", "ranges")}
        shown["uncovered"] = "; ".join(self.uncovered) or None
        shown |= {role: f"{count.fixed} of {count.total} fixed" for role, count in self.parts.items()}
        for row in self.ranges:
            shown[f"layer {row.layer}"] = row.summary()
        return Text("\n".join(f"{name:>22}  {'' if value is None else value}" for name, value in shown.items()))


@dataclass(frozen=True, repr=False)
class Status(Result):
    """The result of `status`: the versions here, and whether the fix can be used and is on."""

    package: str  # the version of this package
    transformers: str
    torch: str
    numerics: int  # the version of the arithmetic
    supported: str  # the supported releases of transformers, in words
    enabled: bool  # False under QWEN2_FP16_FIX=0
    patch: str | None  # the module that serves the installed transformers
    tested: bool  # whether the installed transformers is in the tested range
    registered: dict[str, bool]  # by the name of the Auto class
    problem: str | None  # why the fix cannot be used here
    model: ModelStatus | None = None  # of the model that was asked about; left out of `to_dict` if there is none

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data: what `status --json` prints."""
        found = super().to_dict()
        if self.model is None:
            del found["model"]
        return found

    def summary(self) -> str:
        """The result in one line."""
        state = self.problem or (f"patch {self.patch}" if self.enabled else "switched off by QWEN2_FP16_FIX=0")
        about = "" if self.model is None else f"; {self.model.summary()}"
        return f"{self.package} on transformers {self.transformers}, {state}{about}"

    def __rich__(self) -> "Text":
        """A line for each attribute. The command leaves `registered` out: its own process has nothing registered."""
        from rich.text import Text

        shown = {name: value for name, value in self.to_dict().items() if name not in ("registered", "model")}
        lines = [Text(f"{name:>12}  {'' if value is None else value}") for name, value in shown.items()]
        return Text("\n").join(lines if self.model is None else [*lines, Text(), self.model.__rich__()])
