"""Every op in plain torch, the oracle of the others. Selection and sampling also run on a CPU as they are."""
