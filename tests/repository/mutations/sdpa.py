"""What is taken out of `patches/sdpa.py`."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/sdpa.py"
MUTATIONS = (
    Mutation(
        "a single query goes to sdpa with shared heads",
        FILE,
        "if plain and query.shape[2] == 1:",
        "if False:",
        "tests/patches/test_sdpa.py::test_a_token_is_written_without_shared_heads[False]",
    ),
    Mutation(
        "a mask of each head is handed on as it is",
        FILE,
        "if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:",
        "if False:",
        "tests/patches/test_sdpa.py::test_one_query_is_attention_with_no_shared_heads_and_nothing_repeated"
        "[by name-additive, of each head]",
    ),
    Mutation(
        "key heads are shared where no kernel takes them",
        FILE,
        "if plain and groups > 1 and not shares_key_heads(query):",
        "if False:",
        "tests/patches/test_sdpa.py::test_a_prompt_is_transformers_attention[does not-False-None]",
    ),
    Mutation(
        "repeated keys lose what says that they are causal",
        FILE,
        'self.is_causal = getattr(attention, "is_causal", True)',
        "self.is_causal = True",
        "tests/patches/test_sdpa.py::test_an_encoders_keys_are_repeated_without_a_triangle",
    ),
    Mutation(
        "somebody else's wrapper of sdpa is taken for transformers' own",
        FILE,
        'return found if getattr(found, "__globals__", {}).get("__name__") == HOME else None',
        "return found",
        "tests/patches/test_sdpa.py::test_somebody_elses_sdpa_is_called[wraps]",
    ),
    Mutation(
        "a card's capability is not asked",
        FILE,
        "return torch.cuda.get_device_capability(index) >= (8, 0)",
        "return True",
        "tests/patches/test_sdpa.py::test_key_heads_are_shared_from_ampere_on[T4]",
    ),
    Mutation(
        "what only transformers' sdpa knows is lost",
        FILE,
        "plain = all(kwargs.get(name) is None or kwargs[name] is False for name in OTHER_ARGUMENTS)",
        "plain = True",
        "tests/patches/test_sdpa.py::test_what_only_transformers_function_knows_is_left_to_it[1-position_bias]",
    ),
)
