"""A checkpoint: its configuration, its weights tensor by tensor or loaded, its tokenizer."""
