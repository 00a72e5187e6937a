"""Models and values that are distributed over processes."""
