"""What comes in: a model is checked, its attention calls are read, and it is traced as one graph."""
