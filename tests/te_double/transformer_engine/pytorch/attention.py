"""Empty: the real one has no `_SplitAlongDim` either, and Megatron-Core falls back."""
