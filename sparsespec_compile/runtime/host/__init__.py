"""The host side: who runs, where keys and values lie, and what every iteration does."""
