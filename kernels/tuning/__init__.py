"""Tile sizes of the attention kernel: what they mean, which are taken, how the best are found."""
