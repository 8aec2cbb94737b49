"""Pages made from a run's files."""
