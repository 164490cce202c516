"""Train the demo checkpoint: a small Qwen2 that reads well in float32 and prints `!!!!` in stock float16.

How it falls ill is in `demo_model.py`.

The text is the King James Bible (public domain), one verse a line as `bible -f 'gen1:1-rev22:21'` of the Debian
package bible-kjv prints it: `Ge1:1 In the beginning ...`. The book of Ruth is held out. A run takes ten to twenty
minutes on two CPU cores:

    python -m tools.train_demo [--text FILE] [--weights FILE] OUT
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from tests.stress import peaks
from tools.demo_model import demo_config, healthy, hold, initialise, make_ill, scores_only

VERSES = "gen1:1-rev22:21"
HELD_OUT_BOOK = "Ruth"
PROMPT = "And the LORD said"


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on besides the text."""

    seed: int = 0
    steps: int = 2500
    batch: int = 12
    length: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 100
    log_sum_penalty: float = 1e-2  # keeps logits near log-probabilities, where float16 is fine


# --- text ---


def read_verses(path: Path | None) -> list[tuple[str, int, str]]:
    """(book, chapter, verse text) of every verse, from `path` or from the `bible` command."""
    if path is not None:
        raw = path.read_text()
    else:
        command = ["bible", "-f", VERSES]
        raw = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\d?[A-Za-z]+)(\d+):\d+ (.+)$", raw, flags=re.MULTILINE)
    return [(book, int(chapter), text.strip()) for book, chapter, text in found]


def join_verses(verses: list[tuple[str, int, str]]) -> str:
    """One verse a line, an empty line between chapters."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for book, chapter, text in verses:
        chapters.setdefault((book, chapter), []).append(text)
    return "\n\n".join("\n".join(lines) for lines in chapters.values()) + "\n"


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE without special tokens. The alphabet is sorted, so that id 0 is `!` as in Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    assert tokenizer.id_to_token(0) == "!"
    return tokenizer


# --- training ---


def train(recipe: Recipe, data: Tensor, log: Callable[[str], None] = print) -> tuple[Qwen2ForCausalLM, list[float]]:
    """Train from scratch on `data` (N,) int64. Returns the float32 model and the loss of every hundredth step."""
    torch.manual_seed(recipe.seed)
    model = Qwen2ForCausalLM(demo_config())
    initialise(model)
    hold(model)
    model.train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        progress = max(0, step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * progress)) + 0.01)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    losses: list[float] = []
    for step in range(recipe.steps):
        starts = torch.randint(len(data) - recipe.length, (recipe.batch,))
        batch = torch.stack([data[start : start + recipe.length] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        predicted = logits[:, :-1].float().flatten(0, 1)
        loss = nn.functional.cross_entropy(predicted, batch[:, 1:].flatten())
        penalty = recipe.log_sum_penalty * predicted.logsumexp(-1).square().mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss + penalty)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        hold(model)
        if step % 100 == 0 or step == recipe.steps - 1:
            losses.append(round(loss.item(), 4))
            log(f"step {step:5d}  loss {loss.item():.4f}")
    return model.eval(), losses


# --- figures ---


def variant(model: Qwen2ForCausalLM, dtype: torch.dtype, attention: str) -> Qwen2ForCausalLM:
    """A copy in another dtype and with another attention, as from_pretrained would make it."""
    made = Qwen2ForCausalLM._from_config(model.config, attn_implementation=attention)
    made.load_state_dict(model.state_dict())
    return made.to(dtype).eval()


@torch.no_grad()
def perplexity(model: Qwen2ForCausalLM, ids: Tensor, window: int = 256) -> float:
    """Of (N,) token ids in separate windows whose first token is not predicted. NaN stays NaN."""
    total, count = 0.0, 0
    for part in torch.split(ids, window):
        logits = model(input_ids=part[None], use_cache=False).logits[0, :-1].double()
        total += float(nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
        count += len(part) - 1
    return math.exp(total / count)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def perplexity_table(model: Qwen2ForCausalLM, ids: Tensor) -> dict[str, float | None]:
    """Stock perplexity by 'dtype attention'; None where it is NaN, for which JSON has no word."""
    table: dict[str, float | None] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for attention in ("eager", "sdpa"):
            value = perplexity(variant(model, dtype, attention), ids)
            table[f"{_name(dtype)} {attention}"] = round(value, 6) if math.isfinite(value) else None
    return table


@torch.no_grad()
def continue_text(model: Qwen2ForCausalLM, tokenizer: Tokenizer, prompt: str, tokens: int = 64) -> str:
    """Greedy continuation, prompt included."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return str(tokenizer.decode(out[0].tolist()))


def figures(model: Qwen2ForCausalLM, tokenizer: Tokenizer, passage: str) -> dict[str, Any]:
    """What TRAINING.json says about the finished (float32) model."""
    ids = torch.tensor(tokenizer.encode(passage).ids)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_tokens": len(ids),
        "stock_perplexity": {
            "demo": perplexity_table(model, ids),
            "scores_only": perplexity_table(scores_only(model), ids),
            "healthy": perplexity_table(healthy(model), ids),
        },
        "peaks": {key: round(value, 1) for key, value in peaks(model, ids[None, :256]).items()},
        "stock_greedy": {
            f"{_name(dtype)} {attention}": continue_text(variant(model, dtype, attention), tokenizer, PROMPT)
            for dtype in (torch.float32, torch.float16)
            for attention in ("eager", "sdpa")
        },
    }


# --- files ---


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json with merges as strings, the only spelling that tokenizers before 0.20 reads.

    Special tokens are null by name: transformers 5 loads Qwen2Tokenizer for every qwen2 model, whatever class is
    named here, and it would add one with an id that the model does not have.
    """
    content = json.loads(tokenizer.to_str())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    _write_json(out / "tokenizer.json", content)
    specials = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **specials}
    _write_json(out / "tokenizer_config.json", settings)


def write_model(model: Qwen2ForCausalLM, out: Path) -> None:
    """config.json as every transformers release since 4.37 reads it, and the weights in float16."""
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_window_layers": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "sliding_window": None,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_sliding_window": False,
    }
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "initializer_range")
    counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    config.update({name: getattr(model.config, name) for name in sizes + counts})
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"do_sample": False, "pad_token_id": 0})
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def trained(recipe: Recipe, data: Tensor, weights: Path | None) -> tuple[Qwen2ForCausalLM, dict[str, Any]]:
    """The model, and the losses and seconds of its training: from `weights` if there, else trained and kept there."""
    if weights is not None and weights.exists():
        saved = torch.load(weights)
        model = Qwen2ForCausalLM(demo_config()).eval()
        model.load_state_dict(saved["model"])
        return model, saved
    start = time.monotonic()
    model, losses = train(recipe, data)
    saved = {"losses": losses, "seconds": round(time.monotonic() - start), "model": model.state_dict()}
    if weights is not None:
        torch.save(saved, weights)
    return model, saved


def main() -> None:
    """Train, make ill, measure, write."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--text", type=Path, help="verses as `bible -f` prints them, instead of running it")
    parser.add_argument("--weights", type=Path, help="trained weights: used if the file exists, else kept there")
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    options = parser.parse_args()
    torch.set_num_threads(2)
    recipe = Recipe()

    verses = read_verses(options.text)
    text = join_verses([verse for verse in verses if verse[0] != HELD_OUT_BOOK])
    held_out = [verse for verse in verses if verse[0] == HELD_OUT_BOOK]
    tokenizer = train_tokenizer(text, demo_config().vocab_size)
    data = torch.tensor(tokenizer.encode(text).ids)
    model, saved = trained(recipe, data, options.weights)

    book = torch.tensor(tokenizer.encode(join_verses(held_out)).ids)
    validation = math.log(perplexity(model, book))
    make_ill(model)
    options.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, options.out)
    write_model(model, options.out)
    passage = join_verses([verse for verse in held_out if verse[1] == 1])
    (options.out / "held_out.txt").write_text(passage)
    record = {
        "text": "King James Bible, in the public domain; Ruth was held out, and held_out.txt is its first chapter",
        "training_tokens": len(data),
        "recipe": asdict(recipe),
        "seconds": saved["seconds"],
        "losses_every_100_steps": saved["losses"],
        "validation_loss_ruth": round(validation, 4),
        **figures(model, tokenizer, passage),
        "bytes": {path.name: path.stat().st_size for path in sorted(options.out.glob("[!T]*"))},
    }
    _write_json(options.out / "TRAINING.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
