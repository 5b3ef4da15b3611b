"""Log likelihoods of many (context, target) requests, and the gradient of their sum.

`plan` arranges the requests once, for all candidates; `log_likelihoods` runs a candidate through
the plan, in as many programs as the plan has shapes, and so does `likelihood_gradient`.

Shape letters: B rows of a batch, T slots of a row, C slots whose logits are held at a time,
D embed, V vocab, R requests.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from optimer_jax.evaluation.batching import SMALLEST, Batch, Continuation, Plan, plan
from optimer_jax.gemma3 import Model, prefix_cache
from optimer_jax.gemma3.transformer import Prefix, embed_logits, hidden
from optimer_jax.merging.gradients import likelihood_slopes, weights_gradient
from optimer_jax.merging.weighted_sum import ALL, Groups
from optimer_jax.parallel.sharding import batch_sharding, constrain

__all__ = [
  'Continuation',
  'Likelihood',
  'Plan',
  'gradient_plan',
  'likelihood_gradient',
  'log_likelihoods',
  'logit_slots',
  'plan',
  'score_batch',
]

# What a program takes of a batch.
ARRAYS = ('tokens', 'positions', 'segment_ids', 'branch_ids', 'at', 'targets', 'columns')
# Logits held at once: enough rows for a fast matrix product, and no more than 134 MB.
LOGIT_ROWS = 256
LOGITS = 2**25
# Slots of a batch whose layers keep all that they compute for the gradient: about 3 GB for 270M.
GRADIENT_TOKENS = 1024


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
        chunk = logit_slots(len(batch.tokens) // plan.shards, model.config.vocab_size)
        arrays = jax.tree.map(lambda a: _placed(a, mesh), _inputs(plan, batch))
        pieces = np.int32(-(-batch.scored // chunk))
        queued.append(score_batch(model, chunk, params, prefix, pieces, **arrays))
      # The device always has a group's work to go on with, and never more than two prefixes.
      if results:
        jax.block_until_ready(results[-1])
      results.append(queued)

  count = int(plan.distinct.max(initial=-1)) + 1
  nats, misses = np.zeros(count), np.zeros(count)
  for group, queued in zip(plan.groups, results, strict=True):
    for batch, (batch_nats, batch_greedy) in zip(group.batches, queued, strict=True):
      _count(nats, batch, batch_nats)
      _count(misses, batch, ~np.asarray(batch_greedy))
  return Likelihood(nats[plan.distinct], misses[plan.distinct] == 0)


def gradient_plan(
  model: Model, requests: Sequence[Continuation], context: int, batch_tokens: int, shards: int = 1
) -> Plan:
  """`plan` for `likelihood_gradient`: in batches whose backward pass has room.

  That of layers that are not scanned keeps all that they compute.
  """
  most = batch_tokens if model.scan else min(batch_tokens, GRADIENT_TOKENS)
  return plan(requests, context, most, shards)


def likelihood_gradient(
  model: Model,
  params: dict,
  vectors: Sequence[dict],
  plan: Plan,
  factors: np.ndarray,
  groups: Groups = ALL,
  mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The requests' nats, and the gradient of a sum of them with respect to merge weights.

  Programs are shared as those of `log_likelihoods` are, whatever the groups.

  Args:
    model: what to compute.
    params: the candidate.
    vectors: K of them, in the parameters' structure.
    plan: of requests that share no prefix, as windows of text are.
    factors: float [R], of the requests' nats in the sum.
    groups: which leaves share merge weights; by default all, and G is 1.
    mesh: as in `log_likelihoods`.

  Returns:
    float64 nats [R], as those of `Likelihood`, and float64 [G, K].

  Raises:
    ValueError: requests share a prefix.
  """
  if any(group.length for group in plan.groups):
    raise ValueError('there is no gradient of requests that share a prefix')
  # Where layers are not scanned, `remat` takes a forward pass more and no memory less (on CPU).
  model = model if model.scan else dataclasses.replace(model, remat='none')
  distinct = np.bincount(plan.distinct, factors)
  batches = [batch for group in plan.groups for batch in group.batches]
  results = []
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    for batch in batches:
      chunk = logit_slots(len(batch.tokens) // plan.shards, model.config.vocab_size)
      real = batch.owner >= 0
      arrays = {
        'factors': np.where(real, distinct[batch.owner], 0).astype(np.float32),
        'at': np.take_along_axis(batch.at, batch.columns, axis=1),
        **{k: a for k, a in _inputs(plan, batch).items() if k not in ('at', 'columns')},
      }
      arrays = jax.tree.map(lambda a: _placed(a, mesh), arrays)
      pieces = np.int32(-(-real.sum(1).max() // chunk))
      results.append(_slopes(model, chunk, params, tuple(vectors), pieces, **arrays))
      if len(results) > 1:
        jax.block_until_ready(results[-2])

  nats, found = np.zeros(len(distinct)), jax.device_get(results)
  for batch, (batch_nats, _) in zip(batches, found, strict=True):
    _count(nats, batch, batch_nats)
  # Summed here: to take scanned layers apart on a device is a program for each leaf.
  every = [slopes for _, slopes in found]
  slopes = jax.tree.map(lambda *each: np.sum(each, axis=0, dtype=np.float64), *every)
  return nats[plan.distinct], weights_gradient(model.config, slopes, groups)


def _count(sums: np.ndarray, batch: Batch, values: jax.Array | np.ndarray) -> None:
  """Adds values [B, T] of target tokens to the sums of their requests."""
  real = batch.owner >= 0
  found = np.asarray(values, np.float64)[real]
  found[~np.isfinite(found)] = np.nan
  np.add.at(sums, batch.owner[real], found)


# What is compiled.

_prefix = jax.jit(prefix_cache, static_argnames='model')


@functools.partial(jax.jit, static_argnames=('model', 'chunk'))
def score_batch(
  model: Model,
  chunk: int,
  params: dict,
  prefix: Prefix | None,
  pieces: jax.Array,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  branch_ids: jax.Array | None,
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


@functools.partial(jax.jit, static_argnames=('model', 'chunk'))
def _slopes(model: Model, chunk: int, params: dict, vectors: tuple, pieces: jax.Array, **arrays):
  found = likelihood_slopes(model, chunk, params, vectors, pieces, **arrays)
  return jax.tree.map(lambda a: constrain(a, (None,) * a.ndim), found)  # whole on every process


def logit_slots(rows: int, vocab: int) -> int:
  """C, for B rows on a device and V pieces: a power of two, so that it divides T."""
  most = min(LOGIT_ROWS, max(LOGITS // vocab, 1)) // rows
  return 1 << (min(max(most, 1), SMALLEST).bit_length() - 1)


def _inputs(plan: Plan, batch: Batch) -> dict[str, np.ndarray | None]:
  arrays = {name: getattr(batch, name) for name in ARRAYS}
  # Splash attention is for rows of which it is known that they have no branches.
  return arrays if plan.branched else arrays | {'branch_ids': None}


def _placed(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
  if mesh is None:
    return jnp.asarray(array)
  # Every process has the whole array, and gives its own devices their rows.
  return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda at: array[at])
