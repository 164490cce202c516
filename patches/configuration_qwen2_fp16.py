"""The configuration of a strict export: Qwen2's own, under a model type that transformers does not know.

So a load without `trust_remote_code` fails, where type "qwen2" would silently give the stock class.
"""

from transformers import Qwen2Config


class Qwen2FP16Config(Qwen2Config):
    """transformers' Qwen2Config, with a model type of its own."""

    model_type = "qwen2_fp16"
    _auto_class = "AutoConfig"  # what makes save_pretrained save this file too
