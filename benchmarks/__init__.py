"""Measurements: `python -m benchmarks.NAME` prints a table, then one line of JSON."""
