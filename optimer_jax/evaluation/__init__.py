"""Scores of candidates on tasks."""
