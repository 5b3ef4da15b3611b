"""From a pool in memory and a point of the search to a candidate's parameters."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from optimer_jax.checkpoints.names import contracted_axes
from optimer_jax.checkpoints.quantized import Quantized
from optimer_jax.errors import UsageError
from optimer_jax.gemma3 import from_leaves, logical_axes, to_leaves
from optimer_jax.gemma3.placement import everywhere
from optimer_jax.merging import methods
from optimer_jax.merging.weighted_sum import ALL, Groups, Unmerged, weighted_sum
from optimer_jax.parallel.sharding import shardings
from optimer_jax.vectors.pool import Pool
from optimer_jax.vectors.room import PLACES

TOP = ('embedder', 'final_norm')  # a model's parameters outside its layers, first in its tree
# At weights of zero these give something else than the base, or have no weights at all.
_WITHOUT_ZERO = ('linear', 'model_stock', 'multislerp', 'sce', 'slerp')


@dataclasses.dataclass(frozen=True)
class MergeConfig:
  """How vectors become a candidate.

  Attributes:
    method: of `methods.METHODS`; task_arithmetic is the weighted sum of OptiMer.
    density: share of each vector that ties, dare, della and breadcrumbs keep; of sce: select_topk.
    gamma: share of the largest elements that breadcrumbs drops.
    epsilon: how far della's probabilities lie from the density.
    scale: multiplies the sum of the vectors (mergekit's lambda).
    t: slerp's way from the base to the model.
    normalize: divide by the sum of the weights; default: as the method does.
    rescale: give a thinned vector its L1 norm back; default: as the method does.
    scope: 'tensor' ranks magnitudes within a leaf, 'global' over a whole vector.
    seed: of the random masks of dare and della.
  """

  method: str = 'task_arithmetic'
  density: float = 1.0
  gamma: float = 0.01
  epsilon: float = 0.15
  scale: float = 1.0
  t: float = 0.5
  normalize: bool | None = None
  rescale: bool | None = None
  scope: str = 'tensor'
  seed: int = 0

  @property
  def kind(self) -> methods.Kind:
    return methods.Kind(self.method, self.normalize, self.rescale, self.scope)

  @property
  def is_weighted_sum(self) -> bool:
    return self.method == 'task_arithmetic' and self.scale == 1.0 and not self.normalize

  @property
  def places(self) -> tuple[str, ...]:
    """Where a pool may be, of `vectors.room.PLACES`."""
    return PLACES if self.is_weighted_sum else ('device',)

  def at(self, numbers: Mapping[str, float]) -> 'MergeConfig':
    """With the numbers of a point of the search: its density, where that is searched."""
    return dataclasses.replace(self, **numbers)

  def numbers(self, weights: list[float]) -> methods.Numbers:
    """Of K weights, checked.

    Raises:
      UserError: numbers that the method does not take.
    """
    numbers = methods.numbers(weights, self.density, self.gamma, self.epsilon, self.scale, self.t)
    methods.check(self.kind, numbers, len(weights))
    return numbers

  def identity(self, searched: bool) -> str:
    """What a study's trials depend on beside their points; '' for the weighted sum."""
    if self.is_weighted_sum:
      return ''
    values = dataclasses.asdict(self)
    if searched:
      del values['density']
    return ', '.join(f'{key} {value}' for key, value in values.items() if value is not None)

  def check_searchable(
    self, k: int, density: tuple[float, float] | None = None, linear: bool = False
  ) -> None:
    """Refuses what a search of K weights, and of the density between bounds, would stumble over.

    Args:
      k: vectors.
      density: its bounds, where it is searched.
      linear: whether the search needs the weighted sum, as it takes gradients or has groups.

    Raises:
      UsageError: an unknown method, or one whose weights of zero are not the base, with which a
        search begins; a density where the method has none; not the weighted sum, if it must be.
      UserError: numbers that the method does not take.
    """
    if self.method in _WITHOUT_ZERO:
      raise UsageError(
        f'{self.method} cannot be searched, as no weights of it give the base: merge with it, or '
        f'search {", ".join(sorted(set(methods.METHODS) - set(_WITHOUT_ZERO)))}'
      )
    self.numbers([1 / k] * k)
    if linear and (density or not self.is_weighted_sum):
      raise UsageError(
        f'gradients and groups of weights are of the weighted sum, not of {self.method} with these '
        'settings: take the plain task_arithmetic, or another sampler and no groups'
      )
    if density and methods.METHODS[self.method].keeps == 'all':
      raise UsageError(f'{self.method} keeps all of a vector: it has no density to search')
    for bound in (density[0], density[1] * (1 - 1e-6)) if density else ():
      self.at({'density': bound}).numbers([1 / k] * k)


def candidates(
  pool: Pool, config: MergeConfig = MergeConfig(), groups: Groups = ALL
) -> Callable[[Mapping[str, float]], dict]:
  """A function from a point to parameters that reuses the last candidate's memory.

  A point has the weights that `groups` names for the vectors of the pool, and may have a
  'density'. The parameters that the function returned before are gone when it is called again.
  Where the pool's place is 'scan', those of layers are `Unmerged`.
  """
  merged = TOP if pool.place == 'scan' else pool.base.keys()
  held = [jax.tree.map(jnp.copy, _part(pool.base, merged))]
  names = groups.weights(pool.names, pool.model.config)
  index = None if groups == ALL else groups.index(pool.model)

  def candidate(point: Mapping[str, float]) -> dict:
    weights = np.array([[point[name] for name in names[vector]] for vector in pool.names])
    if config.is_weighted_sum:
      w = np.asarray(weights[:, 0] if index is None else weights.T, np.float32)
      base, *vectors = (_part(tree, merged) for tree in (pool.base, *pool.vectors))
      own = None if index is None else index[: len(jax.tree.leaves(base))]
      held[0] = weighted_sum(held[0], base, vectors, w, groups=own)
      if pool.place == 'scan':
        return held[0] | _unmerged(pool, w, index)
    else:
      others = {key: value for key, value in point.items() if key not in pool.names}
      numbers = config.at(others).numbers(weights[:, 0].tolist())
      held[0] = _merged(held[0], pool, config, numbers)
    return held[0]

  return candidate


def _part(tree: dict, keys: Iterable[str]) -> dict:
  return {key: tree[key] for key in keys}


def _unmerged(pool: Pool, weights: np.ndarray, index: tuple | None) -> dict:
  """The layers' parameters; `weights` is [K], or [G, K] where `index` has the leaves' groups."""
  leaves, structure = jax.tree.flatten(pool.base)
  vectors = [structure.flatten_up_to(tree) for tree in pool.vectors]
  stacks = structure.flatten_up_to(logical_axes(pool.model))
  rows, placed, found = index or (0,) * len(leaves), {}, []
  for base, row, axes, *own in zip(leaves, rows, stacks, *vectors, strict=True):
    sizes = base.shape[: axes.count('layers')]
    if (row, sizes) not in placed:
      w = weights.reshape(-1, len(vectors))[np.asarray(row)]
      w = np.broadcast_to(w, (*sizes, len(vectors)))
      placed[row, sizes] = everywhere(w, pool.mesh)
    found.append(Unmerged(placed[row, sizes], base, tuple(own)))
  tree = structure.unflatten(found)
  return _part(tree, tree.keys() - {*TOP})


def _merged(buffer: dict, pool: Pool, config: MergeConfig, numbers: methods.Numbers) -> dict:
  """Leaf by leaf, each by a program compiled for its shape; stacked layers are taken apart."""
  model, kind = pool.model, config.kind
  out, base, *vectors = (to_leaves(model.config, x) for x in (buffer, pool.base, *pool.vectors))
  cuts = {}
  if kind.scope == 'global':
    splits = {leaf: contracted_axes(leaf) for leaf in base}
    exact = [{leaf: _dequantized(x) for leaf, x in vector.items()} for vector in vectors]
    cuts = methods.device_global_cuts(kind, exact, numbers, splits)
  merged = {}
  for leaf in base:
    merged[leaf] = methods.merge_leaf(
      kind,
      out[leaf],
      base[leaf],
      [_dequantized(vector[leaf]) for vector in vectors],
      numbers,
      methods.leaf_key(config.seed, leaf),
      split=contracted_axes(leaf),
      cuts=cuts.get(leaf),
    )
  params = from_leaves(model, merged)
  if pool.mesh is None:
    return params
  return jax.device_put(params, shardings(logical_axes(model), params, pool.mesh))


def _dequantized(leaf: jax.Array | Quantized) -> jax.Array:
  return leaf.dequantize() if isinstance(leaf, Quantized) else leaf
