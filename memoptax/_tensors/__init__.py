"""One tensor at a time: its storage, its norm, the maxima over its boxes."""
