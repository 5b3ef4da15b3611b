"""Meshes, and one table from logical axes to mesh axes."""
