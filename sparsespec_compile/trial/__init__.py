"""On a user's own model, texts and device: are the texts right, and what does speculation gain?"""
