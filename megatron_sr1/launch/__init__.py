"""Start of a run's ranks: commands are built here, training happens elsewhere."""
