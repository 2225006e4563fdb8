"""The host side: scheduling, placement of keys and values, and the work of each iteration."""
