"""The gradient of a loss with respect to merge weights: dL/dw_k = <dL/dtheta, tau_k>.

One backward pass gives all K numbers of every leaf. Each layer's gradient is multiplied with the
vectors where it arises and goes no further, so that there is never one of all parameters, nor of
the whole embedding. What the layers keep of the tokens is as `Model.remat` says. In scanned layers
the five local ones of a period are taken from their stack together, with those of the vectors.

Shape letters: B rows, T slots and target tokens of a row, C target tokens of a row in a piece,
R in all its rows, D embed, V vocab, K vectors, G groups.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optimer_jax.checkpoints.quantized import Quantized
from optimer_jax.gemma3 import Gemma3Config, Model, logical_axes, to_leaves
from optimer_jax.gemma3.transformer import embed_logits, hidden
from optimer_jax.merging.weighted_sum import ALL, Groups, Unmerged

# Elements of the embedding's gradient that exist at a time: 33 MB.
BLOCK = 2**23


def weights_gradient(config: Gemma3Config, slopes: dict, groups: Groups = ALL) -> np.ndarray:
  """float64 [G, K]: the gradient with respect to the weights of `weighted_sum`.

  Args:
    config: of the model.
    slopes: from `likelihood_slopes`, on the host.
    groups: which leaves share weights; by default all, and G is 1.
  """
  leaves = to_leaves(config, slopes)
  names = groups.names(config)
  rows = [names.index(groups.of(leaf, config.num_layers)) for leaf in leaves]
  values = np.stack([*leaves.values()]).astype(np.float64)
  out = np.zeros((len(names), values.shape[1]))
  np.add.at(out, rows, values)
  return out


def likelihood_slopes(
  model: Model,
  chunk: int,
  params: dict,
  vectors: Sequence[dict],
  pieces: jax.Array,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  branch_ids: jax.Array | None,
  at: jax.Array,
  targets: jax.Array,
  factors: jax.Array,
) -> tuple[jax.Array, dict]:
  """Negative log likelihoods, and the derivatives of a sum of them along the vectors.

  Args:
    model: what to compute (static).
    chunk: C, a divisor of T (static).
    params: a candidate, in the model's layout.
    vectors: K trees of that structure, of float leaves or `Quantized`.
    pieces: int32 scalar: all targets are in the first `pieces` times C columns.
    tokens, positions, segment_ids, branch_ids: int32 [B, T], as `hidden` takes them.
    at: int32 [B, T], the slot that predicts each target.
    targets: int32 [B, T].
    factors: float32 [B, T], of the targets' nats in the sum; 0: it is none.

  Returns:
    float32 nats [B, T], and the slopes: a tree as the parameters', of float32 [K] for each leaf
    ([..., K] for one that stacks layers).
  """
  table, tables = params['embedder']['embedding'], [v['embedder']['embedding'] for v in vectors]
  # Of the embedding a batch looks up few rows: these are a table of their own, so that the gradient
  # has their size.
  flat = tokens.reshape(-1)
  looked_up = {'embedder': {'embedding': _rows(table, flat)}}
  watched = {**params, **looked_up}
  shared = [
    {**vector, 'embedder': {'embedding': _rows(rows, flat)}}
    for vector, rows in zip(vectors, tables, strict=True)
  ]

  each = functools.partial(jax.tree.map, is_leaf=lambda a: isinstance(a, Unmerged))

  def states(zeros: dict) -> jax.Array:
    x = hidden(
      model,
      each(lambda a, z, *rest: _Watched(a, z, rest), watched, zeros, *shared),
      jnp.arange(flat.size).reshape(tokens.shape),
      positions,
      segment_ids,
      branch_ids,
    )
    return jax.vmap(lambda row, slots: row[slots])(x, at)  # B T D

  stacks = each(
    lambda a, axes: jnp.zeros((*a.shape[: axes.count('layers')], len(vectors))),
    watched,
    logical_axes(model),
  )
  y, back = jax.vjp(states, stacks)
  nats, dy, of_table = _cross_entropy(chunk, table, tables, y, targets, factors, pieces)
  (slopes,) = back(dy)
  slopes['embedder']['embedding'] += of_table
  return nats, slopes


def _cross_entropy(
  chunk: int,
  table: jax.Array,
  tables: list,
  y: jax.Array,
  targets: jax.Array,
  factors: jax.Array,
  pieces: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Nats [B, T], the gradient of the sum to y [B, T, D], and its slopes [K].

  As the sum's gradient to each of its terms is known beforehand, a piece's logits are computed
  once, and dropped with the gradient to them.
  """
  vocab, width = table.shape
  block = min(vocab, max(BLOCK // width, 1))

  def piece(i, found):
    *both, slopes = found
    h, target, factor = (
      jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1) for a in (y, targets, factors)
    )
    shape, h = h.shape, h.reshape(-1, width)  # R D, with R = B C
    target, factor = target.reshape(-1, 1), factor.reshape(-1, 1)
    logits = embed_logits({'embedder': {'embedding': table}}, h)  # R V
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    nats = total - jnp.take_along_axis(logits, target, axis=-1)
    d = ((jnp.exp(logits - total) - (jnp.arange(vocab) == target)) * factor).astype(h.dtype)
    dh = jnp.einsum('RV,VD->RD', d, table.astype(h.dtype))

    def rows(j, slopes):
      # The last block begins early enough to be whole; what it repeats does not count.
      start = jnp.minimum(j * block, vocab - block)
      part = jax.lax.dynamic_slice_in_dim(d, start, block, axis=1)
      part = jnp.where(start + jnp.arange(block) >= j * block, part, 0)
      gradient = jnp.einsum('RV,RD->VD', part, h, preferred_element_type=jnp.float32)
      cut = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, block), tables)
      return slopes + _products(gradient, cut)

    new = nats.reshape(shape[:2]), dh.reshape(shape)
    nats, dy = (
      jax.lax.dynamic_update_slice_in_dim(a, b, i * chunk, axis=1)
      for a, b in zip(both, new, strict=True)
    )
    return nats, dy, jax.lax.fori_loop(0, -(-vocab // block), rows, slopes)

  nothing = jnp.zeros(targets.shape), jnp.zeros_like(y), jnp.zeros(len(tables))
  return jax.lax.fori_loop(0, pieces, piece, nothing)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watched:
  """A parameter that, where a layer takes its value, passes its gradient to the vectors."""

  value: jax.Array | Unmerged
  zeros: jax.Array
  vectors: tuple

  def __getitem__(self, index) -> jax.Array:
    return _value(self.value[...], self.zeros, self.vectors)[index]


@jax.custom_vjp
def _value(value: jax.Array, zeros: jax.Array, vectors: tuple) -> jax.Array:
  """`value`, as if zeros [K] times the vectors had been added to it."""
  return value


_value.defvjp(
  lambda value, zeros, vectors: (value, vectors),
  lambda vectors, gradient: (None, _products(gradient, vectors), None),
)


def _rows(table: jax.Array | Quantized, tokens: jax.Array) -> jax.Array | Quantized:
  """The rows [n, D] of n tokens; an embedding's scales are rows too."""
  return jax.tree.map(lambda a: a[tokens], table)


def _products(gradient: jax.Array, vectors: Sequence[jax.Array | Quantized]) -> jax.Array:
  """float32 [K]: inner products with the vectors."""
  g = gradient.astype(jnp.float32)
  return jnp.stack([jnp.sum(g * _exact(vector)) for vector in vectors])


def _exact(vector: jax.Array | Quantized) -> jax.Array:
  exact = vector.dequantize() if isinstance(vector, Quantized) else vector
  return exact.astype(jnp.float32)
