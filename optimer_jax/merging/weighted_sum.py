"""theta_0 + sum_i w_i tau_i: the kernel that every candidate of a search goes through."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optimer_jax.checkpoints.quantized import Quantized
from optimer_jax.errors import UsageError
from optimer_jax.gemma3 import Gemma3Config, Model, from_leaves, leaf_shapes
from optimer_jax.merging.combination import moved, times
from optimer_jax.vectors.geometry import layer_of, module_of

STACKS = ('groups', 'tail')  # of layers: see gemma3.transformer


@dataclasses.dataclass(frozen=True)
class Groups:
  """Which leaves share their merge weights; by default all do.

  Attributes:
    modules: weights of their own for each module type: embedding, the seven projections, norms.
    blocks: weights of their own for each of this many blocks of consecutive layers, of sizes that
      differ by one at most; the embedding stands alone and the last norm goes with the last block.
  """

  modules: bool = False
  blocks: int = 1

  def of(self, leaf: str, num_layers: int) -> str:
    """The name of a leaf's group.

    Raises:
      UsageError: more blocks than layers, or none.
    """
    if not 1 <= self.blocks <= num_layers:
      raise UsageError(f'{num_layers} layers cannot be divided into {self.blocks} blocks')
    module = module_of(leaf) if self.modules else ''
    if self.blocks == 1:
      return module or 'all'
    if module_of(leaf) == 'embedding':
      return 'embedding'
    layer = layer_of(leaf)
    block = (num_layers - 1 if layer is None else layer) * self.blocks // num_layers
    return f'block {block}' + (f' {module}' if module else '')

  def names(self, config: Gemma3Config) -> tuple[str, ...]:
    """The G groups of a model, in the order of the rows of [G, K] weights."""
    return tuple(dict.fromkeys(self.of(leaf, config.num_layers) for leaf in leaf_shapes(config)))

  def index(self, model: Model) -> tuple:
    """The group's number of each leaf of the model's parameters, for `weighted_sum`.

    A leaf that stacks layers has nested tuples.
    """
    config = model.config
    number = {name: i for i, name in enumerate(self.names(config))}
    leaves = {x: np.asarray(number[self.of(x, config.num_layers)]) for x in leaf_shapes(config)}
    return tuple(_hashable(x.tolist()) for x in jax.tree.leaves(from_leaves(model, leaves)))

  def weights(self, vectors: Sequence[str], config: Gemma3Config) -> dict[str, tuple[str, ...]]:
    """The names of the weights of each vector, in the order of the groups.

    Without groups that of the vector itself, else 'vector:group'.
    """
    names = self.names(config)
    return {v: tuple(f'{v}:{g}' for g in names) if len(names) > 1 else (v,) for v in vectors}


ALL = Groups()


def _hashable(value):
  return tuple(map(_hashable, value)) if isinstance(value, list) else value


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True, static_argnames='groups')
def weighted_sum(
  buffer: dict,
  base: dict,
  vectors: Sequence[dict],
  weights: jax.Array,
  groups: tuple | None = None,
) -> dict:
  """Writes base + sum_i weights[i] vectors[i] into the buffer of an earlier candidate.

  Sums in float32 and rounds once, to the buffer's dtype. Every byte of base and vectors is read
  once and nothing is allocated: on CPU a fresh output costs three times the time. New weights do
  not recompile. Arrays are combined place by place, so sharded ones need no communication. Vectors
  in the host's memory come to the devices layer by layer. Where the vectors add nothing the base
  stays as it is, bit for bit.

  Args:
    buffer: parameters whose memory is given up (donated): do not use them again.
    base: parameters of the same structure.
    vectors: K trees of the same structure, of any float dtypes or `Quantized`.
    weights: float32 [K], or [G, K] with `groups`.
    groups: the group of each leaf, from `Groups.index`.

  Returns:
    The candidate, in the buffer's place.
  """
  out, structure = jax.tree.flatten_with_path(buffer)
  rows = groups or (0,) * len(out)
  weights = weights.reshape(-1, len(vectors))
  flat = [structure.flatten_up_to(tree) for tree in (base, *vectors)]
  sums = [
    (_by_layer if path[0].key in STACKS and _is_far(arrays) else _leaf)(
      o, weights[np.asarray(row)], *arrays
    )
    for (path, o), row, *arrays in zip(out, rows, *flat, strict=True)
  ]
  return structure.unflatten(sums)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unmerged:
  """A parameter in a candidate's tree that is merged where a layer takes its value.

  Attributes:
    weights: float32 [K], or [..., K] over the leading axes of a leaf that stacks layers.
    base: of the base.
    vectors: K, as `weighted_sum` takes them.
  """

  weights: jax.Array
  base: jax.Array
  vectors: tuple

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  def __getitem__(self, index) -> jax.Array:
    return _leaf(self.base, self.weights, self.base, *self.vectors)[index]


def near(tree):
  """Arrays in the devices' memory, brought there if they are in the host's; inside a jit."""
  here = lambda a: jax.device_put(a, jax.memory.Space.Device) if _is_far(a) else a
  return jax.tree.map(here, tree)


def _is_far(tree) -> bool:
  return any(jax.typeof(a).memory_space == jax.memory.Space.Host for a in jax.tree.leaves(tree))


def _by_layer(out: jax.Array, weights: jax.Array, base: jax.Array, *vectors) -> jax.Array:
  """As `_leaf`, one layer (of a stack of stacks, one stack) after the other."""

  def layer(i, out):
    at = lambda tree: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, 0, False), tree)
    new = _leaf(at(out), at(weights) if weights.ndim > 1 else weights, *at((base, *vectors)))
    return jax.lax.dynamic_update_index_in_dim(out, new, i, 0)

  return jax.lax.fori_loop(0, len(out), layer, out)


def _leaf(out: jax.Array, weights: jax.Array, base: jax.Array, *vectors) -> jax.Array:
  """One leaf; `weights` is [K], or [..., K] over the leading axes of a leaf that stacks layers."""
  change = jnp.zeros((), jnp.float32)
  for i, vector in enumerate(vectors):
    weight = weights[..., i].reshape(*weights.shape[:-1], *[1] * (base.ndim - weights.ndim + 1))
    vector = near(vector)
    exact = vector.dequantize() if isinstance(vector, Quantized) else vector.astype(jnp.float32)
    change += times(weight, exact)
  return moved(base.astype(jnp.float32), change).astype(out.dtype)
