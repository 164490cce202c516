"""The prompts of a scan as token ids, and the model and the device that run them."""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations.weights_on_demand import LoadedModel, ModelOnDisk, WeightProvider, layers_are_fixed
from ..checkpoints.loading import default_device, device_problem, quiet
from ..checkpoints.tokenizer import file_named, open_tokenizer
from ..errors import CheckpointError, ScanError, first_line
from ..files.reading import SURROGATE, parse_json, read_utf8, shortened
from ..patches.modeling_qwen2_fp16 import STOCK, check_modules
from ..patches.swap import base_models, check_weights

#: The prompts if none are given: a question, a story, code and Chinese.
DEFAULT_PROMPTS = (
    "What is the capital of France, and since when?",
    "Tell me a story about a lighthouse keeper who finds a letter in a bottle.",
    "Write a Python function that returns the prime factors of a number, with a short explanation:\n\ndef factors(n):",
    "请用三句话介绍一下长城的历史。",
)

Prompts = str | Path | Sequence[str | Sequence[int] | Tensor]


def read_prompts(prompts: Prompts | None) -> list[str | Sequence[int] | Tensor]:
    """The prompts: one text, several texts or lists of token ids, or what a file holds. Raises ScanError."""
    if prompts is None:
        return list(DEFAULT_PROMPTS)
    if isinstance(prompts, str):
        prompts = file_named(prompts, ScanError) or [prompts]
    if not isinstance(prompts, Path | Sequence | Tensor):
        raise ScanError(f"the prompts are a {type(prompts).__qualname__}: give a text, a list, or a Path to a file.")
    found: list[Any] = _read_file(prompts) if isinstance(prompts, Path) else list(prompts)
    name = str(prompts) if isinstance(prompts, Path) else "prompts"
    odd = next((prompt for prompt in found if not isinstance(prompt, str | Tensor) and not _are_ids(prompt)), None)
    if odd is not None:
        raise ScanError(f"{name}: {shortened(repr(odd))} is neither a text nor a list of token ids.")
    if not found or any(isinstance(prompt, str) and not prompt.strip() for prompt in found):
        raise ScanError(f"{name} holds no prompt, or an empty one: give at least one prompt, and text in each.")
    if any(isinstance(prompt, str) and SURROGATE.search(prompt) for prompt in found):
        raise ScanError(f"{name} has half of a surrogate pair, which is not a character: write the character itself.")
    return found


def _are_ids(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and all(isinstance(token, Integral) for token in prompt)


def _read_file(path: Path) -> list[Any]:
    """A JSON file's list of texts, or the lines of any other file."""
    text = read_utf8(path, "a file of prompts", ScanError)
    if path.suffix != ".json":
        return [line for line in text.splitlines() if line.strip()]
    found = parse_json(text, str(path), "another file of prompts", ScanError)
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise ScanError(f'{path} is not a list of texts: write ["first prompt", "second prompt"].')
    return found


class TokenisedPrompts(NamedTuple):
    """The prompts as asked, the token ids (1, S) of each, and the tokenizer that reads tokens back."""

    asked: list[str | Sequence[int] | Tensor]
    ids: list[Tensor]
    tokenizer: Any

    def token(self, prompt: int, position: int) -> tuple[int, str | None]:
        """A token and its text. A token inside a character has no text: it is written as the vocabulary has it.

        Without a tokenizer the text is None.
        """
        token = int(self.ids[prompt][0, position])
        if self.tokenizer is None:
            return token, None
        text = str(self.tokenizer.decode([token]))
        odd = not text or "\ufffd" in text
        return token, str(self.tokenizer.convert_ids_to_tokens([token])[0]) if odd else text


def tokenise(
    asked: list[str | Sequence[int] | Tensor], weights: WeightProvider, tokenizer: Any, tokens: int
) -> TokenisedPrompts:
    """The prompts as ids of the model's own tokens, at most `tokens` of each. Raises ScanError or CheckpointError."""
    if tokenizer is None and isinstance(weights, ModelOnDisk) and any(isinstance(prompt, str) for prompt in asked):
        tokenizer = open_tokenizer(weights.folder)
    config = weights.base.config
    limit = min(tokens, config.max_position_embeddings)
    ids = [token_ids(prompt, tokenizer, limit, config.vocab_size) for prompt in asked]
    return TokenisedPrompts(asked, ids, tokenizer)


def token_ids(prompt: str | Sequence[int] | Tensor, tokenizer: Any, limit: int, vocabulary: int) -> Tensor:
    """A prompt as ids (1, S), the first `limit` of them. A text goes through the chat template if there is one.

    Raises ScanError, or CheckpointError if the tokenizer is another model's.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ScanError("a text needs a tokenizer: pass tokenizer=, or prompts as token ids.")
        with quiet():
            if getattr(tokenizer, "chat_template", None):
                turns = [{"role": "user", "content": prompt}]
                prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            found = tokenizer(prompt)["input_ids"]
    else:
        found = prompt.flatten().tolist() if isinstance(prompt, Tensor) else list(prompt)
    if not found:
        raise ScanError("a prompt has no tokens: give text, or token ids, in each.")
    if not 0 <= min(found) <= max(found) < vocabulary:
        raise CheckpointError(
            f"a prompt has token {max(found)}, but the model's vocabulary ends at {vocabulary - 1}: it is another "
            "model's tokenizer."
        )
    return torch.tensor([found[:limit]], dtype=torch.int64)


def check_loaded(model: Any, fixed: bool | None) -> tuple[LoadedModel, bool]:
    """A loaded model, ready to run, and whether it is fixed. Raises Qwen2FP16FixError if it cannot run as asked."""
    check_modules(model)
    check_weights(model)
    if getattr(getattr(model, "config", None), "quantization_config", None):
        raise CheckpointError("this model is quantised: scan the float16 model that it was made from.")
    weights = next(p for p in next(base_models(model, STOCK)).parameters() if p.is_floating_point())
    if weights.dtype != torch.float16:
        name = str(weights.dtype).removeprefix("torch.")
        raise CheckpointError(f"this model is {name}: load it in float16, or scan its folder.")
    loaded = LoadedModel(model)
    found = layers_are_fixed(loaded.base)
    if fixed is not None and fixed != found:
        what, other = ("fixed", "unfix") if found else ("stock", "fix")
        raise ScanError(f"this model is {what}, not as asked: call {other}(model) first, or scan its folder.")
    return loaded, found


def choose_device(device: str | None) -> torch.device:
    """The device by its name; by default cuda if there is one. Raises ScanError."""
    name = default_device() if device is None else device
    problem = device_problem(name)
    if problem is not None:
        raise ScanError(f"{name} is not a device here ({first_line(problem)}): give cpu, or leave the device out.")
    chosen = torch.device(name)
    if chosen.type == "meta":
        raise ScanError("the meta device computes nothing: give cpu, or leave the device out.")
    return chosen
