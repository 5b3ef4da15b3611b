"""Plots and the single-file HTML report of a run."""
