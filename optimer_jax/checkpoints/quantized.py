"""Leaves as int8 with one float32 scale a channel: a quarter of float32's size.

Symmetric, so that zero stays zero: a value x of a channel whose largest magnitude is m is stored as
round(x / s) with s = m / 127, and comes back with an error of at most s / 2. A channel is a row of
what PyTorch stores: a token's row of the embedding, an output of a projection. Norm scales are too
few to be worth it and stay as they are.
"""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np

from optimer_jax.checkpoints.names import EMBEDDING
from optimer_jax.errors import UserError

LEVELS = 127  # on each side of zero
SCALE = '.channel_scale'  # after a leaf's name, the name of its scales in an artifact
_TINY = np.finfo(np.float32).tiny  # smaller scales would be flushed to zero by accelerators


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """int8 values and the scales that they are multiples of; a pytree of both.

  Leaves of several layers or vectors are stacked by `jax.tree.map(lambda *a: np.stack(a), …)`.
  """

  values: np.ndarray | jax.Array  # int8
  scale: np.ndarray | jax.Array  # float32, of length 1 on the axes that share a scale

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  def dequantize(self) -> np.ndarray | jax.Array:
    """float32 values, in numpy or JAX as the parts are."""
    return self.values.astype(np.float32) * self.scale


def channel_axes(leaf: str) -> tuple[int, ...] | None:
  """The axes along which each index has a scale of its own; None for a leaf that stays float.

  Embedding V D: (0,); q, k and v N H of D N H: (1, 2); o D of N H D: (2,); MLP F or D: (1,).
  """
  if leaf == EMBEDDING:
    return (0,)
  if leaf.endswith('o_proj'):
    return (2,)
  if leaf.endswith(('q_proj', 'k_proj', 'v_proj')):
    return (1, 2)
  return (1,) if leaf.endswith('_proj') else None


def scale_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of the scales of a leaf of `shape`."""
  axes = channel_axes(leaf)
  return tuple(size if axis in axes else 1 for axis, size in enumerate(shape))


def channel_scale(leaf: str, blocks: Iterable[np.ndarray]) -> np.ndarray:
  """The scales of a leaf, by one pass over its blocks of rows.

  The embedding's rows have their own scales: those of a block come from `[block]` alone. Other
  leaves share scales across rows, so all blocks are needed before the first can be quantized.

  Args:
    leaf: its name, one with `channel_axes`.
    blocks: consecutive blocks of the leading axis, of any float dtype.

  Returns:
    float32 with the leaf's number of axes, of length 1 on those that share a scale. A channel of
    zeros has scale 0.

  Raises:
    UserError: a value that is not finite.
  """
  axes = channel_axes(leaf)
  peaks = []
  for block in blocks:
    shared = tuple(axis for axis in range(block.ndim) if axis not in axes)
    block = block.astype(np.float32, copy=False)
    peak = np.maximum(block.max(shared, keepdims=True), -block.min(shared, keepdims=True))
    if not np.isfinite(peak).all():
      raise UserError(f'{leaf} has values that are not finite: they cannot be stored as int8')
    if 0 in axes or not peaks:
      peaks.append(peak)
    else:
      peaks[0] = np.maximum(peaks[0], peak)
  peak = np.concatenate(peaks)
  return np.where(peak > 0, np.maximum(peak / np.float32(LEVELS), _TINY), np.float32(0))


def quantize_rows(leaf: str, rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """A block of rows as int8, rounded to nearest even.

  Args:
    leaf: its name.
    rows: some rows of the leading axis, of any float dtype.
    scale: from `channel_scale`: of these rows for the embedding, of the whole leaf otherwise.

  Raises:
    ValueError: the embedding's scales are not those of these rows.
  """
  if 0 in channel_axes(leaf) and len(scale) != len(rows):
    raise ValueError(f'{leaf}: {len(scale)} scales for {len(rows)} rows')
  # A channel of zeros is divided by 1 instead of 0.
  multiples = rows.astype(np.float32, copy=False) / np.where(scale > 0, scale, np.float32(1))
  return np.clip(np.rint(multiples, out=multiples), -LEVELS, LEVELS).astype(np.int8)
