"""Compiled models inside of other tools. Each module needs what its tool installs."""
