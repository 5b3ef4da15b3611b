"""Base and vectors to a candidate."""
