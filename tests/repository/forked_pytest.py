"""Runs pytest in forks of a process that has imported torch and transformers, which takes longer than most runs here.

Reads requests from stdin, a JSON line each: pytest's `arguments`, and the file for what it prints. Answers each with a
line: pytest's exit code. What is under test is not imported here, so that every fork imports it anew.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path

import pytest

#: What the tests import, the slowest first: once here, and not in each fork.
SLOW = ("torch._dynamo", "transformers.models.qwen2.modeling_qwen2", "peft", "accelerate", "torch.distributed.tensor")
SLOW += ("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "hypothesis")
CRASHED = 70


def run(arguments: list[str], output: str) -> int:
    """pytest's exit code, from a fork of this process that prints to `output`."""
    child = os.fork()
    if child == 0:
        with Path(output).open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        code = CRASHED
        try:
            code = int(pytest.main(arguments))
            sys.stdout.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder: what is under test is in the current one
    for name in SLOW:
        importlib.import_module(name)
    assert "qwen2_fp16_fix" not in sys.modules
    gc.collect()
    gc.freeze()  # pytest collects garbage some five times at its end, which would walk through torch in each fork
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)
