"""Checks: graph invariants after each pass, rows mix in attention alone, the model is still the one compiled."""
