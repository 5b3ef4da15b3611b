"""Gemma 3's text towers in Flax NNX: 270M, 1B, 4B, 12B and 27B."""

from optimer_jax.gemma3.config import SIZES, Gemma3Config
from optimer_jax.gemma3.decoding import prefix_cache
from optimer_jax.gemma3.layout import from_leaves, init_leaves, leaf_shapes, to_leaves
from optimer_jax.gemma3.loss import token_nats
from optimer_jax.gemma3.transformer import Model, abstract_params, forward, logical_axes

__all__ = [
  'SIZES',
  'Gemma3Config',
  'Model',
  'abstract_params',
  'forward',
  'from_leaves',
  'init_leaves',
  'leaf_shapes',
  'logical_axes',
  'prefix_cache',
  'to_leaves',
  'token_nats',
]
