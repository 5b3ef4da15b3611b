"""Merging models that are larger than memory: leaf by leaf, and large leaves by rows.

Of a leaf, one block of rows of the base and of each of the K vectors is in memory, and the merged
block. Methods that must know the whole leaf first (ties' threshold, slerp's angle) read it twice.
della ranks along the rows of a projection and takes each projection whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optimer_jax.checkpoints.leaves import row_blocks
from optimer_jax.checkpoints.names import Tensor
from optimer_jax.merging.methods import (
  Kind,
  Numbers,
  check,
  host_global_cuts,
  leaf_key,
  leaf_statistics,
  merge_rows,
  whole,
)
from optimer_jax.progress import progress


def merge_streamed(
  how: Callable[[str], tuple[Kind, Numbers]],
  base: Mapping[str, Tensor],
  vectors: Sequence[Mapping[str, Tensor]],
  dtypes: Mapping[str, str],
  splits: Mapping[str, int],
  seed: int,
) -> Iterator[tuple[str, np.ndarray]]:
  """Merges a pool, leaf by leaf in the base's order.

  Args:
    how: the method and its numbers for a leaf.
    base: theta_0.
    vectors: K tau.
    dtypes: of the result, by leaf.
    splits: by leaf, how many leading axes others store last (`methods.merge_leaf`).
    seed: of random masks.

  Yields:
    A leaf's name and its next block of rows.

  Raises:
    UserError: numbers that a method does not take, or a damaged leaf.
  """
  plans = {leaf: how(leaf) for leaf in base}
  for kind, numbers in plans.values():
    check(kind, numbers, len(vectors))

  def blocks_of(leaf: str):
    def blocks(start: int, stop: int):
      for begin, end in _cut(base[leaf].shape, start, stop):
        rows = [vector[leaf].read(begin, end) for vector in vectors]
        yield begin, base[leaf].read(begin, end), rows

    return blocks

  cuts = _global_cuts(plans, base, splits, blocks_of)
  for leaf in progress(base, len(base), 'merge', 'leaves'):
    (kind, numbers), shape, split = plans[leaf], base[leaf].shape, splits[leaf]
    key, blocks = leaf_key(seed, leaf), blocks_of(leaf)
    stats = leaf_statistics(kind, numbers, shape, blocks, key, split=split, cuts=cuts.get(leaf))
    parts = blocks(0, shape[0])
    if whole(kind, shape, split):
      parts = [_join([*parts])]
    for start, rows, others in parts:
      merged = merge_rows(kind, dtypes[leaf], rows, others, numbers, stats, key, start, split=split)
      yield leaf, np.asarray(merged)


def difference(model: Tensor, base: Tensor) -> Tensor:
  """A model's tensor minus the base's, float32."""

  def read(start: int = 0, stop: int | None = None) -> np.ndarray:
    return np.asarray(_minus(model.read(start, stop), base.read(start, stop)))

  return Tensor(model.shape, 'float32', read)


@jax.jit
def _minus(model: jax.Array, base: jax.Array) -> jax.Array:
  return model.astype(jnp.float32) - base.astype(jnp.float32)


def _cut(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int]]:
  """The leaf's blocks of rows, as far as they lie between start and stop."""
  for begin, end in row_blocks(shape):
    if begin < stop and start < end:
      yield max(begin, start), min(end, stop)


def _join(parts: list) -> tuple[int, np.ndarray, list[np.ndarray]]:
  vectors = zip(*(others for _, _, others in parts), strict=True)
  return 0, np.concatenate([rows for _, rows, _ in parts]), [np.concatenate(v) for v in vectors]


def _global_cuts(plans, base, splits, blocks_of) -> dict[str, np.ndarray]:
  """Cuts over all leaves of a vector, where the method ranks them so."""
  kind, numbers = next(iter(plans.values()))
  if kind.scope != 'global':
    return {}
  leaves = {leaf: (base[leaf].shape, splits[leaf], blocks_of(leaf)) for leaf in base}
  return host_global_cuts(kind, numbers, leaves)
