"""Every op in plain torch, the oracle of the others. Drafting and sampling also run on a CPU as they are."""
