"""What is taken out of `patches/autograd.py`, and how the arithmetic uses it."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/autograd.py"
MUTATIONS = (
    Mutation(
        "returned attention weights get no gradient on a CPU",
        "patches/numerics.py",
        "exact = backward_through(weights, exact)",
        "pass",
        "tests/patches/test_autograd.py::test_returned_weights_have_the_gradient_that_they_have_in_fp32",
    ),
    Mutation(
        "the gradient of the scores is rounded",
        FILE,
        "return rounded, gradient - rounded",
        "return rounded, torch.zeros_like(gradient)",
        "tests/patches/test_autograd.py::test_the_gradient_of_the_scores_is_as_exact_as_before",
    ),
    Mutation(
        "a large gradient becomes infinite and then NaN",
        FILE,
        "gradient.clamp(-largest, largest).to(ctx.dtype)",
        "gradient.to(ctx.dtype)",
        "tests/patches/test_autograd.py::test_a_gradient_beyond_float16_is_cut_in_the_weights_alone",
    ),
    Mutation(
        "transforms find a softmax that writes over its scores",
        "patches/numerics.py",
        "kept = scores.requires_grad or torch.compiler.is_compiling() or is_transformed()",
        "kept = scores.requires_grad or torch.compiler.is_compiling()",
        "tests/patches/test_autograd.py::test_transforms_pass",
    ),
)
