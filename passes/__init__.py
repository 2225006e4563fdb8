"""The compiler: a HuggingFace model in, an FX graph that drafts, verifies and prefills out."""
