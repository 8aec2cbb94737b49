"""Evaluating a model on held-out questions."""
