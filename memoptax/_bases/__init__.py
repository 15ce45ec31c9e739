"""What optax has with other semantics: PyTorch's bases, and float32 inside."""
