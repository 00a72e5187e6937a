"""Metrics and losses in the training loops of other packages, with one module for each package that it imports."""
