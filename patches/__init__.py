"""What runs inside a fixed model: self-contained, and the same files serve as remote code in a Hub repository.

Start reading at `modeling_qwen2_fp16.py`. The arithmetic is in `numerics.py`, the releases are in `version_map.py`.
"""
