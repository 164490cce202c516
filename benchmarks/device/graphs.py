"""A decode step over a static cache that can run again and again, and the same as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from .. import workloads
from .proof import wait_for

Step = Callable[[], Any]
ROOM = 64  # places of the cache behind the context
WARM_UPS = 3


def static_step(model: Any, context: int, run: Any = None) -> tuple[Step, Step]:
    """A step that takes the cache back to `context` tokens, and one that writes the next token and returns its logits.

    run: what to call instead of `model`, say a compiled one. Attention reads the whole static cache.
    """
    device, room = model.device, context + ROOM
    cache = StaticCache(config=model.config, max_cache_len=room)
    workloads.filled(cache, model, context, 1)
    mask = torch.ones(1, 1, 1, room, dtype=torch.bool, device=device)
    if model.config._attn_implementation == "eager":
        mask = torch.zeros_like(mask, dtype=model.dtype)  # stock adds it to the scores
    token, position = torch.zeros(1, 1, dtype=torch.long, device=device), torch.full((1, 1), context, device=device)
    inputs = {"input_ids": token, "position_ids": position, "attention_mask": mask, "use_cache": True}
    inputs[workloads.CACHE] = cache
    counted = [layer for layer in cache.layers if hasattr(layer, "cumulative_length")]

    def take_back() -> None:
        for layer in counted:  # in place: a graph has its address
            if isinstance(layer.cumulative_length, Tensor):
                layer.cumulative_length.fill_(context)
            else:
                layer.cumulative_length = context

    return take_back, lambda: (model if run is None else run)(**inputs).logits


def captured(step: Step, device: torch.device) -> Step:
    """Replays the step as one CUDA graph: what is left of its time is the device's."""
    with torch.no_grad():
        wait_for(device)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(device).wait_stream(side)
        wait_for(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

    def replay(kept: Step = step) -> None:  # the graph reads and writes the step's own tensors, wherever they lie
        graph.replay()

    return replay


def graphed(model: Any, context: int) -> Step:
    """A decode step as a CUDA graph. It takes the cache back itself, or its replays would write past the end."""
    take_back, write = static_step(model, context)

    def step() -> None:
        take_back()
        write()

    return captured(step, model.device)
