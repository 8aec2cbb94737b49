"""The demo: handwritten digits and a tiny model, on a CPU."""
