"""`python -m qwen2_fp16_fix` is the command line."""

from .cli.main import main

main()
