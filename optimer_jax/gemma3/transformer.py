"""The text tower as pure functions of a plain parameter tree.

One structure of parameters serves the model, its gradients, its optimizer moments, distribution
vectors and merge candidates. It has one of two layouts:

  unrolled (CPU: the faster step)           scanned (accelerators: the faster compile)
    embedder.embedding                        embedder.embedding
    layers.0 … layers.L-1                     groups.local [L/6, 5, …]  groups.global [L/6, …]
                                              tail [L%6, …]
    final_norm.scale                          final_norm.scale

`optimer_jax.gemma3.layout` goes from one to the other by way of named leaves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from optimer_jax.gemma3.config import PERIOD, Gemma3Config
from optimer_jax.gemma3.layers import Block, Embedder, KVCache, RMSNorm, rope
from optimer_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Model:
  """What a compiled function is specialised on: the architecture and how to compute it."""

  config: Gemma3Config
  dtype: str = 'float32'  # of activations and matrix products
  scan: bool = False
  remat: bool = True  # keep a layer's input only, and compute the rest again for the gradient
  loss_chunks: int = 4  # pieces of the row whose logits are held at once


class Transformer(nnx.Module):
  """Declares the parameters of both layouts and walks the layers."""

  def __init__(self, config: Gemma3Config, scan: bool):
    self.config = config
    self.embedder = Embedder(config)
    if scan:
      # A stack of no layers is left out: an empty array cannot be stored.
      if config.num_groups:
        self.groups = nnx.Dict(
          local=Block(config, (config.num_groups, PERIOD - 1)),
          **{'global': Block(config, (config.num_groups,))},
        )
      if config.num_tail:
        self.tail = Block(config, (config.num_tail,))
    else:
      self.layers = nnx.List([Block(config) for _ in range(config.num_layers)])
    self.final_norm = RMSNorm(config.embed_dim, 'embed', config.norm_eps)

  def __call__(self, model: Model, tokens, positions, masks, cache, slots):
    c = self.config
    ropes = {
      'local': rope(positions, c.head_dim, c.local_theta),
      'global': rope(positions, c.head_dim, c.global_theta, c.rope_scale),
    }
    x = constrain(
      self.embedder.encode(tokens, jnp.dtype(model.dtype)), ('batch', 'length', 'embed')
    )
    walk = self._scan if model.scan else self._unroll
    x, cache = walk(model, x, ropes, masks, cache, slots)
    return self.final_norm(x), cache

  def _unroll(self, model, x, ropes, masks, cache, slots):
    new = []
    for i, block in enumerate(self.layers):
      kind = 'global' if self.config.is_global(i) else 'local'
      graph, state = nnx.split(block)
      step = functools.partial(_block, graph)
      step = jax.checkpoint(step) if model.remat else step
      layer_cache = jax.tree.map(lambda a, i=i: a[i], cache)
      with jax.named_scope(f'layer_{i}'):
        x, layer_cache = step(state, x, ropes[kind], masks[kind], layer_cache, slots)
      new.append(layer_cache)
    return x, jax.tree.map(lambda *a: jnp.stack(a), *new)

  def _scan(self, model, x, ropes, masks, cache, slots):
    c = self.config

    def step(graph, kind, x, state, cache):
      # Inside a scan nothing can be shared with the forward pass, so no barrier is needed.
      block = functools.partial(_block, graph)
      block = jax.checkpoint(block, prevent_cse=False) if model.remat else block
      return block(state, x, ropes[kind], masks[kind], cache, slots)

    def local_layers(block, x, caches):
      graph, states = nnx.split(block)
      return jax.lax.scan(lambda x, now: step(graph, 'local', x, *now), x, (states, caches))

    def group(x, now):
      local, state, caches = now
      first = jax.tree.map(lambda a: a[:-1], caches)
      end = jax.tree.map(lambda a: a[-1], caches)
      x, first = local_layers(nnx.merge(local_graph, local), x, first)
      x, end = step(global_graph, 'global', x, state, end)
      return x, jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), first, end)

    # Without a cache `cache` is None, a tree without leaves, and so is whatever is mapped of it.
    cut, new = c.num_groups * PERIOD, []
    if c.num_groups:
      local_graph, local_states = nnx.split(self.groups['local'])
      global_graph, global_states = nnx.split(self.groups['global'])
      caches = jax.tree.map(lambda a: a[:cut].reshape(-1, PERIOD, *a.shape[1:]), cache)
      x, caches = jax.lax.scan(group, x, (local_states, global_states, caches))
      new.append(jax.tree.map(lambda a: a.reshape(cut, *a.shape[2:]), caches))
    if c.num_tail:
      x, caches = local_layers(self.tail, x, jax.tree.map(lambda a: a[cut:], cache))
      new.append(caches)
    return x, jax.tree.map(lambda *a: jnp.concatenate(a), *new)


def _block(graph, state, x, r, mask, cache, slots):
  x, cache = nnx.merge(graph, state)(x, r, mask, cache, slots)
  return constrain(x, ('batch', 'length', 'embed')), cache


@functools.lru_cache
def _declare(config: Gemma3Config, scan: bool):
  return nnx.split(nnx.eval_shape(lambda: Transformer(config, scan)))


def abstract_params(model: Model, dtype: jnp.dtype = jnp.float32) -> dict:
  """The parameter tree as `jax.ShapeDtypeStruct`s: nothing is allocated."""
  _, state = _declare(model.config, model.scan)
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), nnx.to_pure_dict(state))


def logical_axes(model: Model) -> dict:
  """The parameter tree with a tuple of logical axis names in place of each array."""
  _, state = _declare(model.config, model.scan)
  return nnx.to_pure_dict(
    jax.tree.map(
      lambda v: v.replace(v.get_metadata()['axes']),
      state,
      is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
  )


def embed_logits(params: dict, x: jax.Array) -> jax.Array:
  """Hidden states [..., D] to float32 logits [..., V] through the tied embedding."""
  table = params['embedder']['embedding'].astype(x.dtype)
  return jnp.einsum('...D,VD->...V', x, table, preferred_element_type=jnp.float32)


def hidden(
  model: Model,
  params: dict,
  tokens: jax.Array,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """Hidden states [B, T, D] after the last norm, of rows that may pack several documents.

  Args:
    model: what to compute (static).
    params: the parameter tree, in the model's layout.
    tokens: int32 [B, T]; a document starts with BOS.
    positions: int32 [B, T], counted from 0 in each document; default: one document a row.
    segment_ids: int32 [B, T]; tokens see their own segment only, 0 is padding.
  """
  batch, length = tokens.shape
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
  at = jnp.arange(length)
  distance = at[:, None] - at[None, :]  # T S
  causal = jnp.broadcast_to(distance >= 0, (batch, length, length))
  if segment_ids is not None:
    causal &= segment_ids[:, :, None] == segment_ids[:, None, :]
  masks = {'global': causal, 'local': causal & (distance < model.config.window)}
  graph, _ = _declare(model.config, model.scan)
  x, _ = nnx.merge(graph, params)(model, tokens, positions, masks, None, None)
  return x


def forward(
  model: Model,
  params: dict,
  tokens: jax.Array,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """Float32 logits [B, T, V]; the arguments are those of `hidden`.

  For losses use `token_nats`, which never holds them all.
  """
  return embed_logits(params, hidden(model, params, tokens, positions, segment_ids))


def empty_cache(model: Model, batch: int, slots: int) -> KVCache:
  """A cache for every layer: [L, B, S, K, H], zeros."""
  c = model.config
  shape = (c.num_layers, batch, slots, c.num_kv_heads, c.head_dim)
  return KVCache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))


def cached_hidden(
  model: Model, params: dict, tokens: jax.Array, positions: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
  """Hidden states [B, T, D] of `tokens` at `positions`, which look at the cache they enter.

  A token at position p takes slot p and sees the slots up to p, so whatever padding left in
  later slots is overwritten before it can be seen.
  """
  slots = jnp.arange(cache.k.shape[2])
  distance = positions[:, :, None] - slots  # B T S
  causal = distance >= 0
  masks = {'global': causal, 'local': causal & (distance < model.config.window)}
  graph, _ = _declare(model.config, model.scan)
  return nnx.merge(graph, params)(model, tokens, positions, masks, cache, positions)
