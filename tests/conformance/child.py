"""What the programs in this folder share that run as processes of their own, and import this file as their neighbour.

Nothing of the fix is imported here: the programs stand for those of users.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def load(name: str, where: str, dtype: torch.dtype = torch.float16, **how: Any) -> Any:
    """A model by transformers' class of this name, in eval mode."""
    return (
        getattr(transformers, name)
        .from_pretrained(where, **{"attn_implementation": "eager", DTYPE: dtype, **how})
        .eval()
    )


def say(model: Any, tokens: torch.Tensor, new: int, **how: Any) -> torch.Tensor:
    """`tokens` and up to `new` greedy ones."""
    found: torch.Tensor = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **how,
    )
    return found


def answer_request(answer: Callable[[dict[str, Any], Path], dict[str, Any]]) -> None:
    """Prints what `answer` makes of the request whose file is the only argument, and of the folder it lies in."""
    request = Path(sys.argv[1])
    print(json.dumps(answer(json.loads(request.read_text()), request.parent)))
