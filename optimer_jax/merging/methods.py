"""Merge methods: from a base and K vectors to one leaf of a candidate, as mergekit 0.1.5 does it.

Three steps, so that the same code serves leaves in memory and leaves read by blocks of rows:
cuts (which elements are kept: selection.py), sums over the leaf (norms, angles) and the elementwise
combination of a block (combination.py). Arithmetic is float32 and rounds once, to the result's
dtype; blocks of any size give the same bits as the whole leaf.

Sources: model soups (2203.05482), task arithmetic (2212.04089), TIES (2306.01708), DARE
(2311.03099), DELLA (2406.11617), breadcrumbs (2312.06795), Model Stock (2403.19522), SCE
(2408.07990). Two things differ from mergekit. Among equal magnitudes mergekit keeps whichever its
sort leaves first, which depends on the processor; here the first in storage order. Multi-SLERP is
computed by its closed form: its step in the tangent space is zero.
"""

import dataclasses
import difflib
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimer_jax.errors import UsageError, UserError
from optimer_jax.merging import selection
from optimer_jax.merging.combination import Leaf, combine, row_sums, sums_needed, tree, variance
from optimer_jax.merging.selection import BOTTOM, MOST, TOP

Blocks = Callable[[int, int], Iterator[tuple[int, np.ndarray, Sequence[np.ndarray]]]]


class _Method(NamedTuple):
  keeps: str = 'all'  # largest, between, random, ranked: which elements of a vector
  elects: bool = False  # only elements with the sign of the weighted sum
  normalize: bool = False
  rescale: bool = False


METHODS = {
  'linear': _Method(normalize=True),
  'task_arithmetic': _Method(),
  'ties': _Method('largest', elects=True, normalize=True),
  'dare_linear': _Method('random', rescale=True),
  'dare_ties': _Method('random', elects=True, rescale=True),
  'della_linear': _Method('ranked', rescale=True),
  'della': _Method('ranked', elects=True, normalize=True, rescale=True),
  'breadcrumbs': _Method('between'),
  'breadcrumbs_ties': _Method('between', elects=True),
  'model_stock': _Method(),
  'sce': _Method('varied'),
  'slerp': _Method(),
  'multislerp': _Method(normalize=True),
}
_SIDES = {'largest': (TOP,), 'between': (BOTTOM, BOTTOM), 'varied': (TOP,)}


@dataclasses.dataclass(frozen=True)
class Kind:
  """A method and its switches: what a program is compiled for.

  Attributes:
    name: a key of METHODS.
    normalize: divide by the sum of the weights; None: the method's own default.
    rescale: give a thinned vector its L1 norm back; None: the method's own default.
    scope: 'tensor' ranks magnitudes within a leaf, as mergekit; 'global' over all leaves of a
      vector, as the TIES paper.
  """

  name: str
  normalize: bool | None = None
  rescale: bool | None = None
  scope: str = 'tensor'

  @property
  def method(self) -> _Method:
    own = METHODS[self.name]
    return own._replace(
      normalize=own.normalize if self.normalize is None else self.normalize,
      rescale=own.keeps in ('largest', 'between', 'random', 'ranked')
      and (own.rescale if self.rescale is None else self.rescale),
    )


class Numbers(NamedTuple):
  """A method's numbers. Other values never recompile. Float64 on the host: ranks need it."""

  weights: np.ndarray  # [K]
  density: np.ndarray  # [K], the share of a vector that is kept; of sce: select_topk
  gamma: np.ndarray  # [K], the share of largest elements that breadcrumbs drops
  epsilon: np.ndarray  # [K], how far della's probabilities lie from the density
  scale: np.ndarray  # [], lambda: multiplies the sum of the vectors
  t: np.ndarray  # [], slerp's way from the base (0) to the model (1)


class Stats(NamedTuple):
  """What the combination of a block must know of the whole leaf."""

  cuts: np.ndarray  # int32 [K, E, 3]; sce [1, 1, 3]; E = 0 for methods without
  sums: np.ndarray  # float32 [S]
  size: np.ndarray  # int32 [], elements of the leaf


def numbers(weights, density=1.0, gamma=0.01, epsilon=0.15, scale=1.0, t=0.5) -> Numbers:
  """Numbers for K = len(weights) vectors; a scalar holds for all. The defaults are mergekit's."""
  weights = np.asarray(weights, np.float64)
  each = [
    np.broadcast_to(np.asarray(x, np.float64), weights.shape) for x in (density, gamma, epsilon)
  ]
  return Numbers(weights, *each, np.float64(scale), np.float64(t))


def leaf_key(seed: int, leaf: str) -> jax.Array:
  """The key of a leaf's random masks."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(leaf.encode()))


def check(kind: Kind, numbers: Numbers, k: int) -> None:
  """Refuses what a method cannot do.

  Raises:
    UsageError: an unknown method or scope.
    UserError: a number outside its domain, or a number of vectors that the method does not take.
  """
  name = kind.name
  if name not in METHODS:
    near = difflib.get_close_matches(name, METHODS, 1, 0)[0]
    raise UsageError(f'there is no merge method {name!r}: did you mean {near!r}?')
  method = kind.method
  if kind.scope not in ('tensor', 'global'):
    raise UsageError(f"{name}: scope is 'tensor' or 'global', not {kind.scope!r}")
  if kind.scope == 'global' and (method.keeps not in ('largest', 'between') or method.rescale):
    raise UserError(f'{name}: scope global is for ties and breadcrumbs without rescale')
  if k < 1 or numbers.weights.shape != (k,):
    raise UserError(f'{name}: {numbers.weights.size} weights for {k} vectors: give one for each')
  for field, value in zip(Numbers._fields, numbers, strict=True):
    if not np.isfinite(value).all():
      raise UserError(f'{name}: {field} {_text(value)} is not finite')
  for field in ('density', 'gamma'):
    value = getattr(numbers, field)
    if (value < 0).any() or (value > 1).any():
      raise UserError(f'{name}: {field} {_text(value)} is not between 0 and 1')
  if method.keeps == 'ranked':
    thinned = (numbers.density > 0) & (numbers.density < 1)
    low, high = numbers.density - numbers.epsilon, numbers.density + numbers.epsilon
    if (thinned & ((np.minimum(low, high) <= 0) | (np.maximum(low, high) >= 1))).any():
      raise UserError(
        f'{name}: density {_text(numbers.density)} plus and minus epsilon {_text(numbers.epsilon)} '
        'leaves the open interval from 0 to 1'
      )
  if name == 'slerp' and k != 1:
    raise UserError(f'slerp: takes 1 vector, not {k}: multislerp takes more')
  if name == 'model_stock' and k < 2:
    raise UserError(f'model_stock: needs the angle between vectors, so 2 or more, not {k}')
  if name == 'sce' and np.unique(numbers.density).size > 1:
    raise UserError(f'sce: has one density for all vectors, not {_text(numbers.density)}')
  if name in ('linear', 'multislerp') and method.normalize and not numbers.weights.sum():
    raise UserError(
      f'{name}: the weights {_text(numbers.weights)} sum to 0: normalize divides by it'
    )


def _text(value) -> str:
  return ', '.join(f'{x:g}' for x in np.atleast_1d(value))


def ranks(kind: Kind, numbers: Numbers, size: int) -> np.ndarray:
  """How many elements lie above each cut of a leaf, or of all leaves together.

  The products are taken in float64, as Python takes them: float32 is not enough.

  Returns:
    int32 [K, E, 2], the `selection.halves`; E = 0 where there is nothing to count.
  """
  k = len(numbers.weights)
  above = np.zeros((k, len(_SIDES.get(kind.method.keeps, ())), 2), np.int32)
  for i in range(k):
    for e, count in enumerate(_larger(kind, numbers, i, size)):
      above[i, e] = selection.halves(count)
  return above


def _larger(kind, numbers, i, size) -> tuple[int, ...]:
  density, gamma = float(numbers.density[i]), float(numbers.gamma[i])
  keeps = kind.method.keeps
  if keeps == 'largest':
    kept = max(1, int(density * size)) if 0 < density < 1 else size * (density >= 1)
    return (kept,)
  if keeps == 'between':
    kept = int(density * size) if density < 1 else size
    dropped = 0 if density >= 1 else max(0, size - kept - int(gamma * size))
    return size - dropped, size - dropped - kept
  return ()


def whole(kind: Kind, shape: tuple[int, ...], split: int = 0) -> bool:
  """Whether the leaf must be given as one block: della ranks along its first axis."""
  return METHODS[kind.name].keeps == 'ranked' and (split > 0 or len(shape) == 1)


# In memory.


def merge_leaf(
  kind: Kind,
  out: jax.Array,
  base: jax.Array,
  vectors: Sequence[jax.Array],
  numbers: Numbers,
  key: jax.Array,
  *,
  split: int = 0,
  above: jax.Array | None = None,
  cuts: jax.Array | None = None,
) -> jax.Array:
  """Merges a leaf in memory, by programs that are compiled once for a shape.

  Under `jax.vmap` a stack of layers is merged layer by layer, each with its own key.

  Args:
    kind: what to do.
    out: an array whose memory and dtype the result takes (donated).
    base: theta_0 [...].
    vectors: K tau [...], of any float dtypes.
    numbers: checked by `check`.
    key: of the leaf's random masks: `leaf_key`. Other methods do not look at it.
    split: how many leading axes are the contracted ones, which others store last ([out, in]): 1
      for projections, 2 for o_proj, 0 for the embedding and norms. Ties and della's ranks follow
      the storage of others.
    above: `ranks` of the leaf; needed where the numbers are traced (inside a jit).
    cuts: int32 [K, E, 3] from `device_global_cuts`, for the scope 'global'.

  Returns:
    The merged leaf.
  """
  vectors = tuple(vectors)
  if cuts is None:
    cuts = _device_cuts(kind, split, vectors, numbers, above, base.size)
  sums = np.zeros(0, np.float32)
  if sums_needed(kind):
    sums = _sum_of_rows(_sum_rows(kind, split, base, vectors, numbers, key, 0, cuts))
  stats = Stats(cuts, sums, np.int32(base.size))
  return _merge_into(out, kind, split, base, vectors, numbers, stats, key)


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0, keep_unused=True)
def _merge_into(out, kind, split, base, vectors, numbers, stats, key):
  leaf = Leaf(kind, split, base, vectors, numbers, key, 0)
  return combine(leaf, stats).reshape(base.shape).astype(out.dtype)


def _device_cuts(kind, split, vectors, numbers, above, size):
  keeps = kind.method.keeps
  if keeps == 'varied':
    density = jnp.asarray(numbers.density[0], jnp.float32)
    variance = _variance_rows(vectors)
    some = jnp.sum(variance != 0, dtype=jnp.int32)
    larger = jnp.where(density >= 1, 0, (some.astype(jnp.float32) * density).astype(jnp.int32))
    (cut,) = _cuts_over([variance], (split,), TOP, jnp.stack(selection.halves(larger)))
    return jnp.where(density >= 1, jnp.array([-1, MOST, MOST], jnp.int32), cut)[None, None]
  if keeps not in _SIDES:
    return np.zeros((len(vectors), 0, 3), np.int32)
  if above is None:
    above = ranks(kind, numbers, size)
  cuts = [
    [_cuts_over([vector], (split,), side, above[i, e])[0] for e, side in enumerate(_SIDES[keeps])]
    for i, vector in enumerate(vectors)
  ]
  return jnp.stack([jnp.stack(edges) for edges in cuts])


@jax.jit
def _variance_rows(rows):
  """float32 [...], over the K arrays."""
  return variance([row.astype(jnp.float32) for row in rows])


def device_global_cuts(
  kind: Kind,
  vectors: Sequence[Mapping[str, jax.Array]],
  numbers: Numbers,
  splits: Mapping[str, int],
) -> dict[str, jax.Array]:
  """Cuts over all leaves of each vector, for `merge_leaf`: leaf to int32 [K, E, 3].

  Args:
    kind: of the scope 'global'.
    vectors: K times leaf name to array; the order of the leaves is that in which equals are kept.
    numbers: checked.
    splits: leaf name to `split`.
  """
  names = tuple(vectors[0])
  sides, order = _SIDES[kind.method.keeps], tuple(splits[name] for name in names)
  above = ranks(kind, numbers, sum(leaf.size for leaf in vectors[0].values()))
  found = [
    [
      _cuts_over([vector[name] for name in names], order, side, above[i, e])
      for e, side in enumerate(sides)
    ]
    for i, vector in enumerate(vectors)
  ]
  return {
    name: jnp.stack([jnp.stack([edge[j] for edge in edges]) for edges in found])
    for j, name in enumerate(names)
  }


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cuts_over(leaves, splits, side, larger):
  each = zip(leaves, splits, strict=True)
  leaves = [leaf.reshape(selection.matrix(leaf.shape, split)) for leaf, split in each]
  return selection.device_cuts(leaves, splits, larger, side)


# By blocks.


def leaf_statistics(
  kind: Kind,
  numbers: Numbers,
  shape: tuple[int, ...],
  blocks: Blocks,
  key: jax.Array,
  *,
  split: int = 0,
  cuts: np.ndarray | None = None,
) -> Stats:
  """What `merge_rows` must know of a leaf; reads nothing if the method needs nothing.

  Args:
    kind: what to do.
    numbers: checked by `check`.
    shape: of the leaf.
    blocks: `blocks(start, stop)` gives (start row, base rows, [K vector rows]) for those rows of
      axis 0, block by block. All rows are read in order: once for ties and breadcrumbs (twice where
      the first of several blocks misleads), once for a rescale or for angles, three times for a
      thinned sce. A few rows, or all with a split, are read once more to find one of many equals.
    key: as in `merge_leaf`.
    split: as in `merge_leaf`.
    cuts: from `host_global_cuts`, for the scope 'global'.
  """
  size = math.prod(shape)
  if cuts is None:
    cuts = _leaf_cuts(kind, numbers, shape, blocks, split)
  stats = Stats(cuts, np.zeros(0, np.float32), np.int32(size))
  if not sums_needed(kind):
    return stats
  rows = []
  for start, base, vectors in _gathered(kind, shape, blocks, split):
    rows.append(np.asarray(_sum_rows(kind, split, base, tuple(vectors), numbers, key, start, cuts)))
  return stats._replace(sums=np.asarray(_sum_of_rows(np.concatenate(rows, axis=1))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sum_rows(kind, split, base, vectors, numbers, key, start, cuts):
  return row_sums(Leaf(kind, split, base, vectors, numbers, key, start), cuts)


@jax.jit
def _sum_of_rows(rows):
  return tree(rows)


def _gathered(kind, shape, blocks, split):
  if not whole(kind, shape, split):
    yield from blocks(0, shape[0])
    return
  parts = list(blocks(0, shape[0]))
  vectors = [np.concatenate(rows) for rows in zip(*(part[2] for part in parts), strict=True)]
  base = np.concatenate([part[1] for part in parts])
  del parts
  yield 0, base, vectors


def _leaf_cuts(kind, numbers, shape, blocks, split) -> np.ndarray:
  keeps = kind.method.keeps
  size, k = math.prod(shape), len(numbers.weights)
  if keeps == 'varied':
    if numbers.density[0] >= 1:
      return np.array([[[-1, MOST, MOST]]], np.int32)

    def variances(start, stop):
      for at, _, vectors in blocks(start, stop):
        yield at, [np.asarray(_variance_rows(tuple(vectors)))]

    some = sum(int(np.count_nonzero(v[0])) for _, v in variances(0, shape[0]))
    larger = int(np.float32(some) * np.float32(numbers.density[0]))
    source = selection.Source(shape, split, variances)
    return selection.host_cuts([source], [(larger,)], (TOP,))[0]
  if keeps not in _SIDES:
    return np.zeros((k, 0, 3), np.int32)
  larger = [_larger(kind, numbers, i, size) for i in range(k)]
  if (numbers.density >= 1).all():
    one = [[(-1, -1, -1)] if keeps == 'largest' else [(MOST, -1, -1), (-1, -1, -1)]]
    return np.array(one * k, np.int32)
  source = selection.Source(shape, split, _only_vectors(blocks))
  return selection.host_cuts([source], larger, _SIDES[keeps])[0]


def _only_vectors(blocks: Blocks):
  return lambda start, stop: ((at, vectors) for at, _, vectors in blocks(start, stop))


def host_global_cuts(
  kind: Kind,
  numbers: Numbers,
  leaves: Mapping[str, tuple[tuple[int, ...], int, Blocks]],
) -> dict[str, np.ndarray]:
  """Cuts over all leaves of each vector, for `leaf_statistics`: leaf to int32 [K, E, 3].

  Args:
    kind: of the scope 'global'.
    numbers: checked.
    leaves: leaf name to (shape, split, blocks); the order is that in which equals are kept.
  """
  size = sum(math.prod(shape) for shape, _, _ in leaves.values())
  larger = [_larger(kind, numbers, i, size) for i in range(len(numbers.weights))]
  sources = [
    selection.Source(shape, split, _only_vectors(blocks))
    for shape, split, blocks in leaves.values()
  ]
  found = selection.host_cuts(sources, larger, _SIDES[kind.method.keeps])
  return dict(zip(leaves, found, strict=True))


def merge_rows(
  kind: Kind,
  out_dtype,
  base_rows: np.ndarray,
  vector_rows: Sequence[np.ndarray],
  numbers: Numbers,
  stats: Stats,
  key: jax.Array,
  start_row: int,
  *,
  split: int = 0,
) -> jax.Array:
  """Merges some rows of axis 0 of a leaf.

  Compiled for every shape of a block: a last block of fewer rows costs one more program.

  Raises:
    UsageError: a part of a leaf that must be given whole.
  """
  if whole(kind, base_rows.shape, split) and int(stats.size) != base_rows.size:
    raise UsageError(f'{kind.name} ranks along the first axis of this leaf: give it whole')
  dtype = np.dtype(out_dtype)
  return _merge_rows(
    kind, dtype, split, base_rows, tuple(vector_rows), numbers, stats, key, start_row
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _merge_rows(kind, dtype, split, base, vectors, numbers, stats, key, start):
  leaf = Leaf(kind, split, base, vectors, numbers, key, start)
  return combine(leaf, stats).reshape(base.shape).astype(dtype)
