"""Published weights and checkpoints: names and transforms, reading, streaming, saving, resuming."""
