"""Verdicts on a response: spans, form, answer, leak, and their weighted sum."""
