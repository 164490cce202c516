"""An unchanged program, as users have it: loads and runs Qwen2 models and has never heard of the fix.

    qwen2-fp16-fix run -- load_under_run.py REQUEST.json

It does all a release needs at once, since an import of transformers costs more than everything here, and writes what
the models computed beside the request and what it found to standard output, as JSON.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def load(name: str, folder: str, dtype: torch.dtype, **how: Any) -> Any:
    loader = getattr(transformers, name)
    return loader.from_pretrained(folder, attn_implementation="eager", **{DTYPE: dtype}, **how).eval()


@torch.no_grad()
def facts(model: Any, tokens: torch.Tensor, out: Path) -> dict[str, Any]:
    """What the model is and records; its output, and its states one after the other, to a file."""
    output = model(input_ids=tokens, output_hidden_states=True, output_attentions=True)
    torch.save({"output": output[0], "states": output.hidden_states, "attentions": output.attentions}, out)
    found = {"class": type(model).__name__, "module": type(model).__module__, "own": "ran" in model.__dict__}
    if hasattr(model, "lm_head"):
        said = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pad_token_id=0,
            min_new_tokens=8,
            max_new_tokens=8,
            do_sample=False,
        )
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
    request = Path(sys.argv[1])
    print(json.dumps(main(json.loads(request.read_text()), request.parent)))
