"""The results of the public functions: attributes for a program, a table for a terminal or a notebook, and JSON.

    found = qwen2_fp16_fix.certify("checkpoint")
    found.proven             # an attribute, which an editor completes
    found.to_dict()          # the data that `certify --json` prints
    found.summary()          # one line, which `repr` shows as well
    rich.print(found)        # the table that `certify` prints

Each class is in the subpackage of its function. docs/api.md lists them.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Notebooks give <pre> the font of their text, in which the columns of a table do not line up.
NOTEBOOK_TABLE = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',Consolas,'Courier New',monospace\">{code}</pre>"
)


class Record:
    """A part of a result, as a row of its table. Derived classes are dataclasses with `frozen=True`."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data: dicts, lists, strings, numbers, booleans and None. `--json` prints it."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # of a derived class
            found[field.name] = plain(getattr(self, field.name))
        return found


class Result(Record):
    """Base of the results of the public functions. Derived classes are dataclasses with `frozen=True, repr=False`."""

    def summary(self) -> str:
        """The result in one line."""
        raise NotImplementedError

    def __rich__(self) -> "RenderableType":
        """The table that a terminal prints, for rich."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """One line, however long the result is."""
        return f"<{type(self).__name__}: {self.summary()}>"

    def _repr_html_(self) -> str:
        """The table for a notebook, as HTML: the same as on a terminal, 100 columns wide."""
        import io

        from rich.console import Console

        page = Console(file=io.StringIO(), record=True, width=100, force_jupyter=False)
        page.print(self)
        return page.export_html(inline_styles=True, code_format=NOTEBOOK_TABLE)


def plain(value: Any) -> Any:
    """`value` as plain data: records become dicts, tuples become lists, at any depth."""
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value
