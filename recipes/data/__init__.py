"""Data sets of the recipes: bundled ones, and image sets from the package datasets."""
