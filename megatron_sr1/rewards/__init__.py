"""The reward of a response: its answer, format and description, weighted and added up."""
