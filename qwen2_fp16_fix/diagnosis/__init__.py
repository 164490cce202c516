"""The doctor: what runs here, how a Qwen2 is best run on it, and what is in the way."""
