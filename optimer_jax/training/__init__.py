"""Continual pre-training on one data set or a mixture."""
