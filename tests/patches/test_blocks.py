"""The fixed parts one by one, on the installed release."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import qwen2_fp16_fix
from qwen2_fp16_fix.patches import attention, attention_classes, linears, numerics, v4_37
from qwen2_fp16_fix.patches.key_centring import Centre
from tests.stress import TINY, build, random_prompt

PROMPT = random_prompt(TINY, batch=1, length=16)
POSITIONS = torch.tensor([[0, 1, 1000, 4000]])


def exact_tables(model: Any) -> tuple[Tensor, Tensor]:
    """What an fp32 model computes."""
    tables: tuple[Tensor, Tensor] = build(TINY, ()).model.rotary_emb(torch.zeros(1), POSITIONS)
    return tables


def equals_exact(model: Any) -> bool:
    got = model.model.rotary_emb(torch.zeros(1, dtype=torch.float16), POSITIONS)
    return all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, exact_tables(model), strict=True))


def test_rotation_tables_are_fp32() -> None:
    """Stock rounds cosine and sine to float16: 5e-4 of a key of 300 is 0.15, more than a float16 step."""
    assert equals_exact(qwen2_fp16_fix.fix(build(TINY, ())).half())


def test_a_cast_before_the_fix_does_not_reach_the_tables() -> None:
    """`model.half()` rounds inv_freq: at position 4,000 the fast pairs point anywhere."""
    model = build(TINY, ()).half()
    rounded = model.model.rotary_emb.inv_freq.clone()
    assert rounded.dtype == torch.float16
    assert equals_exact(qwen2_fp16_fix.fix(model))
    assert torch.equal(qwen2_fp16_fix.unfix(model).model.rotary_emb.inv_freq, rounded)


def test_a_cast_after_the_fix_does_not_reach_the_tables() -> None:
    model = qwen2_fp16_fix.fix(build(TINY, ()))
    assert equals_exact(model.half())
    stock = build(TINY, ()).half().model.rotary_emb.inv_freq
    assert torch.equal(qwen2_fp16_fix.unfix(model).model.rotary_emb.inv_freq, stock)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_unfix_restores_bit_for_bit(attention: str) -> None:
    model = build(TINY, (), attn_implementation=attention).half()
    with torch.no_grad():
        before = model(PROMPT).logits
        fixed = qwen2_fp16_fix.fix(model)(PROMPT).logits
        after = qwen2_fp16_fix.unfix(model)(PROMPT).logits
    assert not torch.equal(before, fixed)
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_norm_takes_an_output_dtype(dtype: torch.dtype) -> None:
    """Engines swap in a norm of their own where forward has one parameter; and fp32 must be there for the asking."""
    norm = qwen2_fp16_fix.fix(build(TINY, ()).to(dtype)).model.norm
    hidden = torch.randn(2, TINY.hidden).to(dtype)
    assert norm(hidden).dtype == dtype
    assert norm(hidden, torch.float32).dtype == torch.float32


def test_the_norm_rounds_an_fp32_residual_to_the_weights_dtype() -> None:
    """The next matmul has float16 weights and refuses fp32."""
    norm = qwen2_fp16_fix.fix(build(TINY, ()).half()).model.norm
    assert norm(torch.randn(2, TINY.hidden) * 1e5).dtype == torch.float16


def test_the_norm_does_not_carry_stocks_kernel_mark() -> None:
    """use_kernels=True replaces the forward of every module whose class carries it, subclasses included."""
    assert type(qwen2_fp16_fix.fix(build(TINY, ())).model.norm).kernel_layer_name != "RMSNorm"


def test_rotation_tables_of_old_releases_are_fp32_whatever_the_default_dtype() -> None:
    """from_pretrained builds a float16 model with float16 as torch's default: 4.37 to 4.44 make their tables then."""
    rotary = v4_37.RotaryEmbedding()
    rotary.dim, rotary.base = 64, 1e6
    angles = torch.outer(torch.arange(3000.0), 1e6 ** (-torch.arange(0.0, 64, 2, dtype=torch.float64) / 64).float())
    torch.set_default_dtype(torch.float16)
    try:
        cos, _ = rotary(torch.zeros(1).half(), 3000)
    finally:
        torch.set_default_dtype(torch.float32)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[:, :32], angles.cos(), atol=5e-4, rtol=0)  # position 3,000 times fp32's 6e-8, twice


def test_a_fused_kernel_is_called_with_keys_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash, flex and what a user registers: called as chosen, with our keys, their window and their arguments."""
    seen: dict[str, Any] = {}

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.update(query=query, key=key, value=value, module=module, **kwargs)
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "spy", spy)
    model = qwen2_fp16_fix.fix(build(TINY, ("scores",), attn_implementation="sdpa").half())
    model.config._attn_implementation = "spy"
    with torch.no_grad():
        model(PROMPT, cu_seq_lens_q="as given")
        attention = model.model.layers[0].self_attn
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(PROMPT).float())
        cos, sin = model.model.rotary_emb(hidden, torch.arange(16)[None])
        key = linears.project_exactly(attention.k_proj, hidden).view(1, 16, -1, TINY.head_dim).transpose(1, 2)
    assert torch.equal(seen["key"], numerics.rotate(key, cos, sin, attention.key_shift).half())
    assert seen["query"].dtype == seen["key"].dtype == seen["value"].dtype == torch.float16
    assert (seen["scaling"], seen["dropout"], seen["cu_seq_lens_q"]) == (attention.scaling, 0.0, "as given")
    assert "sliding_window" in seen


def apply_rotary_pos_emb(*args: Any) -> Any:
    """Stands for stock's rotation: it must not be reached."""
    raise AssertionError


def hand_over(rotated: Any) -> Any:
    """Stands for stock's flash function."""
    return rotated


class FlashOfOldReleases(nn.Module):
    """Stands for Qwen2FlashAttention2 of 4.37 to 4.47, whose kernel needs a GPU: rotate, then hand over."""

    def forward(self, query: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None) -> Any:
        return hand_over(apply_rotary_pos_emb(query, query, cos, sin, position_ids))


@pytest.mark.parametrize("whole_tables", [True, False], ids=["before 4.45", "from 4.45"])
def test_flash_attention_of_old_releases_rotates_in_fp32(whole_tables: bool) -> None:
    """The stock forward runs as it is, with one name in it meaning another function."""

    class Fixed(attention_classes.FlashAttention, FlashOfOldReleases):
        pass

    query = torch.randn(1, 2, 4, 8).half() * 100
    cos, sin = torch.rand(9, 8), torch.rand(9, 8)
    positions, shift = torch.tensor([[0, 3, 5, 8]]), torch.arange(32.0).view(1, 4, 1, 8)
    turned = cos[positions], sin[positions]
    arguments = (cos, sin, positions) if whole_tables else turned
    attention = Fixed()
    attention.num_key_value_groups, attention.layer_idx = 1, 0
    attention.keep_centre(Centre(shift, None, 1))  # two heads of queries, two of keys
    got, key = attention(query, *arguments)
    assert torch.equal(got, numerics.rotate(query, *turned).half())
    assert torch.equal(key, numerics.rotate(query, *turned, shift[:, 2:]).half())  # in one step, which rounds once less


def test_flash_attention_of_old_releases_keeps_no_shift() -> None:
    """The shift of one call must not reach the next, also if the call has failed."""

    class Fixed(attention_classes.FlashAttention, FlashOfOldReleases):
        pass

    query, cos, sin = torch.randn(1, 2, 4, 8).half(), torch.rand(1, 4, 8), torch.rand(1, 4, 8)
    attention = Fixed()
    attention.num_key_value_groups, attention.layer_idx = 1, 0
    attention.keep_centre(Centre(torch.full((1, 4, 1, 8), 9.0), None, 1))
    _, centred = attention(query, cos, sin)
    with pytest.raises(AttributeError):
        attention(None, cos, sin)
    attention.keep_centre(None)
    _, uncentred = attention(query, cos, sin)
    assert torch.equal(uncentred, numerics.rotate(query, cos, sin).half())
    assert not torch.equal(centred, uncentred)


def test_flash_attention_of_old_releases_calls_what_stands_in_transformers_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools for long sequences replace stock's flash function in its module, also after a first forward."""

    class Fixed(attention_classes.FlashAttention, FlashOfOldReleases):
        pass

    query, cos, sin = torch.randn(1, 2, 4, 8).half(), torch.rand(1, 4, 8), torch.rand(1, 4, 8)
    attention, handed = Fixed(), []
    attention(query, cos, sin)
    monkeypatch.setitem(globals(), "hand_over", lambda rotated: handed.append(rotated) or "of the tool")
    assert attention(query, cos, sin) == "of the tool"
    assert torch.equal(handed[0][0], numerics.rotate(query, cos, sin).half())


def test_sdpa_of_old_releases_takes_an_fp32_query() -> None:
    """The rotation leaves it unrounded; torch's kernel wants one dtype."""
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8).half(), torch.randn(1, 2, 3, 8).half()
    found = attention_classes.sdpa_attention(query, key, value, None, 0.5, 0.0)
    exact = attention_classes.sdpa_attention(query, key.float(), value.float(), None, 0.5, 0.0)
    torch.testing.assert_close(found.float(), exact, atol=1e-3, rtol=0)  # half a float16 step of 2


def test_eager_attention_hands_on_the_dtype_of_the_values() -> None:
    """On a CPU its product is fp32, and interpretability tools read what goes into o_proj."""
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8).half()
    output, weights = attention.eager_attention(nn.Module(), query, key, key, None, 0.5)
    assert output.dtype == weights.dtype == torch.float16
    assert output.is_contiguous()


def test_the_output_projection_is_handed_the_models_dtype() -> None:
    """Fused kernels are handed fp32 on a CPU and return it."""
    model = qwen2_fp16_fix.fix(build(TINY, (), attn_implementation="sdpa").half())
    seen: list[torch.dtype] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].dtype)
    )
    with torch.no_grad():
        model(PROMPT)
    assert seen == [torch.float16]


def test_a_mask_is_widened_once_a_forward() -> None:
    """Every layer is handed the same mask. The next forward may bring it again, changed without autograd's notice."""
    mask, forward, next_forward = torch.zeros(1, 1, 2, 3).half(), torch.zeros(1), torch.zeros(1)
    widened = attention.prepared_once(forward, numerics.widen_mask, mask, 3)
    assert attention.prepared_once(forward, numerics.widen_mask, mask, 3) is widened
    assert attention.prepared_once(forward, numerics.widen_mask, mask, 2).shape[-1] == 2
    assert attention.prepared_once(forward, numerics.mask_to_minus_inf, mask, 2).dtype == mask.dtype
    mask.data.fill_(torch.finfo(torch.float16).min)
    assert (attention.prepared_once(next_forward, numerics.widen_mask, mask, 3) == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("exponent", [0, 3])
@pytest.mark.parametrize("where", ["gate_proj", "act_fn", "everywhere"])
def test_what_a_hook_has_seen_is_not_overwritten(where: str, exponent: int) -> None:
    """The product is put where the gate was, unless somebody may have kept that: nothing would show it."""
    mlp = qwen2_fp16_fix.fix(build(TINY, ()).half()).model.layers[0].mlp
    mlp.set_exponent(exponent)
    hidden, seen = torch.randn(1, 4, TINY.hidden).half(), []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module in (mlp.gate_proj, mlp.act_fn):
            seen.append((output, output.clone()))

    register = nn.modules.module.register_module_forward_hook
    handle = register(keep) if where == "everywhere" else getattr(mlp, where).register_forward_hook(keep)
    with torch.no_grad():
        hooked = mlp(hidden)
        handle.remove()
        assert torch.equal(mlp(hidden), hooked)
    assert seen
    assert all(torch.equal(kept, then) for kept, then in seen)


def test_an_mlp_that_learns_overwrites_nothing() -> None:
    mlp = qwen2_fp16_fix.fix(build(TINY, ()).half()).model.layers[0].mlp
    mlp(torch.randn(1, 4, TINY.hidden).half()).float().sum().backward()
    assert mlp.gate_proj.weight.grad is not None


def test_parts_that_are_built_by_themselves_run() -> None:
    """Tools take the class of a part and build another, which belongs to no model that was fixed."""
    model = qwen2_fp16_fix.fix(build(TINY, ()).half())
    rotary = type(model.model.rotary_emb)(config=model.config).to("cpu")
    tables = rotary(torch.zeros(1), POSITIONS)
    assert all(torch.equal(found, exact) for found, exact in zip(tables, exact_tables(model), strict=True))
    layer = type(model.model.layers[0])(model.config, 0).eval()
    stock = build(TINY, ()).model.layers[0]
    stock.load_state_dict(layer.state_dict())
    states, inputs = torch.randn(1, 4, TINY.hidden), {"position_embeddings": tables, "attention_mask": None}
    assert torch.equal(layer(states, **inputs), stock(states, **inputs))


def test_frequencies_without_numbers_are_not_kept() -> None:
    """transformers 5 builds on the meta device, then fills each buffer. A cast between kept one that no move takes."""
    with torch.device("meta"):
        model = qwen2_fp16_fix.Qwen2ForCausalLM(build(TINY, ()).config).half()
    exact = build(TINY, ())
    model.load_state_dict({name: weight.half() for name, weight in exact.state_dict().items()}, assign=True)
    for name, buffer in exact.model.rotary_emb.named_buffers():
        setattr(model.model.rotary_emb, name, buffer)
    assert equals_exact(model.to("cpu"))
