"""The comparison of regularizers: its plan, its cost, and its report."""
