"""Models and values that are spread over processes."""
