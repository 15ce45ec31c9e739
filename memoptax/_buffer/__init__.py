"""The buffer of critical gradients and momenta. It does not depend on optimizers."""
