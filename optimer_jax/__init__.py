"""OptiMer in JAX: train once per data set, then search the weights of the vectors' sum."""

__version__ = '0.1.0'
