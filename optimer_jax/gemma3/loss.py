"""Cross-entropy that never holds batch x length x vocab logits.

Shape letters: B rows, T tokens of a row, N of all rows, D embed, V vocab, C of it at a time.
"""

import functools

import jax
import jax.numpy as jnp

from optimer_jax.gemma3.transformer import Model, embed_logits, hidden

BLOCK = 2048  # C: as many logits of a thousand tokens as stay in a processor's cache


def token_nats(
  model: Model,
  params: dict,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Negative log likelihood of each next token, in nats.

  Where layers are scanned, or several devices may share the vocabulary, the row is cut in
  `model.loss_chunks` pieces, and a piece's logits live only while its loss, or the gradient of its
  loss, is computed. Else all tokens go through the vocabulary by blocks.

  Args:
    model: what to compute (static).
    params: the parameter tree.
    tokens, positions, segment_ids: int32 [B, T], as `hidden` takes them.

  Returns:
    nats [B, T] float32 and mask [B, T] bool: entry t scores token t + 1 given those up to t, where
    both stand in one segment; elsewhere nats is 0.
  """
  targets = jnp.roll(tokens, -1, axis=1)
  following = jnp.roll(segment_ids, -1, axis=1).at[:, -1].set(0)
  mask = (segment_ids == following) & (segment_ids > 0)
  table = params['embedder']['embedding']
  if model.scan or jax.sharding.get_abstract_mesh().size > 1:
    x = hidden(model, params, tokens, positions, segment_ids)
    nats = _nats_by_pieces(table, x, targets, model.loss_chunks)
  else:
    # The rows that are looked up are a table of their own: see `_with_rows`.
    table, rows = _with_rows(table, tokens.reshape(-1))
    params = {**params, 'embedder': {'embedding': rows}}
    places = jnp.arange(tokens.size).reshape(tokens.shape)
    x = hidden(model, params, places, positions, segment_ids)
    flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    nats = nats_by_blocks(table, *flat, BLOCK).reshape(tokens.shape)
  return jnp.where(mask, nats, 0.0), mask


def _nats_by_pieces(table: jax.Array, x: jax.Array, targets: jax.Array, pieces: int) -> jax.Array:
  """Nats [B, T] of targets [B, T] after hidden states [B, T, D]."""
  batch, length = targets.shape
  size = -(-length // pieces)
  pad = size * pieces - length

  @jax.checkpoint
  def piece(table, x, targets):
    logits = embed_logits({'embedder': {'embedding': table}}, x)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked

  def split(a):
    a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(batch, pieces, size, *a.shape[2:]), 1, 0)

  nats = jax.lax.map(lambda now: piece(table, *now), (split(x), split(targets)))
  return jnp.moveaxis(nats, 0, 1).reshape(batch, -1)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def nats_by_blocks(table: jax.Array, x: jax.Array, targets: jax.Array, block: int) -> jax.Array:
  """Nats [N] of targets [N] after hidden states [N, D], `block` of the vocabulary at a time.

  Logits are computed twice, for their sum and for the gradient, and never leave the processor's
  cache; each row of the gradient to the table [V, D] is written once.
  """
  return _forward(table, x, targets, block)[0]


def _forward(table, x, targets, block):
  def add(j, found):
    most, total, own = found
    logits, _, ids, new = _block(table, x, block, j)
    at = jnp.clip(targets - ids[0], 0, ids.size - 1)
    picked = jnp.take_along_axis(logits, at[:, None], axis=-1)[:, 0]
    own = jnp.where(ids[at] == targets, picked, own)
    logits = jnp.where(new, logits, -jnp.inf)
    higher = jnp.maximum(most, logits.max(-1))
    total = total * jnp.exp(most - higher) + jnp.exp(logits - higher[:, None]).sum(-1)
    return higher, total, own

  zeros = jnp.zeros(targets.shape)
  found = jax.lax.fori_loop(0, _blocks(table, block), add, (zeros - jnp.inf, zeros, zeros))
  most, total, own = found
  log_total = most + jnp.log(total)
  return log_total - own, (table, x, targets, log_total)


def _backward(block, saved, gradient):
  table, x, targets, log_total = saved

  def add(j, found):
    dx, of_table = found
    logits, rows, ids, new = _block(table, x, block, j)
    d = (jnp.exp(logits - log_total[:, None]) - (ids == targets[:, None])) * gradient[:, None]
    d = d.astype(x.dtype)
    dx += jnp.einsum('NC,CD->ND', jnp.where(new, d, 0), rows, preferred_element_type=jnp.float32)
    # What the last block repeats is the same again.
    of_rows = jnp.einsum('NC,ND->CD', d, x, preferred_element_type=of_table.dtype)
    return dx, jax.lax.dynamic_update_slice_in_dim(of_table, of_rows, ids[0], 0)

  nothing = jnp.zeros(x.shape), jnp.zeros_like(table)
  dx, of_table = jax.lax.fori_loop(0, _blocks(table, block), add, nothing)
  return of_table, dx.astype(x.dtype), None


nats_by_blocks.defvjp(_forward, _backward)


def _blocks(table: jax.Array, block: int) -> int:
  return -(-len(table) // block)


def _block(table: jax.Array, x: jax.Array, block: int, j: jax.Array) -> tuple[jax.Array, ...]:
  """Logits [N, C] of the j-th block, its rows [C, D], which these are [C], and which are new [C].

  The last block begins early enough to be whole.
  """
  size = min(block, len(table))
  start = jnp.minimum(j * block, len(table) - size)
  rows = jax.lax.dynamic_slice_in_dim(table, start, size).astype(x.dtype)
  ids = start + jnp.arange(size)
  logits = jnp.einsum('ND,CD->NC', x, rows, preferred_element_type=jnp.float32)
  return logits, rows, ids, ids >= j * block


@jax.custom_vjp
def _with_rows(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The table [V, D], and its rows [N, D] of tokens [N].

  Their gradients are added row by row: the plain way makes a second table of the rows' alone.
  """
  return table, table[tokens]


_with_rows.defvjp(
  lambda table, tokens: (_with_rows(table, tokens), tokens),
  lambda tokens, gradients: (gradients[0].at[tokens].add(gradients[1]), None),
)
