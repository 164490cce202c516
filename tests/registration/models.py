"""A prompt and a subclass that several files here share."""

from typing import Any

from transformers import Qwen2Model

from tests.stress import TINY, random_prompt

PROMPT = random_prompt(TINY, batch=2, length=24)


class OwnForward(Qwen2Model):
    """Derived before anything is registered, without a constructor of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)
