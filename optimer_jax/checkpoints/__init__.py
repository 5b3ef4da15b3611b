"""Artifacts on disk, and conversion from and to what others use."""
