"""Greedy decoding with a key-value cache."""

import functools

import jax
import jax.numpy as jnp

from optimer_jax.gemma3.transformer import Model, cached_hidden, embed_logits, empty_cache


@functools.partial(jax.jit, static_argnames=('model', 'max_new', 'eos'))
def generate(
  model: Model, params: dict, tokens: jax.Array, lengths: jax.Array, *, max_new: int, eos: int = 1
) -> jax.Array:
  """The most likely continuation of each prompt.

  Args:
    model: what to compute (static).
    params: the parameter tree.
    tokens: int32 [B, T], prompts with BOS first, padded on the right with anything.
    lengths: int32 [B], tokens of each prompt, at least 1.
    max_new: how many tokens to add at most, at least 1 (static).
    eos: a row that has produced this token is filled up with it.

  Returns:
    int32 [B, max_new].
  """
  batch, width = tokens.shape
  rows = jnp.arange(batch)
  cache = empty_cache(model, batch, width + max_new)
  positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
  x, cache = cached_hidden(model, params, tokens, positions, cache)

  def pick(x):
    return jnp.argmax(embed_logits(params, x), axis=-1).astype(jnp.int32)

  token = pick(x[rows, lengths - 1])

  def going(state):
    step, token, _, _ = state
    return (step < max_new) & jnp.any(token != eos)  # `out` is full of eos already

  def step(state):
    step, token, cache, out = state
    out = out.at[:, step].set(token)
    x, cache = cached_hidden(model, params, token[:, None], (lengths + step)[:, None], cache)
    return step + 1, jnp.where(token == eos, eos, pick(x[:, 0])), cache, out

  out = jnp.full((batch, max_new), eos, jnp.int32)
  return jax.lax.while_loop(going, step, (0, token, cache, out))[3]
