"""The last stage: the graph is cut into regions, and each distinct one is compiled."""
