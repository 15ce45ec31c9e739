"""The buffer of critical gradients and critical momenta. It knows no optimizer."""
