"""What recipes train on: bundled sets, and image sets through the package datasets."""
