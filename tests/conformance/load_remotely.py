"""Loads exports as somebody does who has transformers and not this package; run as a process of its own.

    python load_remotely.py REQUEST.json

It does all a release needs at once, since an import of transformers costs more than everything here, and writes the
logits beside the request and what it found to standard output, as JSON.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import child
import torch
import transformers

load = functools.partial(child.load, trust_remote_code=True)


def facts(model: Any) -> dict[str, Any]:
    """Which code runs, and whether all of it does. `mark` is what a test has written at the end of a code commit."""
    code = sys.modules[type(model).__module__]
    layers = getattr(model, model.base_model_prefix, model).layers
    return {
        "class": type(model).__name__,
        "module": code.__name__,
        "fixed": all(type(layer) in code.STOCK and layer.plan is not None for layer in layers),
        "mark": getattr(code, "MARK", None),
    }


def attempt(act: Any) -> str:
    """The error's class and text; empty if there was none."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@torch.no_grad()
def answer(model: Any, tokens: torch.Tensor, new: int, out: Path) -> dict[str, Any]:
    """The facts, whether the class is the code's own or built around it, and the greedy tokens; logits to a file."""
    torch.save(model(input_ids=tokens).logits, out)
    said = child.say(model, tokens, new)
    own = type(model) is getattr(sys.modules[type(model).__module__], type(model).__name__)
    return {**facts(model), "own": own, "tokens": said[0].tolist()}


@torch.no_grad()
def main(request: dict[str, Any], out: Path) -> dict[str, Any]:
    tokens, new = torch.tensor([request["tokens"]]), request["new_tokens"]
    found: dict[str, Any] = {"transformers": transformers.__version__}
    found["package"] = attempt(lambda: __import__("qwen2_fp16_fix"))
    for kind in ("plain", "strict"):
        folder = request[kind]
        for attention in ("eager", "sdpa"):
            model = load("AutoModelForCausalLM", folder, attn_implementation=attention)
            found[f"{kind} {attention}"] = answer(model, tokens, new, out / f"{kind}-{attention}.pt")
        for auto in ("AutoModel", "AutoModelForSequenceClassification"):
            found[f"{kind} {auto}"] = facts(load(auto, folder))
        found[f"{kind} first"] = facts(model)  # still, after other loads have run the code anew
        pipe = transformers.pipeline(
            "text-generation", model=folder, trust_remote_code=True, **{child.DTYPE: torch.float16}
        )
        said = pipe(request["prompt"], max_new_tokens=new, do_sample=False)[0]["generated_text"]
        found[f"{kind} pipeline"] = {**facts(pipe.model), "text": said}
        again = out / f"again-{kind}"
        model.save_pretrained(again)
        found[f"{kind} saved"] = json.loads((again / "config.json").read_text())["architectures"]
        found[f"{kind} again"] = answer(load("AutoModelForCausalLM", str(again)), tokens, 1, out / f"again-{kind}.pt")
    found["untrusted"] = {
        auto: attempt(lambda auto=auto: load(auto, request["strict"], trust_remote_code=False))
        for auto in ("AutoModel", "AutoModelForCausalLM")
    }
    for name, pins in request["hub"].items():
        found[name] = answer(load("AutoModelForCausalLM", **pins), tokens, 1, out / f"{name}.pt")
    found["newest weights"] = attempt(lambda: load("AutoModelForCausalLM", request["hub"]["whole"]["where"]))
    return found


if __name__ == "__main__":
    sys.modules["qwen2_fp16_fix"] = None  # type: ignore[assignment]  # where it is installed all the same
    transformers.logging.set_verbosity_error()
    child.answer_request(main)
