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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from optimer_jax.errors import UsageError
from optimer_jax.gemma3.config import PERIOD, Gemma3Config
from optimer_jax.gemma3.layers import RESIDUAL, WHOLE, Block, Embedder, KVCache, RMSNorm, View, rope
from optimer_jax.gemma3.splash import SAVED, Packed, divides
from optimer_jax.parallel.sharding import constrain, platform

KINDS = ('local', 'global')
# How `hidden` attends where it can choose; 'auto' is 'splash' on TPU and 'plain' elsewhere.
ATTENTION = ('auto', 'plain', 'splash')
# What a layer keeps for its gradient beside its input, and does not compute again.
_policies = jax.checkpoint_policies
REMAT = {
  'none': None,  # no rematerialisation: it keeps everything
  'layer': _policies.nothing_saveable,
  # The products with weights, and what splash attention would have to be computed again for.
  'dots': _policies.save_from_both_policies(
    _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(SAVED)
  ),
}
# The caches of all layers: a tuple in the order of the layers, or stacks as the parameters have.
Layers = tuple[KVCache, ...] | dict[str, KVCache]


@dataclasses.dataclass(frozen=True)
class Model:
  """What a compiled function is specialised on: the architecture and how to compute it."""

  config: Gemma3Config
  dtype: str = 'float32'  # of activations and matrix products
  scan: bool = False
  attention: str = 'auto'  # one of ATTENTION
  remat: str = 'layer'  # what a layer keeps for its gradient: one of REMAT
  loss_chunks: int = 4  # pieces of the row whose logits are held at once

  def __post_init__(self):
    check_choices(self)


def check_choices(settings) -> None:
  """UsageError where the `attention` or `remat` of a dataclass is none that there is."""
  for key, known in {'attention': ATTENTION, 'remat': REMAT}.items():
    value = getattr(settings, key)
    if value not in known:
      raise UsageError(
        f'{type(settings).__name__}.{key} is {value!r}: it must be one of {", ".join(known)}'
      )


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

  def __call__(self, model: Model, tokens, positions, views, cache=None, prefix=None):
    c = self.config
    ropes = {
      'local': rope(positions, c.head_dim, c.local_theta),
      'global': rope(positions, c.head_dim, c.global_theta, c.rope_scale),
    }
    x = constrain(self.embedder.encode(tokens, jnp.dtype(model.dtype)), RESIDUAL)
    walk = self._scan if model.scan else self._unroll
    x, cache = walk(model, x, ropes, views, cache, prefix)
    return constrain(self.final_norm(x), WHOLE), cache

  def _unroll(self, model, x, ropes, views, cache, prefix):
    layers, new = [None] * self.config.num_layers, []
    for i, (block, *past) in enumerate(
      zip(self.layers, cache or layers, prefix or layers, strict=True)
    ):
      kind = 'global' if self.config.is_global(i) else 'local'
      graph, state = nnx.split(block)
      step = _remat(model, functools.partial(_block, graph))
      with jax.named_scope(f'layer_{i}'):
        x, layer_cache = step(state, x, ropes[kind], views[kind], *past)
      new.append(layer_cache)
    return x, tuple(new)

  def _scan(self, model, x, ropes, views, cache, prefix):
    c, new = self.config, {}
    cache, prefix = cache or {}, prefix or {}

    def step(graph, kind, x, state, *past):
      policy, block = REMAT[model.remat], functools.partial(_block, graph)
      # Inside a scan nothing can be shared with the forward pass, so no barrier is needed.
      block = jax.checkpoint(block, policy=policy, prevent_cse=False) if policy else block
      return block(state, x, ropes[kind], views[kind], *past)

    def local_layers(block, x, *past):
      graph, states = nnx.split(block)
      return jax.lax.scan(lambda x, now: step(graph, 'local', x, *now), x, (states, *past))

    def group(x, now):
      local, state, local_past, global_past = now
      x, local_cache = local_layers(nnx.merge(local_graph, local), x, *local_past)
      x, global_cache = step(global_graph, 'global', x, state, *global_past)
      return x, (local_cache, global_cache)

    # What is absent is None, a tree without leaves, and so is whatever is mapped of it.
    past = {key: (cache.get(key), prefix.get(key)) for key in ('local', 'global', 'tail')}
    if c.num_groups:
      local_graph, local_states = nnx.split(self.groups['local'])
      global_graph, global_states = nnx.split(self.groups['global'])
      xs = (local_states, global_states, past['local'], past['global'])
      x, (new['local'], new['global']) = jax.lax.scan(group, x, xs)
    if c.num_tail:
      x, new['tail'] = local_layers(self.tail, x, *past['tail'])
    return x, new


def _block(graph, state, x, r, view, cache, prefix):
  x, cache = nnx.merge(graph, state)(x, r, view, cache, prefix)
  return constrain(x, RESIDUAL), cache


def _remat(model, block):
  """Rematerialisation of an unrolled layer.

  What `jax.checkpoint` alone would compute again depends on the forward pass only: XLA's CPU
  compiler, which drops barriers before it orders the program, does so at once and keeps the result.
  So what is kept has 0 times the incoming gradient added to it.
  """
  policy = REMAT[model.remat]
  if policy is None:
    return block
  block = jax.checkpoint(block, policy=policy)
  run = jax.custom_vjp(block)

  def forward(state, *inputs):
    out, pull = jax.vjp(block, state, *inputs)
    return out, (pull, state)

  def backward(saved, gradients):
    pull, state = saved
    zero = 0 * gradients[0].ravel()[0]
    weights = {id(leaf) for leaf in jax.tree.leaves(state)}
    wait = lambda a: a if id(a) in weights or not jnp.issubdtype(a, jnp.floating) else a + zero
    return jax.tree.map(wait, pull)(gradients)

  run.defvjp(forward, backward)
  return run


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


class Prefix(NamedTuple):
  """What every row begins with, computed once: see `decoding.prefix_cache`.

  Attributes:
    layers: the keys and values of each layer, arranged as the layers are. The last slot holds the
      last token, so slots may be more than tokens, and in a local layer no more than its window.
    length: int32 scalar, the prefix's tokens.
  """

  layers: Layers
  length: jax.Array


def run(
  model: Model,
  params: dict,
  tokens: jax.Array,
  positions: jax.Array,
  views: dict[str, View | Packed],
  cache: Layers | None = None,
  prefix: Prefix | None = None,
) -> tuple[jax.Array, Layers]:
  """Hidden states [B, T, D] and the cache after them: what all forward passes have in common.

  Args:
    model: what to compute (static).
    params: the parameter tree, in the model's layout.
    tokens: int32 [B, T].
    positions: int32 [B, T], for the rotary angles.
    views: what the tokens look at in local and in global layers.
    cache: of earlier tokens of the rows.
    prefix: what all rows begin with.
  """
  graph, _ = _declare(model.config, model.scan)
  shared = None if prefix is None else prefix.layers
  return nnx.merge(graph, params)(model, tokens, positions, views, cache, shared)


def within_window(
  model: Model, kind: str, queries: jax.Array, keys: jax.Array, seen: jax.Array
) -> jax.Array:
  """`seen` [B, T, S], in local layers without the keys beyond the window.

  Args:
    model: whose window it is.
    kind: 'local' or 'global'.
    queries: int32 [B, T], positions.
    keys: int32 [B, S] or [S], positions.
    seen: bool, broadcastable to [B, T, S].
  """
  distance = queries[:, :, None] - keys[..., None, :]
  if kind == 'global':
    return jnp.broadcast_to(seen, distance.shape)
  return seen & (distance < model.config.window)


def prefix_mask(
  model: Model, kind: str, positions: jax.Array, prefix: Prefix | None
) -> jax.Array | None:
  """bool [B, T, P]: what queries at `positions`, all after the prefix, see of it."""
  if prefix is None:
    return None
  layers = prefix.layers
  if isinstance(layers, tuple):
    some = layers[0 if kind == 'local' else min(PERIOD, len(layers)) - 1]
  else:
    some = layers.get(kind, layers.get('tail'))
  slots = some.k.shape[-3]
  keys = prefix.length - slots + jnp.arange(slots)
  return within_window(model, kind, positions, keys, keys >= 0)


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
  branch_ids: jax.Array | None = None,
  prefix: Prefix | None = None,
) -> jax.Array:
  """Hidden states [B, T, D] after the last norm, of rows that may pack several documents.

  Splash attention, if the model says so, takes rows of a multiple of 128 tokens without branches
  and prefix. All else goes the plain way, with masks and logits [B, T, T].

  Args:
    model: what to compute (static).
    params: the parameter tree, in the model's layout.
    tokens: int32 [B, T]; a document starts with BOS.
    positions: int32 [B, T], counted from 0 in each document (after a prefix: from its length);
      default: one document a row.
    segment_ids: int32 [B, T]; tokens see their own segment only, 0 is padding.
    branch_ids: int32 [B, T]: a segment may be a tree, a trunk (0) and then branches (1, 2, …) that
      see the trunk and themselves only, and whose positions go on from the trunk's.
    prefix: what every document begins with, from `prefix_cache`.
  """
  batch, length = tokens.shape
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
  if segment_ids is None:
    segment_ids = jnp.ones_like(tokens)
  wanted = model.attention == 'splash' or (model.attention == 'auto' and platform() == 'tpu')
  if wanted and divides(length) and branch_ids is None and prefix is None:
    views = {'local': Packed(segment_ids, model.config.window), 'global': Packed(segment_ids, None)}
    return run(model, params, tokens, positions, views)[0]
  seen = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
  seen &= segment_ids[:, :, None] == segment_ids[:, None, :]
  if branch_ids is not None:
    keys = branch_ids[:, None, :]
    seen &= (keys == 0) | (keys == branch_ids[:, :, None])
  views = {
    kind: View(
      within_window(model, kind, positions, positions, seen),
      prefix_mask(model, kind, positions, prefix),
    )
    for kind in KINDS
  }
  return run(model, params, tokens, positions, views, None, prefix)[0]


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
