"""Cross-entropy that never holds batch x length x vocab logits."""

import jax
import jax.numpy as jnp

from optimer_jax.gemma3.transformer import Model, embed_logits, hidden


def token_nats(
  model: Model,
  params: dict,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Negative log likelihood of each next token, in nats.

  The row is cut in `model.loss_chunks` pieces; a piece's logits live only while its loss, or the
  gradient of its loss, is computed.

  Args:
    model: what to compute (static).
    params: the parameter tree.
    tokens, positions, segment_ids: int32 [B, T], as `hidden` takes them.

  Returns:
    nats [B, T] float32 and mask [B, T] bool: entry t scores token t + 1 given those up to t, where
    both stand in one segment; elsewhere nats is 0.
  """
  x = hidden(model, params, tokens, positions, segment_ids)
  targets = jnp.roll(tokens, -1, axis=1)
  following = jnp.roll(segment_ids, -1, axis=1).at[:, -1].set(0)
  mask = (segment_ids == following) & (segment_ids > 0)

  @jax.checkpoint
  def piece(table, x, targets):
    logits = embed_logits({'embedder': {'embedding': table}}, x)  # B C V
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked

  batch, length = tokens.shape
  size = -(-length // model.loss_chunks)
  pad = size * model.loss_chunks - length

  def split(a):
    a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(batch, model.loss_chunks, size, *a.shape[2:]), 1, 0)

  table = params['embedder']['embedding']
  nats = jax.lax.map(lambda now: piece(table, *now), (split(x), split(targets)))  # chunks B C
  nats = jnp.moveaxis(nats, 0, 1).reshape(batch, -1)[:, :length]
  return jnp.where(mask, nats, 0.0), mask
