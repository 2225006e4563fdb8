"""Checks: the graph is whole after each pass, rows meet in attention alone, the model is still the one compiled."""
