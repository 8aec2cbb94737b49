"""Data: shards of samples, their prompts and pixels, and micro-batches packed from them."""
