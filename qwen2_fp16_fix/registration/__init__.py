"""Making transformers build fixed models, and undoing it."""
