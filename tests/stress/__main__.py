"""`python -m tests.stress`: builds a stress checkpoint and saves it in float16, or prints what it reaches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

from tests.stress.measuring import peaks
from tests.stress.models import KINDS, ROPE_THETA, SHAPES, Shape, build, random_prompt


def check(shape: Shape, kinds: Sequence[str], seed: int) -> str:
    """Peaks of the stock float32 model and whether stock float16 stays finite, for each kind and all together."""
    ids = random_prompt(shape, 1, 48, seed)
    groups = [[kind] for kind in kinds] + ([list(kinds)] if len(kinds) > 1 else [])
    lines = []
    for group in groups:
        model = build(shape, group, seed, attn_implementation="eager")
        sizes = ", ".join(f"{key} {value:,.0f}" for key, value in peaks(model, ids).items())
        state = model.state_dict()
        verdicts = []
        for attention in ("eager", "sdpa"):
            half = Qwen2ForCausalLM._from_config(model.config, attn_implementation=attention).eval()
            half.load_state_dict(state)
            with torch.no_grad():
                finite = bool(half.half()(input_ids=ids).logits.isfinite().all())
            verdicts.append(f"stock float16 {attention} {'finite' if finite else 'NOT finite'}")
        lines.append(f"{'+'.join(group)}: {sizes}; {', '.join(verdicts)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build a stress checkpoint and save it in float16.")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="number of layers instead of the shape's own")
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="print measured peaks of every kind")
    parser.add_argument("out", nargs="?", type=Path, help="folder to save to")
    options = parser.parse_args(arguments)
    if options.out is None and not options.check:
        parser.error("give a folder to save to, or --check")
    shape: Shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = replace(shape, layers=options.layers)
    kinds: list[str] = options.kind or list(KINDS)
    if options.check:
        print(check(shape, kinds, options.seed))
    if options.out is not None:
        model = build(shape, kinds, options.seed).half()
        model.config.rope_theta = ROPE_THETA  # what transformers 4 reads; 5 alone would save rope_parameters only
        model.save_pretrained(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
