"""The configuration of a strict export: Qwen2's own, with a model type that transformers does not know.

So a load without `trust_remote_code` fails. With type "qwen2" it would silently return the stock class.
"""

from transformers import Qwen2Config


class Qwen2FP16Config(Qwen2Config):
    """transformers' Qwen2Config, with a model type of its own."""

    model_type = "qwen2_fp16"
    _auto_class = "AutoConfig"  # save_pretrained copies this file only if this is set
