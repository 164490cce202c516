"""The table of what differs between the transformers ranges, against the source that is installed."""

import ast
import inspect
import textwrap
from typing import Any

from qwen2_fp16_fix.patches.modeling_qwen2_fp16 import PARTS, RANGE, STOCK
from qwen2_fp16_fix.patches.version_map import DIFFERENCES, Difference

UPDATES = {(4, False): "rotation", (3, False): "nothing", (3, True): "kwargs"}  # by arguments, and whether by name
ROTATIONS = {(True, False): "layer", (True, True): "model or layer", (False, True): "model"}


def source_of(forward: Any) -> ast.FunctionDef:
    """A forward as it was written, beneath its decorators."""
    function = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))).body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


def cache_and_rotation(function: ast.FunctionDef) -> tuple[str, str, str]:
    """The first three columns: the cache argument, what its `update` takes, and where the rotation comes from."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    (update,) = (call for call in calls if call.func.attr == "update")  # type: ignore[attr-defined]
    cache = ast.unparse(update.func.value)  # type: ignore[attr-defined]
    arguments = {argument.arg for argument in function.args.args}
    assert cache in arguments
    used = {ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    rotation = ROTATIONS["self.rotary_emb" in used, "position_embeddings" in arguments]
    return cache, UPDATES[len(update.args), bool(update.keywords)], rotation


def backends_and_window(function: ast.FunctionDef) -> tuple[str, str | None]:
    """The other two columns, which stock's own forward alone shows."""
    used = {ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Attribute | ast.Name)}
    constants = {node.value for node in ast.walk(function) if isinstance(node, ast.Constant)}
    backends = "classes"
    if "ALL_ATTENTION_FUNCTIONS" in used:
        backends = "table, eager for weights" if "output_attentions" in constants else "table"
    window = "attribute" if "self.sliding_window" in used else None
    return backends, "computed" if "self.config.max_window_layers" in used else window


def test_stock_differs_as_the_table_says() -> None:
    """Whoever writes the module of a new range starts from this table."""
    function = source_of(STOCK.Qwen2Attention.forward)
    assert Difference(*cache_and_rotation(function), *backends_and_window(function)) == DIFFERENCES[RANGE.module]
    assert hasattr(STOCK, "Qwen2SdpaAttention") is (DIFFERENCES[RANGE.module].backends == "classes")


def test_the_fixed_attention_differs_as_the_table_says() -> None:
    """A forward that hands a cache other things than stock does would fill some sort of cache with other keys."""
    assert cache_and_rotation(source_of(PARTS["Qwen2Attention"].forward)) == DIFFERENCES[RANGE.module][:3]
