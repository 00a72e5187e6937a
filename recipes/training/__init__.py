"""How a run trains: flags, loop, log, checkpoints, measurements, networks and regularizers."""
