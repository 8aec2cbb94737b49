"""The configuration: settings by group, their loading and their checks. Free of torch."""
