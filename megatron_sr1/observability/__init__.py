"""What a run records: the metrics file, memory, profiles, and the sinks that show them."""
