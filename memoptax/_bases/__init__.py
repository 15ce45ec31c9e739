"""Base optimizers where optax's differ: PyTorch's semantics, and float32 inside."""
