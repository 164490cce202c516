"""Whether what `certify` calls proven is finite, in the model that transformers makes of the same folder."""

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qwen2_fp16_fix
from qwen2_fp16_fix.checkpoints.loading import quiet
from qwen2_fp16_fix.patches import numerics
from tests.fuzz.worker import Trial

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What float16 may take off a gain, and so off a product of two: 2^-11 of each, or all of one that is subnormal.
ROUNDED, SMALL = 1 + 2.0**-8, 1e-3
LENGTH = 32  # tokens of a prompt


def check(trial: Trial, folder: Path, restarts: int = 1, steps: int = 4) -> bool:
    """Certifies the folder; where that says proven, looks for what disproves it. Returns whether it says proven."""
    code, out = trial.run("certify", folder, "--json")
    if code != 0:
        return False
    try:
        certificate = json.loads(out)
        assert certificate["proven"] is True
    except (ValueError, KeyError, AssertionError):
        trial.fault("certify: exit code 0 without a JSON that says proven", out[:1000])
        return False
    model, problem = load(folder)
    if model is None:
        trial.notes.append(f"proven, not loaded: {problem}")
        return True
    trial.notes.append("proven")
    for what in same_weights(certificate, model):
        trial.fault(f"certify says proven: {what}", str(folder))
    try:
        driven = list(adversary(model, trial.number, restarts, steps))
        trial.notes += ["no gradient"] * (len(driven) < restarts)
        found = list(disproofs(model, certificate, driven))
    except Exception as error:  # a forward may raise anything where the config is odd
        if runs_stock(model):
            trial.fault(
                f"certify says proven: the fixed model raises {type(error).__name__} and stock runs", repr(error)
            )
        else:
            trial.notes.append("proven, does not run")
        return True
    for what in found:
        trial.fault(f"certify says proven: {what}", str(folder))
    return True


def load(folder: Path) -> tuple[Any, str]:
    """The folder as transformers loads it, fixed, in float16; or None and the error."""
    with quiet(), warnings.catch_warnings(), qwen2_fp16_fix.registered():
        warnings.simplefilter("ignore")
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float16, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # whatever transformers says: what does not load gives no number
            return None, type(error).__name__
    model.missing = sorted(info["missing_keys"])
    return model.eval(), ""


def same_weights(certificate: dict[str, Any], model: Any) -> Iterator[str]:
    """What the certificate says of other weights than those that were loaded."""
    if model.missing:
        yield f"transformers finds no {model.missing[0]} and makes one up"
    own = qwen2_fp16_fix.certify(model).to_dict()
    if not own["proven"]:
        yield f"the loaded model is not proven: {own['reasons'][0][:80]}"
    if len(own["layers"]) != len(certificate["layers"]):
        yield "the loaded model has another number of layers"
    for layer, loaded in zip(certificate["layers"], own["layers"], strict=False):
        for site, bound in layer["bounds"].items():
            if not agrees(site, bound, loaded["bounds"].get(site)):
                yield f"another bound of {site} for the loaded model"
                return


def agrees(site: str, bound: float | None, loaded: float | None) -> bool:
    """Whether a bound is that of the loaded model, or a little more: it covers gains as they are stored, too.

    The rotation's may be far larger, since it covers every release.
    """
    if bound is None or loaded is None:
        return bound is loaded
    return loaded <= bound and (site == "rotated" or bound <= ROUNDED * loaded + SMALL)


def disproofs(model: Any, certificate: dict[str, Any], driven: Sequence[Tensor]) -> Iterator[str]:
    """Which inputs give logits that are not finite: the whole vocabulary as prompts, late positions, an adversary's.

    driven: the embeddings that the adversary has found.
    """
    vocabulary, positions = model.config.vocab_size, model.config.max_position_embeddings
    length = min(LENGTH, positions)
    count = min(vocabulary, 4096)
    tokens = torch.arange(-(-count // length) * length).remainder(count).view(-1, length)
    late = torch.arange(max(0, positions - length), max(0, positions - length) + length)[None]
    inputs: list[tuple[str, dict[str, Any]]] = [
        ("a prompt", {"input_ids": tokens}),
        ("a prompt at late positions", {"input_ids": tokens[:4], "position_ids": late.expand(len(tokens[:4]), -1)}),
    ]
    inputs += [("the adversary", {"inputs_embeds": each}) for each in driven]
    trains = model.config.attention_dropout and "dropout" not in f"{certificate['verdict']} {certificate['assumes']}"
    for attention in ("eager", "sdpa"):
        model.config._attn_implementation = attention
        for on_cpu in (True, False):
            for training in (False, True) if trains else (False,):
                for what, given in inputs:
                    if not is_finite(model.train(training), given, on_cpu):
                        rounding = "a CPU's" if on_cpu else "a GPU's"
                        yield f"{what} is not finite ({attention}, {rounding} arithmetic{', training' * training})"
                        return


def runs_stock(model: Any) -> bool:
    """Whether the stock model runs in fp32 on a short prompt."""
    stock = copy.deepcopy(model)
    qwen2_fp16_fix.unfix(stock)
    try:
        stock.float()(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
    except Exception:  # then nobody can run it
        return False
    return True


class NotRun(Exception):
    """The stock model cannot be run, so no gradient leads anywhere."""


@torch.no_grad()
def is_finite(model: Any, given: dict[str, Any], on_cpu: bool) -> bool:
    """Whether all logits are, in a CPU's arithmetic or in the one that any other device gets."""
    stock = numerics.runs_on_cpu
    numerics.runs_on_cpu = (lambda tensor: True) if on_cpu else (lambda tensor: False)
    try:
        return bool(model(**given, use_cache=False).logits.isfinite().all())
    finally:
        numerics.runs_on_cpu = stock


def adversary(model: Any, seed: int, restarts: int, steps: int) -> Iterator[Tensor]:
    """Embeddings (2, 6, hidden) that gradients have driven to a large number at one site each, in float16.

    The gradients are those of the stock model in fp32. A norm takes the length away, so the steps only turn them.
    """
    stock = copy.deepcopy(model)
    qwen2_fp16_fix.unfix(stock)
    stock = stock.float().requires_grad_(False)
    stock.config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    names = [f"layers.{number}.{{}}" for number in range(len(stock.model.layers))]
    for _ in range(restarts):
        pick = [int(torch.randint(len(some), (), generator=generator)) for some in (names, SITES)]
        embeds = torch.randn(2, 6, model.config.hidden_size, generator=generator)
        with contextlib.suppress(NotRun):
            yield ascend(stock, pick[0], SITES[pick[1]], embeds, steps).half()


def ascend(stock: Any, layer: int, site: str, embeds: Tensor, steps: int) -> Tensor:
    """The embeddings after some steps of gradient ascent on the largest number that enters or leaves a linear."""
    block = stock.model.layers[layer]
    linear = getattr(block.self_attn if hasattr(block.self_attn, site) else block.mlp, site)
    seen: list[Tensor] = []
    hook = linear.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    try:
        for _ in range(steps):
            seen.clear()
            embeds = embeds.detach().requires_grad_(True)
            stock.model(inputs_embeds=embeds, use_cache=False)
            sum(each.abs().amax().clamp(min=1e-30).log() for each in seen).backward()  # type: ignore[union-attr]
            grad = torch.nan_to_num(embeds.grad)
            length = grad.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            embeds = embeds.detach() + 0.7 * grad / length * embeds.detach().norm(dim=-1, keepdim=True)
            embeds = embeds / embeds.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-3)
    except Exception as error:
        raise NotRun from error
    finally:
        hook.remove()
    return embeds.detach()
