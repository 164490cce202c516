"""What is taken out of `patches/blocks.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/blocks.py"
MUTATIONS = (
    Mutation(
        "gate and up that are quantised behind a wide norm count as fp32",
        FILE,
        "(holds_float16(self.gate_proj) or is_quantised(self.gate_proj))",
        "holds_float16(self.gate_proj)",
        "tests/patches/test_exponents.py::test_linears_quantised_later_run_behind_a_wide_norm[mlp]",
    ),
    Mutation(
        "norm ignores the dtype asked for",
        FILE,
        "normed = stock if out_dtype is None else stock.to(out_dtype)",
        "normed = stock",
        "tests/patches/test_blocks.py::test_the_norm_takes_an_output_dtype",
    ),
    Mutation(
        "norm is stock's",
        FILE,
        "if weight.dtype != torch.float16:",
        "if True:",
        "tests/registration/test_ways_in.py::test_fix_takes_effect_in_place",
    ),
    Mutation(
        "SwiGLU product by token in float16",
        FILE,
        "gate.float() * up.float()",
        "(gate * up).float()",
        "tests/patches/test_planning.py::test_scaling_by_token_holds_products_that_float16_cannot",
    ),
    Mutation(
        "a gate that was scaled is activated in float16",
        FILE,
        "self.act_fn(gate.float())",
        "self.act_fn(gate.half())",
        "tests/patches/test_exponents.py::test_an_adversary_finds_no_number_beyond_its_limit[wide post_norm]",
    ),
    Mutation(
        "down_proj is handed a product in fp32",
        FILE,
        "gate, up, scale.exponent).to(torch.float16)",
        "gate, up, scale.exponent)",
        "tests/patches/test_exponents.py::test_what_asks_for_an_exponent_is_proven_and_exact[eager-gate]",
    ),
    Mutation(
        "an MLP behind a wide norm is stock's",
        FILE,
        "may_be_wide = self.input_exponent > 0 and is_full_precision(hidden_states)",
        "return False",
        "tests/patches/test_exponents.py::test_what_asks_for_an_exponent_is_proven_and_exact[eager-wide post_norm]",
    ),
    Mutation(
        "code that a tool has replaced goes unnoticed",
        FILE,
        "notice_replaced(normed)",
        "pass",
        "tests/registration/test_refusals.py::test_code_replaced_after_the_fix_is_told_of[forward-fast]",
    ),
)
