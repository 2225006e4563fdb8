"""The passes that change the graph, one a file."""
