"""The scan: how close each number of a Qwen2 comes to float16's limit on real prompts."""
