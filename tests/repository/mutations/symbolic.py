"""What is taken out of `patches/symbolic.py`, and where the parts ask it."""

from tests.repository.mutations.mutation import Mutation

FILE = "patches/symbolic.py"
MUTATIONS = (
    Mutation(
        "torch.fx goes into a layer",
        "patches/blocks.py",
        "return as_one_node(self, hidden_states, args, kwargs)",
        "pass",
        "tests/patches/test_symbolic.py::test_a_graph_has_one_node_for_each_part",
    ),
    Mutation(
        "torch.fx goes into a norm",
        "patches/blocks.py",
        "node: Tensor = as_one_node(self, hidden_states, (out_dtype,))\n            return node",
        "pass",
        "tests/patches/test_symbolic.py::test_a_graph_has_one_node_for_each_part",
    ),
    Mutation(
        "torch.fx goes into the rotary embedding",
        "patches/rotary.py",
        "node: tuple[Tensor, Tensor] = as_one_node(self, x, (position_ids,))\n            return node",
        "pass",
        "tests/patches/test_symbolic.py::test_the_rotary_embedding_is_a_node_too",
    ),
    Mutation(
        "torch.fx gets a node that names no part",
        FILE,
        "    if not path:\n",
        "    if path is None:\n",
        "tests/patches/test_symbolic.py::test_a_part_by_itself_is_refused[input_layernorm]",
    ),
    Mutation(
        "torch.fx goes into a part",
        "patches/autocast.py",
        "    if is_symbolic(device_type):\n        refuse()\n",
        "",
        "tests/patches/test_symbolic.py::test_a_part_by_itself_is_refused[mlp]",
    ),
    Mutation(
        "torch.fx refuses a cache in words of its own",
        FILE,
        "except NotImplementedError as error:",
        "except ZeroDivisionError as error:",
        "tests/patches/test_symbolic.py::test_a_layer_with_a_cache_is_refused",
    ),
)
