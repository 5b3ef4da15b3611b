"""Log likelihoods of many (context, target) requests.

`plan` arranges the requests once, for all candidates; `log_likelihoods` runs a candidate through
the plan, in as many programs as the plan has shapes.

Shape letters: B rows of a batch, T slots of a row, C slots whose logits are held at a time,
D embed, V vocab, R requests.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from optimer_jax.evaluation.batching import SMALLEST, Continuation, Plan, plan
from optimer_jax.gemma3 import Model, prefix_cache
from optimer_jax.gemma3.transformer import Prefix, embed_logits, hidden
from optimer_jax.parallel.sharding import batch_sharding, constrain

__all__ = ['Continuation', 'Likelihood', 'Plan', 'log_likelihoods', 'plan']

# What a program takes of a batch.
ARRAYS = ('tokens', 'positions', 'segment_ids', 'branch_ids', 'at', 'targets', 'columns')
# Logits held at once: enough rows for a fast matrix product, and no more than 134 MB.
LOGIT_ROWS = 256
LOGITS = 2**25


class Likelihood(NamedTuple):
  """What a candidate makes of R requests, in their order.

  Attributes:
    nats: float64 [R], the negative log likelihood of each whole target; NaN where the model gave
      a number that is not finite.
    greedy: bool [R], whether no token of the target had a likelier rival.
  """

  nats: np.ndarray
  greedy: np.ndarray


def log_likelihoods(model: Model, params: dict, plan: Plan, mesh: Mesh | None = None) -> Likelihood:
  """Scores every request once; programs are shared by all candidates and all plans of one shape.

  Args:
    model: what to compute.
    params: the candidate, placed on the mesh if there is one.
    plan: of `plan`, with the mesh's data times fsdp as its `shards`.
    mesh: devices, of all processes, that share the rows. Every process gets every result.
  """
  results = []
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    for group in plan.groups:
      prefix = None
      if group.length:
        prefix = _prefix(model, params, group.prefix, np.int32(group.length))
      queued = []
      for batch in group.batches:
        chunk = _chunk(len(batch.tokens) // plan.shards, model.config.vocab_size)
        arrays = {name: _placed(getattr(batch, name), mesh) for name in ARRAYS}
        pieces = np.int32(-(-batch.scored // chunk))
        queued.append(_score(model, chunk, params, prefix, pieces, **arrays))
      # The device always has a group's work to go on with, and never more than two prefixes.
      if results:
        jax.block_until_ready(results[-1])
      results.append(queued)

  count = int(plan.distinct.max(initial=-1)) + 1
  nats, misses = np.zeros(count), np.zeros(count)
  for group, queued in zip(plan.groups, results, strict=True):
    for batch, (batch_nats, batch_greedy) in zip(group.batches, queued, strict=True):
      real = batch.owner >= 0
      found = np.asarray(batch_nats, np.float64)[real]
      found[~np.isfinite(found)] = np.nan
      np.add.at(nats, batch.owner[real], found)
      np.add.at(misses, batch.owner[real], ~np.asarray(batch_greedy)[real])
  return Likelihood(nats[plan.distinct], misses[plan.distinct] == 0)


# What is compiled.

_prefix = jax.jit(prefix_cache, static_argnames='model')


@functools.partial(jax.jit, static_argnames=('model', 'chunk'))
def _score(
  model: Model,
  chunk: int,
  params: dict,
  prefix: Prefix | None,
  pieces: jax.Array,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  branch_ids: jax.Array,
  at: jax.Array,
  targets: jax.Array,
  columns: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Nats, and whether no token is likelier, float32 and bool [B, T], of every target token.

  `pieces` times `chunk` columns of `at` are looked at: logits exist for these only, and for one
  piece at a time.
  """
  x = hidden(model, params, tokens, positions, segment_ids, branch_ids, prefix)  # B T D
  look_up = jax.vmap(lambda array, *at: array[at])  # within each row: no row has to travel

  def piece(i, found):
    slots = jax.lax.dynamic_slice_in_dim(at, i * chunk, chunk, axis=1)
    logits = embed_logits(params, look_up(x, slots))  # B C V
    total = jax.nn.logsumexp(logits, axis=-1)
    best = jnp.max(logits, axis=-1)
    here = columns // chunk == i
    column = jnp.where(here, columns - i * chunk, 0)
    picked = look_up(logits, column, targets)  # B T
    new = look_up(total, column) - picked, picked >= look_up(best, column)
    return tuple(jnp.where(here, a, b) for a, b in zip(new, found, strict=True))

  nothing = jnp.zeros(at.shape, jnp.float32), jnp.zeros(at.shape, bool)
  found = jax.lax.fori_loop(0, pieces, piece, nothing)
  return tuple(constrain(a, (None, None)) for a in found)  # whole on every process


def _chunk(rows: int, vocab: int) -> int:
  """C: a power of two, so that it divides T."""
  most = min(LOGIT_ROWS, max(LOGITS // vocab, 1)) // rows
  return 1 << (min(max(most, 1), SMALLEST).bit_length() - 1)


def _placed(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
  if mesh is None:
    return jnp.asarray(array)
  # Every process has the whole array, and gives its own devices their rows.
  return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda at: array[at])
