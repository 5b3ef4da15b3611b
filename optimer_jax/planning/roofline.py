"""The least time that a stage's step can take: what its chips can compute and move at most.

Communication between chips, other kernels than matrix products and the program's own detours are
not counted: a real step takes longer.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from optimer_jax.planning.stages import Case
from optimer_jax.planning.topologies import Topology

DAY_S = 86_400
MASTER = 4  # bytes of a float32 master, moment or gradient


@dataclasses.dataclass(frozen=True)
class Work:
  """What a step cannot do without.

  Attributes:
    model_flops: of the whole slice, nothing counted twice.
    flops: the same with what is computed again for the gradient.
    bytes: of HBM that each chip reads and writes.
    tokens: of the whole slice.
  """

  model_flops: float
  flops: float
  bytes: float
  tokens: int


@dataclasses.dataclass(frozen=True)
class Bound:
  """No program is better.

  Attributes:
    step_s: least seconds of a step.
    mfu: most model FLOPs utilisation; None where no tokens are computed.
    tokens_per_day: most tokens in a day of such steps; None likewise.
  """

  step_s: float
  mfu: float | None
  tokens_per_day: float | None


def work(case: Case, mesh: Mapping[str, int]) -> Work:
  """Counts a step of a case; `mesh` has the size of each mesh axis.

  A chip reads each weight that it multiplies with once a pass (forward, forward again for the
  gradient with remat, backward) and a piece of the batch, and reads and writes the residual stream
  once a layer. An optimizer step reads and writes master, two moments and gradient once each.
  Evaluation counts the logits of all tokens, as bits per byte need them.
  """
  config = case.model.config
  params, size = config.num_params, jnp.dtype(case.dtype).itemsize
  mine = params / (mesh['fsdp'] * mesh['tensor'])
  if case.stage == 'extract':
    return Work(params, params, mine * (2 * MASTER + 2), 0)
  if case.stage == 'merge':
    flops = 2 * case.vectors * params
    return Work(flops, flops, mine * size * (case.vectors + 2), 0)

  tokens = case.batch * case.length
  forward = config.flops_per_token(case.length) * tokens
  own = tokens / (mesh['data'] * mesh['fsdp'])  # tokens of a chip
  weights = case.pieces * params / mesh['tensor']
  a_pass = size * (weights + 2 * config.num_layers * own * config.embed_dim)
  if case.stage == 'evaluate':
    return Work(forward, forward, a_pass, tokens)
  again = 1 if case.remat == 'layer' else 0
  return Work(
    model_flops=3 * forward,
    flops=(3 + again) * forward,
    bytes=(2 + again) * a_pass + 8 * MASTER * mine,
    tokens=tokens,
  )


def roofline(work: Work, topology: Topology) -> Bound:
  """The bound of a slice's peaks on a step's work."""
  peak = topology.chip.flops * topology.chips
  step_s = max(work.flops / peak, work.bytes / topology.chip.bandwidth)
  if not work.tokens:
    return Bound(step_s, None, None)
  return Bound(step_s, work.model_flops / (peak * step_s), work.tokens * DAY_S / step_s)
