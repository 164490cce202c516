"""Takes each upcast, cast and mask widening out of the patches, one at a time, and sees a named test turn red.

The last test holds the list against the source: an upcast that nothing here removes is one that nothing guards.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """`old`, found exactly once in `file`, becomes `new`, and `red` must fail."""

    what: str
    file: str
    old: str
    new: str
    red: str


NUMERICS, BLOCKS, SWAP, SCALING = (f"patches/{name}.py" for name in ("numerics", "blocks", "swap", "scaling"))
PLANNING, LAYER_PLAN = "patches/planning.py", "patches/layer_plan.py"
OVERFLOW = "patches/overflow.py"
KEYS, LINEARS, ATTENTION = "patches/key_centring.py", "patches/linears.py", "patches/attention.py"
CACHES = "patches/caches.py"
CLOSENESS, VERIFICATION = "qwen2_fp16_fix/closeness.py", "qwen2_fp16_fix/verification.py"
MUTATIONS = (
    Mutation(
        "residual stays float16",
        NUMERICS,
        "return hidden_states.float() if hidden_states.dtype == torch.float16 else hidden_states",
        "return hidden_states",
        "tests/test_numerics.py::test_promote_residual_widens_float16_alone",
    ),
    Mutation(
        "norm squares in float16",
        NUMERICS,
        "    hidden_states = hidden_states.float()\n",
        "",
        "tests/test_numerics.py::test_rms_norm_takes_what_float16_cannot_square",
    ),
    Mutation(
        "norm rounds before the gain too",
        NUMERICS,
        "(hidden_states * torch.rsqrt(length.square() / weight.numel() + eps) * weight).to(out_dtype)",
        "((hidden_states * torch.rsqrt(length.square() / weight.numel() + eps)).to(out_dtype) * weight).to(out_dtype)",
        "tests/test_numerics.py::test_rms_norm_rounds_once",
    ),
    Mutation(
        "norm hands the fp32 residual on",
        NUMERICS,
        "+ eps) * weight).to(out_dtype)",
        "+ eps) * weight)",
        "tests/test_blocks.py::test_the_norm_rounds_an_fp32_residual_to_the_weights_dtype",
    ),
    Mutation(
        "norm of other devices rounds twice",
        NUMERICS,
        "rms_norm(hidden_states, weight.shape, weight.float(), eps).to(out_dtype)",
        "rms_norm(hidden_states, weight.shape, None, eps).to(out_dtype) * weight",
        "tests/test_numerics.py::test_rms_norm_rounds_once[elsewhere]",
    ),
    Mutation(
        "norm ignores the dtype asked for",
        BLOCKS,
        "normed = stock if out_dtype is None else stock.to(out_dtype)",
        "normed = stock",
        "tests/test_blocks.py::test_the_norm_takes_an_output_dtype",
    ),
    Mutation(
        "norm is stock's",
        BLOCKS,
        "if weight.dtype != torch.float16:",
        "if True:",
        "tests/test_ways_in.py::test_fix",
    ),
    Mutation(
        "rotation in float16",
        NUMERICS,
        "cos, exact = cos.unsqueeze(1), states.float()",
        "cos, exact = cos.unsqueeze(1), states",
        "tests/test_numerics.py::test_rotate_computes_in_fp32_with_half_tables",
    ),
    Mutation(
        "rotation is not rounded for the cache",
        ATTENTION,
        "return query, key.to(value.dtype), value",
        "return query, key, value",
        "tests/test_blocks.py::test_a_fused_kernel_is_called_with_keys_rounded_once",
    ),
    Mutation(
        "rotation tables in float16",
        BLOCKS,
        "self.frequencies().to(x.device, torch.float32)",
        "self.frequencies().to(x.device, torch.float16)",
        "tests/test_blocks.py::test_rotation_tables_are_fp32",
    ),
    Mutation(
        "frequencies that follow the length do so in torch's default dtype",
        BLOCKS,
        "position_ids.amax().view(1, 1).float()",
        "position_ids.amax().view(1, 1)",
        "tests/test_default_dtype.py::test_frequencies_that_a_cast_has_rounded_are_found_again[dynamic-torch.float16]",
    ),
    Mutation(
        "a SwiGLU product of two kernels in float16",
        NUMERICS,
        "(gate.float() * up.float() * 2.0**-exponent)",
        "(gate * up * 2.0**-exponent)",
        "tests/test_devices.py::test_the_scaled_product_has_the_same_bits_on_any_device[mps]",
    ),
    Mutation(
        "a SwiGLU product of two kernels stays fp32",
        NUMERICS,
        "* 2.0**-exponent).to(zero.dtype)",
        "* 2.0**-exponent)",
        "tests/test_devices.py::test_the_scaled_product_has_the_same_bits_on_any_device[mps]",
    ),
    Mutation(
        "the way back to the residual follows torch's default dtype",
        SCALING,
        ", dtype=torch.float32, device=device)",
        ", device=device)",
        "tests/test_default_dtype.py::test_planning_finds_the_same_constants[torch.float16]",
    ),
    Mutation(
        "fp64 is asked of a device",
        "patches/range_plan.py",
        "return sums.cpu().double()",
        "return sums.double().cpu()",
        "tests/test_devices.py::test_a_plan_is_made_on_a_device_without_fp64",
    ),
    Mutation(
        "a centre of NaN is kept",
        KEYS,
        "shift.to(device) if shift.isfinite().all() else None",
        "shift.to(device)",
        "tests/test_keys.py::test_a_centre_that_is_not_finite_is_not_kept[bias]",
    ),
    Mutation(
        "a cast rounds the frequencies",
        BLOCKS,
        "after.dtype != exact.dtype",
        "False",
        "tests/test_blocks.py::test_a_cast_after_the_fix_does_not_reach_the_tables",
    ),
    Mutation(
        "frequencies rounded before the fix stay so",
        BLOCKS,
        "buffer.dtype != torch.float32 and buffer.device.type",
        "False and buffer.device.type",
        "tests/test_blocks.py::test_a_cast_before_the_fix_does_not_reach_the_tables",
    ),
    Mutation(
        "tables of 4.37 follow the default dtype",
        "patches/v4_37.py",
        "torch.arange(0, self.dim, 2, device=device).float() / self.dim",
        "torch.arange(0, self.dim, 2, device=device) / self.dim",
        "tests/test_blocks.py::test_rotation_tables_of_old_releases_are_fp32_whatever_the_default_dtype",
    ),
    Mutation(
        "positions of 4.37 in float16",
        "patches/v4_37.py",
        "torch.arange(length, device=device, dtype=torch.float32)",
        "torch.arange(length, device=device, dtype=torch.float16)",
        "tests/test_blocks.py::test_rotation_tables_of_old_releases_are_fp32_whatever_the_default_dtype",
    ),
    Mutation(
        "scores in float16",
        NUMERICS,
        "rows, columns = query.float().reshape(*grouped, head_dim), key.float()",
        "rows, columns = query.reshape(*grouped, head_dim), key",
        "tests/test_numerics.py::test_scores_of_300_times_300_are_exact",
    ),
    Mutation(
        "query in float16",
        NUMERICS,
        "query.float().reshape(*grouped, head_dim)",
        "query.reshape(*grouped, head_dim)",
        "tests/test_numerics.py::test_scores_of_300_times_300_are_exact",
    ),
    Mutation(
        "autocast reaches the scores",
        NUMERICS,
        "if torch.is_autocast_enabled(device):\n        with torch.autocast(device, enabled=False):",
        "if False:\n        with torch.autocast(device, enabled=False):",
        "tests/test_numerics.py::test_scores_of_300_times_300_are_exact",
    ),
    Mutation(
        "fp32 weights under autocast take stock's path",
        NUMERICS,
        " and not autocast_is_on(hidden_states.device.type)",
        "",
        "tests/test_numerics.py::test_full_precision_means_fp32_without_autocast",
    ),
    Mutation(
        "weights stay fp32",
        NUMERICS,
        "weights = exact.to(value.dtype)",
        "weights = exact",
        "tests/test_numerics.py::test_grouped_attention_is_attention",
    ),
    Mutation(
        "masks keep float16's minimum",
        NUMERICS,
        "return torch.nn.functional.threshold(mask.float(), torch.finfo(mask.dtype).min, lowest)",
        "return mask.float()",
        "tests/test_numerics.py::test_masked_keys_weigh_exactly_nothing_among_large_scores",
    ),
    Mutation(
        "masks are widened in float16",
        NUMERICS,
        "threshold(mask.float(), torch",
        "threshold(mask, torch",
        "tests/test_numerics.py::test_masked_keys_weigh_exactly_nothing_among_large_scores",
    ),
    Mutation(
        "masks are widened to -inf",
        NUMERICS,
        "lowest = torch.finfo(torch.float32).min",
        "lowest = -torch.inf",
        "tests/test_numerics.py::test_a_row_with_every_key_masked_is_finite",
    ),
    Mutation(
        "fused kernels get float16's minimum",
        NUMERICS,
        "return mask.masked_fill(masked & ~masked.all(-1, keepdim=True), -torch.inf)",
        "return mask",
        "tests/test_numerics.py::test_a_sealed_mask_holds_against_any_score",
    ),
    Mutation(
        "boolean masks in float16",
        NUMERICS,
        "torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, lowest)",
        "torch.zeros_like(mask, dtype=torch.float16)",
        "tests/test_numerics.py::test_a_boolean_mask_means_allowed",
    ),
    Mutation(
        "masks one column too wide",
        NUMERICS,
        "mask = mask[..., :key_length]\n    lowest",
        "lowest",
        "tests/test_numerics.py::test_a_mask_one_column_too_wide_is_cut[widen_mask]",
    ),
    Mutation(
        "sealed masks one column too wide",
        NUMERICS,
        "mask = mask[..., :key_length]\n    if mask.dtype == torch.bool:\n        return mask",
        "if mask.dtype == torch.bool:\n        return mask",
        "tests/test_numerics.py::test_a_mask_one_column_too_wide_is_cut[mask_to_minus_inf]",
    ),
    Mutation(
        "linears that cast by themselves are taken for fp32",
        SCALING,
        'return getattr(inner, "compute_dtype", None) == torch.float16',
        "return False",
        "tests/test_weights_elsewhere.py::test_linears_that_cast_fp32_to_float16_are_scaled[down_proj]",
    ),
    Mutation(
        "a gain in fp32 is bounded by its rounding",
        "patches/range_plan.py",
        "torch.maximum(float16_values(gain).abs(), gain.detach().float().abs())",
        "float16_values(gain).abs()",
        "tests/test_weights_elsewhere.py::test_a_gain_in_fp32_is_not_bounded_by_its_rounding",
    ),
    Mutation(
        "SwiGLU product by token in float16",
        BLOCKS,
        "gate.float() * up.float()",
        "(gate * up).float()",
        "tests/test_planning.py::test_scaling_by_token_holds_products_that_float16_cannot",
    ),
    Mutation(
        "a hook's output is overwritten",
        NUMERICS,
        "if module._forward_hooks or module._forward_pre_hooks or",
        "if module._forward_pre_hooks or",
        "tests/test_blocks.py::test_what_a_hook_has_seen_is_not_overwritten[act_fn-0]",
    ),
    Mutation(
        "output projection by token in float16",
        ATTENTION,
        "linear_by_token(attention.o_proj, output.float(), width)",
        "linear_by_token(attention.o_proj, output, width)",
        "tests/test_planning.py::test_scaling_by_token_is_handed_fp32",
    ),
    Mutation(
        "the way back to the residual in float16",
        SCALING,
        "linear(scaled) * power_of_two(exponent)",
        "linear(scaled) * power_of_two(exponent).half()",
        "tests/test_planning.py::test_scaling_by_token_holds_products_that_float16_cannot",
    ),
    Mutation(
        "the linear is handed fp32",
        SCALING,
        "(activation * power_of_two(-exponent)).to(torch.float16)",
        "activation * power_of_two(-exponent)",
        "tests/test_planning.py::test_scaling_by_token_is_as_good_as_the_plan",
    ),
    Mutation(
        "gradients stop where a token is scaled down",
        SCALING,
        "(activation * power_of_two(-exponent)).to(torch.float16)",
        "torch.ldexp(activation, -exponent).to(torch.float16)",
        "tests/test_gradients.py::test_every_gradient_passes_by_token[30.0-False]",
    ),
    Mutation(
        "a power of two is an integer, or torch's default dtype",
        SCALING,
        "exponent = exponent.float()",
        "exponent = exponent.half()",
        "tests/test_gradients.py::test_powers_of_two_are_exact[torch.float32]",
    ),
    Mutation(
        "a bias is taken off in float16",
        SCALING,
        "(output.float() - rest)",
        "(output - rest)",
        "tests/test_planning.py::test_a_bias_is_taken_off_in_fp32",
    ),
    Mutation(
        "a bias learns a difference of two roundings",
        SCALING,
        "if trained := trained_biases(linear):",
        "if trained := {}:",
        "tests/test_gradients.py::test_every_gradient_passes_by_token[1000.0-True]",
    ),
    Mutation(
        "a key's bias is rounded with what it says",
        ATTENTION,
        "linear.bias.view(-1, 1, head_dim), one, out=heads)",
        "linear.bias.view(-1, 1, head_dim), one.half(), out=heads)",
        "tests/test_keys.py::test_a_spiked_layer_agrees_with_attention_from_scratch[slow-sdpa]",
    ),
    Mutation(
        "a key's bias is rounded with what it says where autograd looks on, or the linear is not plain",
        LINEARS,
        "bias.to(product.device).float()",
        "bias.to(product.device)",
        "tests/test_keys.py::test_projections_are_the_same_to_the_bit_with_autograd",
    ),
    Mutation(
        "queries and keys wait for their rotation in float16",
        ATTENTION,
        "dtype=torch.float32, device=hidden_states.device)",
        "dtype=torch.float16, device=hidden_states.device)",
        "tests/test_keys.py::test_projections_are_the_same_to_the_bit_with_autograd",
    ),
    Mutation(
        "a kernel is handed heads in another order than stock's",
        NUMERICS,
        "heads.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).transpose(1, 2)",
        "heads.to(dtype)",
        "tests/test_numerics.py::test_sdpa_operands[elsewhere]",
    ),
    Mutation(
        "heads are written past a hook",
        NUMERICS,
        "if module._forward_hooks or module._forward_pre_hooks or",
        "if",
        "tests/test_keys.py::test_a_hook_is_called",
    ),
    Mutation(
        "a product is taken past a hook",
        LINEARS,
        "(is_plain(projection) and not is_watched(projection))",
        "is_plain(projection)",
        "tests/test_linears.py::test_a_hook_that_changes_something_changes_the_result",
    ),
    Mutation(
        "to look changes what is looked at",
        LINEARS,
        "exact = torch.where(whole == kept, exact, whole.float())",
        "exact = whole.float()",
        "tests/test_linears.py::test_to_look_changes_nothing[hook]",
    ),
    Mutation(
        "what a hook writes is not seen",
        LINEARS,
        "torch.where(whole == kept, exact, whole.float())",
        "exact.clone()",
        "tests/test_linears.py::test_a_hook_that_changes_something_changes_the_result[hook in place-False-no_grad]",
    ),
    Mutation(
        "a view is taken past a hook",
        LINEARS,
        'is_watched(module) or ("forward"',
        '("forward"',
        "tests/test_linears.py::test_a_hook_on_what_goes_through_a_view_is_called_with_the_whole[quantised]",
    ),
    Mutation(
        "a bias is taken off by an attribute of the class",
        LINEARS,
        "NO_BIAS = property(lambda module: None)",
        "NO_BIAS = None",
        "tests/test_linears.py::test_a_replica_adds_its_bias_once[quantised]",
    ),
    Mutation(
        "a forward bound to the module is called for the product",
        LINEARS,
        ' or ("forward" in module.__dict__ and not is_aligned(module))',
        "",
        "tests/test_linears.py::test_a_wrapper_of_linears_forward_meets_the_original_signature",
    ),
    Mutation(
        "accelerate's forward stays bound to the module",
        LINEARS,
        'if "forward" not in own:',
        "if True:",
        "tests/test_linears.py::test_offloaded_weights_are_where_they_are_needed_and_gone_again[alone]",
    ),
    Mutation(
        "a linear that nobody has looked at is taken to add its bias last",
        LINEARS,
        "kind is not nn.Linear and not kind.__module__.startswith(ADDING_LAST)",
        "False",
        "tests/test_linears.py::test_a_linear_that_nobody_has_looked_at_is_rounded_as_in_stock",
    ),
    Mutation(
        "an adapter takes itself out of the weights through a view",
        LINEARS,
        "not about_to_unmerge and ",
        "",
        "tests/test_linears.py::test_adapters_are_exact_on_merged_and_off[Lora]",
    ),
    Mutation(
        "keys are centred for a bias that an adapter changes",
        KEYS,
        "None if may_change_bias(self.k_proj) else loaded_bias",
        "loaded_bias",
        "tests/test_linears.py::test_an_adapter_that_changes_the_bias_gets_no_centre_and_is_no_worse_than_stock[IA3-wrapped]",
    ),
    Mutation(
        "a centre outlives an adapter that changes the bias",
        KEYS,
        "isinstance(value, nn.Module) and may_change_bias(value)",
        "False",
        "tests/test_linears.py::test_an_adapter_that_changes_the_bias_gets_no_centre_and_is_no_worse_than_stock[IA3-fixed]",
    ),
    Mutation(
        "keys are not centred",
        ATTENTION,
        "hidden_states), cos, sin, shift)",
        "hidden_states), cos, sin)",
        "tests/test_keys.py::test_a_spiked_layer_agrees_with_attention_from_scratch[slow-sdpa]",
    ),
    Mutation(
        "the centre is fp64, and all that meets it",
        KEYS,
        "torch.cat((nothing, -centre), dim=1).float()",
        "torch.cat((nothing, -centre), dim=1)",
        "tests/test_keys.py::test_the_centre_follows_a_move_and_not_a_cast",
    ),
    Mutation(
        "a cache is not marked",
        CACHES,
        "    marks[layer] = centred\n",
        "",
        "tests/test_keys.py::test_a_cache_of_another_sort_is_refused",
    ),
    Mutation(
        "new keys are centred beside a stock model's",
        CACHES,
        "return shift if centred else None",
        "return shift",
        "tests/test_keys.py::test_a_cache_of_plain_keys_is_gone_on_with",
    ),
    Mutation(
        "keys are added up in float16",
        CACHES,
        "keys.detach()[:, :, :TOKENS].float()",
        "keys.detach()[:, :, :TOKENS]",
        "tests/test_caches.py::test_keys_are_added_up_in_fp32",
    ),
    Mutation(
        "what tells keys is fp64, which not every device has",
        CACHES,
        "(torch.cat((x.real, x.imag), -1).float() for x",
        "(torch.cat((x.real, x.imag), -1) for x",
        "tests/test_caches.py::test_witnesses_come_and_go_with_the_fix",
    ),
    Mutation(
        "a cache without marks is taken for one of ours",
        CACHES,
        "if not marks_last or (TRACED and (not is_told or abs(along) <= NEAR * centre)):",
        "if True:",
        "tests/test_caches.py::test_a_cache_that_lost_its_mark_is_asked_about[by_constructor]",
    ),
    Mutation(
        "a learned prefix is taken for anything",
        CACHES,
        "not is_learned_prefix() and look_centred",
        "look_centred",
        "tests/test_caches.py::test_a_learned_prefix_is_uncentred_and_learns[-eager-fixed]",
    ),
    Mutation(
        "the empty places of a static cache count as keys",
        CACHES,
        "count = keys.any(-1).any(1).sum()",
        "count = torch.tensor(keys.shape[0] * keys.shape[2])",
        "tests/test_caches.py::test_every_sort_of_cache_is_measured[stock-static]",
    ),
    Mutation(
        "a kernel of the user's is handed an fp32 query",
        ATTENTION,
        "return laid_out_by_token(query, value.dtype), key, value, mask",
        "return query, key, value, mask",
        "tests/test_blocks.py::test_a_fused_kernel_is_called_with_keys_rounded_once",
    ),
    Mutation(
        "sdpa is handed an fp32 query alone",
        NUMERICS,
        "return laid_out_by_token(query, value.dtype), key, value, mask",
        "return query, key, value, mask",
        "tests/test_numerics.py::test_sdpa_operands[elsewhere]",
    ),
    Mutation(
        "sdpa on a CPU is handed 16 bit",
        NUMERICS,
        "return query.float(), key.float(), value.float(), mask",
        "return query.to(value.dtype), key, value, mask",
        "tests/test_numerics.py::test_sdpa_operands[cpu]",
    ),
    Mutation(
        "values are multiplied in 16 bit on a CPU",
        NUMERICS,
        "exact.view(*grouped, keys) @ value.float().flatten(0, 1)",
        "weights.view(*grouped, keys) @ value.flatten(0, 1)",
        "tests/test_numerics.py::test_grouped_attention_is_attention[cpu-1-heads0]",
    ),
    Mutation(
        "eager hands fp32 on",
        ATTENTION,
        "output.transpose(1, 2).to(value.dtype, memory_format=torch.contiguous_format)",
        "output.transpose(1, 2).contiguous()",
        "tests/test_blocks.py::test_eager_attention_hands_on_the_dtype_of_the_values",
    ),
    Mutation(
        "the output projection is handed fp32",
        ATTENTION,
        "output, scale = output.to(dtype), attention.scale",
        "scale = attention.scale",
        "tests/test_blocks.py::test_the_output_projection_is_handed_the_models_dtype",
    ),
    Mutation(
        "flash of old releases is handed fp32",
        "patches/attention_classes.py",
        "return rotate(query, cos, sin).to(query.dtype), rotate(key, cos, sin, _key_shift.get()).to(key.dtype)",
        "return rotate(query, cos, sin), rotate(key, cos, sin, _key_shift.get())",
        "tests/test_blocks.py::test_flash_attention_of_old_releases_rotates_in_fp32[before 4.45]",
    ),
    Mutation(
        "flash of old releases goes uncentred",
        "patches/attention_classes.py",
        "rotate(key, cos, sin, _key_shift.get())",
        "rotate(key, cos, sin)",
        "tests/test_blocks.py::test_flash_attention_of_old_releases_rotates_in_fp32[before 4.45]",
    ),
    Mutation(
        "bounds summed in float16",
        "patches/range_plan.py",
        "weight.detach().half().to(torch.float32, copy=copy)",
        "weight.detach().half()",
        "tests/test_range_plan.py::test_fp32_sums_in_chunks_bound_the_exact_ones",
    ),
    Mutation(
        "a norm's own output goes unbounded",
        "patches/range_plan.py",
        'norm=max(bound_norm(weights[f"{norm}.weight"]) for norm in QWEN2.norms())',
        "norm=0.0",
        "tests/test_range_plan.py::test_a_norm_that_overflows_by_itself_is_not_proven",
    ),
    Mutation(
        "a wrapped bias is scaled with the rest",
        SCALING,
        "for module in linear.modules())",
        "for module in [linear])",
        "tests/test_planning.py::test_a_bias_is_not_scaled[True]",
    ),
    Mutation(
        "a bias that no bound knows is planned for",
        PLANNING,
        " or (child.bias is not None and not known[name].bias)",
        "",
        "tests/test_planning.py::test_a_bias_is_not_scaled[False]",
    ),
    Mutation(
        "a rank scales on its own",
        SCALING,
        "        exponent = largest_in_group(exponent, linear)\n",
        "        pass\n",
        "tests/test_planning.py::test_tensor_parallel_ranks_scale_in_step",
    ),
    Mutation(
        "a plan outlives an edit",
        LAYER_PLAN,
        "elif not plan.suspect and plan.versions == weight_versions(layer):",
        "elif not plan.suspect:",
        "tests/test_stale_plans.py::test_weights_edited_just_before_a_compiler_runs[compile-in_place]",
    ),
    Mutation(
        "the sum beside a hook is rounded",
        LINEARS,
        "linear.weight) + bias.to(hidden_states.device).float()",
        "linear.weight) + bias.to(hidden_states.device)",
        "tests/test_linears.py::test_to_look_changes_nothing[hook]",
    ),
    Mutation(
        "what a hook was shown is cut out of the graph",
        LINEARS,
        " + (whole.float() - whole.detach().float()) if whole.requires_grad else exact",
        "",
        "tests/test_linears.py::test_gradients_reach_what_a_hook_was_shown[q_proj]",
    ),
    Mutation(
        "a plan outlives a write before a cast",
        PLANNING,
        "    drop_stale_plan(layer)\n    plan = layer.plan\n    yield",
        "    plan = layer.plan\n    yield",
        "tests/test_stale_plans.py::test_a_cast_keeps_no_plan_that_was_stale",
    ),
    Mutation(
        "compiled code reads no mark",
        CACHES,
        "return None if known is not None and known.get(attention.layer_idx) is False else shift",
        "return shift",
        "tests/test_caches.py::test_compiled_code_reads_the_mark",
    ),
    Mutation(
        "a plan outlives a fused optimiser",
        LAYER_PLAN,
        "elif not plan.suspect and plan",
        "elif plan",
        "tests/test_stale_plans.py::test_a_fused_optimiser_ends_every_plan[SGD]",
    ),
    Mutation(
        "a plan outlives an overflow",
        LAYER_PLAN,
        "    if layer.watch.has_overflowed():",
        "    if False:",
        "tests/test_stale_plans.py::test_a_forward_that_overflowed_is_told_of_by_the_next[by_data]",
    ),
    Mutation(
        "status believes a plan",
        PLANNING,
        "    if layer.plan is not None and exponents_for",
        "    if False and exponents_for",
        "tests/test_stale_plans.py::test_status_and_certify_believe_no_plan[by_data]",
    ),
    Mutation(
        "a graph to train with keeps the plan",
        PLANNING,
        "    if in_grad_mode and any",
        "    if False and any",
        "tests/test_stale_plans.py::test_a_graph_to_train_with_scales_by_token",
    ),
    Mutation(
        "hidden states are summed in float16",
        OVERFLOW,
        "sum(dtype=torch.float32)",
        "sum()",
        "tests/test_stale_plans.py::test_sums_that_pass_float16_are_no_overflow",
    ),
    Mutation(
        "sums of hidden states are kept in float16",
        OVERFLOW,
        "torch.zeros((), dtype=torch.float32, device=device)",
        "torch.zeros((), dtype=torch.float16, device=device)",
        "tests/test_stale_plans.py::test_sums_that_pass_float16_are_no_overflow",
    ),
    Mutation(
        "a plan outlives a merge",
        SCALING,
        "            self.set_exponent(None)\n        super",
        "            pass\n        super",
        "tests/test_planning.py::test_merging_an_adapter_ends_a_plan[False]",
    ),
    Mutation(
        "a plan outlives a cast to bfloat16",
        PLANNING,
        "w.dtype not in (torch.float16, torch.float32)",
        "False",
        "tests/test_planning.py::test_a_cast_to_float16_keeps_a_plan_and_one_to_bfloat16_ends_it",
    ),
    Mutation(
        "accelerate's hook keeps stock's forward",
        SWAP,
        "    for name in kept:\n",
        "    for name in ():\n",
        "tests/test_ways_in.py::test_device_map[fixed after loading]",
    ),
    Mutation(
        "verify takes KL the other way round",
        CLOSENESS,
        "log_p.exp() * (log_p - log_q)",
        "log_q.exp() * (log_q - log_p)",
        "tests/test_verify.py::test_sums_are_the_direct_formulas",
    ),
    Mutation(
        "verify scores a token twice",
        CLOSENESS,
        "found[-1].end if found else 1",
        "start + 1",
        "tests/test_verify.py::test_every_token_but_the_first_is_scored_once_with_all_its_context[100-16-5]",
    ),
    Mutation(
        "verify knows no largest KL",
        VERIFICATION,
        'if max_kl is not None and not row["kl_mean"] <= max_kl:',
        "if False:",
        "tests/test_verify.py::test_shortcomings_name_the_row",
    ),
    Mutation(
        "verify passes a drift downwards",
        VERIFICATION,
        "not abs(drift) <= max_ppl_drift",
        "not drift <= max_ppl_drift",
        "tests/test_verify.py::test_bad_perplexities_on_either_side_count",
    ),
    Mutation(
        "verify forgets what is not finite",
        VERIFICATION,
        'if row["fixed"] and not row["finite"]:',
        "if False:",
        "tests/test_verify.py::test_shortcomings_name_the_row",
    ),
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a mutated run needs."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in ("patches", "qwen2_fp16_fix", "tools", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    for name in (
        "conftest.py",
        "stand_ins.py",
        "test_numerics.py",
        "test_blocks.py",
        "test_ways_in.py",
        "test_planning.py",
        "test_stale_plans.py",
        "test_gradients.py",
        "test_range_plan.py",
        "test_keys.py",
        "test_linears.py",
        "test_devices.py",
        "test_default_dtype.py",
        "test_caches.py",
        "test_verify.py",
        "test_weights_elsewhere.py",
    ):
        shutil.copy(ROOT / "tests" / name, copy / "tests")
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


@pytest.fixture(scope="module")
def run_pytest(sources: Path) -> Iterator[Callable[[str], tuple[int, str]]]:
    """Runs a test of the copy; returns pytest's exit code and what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, str(ROOT / "tests" / "forked_pytest.py")]
    output = sources / "output.txt"
    with subprocess.Popen(
        command, cwd=sources, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(test: str) -> tuple[int, str]:
            arguments = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning", test]
            print(json.dumps({"arguments": arguments, "output": str(output)}), file=server.stdin, flush=True)
            return int(server.stdout.readline()), output.read_text()

        yield run
        server.stdin.close()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_turns_red(mutation: Mutation, sources: Path, run_pytest: Callable[[str], tuple[int, str]]) -> None:
    """The named test fails on the mutated source, and for an assertion or an error of the run, not of the copy."""
    path = sources / mutation.file
    original = path.read_text()
    assert original.count(mutation.old) == 1, f"{mutation.old!r} is not found exactly once in {mutation.file}"
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        code, printed = run_pytest(mutation.red)
    finally:
        path.write_text(original)
    assert code == 1, printed  # 1: a test failed; 2 to 5: pytest could not run it
    assert "1 failed" in printed


GUARDED = re.compile(r"\.float\(\)|\.to\((?!\w+\.device)|masked_fill|enabled=False|dtype=torch\.float32")


def test_every_upcast_has_a_mutation() -> None:
    """A cast that no mutation touches could be lost in a refactoring, as Phi-2's and GPT-2's were."""
    unguarded = []
    for path in sorted((ROOT / "patches").glob("*.py")):
        name, text = f"patches/{path.name}", path.read_text()
        spans = [(text.index(m.old), text.index(m.old) + len(m.old)) for m in MUTATIONS if m.file == name]
        for found in GUARDED.finditer(text):
            line = text[text.rfind("\n", 0, found.start()) + 1 : text.find("\n", found.start())]
            in_prose = line.count("`") or line.lstrip().startswith(("#", '"""'))
            if not in_prose and not any(start <= found.start() < end for start, end in spans):
                unguarded.append(f"{name}: {line.strip()}")
    assert not unguarded
