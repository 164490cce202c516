"""An unchanged program, as users have it: loads and runs Qwen2 models and has never heard of the fix.

    qwen2-fp16-fix run -- load_under_run.py REQUEST.json

It does all a release needs at once, since an import of transformers costs more than everything here, and writes what
the models computed beside the request and what it found to standard output, as JSON.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import transformers
from child import answer_request, load, say


@torch.no_grad()
def facts(model: Any, tokens: torch.Tensor, out: Path) -> dict[str, Any]:
    """What the model is and records; its output, and its states one after the other, to a file."""
    output = model(input_ids=tokens, output_hidden_states=True, output_attentions=True)
    torch.save({"output": output[0], "states": output.hidden_states, "attentions": output.attentions}, out)
    found = {"class": type(model).__name__, "module": type(model).__module__, "own": "ran" in model.__dict__}
    if hasattr(model, "lm_head"):
        said = say(model, tokens, 8, min_new_tokens=8)
        found["said"] = said[:, tokens.shape[1] :].tolist()
    return found


def main(request: dict[str, Any], out: Path) -> dict[str, Any]:
    tokens, folder = torch.tensor(request["tokens"]), request["folder"]
    found: dict[str, Any] = {"transformers": transformers.__version__}
    for name in ("AutoModelForCausalLM", "Qwen2ForCausalLM", "AutoModel", "Qwen2Model"):
        for dtype in ("float16", "float32"):
            way = f"{name} {dtype}"
            found[way] = facts(load(name, folder, getattr(torch, dtype)), tokens, out / f"{way}.pt")
    found["isinstance"] = isinstance(load("AutoModel", folder, torch.float16), transformers.Qwen2Model)
    named = pickle.loads(pickle.dumps(load("Qwen2ForCausalLM", folder, torch.float16)))
    found["pickled"] = facts(named, tokens, out / "pickled.pt")
    own = load("AutoModel", request["own"], torch.float16, trust_remote_code=True)
    found["own"] = facts(own, tokens, out / "own.pt")
    return found


if __name__ == "__main__":
    answer_request(main)
