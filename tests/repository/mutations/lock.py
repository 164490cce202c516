"""What is taken out of `patches/lock.py` and of the files that compare code for it."""

from tests.repository.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a wrapper put on at run time is no difference",
        "patches/loaded_code.py",
        "        if not _is_expected(link, decorated, own):",
        "        if link is None:",
        "tests/test_tampering.py::test_every_function_that_is_wrapped_at_run_time_is_named",
    ),
    Mutation(
        "files that a lock does not list are not compared",
        "patches/lock.py",
        '    if lock["upstream_tree"] != found["upstream_tree"]:',
        '    if not lock["upstream_tree"]:',
        "tests/test_tampering.py::test_without_a_record_of_pip_a_change_is_noticed",
    ),
)
