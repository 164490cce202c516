"""The doctor: the software and devices here, the best way to run a Qwen2 on them, and what is in the way."""
