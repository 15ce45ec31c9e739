"""One tensor at a time: its storage, its norm, and the maxima over its boxes."""
