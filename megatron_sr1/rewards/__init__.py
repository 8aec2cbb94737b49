"""What a response earns: parsing, grading, form, leaks, and their sum by recipe."""
