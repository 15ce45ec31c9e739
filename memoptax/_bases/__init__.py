"""Base optimizers: PyTorch's semantics where optax's differ, computed in float32."""
