"""Real data: sources, splits, tokenizers, pipelines."""
