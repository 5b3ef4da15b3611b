"""Key-value caches: a prefix that rows share, prompts, and the tokens that follow them.

A row's own tokens are counted from 0 after the prefix, if there is one. A layer's cache is a ring:
own token p takes slot p modulo the slots, of which a local layer needs no more than its window.
"""

import jax
import jax.numpy as jnp

from optimer_jax.gemma3.layers import View
from optimer_jax.gemma3.transformer import (
  KINDS,
  Layers,
  Model,
  Prefix,
  abstract_params,
  prefix_mask,
  run,
  within_window,
)


def prefix_cache(model: Model, params: dict, tokens: jax.Array, length: jax.Array) -> Prefix:
  """The keys and values of what all rows begin with.

  Args:
    model: what to compute (static).
    params: the parameter tree.
    tokens: int32 [P], BOS first, padded on the right with anything.
    length: int32 scalar, how many of the tokens are the prefix, at least 1.
  """
  (size,) = tokens.shape
  positions = jnp.arange(size)[None]
  seen = jnp.tril(jnp.ones((size, size), bool))[None]
  views = {}
  for kind in KINDS:
    slots = _slots(model, kind, size)
    keep = jnp.maximum(length - slots + jnp.arange(slots), 0)[None]
    views[kind] = View(within_window(model, kind, positions, positions, seen), keep=keep)
  _, cache = run(model, params, tokens[None], positions, views)
  return Prefix(jax.tree.map(lambda a: a.squeeze(a.ndim - 4), cache), jnp.asarray(length))


def prefill(
  model: Model,
  params: dict,
  tokens: jax.Array,
  lengths: jax.Array,
  slots: int,
  prefix: Prefix | None = None,
) -> tuple[jax.Array, Layers]:
  """Reads prompts: the hidden states [B, D] of their last tokens, and their cache.

  Args:
    model: what to compute (static).
    params: the parameter tree.
    tokens: int32 [B, T], each prompt (without the prefix) padded on the right with anything.
    lengths: int32 [B], tokens of each prompt, at least 1.
    slots: of the cache: room for a prompt and all that is to follow it (static).
    prefix: what the prompts go on from.
  """
  batch, width = tokens.shape
  start = 0 if prefix is None else prefix.length
  positions = jnp.broadcast_to(start + jnp.arange(width), (batch, width))
  seen = jnp.tril(jnp.ones((width, width), bool))[None]
  views = {}
  for kind in KINDS:
    views[kind] = View(
      within_window(model, kind, positions, positions, seen),
      prefix_mask(model, kind, positions, prefix),
      keep=jnp.maximum(_held(lengths - 1, _slots(model, kind, slots)), 0),
    )
  x, cache = run(model, params, tokens, positions, views, prefix=prefix)
  return x[jnp.arange(batch), lengths - 1], cache


def step(
  model: Model,
  params: dict,
  tokens: jax.Array,
  at: jax.Array,
  cache: Layers,
  slots: int,
  prefix: Prefix | None = None,
) -> tuple[jax.Array, Layers]:
  """Reads one more token of each row: its hidden state [B, D], and the cache with it.

  Args:
    model: what to compute (static).
    params: the parameter tree.
    tokens: int32 [B].
    at: int32 [B], which of its row's own tokens each is, from 0.
    cache: of the tokens before.
    slots: as `prefill` was given (static).
    prefix: as `prefill` was given.
  """
  start = 0 if prefix is None else prefix.length
  positions = (start + at)[:, None]
  views = {}
  for kind in KINDS:
    held = _held(at, _slots(model, kind, slots))
    views[kind] = View(
      within_window(model, kind, positions, start + held, (held >= 0)[:, None]),
      prefix_mask(model, kind, positions, prefix),
      slots=(at % held.shape[1])[:, None],
    )
  x, cache = run(model, params, tokens[:, None], positions, views, cache, prefix)
  return x[:, 0], cache


def empty_cache(model: Model, batch: int, slots: int) -> Layers:
  """A cache of `batch` rows that hold nothing yet, for `insert`."""
  tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
  lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
  _, cache = jax.eval_shape(
    lambda *a: prefill(model, *a, slots), abstract_params(model), tokens, lengths
  )
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), cache)


def insert(cache: Layers, rows: jax.Array, new: Layers) -> Layers:
  """`cache` with its `rows` [b] replaced by those of `new`; a row out of range is left out."""

  def replaced(a, b):
    stack = (slice(None),) * (a.ndim - 4)
    return a.at[(*stack, rows)].set(b, mode='drop')

  return jax.tree.map(replaced, cache, new)


def _slots(model: Model, kind: str, slots: int) -> int:
  return slots if kind == 'global' else min(slots, model.config.window)


def _held(last: jax.Array, slots: int) -> jax.Array:
  """int32 [B, S]: which own token each slot holds when token `last` [B] is in; negative: none."""
  return last[:, None] - (last[:, None] - jnp.arange(slots)) % slots
