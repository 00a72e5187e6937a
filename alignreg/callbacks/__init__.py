"""Metrics and losses in training loops of other packages; a module for each package, which it imports."""
