"""From a HuggingFace model to what the runtime runs."""
