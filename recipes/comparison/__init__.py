"""The comparison of regularizers: what is run, what it costs, and what it found."""
