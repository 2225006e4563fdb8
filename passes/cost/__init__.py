"""What an iteration reads and computes: formulas for one layer, and their sum over a graph."""
