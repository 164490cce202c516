"""A config.json of which some keys have other values: any that a Qwen2 of transformers 4.37 to 5.24 reads."""

import json
import random
from collections.abc import Sequence
from typing import Any

from tests.fuzz import bases, proofs
from tests.fuzz.damage import Raw, dumps, odd_value
from tests.fuzz.worker import Trial

COUNT = 3000
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SIZES += ("num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings", "sliding_window")
SIZES += ("max_window_layers",)
NUMERIC = ("rms_norm_eps", "rope_theta", "attention_dropout", "initializer_range", "partial_rotary_factor")
NUMERIC += ("default_theta",)
WORDS = ("hidden_act", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path")
WORDS += ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "tokenizer_class", "prefix")
WORDS += ("problem_type", "transformers_weights", "finetuning_task", "_commit_hash", "experts_implementation")
FLAGS = (
    "tie_word_embeddings",
    "use_sliding_window",
    "use_cache",
    "attention_bias",
    "mlp_bias",
    "use_mrope",
    "is_decoder",
)
FLAGS += ("torchscript", "use_bfloat16", "gradient_checkpointing", "output_attentions", "output_hidden_states")
FLAGS += ("return_dict", "use_return_dict", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder")
FLAGS += ("tf_legacy_loss", "do_sample")
TREES = ("rope_scaling", "rope_parameters", "layer_types", "architectures", "auto_map", "quantization_config")
TREES += ("compression_config", "id2label", "label2id", "pruned_heads", "task_specific_params", "text_config")
TREES += ("vision_config", "base_model_tp_plan", "base_model_pp_plan", "sub_configs", "rope_init_fn", "num_labels")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")
OTHERS = (
    "max_length",
    "temperature",
    "top_k",
    "bad_words_ids",
    "chunk_size_feed_forward",
    "keys_to_ignore_at_inference",
)
KEYS = SIZES + NUMERIC + WORDS + FLAGS + TREES + TOKENS + OTHERS

#: Values that transformers knows, beside those of `damage`.
KNOWN: dict[str, tuple[Any, ...]] = {
    "hidden_act": (
        "silu",
        "gelu",
        "relu",
        "gelu_new",
        "quick_gelu",
        "relu2",
        "tanh",
        "linear",
        "mish",
        "sigmoid",
        "no",
    ),
    "torch_dtype": ("float16", "float32", "bfloat16", "float64", "int8", "float8_e4m3fn", "torch.float16", "auto"),
    "dtype": ("float16", "float32", "bfloat16", "float64", "int8", "complex64", {"": "float32"}),
    "model_type": ("qwen2", "qwen2_fp16", "qwen2_fp16_fix", "qwen2_moe", "llama", "qwen3", "QWEN2"),
    "architectures": (["Qwen2Model"], ["Qwen2ForSequenceClassification"], [], ["X"], ["Qwen2ForCausalLM"] * 2, [1]),
    "layer_types": (["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention"], ["x", "y"], [None, 1]),
    "auto_map": ({"AutoModelForCausalLM": "x.Y"}, {"AutoModel": ["a", "b"]}, {"AutoConfig": "o/n--m.C"}, ["x"]),
    "quantization_config": ({}, {"quant_method": "gptq"}, {"quant_method": None}, {"load_in_8bit": True}, [], "x"),
    "tie_word_embeddings": (True, False, 0, 1, "true"),
    "transformers_weights": ("model.safetensors", "other.safetensors", "../model.safetensors", "tokenizer.json"),
    "attention_dropout": (0.1, 0.5, 0.99, 1, 1.0, 2),
    "rms_norm_eps": (1e-6, 1e-5, 1e-12, 0, 1e-46, 1.0, 1e30),
    "num_hidden_layers": (1, 2, 3, 0, 1000, 1000000, 10**9, 10**18),
    "rope_theta": (10000.0, 1e6, 1, 0, 1e-30, 1e38, 1e-320, 0.5),
    "_attn_implementation": ("eager", "sdpa", "flash_attention_2", "flex_attention", "x"),
    "transformers_version": ("4.37.0", "4.45.2", "5.24.0", "x", "4", "99.0"),
}
ROPE_TYPES = ("yarn", "longrope", "linear", "dynamic", "llama3", "default", "su", "mrope", "proportional", "x", "YARN")
ROPE_NUMBERS = (1.0, 2.0, 4, 8.0, 40.0, 0.5, 0, -1.0, -4, 1e-30, 1e6, 1e30, 1e300, 32768, 64, 128, 1)
ROPE_KEYS = ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "rope_theta")
ROPE_KEYS += ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "partial_rotary_factor")


def rope(chosen: random.Random) -> dict[str, Any]:
    """A rotation that transformers may know, with numbers that it may refuse."""
    found: dict[str, Any] = {chosen.choice(("rope_type", "rope_type", "type")): chosen.choice(ROPE_TYPES)}
    found["factor"] = chosen.choice(ROPE_NUMBERS)
    for key in chosen.sample(ROPE_KEYS, chosen.randrange(5)):
        found[key] = odd_value(chosen) if chosen.random() < 0.15 else chosen.choice(ROPE_NUMBERS)
    if chosen.random() < 0.5:
        found["original_max_position_embeddings"] = chosen.choice((16, 32, 64, 128, 1024))
    if chosen.random() < 0.4:
        found["rope_theta"] = chosen.choice((10000.0, 1e6, 500))
    if found.get("rope_type", found.get("type")) in ("longrope", "su") or chosen.random() < 0.1:
        for key in ("short_factor", "long_factor"):
            found[key] = [chosen.choice(ROPE_NUMBERS)] * chosen.choice((4, 4, 4, 3, 0))
    if chosen.random() < 0.1:
        found["type"] = chosen.choice(ROPE_TYPES)
    if chosen.random() < 0.1:
        return {"full_attention": found, "sliding_attention": chosen.choice((found, None, {}))}
    return found


def value_for(key: str, chosen: random.Random) -> Any:
    """A value for that key."""
    if key in ("rope_scaling", "rope_parameters") and chosen.random() < 0.8:
        return rope(chosen)
    if key in KNOWN and chosen.random() < 0.6:
        return chosen.choice(KNOWN[key])
    if key in SIZES and chosen.random() < 0.4:
        return chosen.choice((1, 2, 3, 4, 8, 16, 32, 48, 64, 96, 128, 1024, 2048, 10**6, 10**9))
    if key in FLAGS and chosen.random() < 0.6:
        return chosen.choice((True, False))
    return odd_value(chosen)


def changed(chosen: random.Random) -> str:
    """The text of the config.json."""
    tree = json.loads(bases.config())
    common = chosen.random() < 0.35  # the rotation has most to get wrong
    keys = chosen.sample(("rope_scaling", "rope_parameters"), chosen.choice((1, 1, 2))) if common else []
    keys += chosen.sample(KEYS, chosen.choice((1, 1, 1, 2, 3)) - bool(keys) * chosen.choice((0, 1, 1, 1)))
    for key in keys:
        if key in tree and chosen.random() < 0.1:
            del tree[key]
        else:
            tree[key] = value_for(key, chosen)
    text = dumps(tree)
    if chosen.random() < 0.03:  # the same key twice: the last one holds
        text = text[:-1] + f", {dumps(chosen.choice(KEYS))}: {odd_value(chosen)}}}"
    return Raw(text)


#: What is run beside `certify`, and how often.
BESIDE = ((0.70, None), (0.82, "export"), (0.90, "doctor"), (0.97, "scan"), (1.0, "verify"))


def prepare(numbers: Sequence[int]) -> None:
    """Makes the checkpoint."""
    bases.healthy()


def attempt(trial: Trial) -> None:
    """Certifies a checkpoint with such a config, and sometimes does something else with it."""
    folder = bases.placed(bases.healthy(), trial.folder)
    (folder / "config.json").write_text(changed(trial.random), encoding="utf-8")
    proofs.check(trial, folder)
    drawn = trial.random.random()
    beside(trial, folder, next(what for share, what in BESIDE if drawn < share))


def beside(trial: Trial, folder: Any, what: str | None) -> None:
    """Another command for the same checkpoint."""
    if what == "export":
        more = trial.random.choice((("--code-only",), ("--weights", "copy"), ("--strict",)))
        trial.run("export", folder, trial.folder / "out", *more)
    elif what == "doctor":
        trial.run("doctor", folder, "--json")
    elif what == "scan":
        trial.run("scan", folder, "--tokens", "4", trial.random.choice(("--fixed", "--stock")))
    elif what == "verify":
        trial.run("verify", folder, "--tokens", "8")
