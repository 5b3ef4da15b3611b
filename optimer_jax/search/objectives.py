"""Objectives: what a study makes of the tasks' losses, always to be minimised.

A loss is bits per byte or 1 - accuracy. An `Objective` is what gin configures; with the losses of
the base (and of the CPT models, where it asks for them) it becomes an `Aggregate`, a function of
losses that is a pytree: one compiled program serves every objective.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import qmc

from optimer_jax.errors import UsageError
from optimer_jax.evaluation.scores import loss

KINDS, SCALES = ('mean', 'worst', 'pareto'), ('loss', 'base', 'best')
_PENALTY = 10.0  # Of a loss beyond its limit: more than what breaking it can win elsewhere.
_FRONT = 0.05  # Share of the mean in a front's scalar, so that no point of it is dominated.


@dataclasses.dataclass(frozen=True)
class Objective:
  """What a study minimises.

  Attributes:
    kind: 'mean' of the tasks' losses; the 'worst' of them; or 'pareto', the front of two or three
      tasks: each trial then minimises the worst under other weights (ParEGO, Knowles 2006), and the
      answer has the whole front beside the point of equal weights.
    weights: of the tasks, by name; the others have 1. A task of weight 0 is scored and kept for
      other objectives, and may have a limit, but does not count.
    scale: how losses of different kinds come on one scale: 'loss', as they are; 'base', as shares
      of the base's loss, so that 1 minus it is the gain over the base; 'best', 1 at the base and 0
      at the best CPT model of the task, for which the study first scores the K CPT models.
    limits: by task, by how much of the base's loss its own may be higher: {'en': 0.01} is "English
      no worse than the base by 1%". A negative number asks for a gain.
  """

  kind: str = 'mean'
  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  scale: str = 'loss'
  limits: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def check(self, tasks: Sequence[str]) -> None:
    """UsageError if the objective makes no sense for these tasks."""
    for what, value, known in (('kind', self.kind, KINDS), ('scale', self.scale, SCALES)):
      if value not in known:
        raise UsageError(f'Objective.{what} is {value!r}: it must be one of {", ".join(known)}')
    for what in ('weights', 'limits'):
      if unknown := sorted(set(getattr(self, what)) - set(tasks)):
        raise UsageError(
          f'Objective.{what} names {unknown[0]!r}, which is no task of the run: it has '
          f'{", ".join(tasks)}'
        )
    weights = self.weights_of(tasks)
    if min(weights) < 0 or not any(weights):
      raise UsageError(f'Objective.weights are {weights}: give none below 0, and one above')
    if self.kind == 'pareto' and not 2 <= sum(w > 0 for w in weights) <= 3:
      raise UsageError(
        f'a Pareto front is of two or three tasks, not {sum(w > 0 for w in weights)}: give the '
        'others the weight 0 in Objective.weights'
      )

  @property
  def label(self) -> str:
    """For people: "worst, as shares of the base's loss, with en at most 1% worse"."""
    said = self.kind if self.kind != 'pareto' else 'Pareto front'
    if self.weights:
      said += ' of ' + ', '.join(f'{task} x {weight:g}' for task, weight in self.weights.items())
    said += {'loss': '', 'base': ", as shares of the base's loss", 'best': ', 1 at the base'}[
      self.scale
    ]
    for task, limit in self.limits.items():
      said += f', {task} at most {limit:.1%} worse than the base'
    return said

  def weights_of(self, tasks: Sequence[str]) -> list[float]:
    return [float(self.weights.get(task, 1.0)) for task in tasks]

  def anchors(self, parameters: Mapping[str, Sequence[str]]) -> list[dict[str, float]]:
    """The merge weights whose losses `at` needs: the base's, and those of the CPT models.

    Args:
      parameters: the names of the weights of each vector.
    """
    if self.kind != 'pareto' and self.scale == 'loss' and not self.limits:
      return []
    base = {name: 0.0 for names in parameters.values() for name in names}
    single = [{**base, **dict.fromkeys(names, 1.0)} for names in parameters.values()]
    return [base, *(single if self.scale == 'best' else [])]

  def at(
    self, tasks: Sequence[str], losses: np.ndarray, anchors: np.ndarray, number: int | None = None
  ) -> 'Aggregate':
    """The objective as a function of the losses of `tasks`.

    Args:
      tasks: J names.
      losses: [n, J], of all trials: a front is scaled by the best that they reached.
      anchors: [A, J], of the weights that `anchors` gives, in their order.
      number: 0, 1, … of the direction in which a front is looked for: first to its ends, the
        lowest losses of each task, and then in between; default: all its tasks alike.
    """
    weights = np.array(self.weights_of(tasks))
    base = anchors[0] if len(anchors) else np.full_like(weights, np.nan)
    shift, scale = np.zeros_like(weights), np.ones_like(weights)
    if self.scale == 'base':
      scale = base
    elif self.scale == 'best':
      shift = np.fmin.reduce(anchors[1:])
    if self.kind == 'pareto':
      shift = np.fmin.reduce(np.concatenate([losses, anchors]))
      weights = np.where(weights > 0, 1.0, 0.0)
      if number is not None:
        weights[weights > 0] = _direction(int(weights.sum()), number)
    if self.scale == 'best' or self.kind == 'pareto':
      # A task on which nothing is better than the base keeps its own unit.
      scale = np.where(base > shift, base - shift, 1.0)
    allowed = np.array([self.limits.get(task, np.inf) for task in tasks])
    limits = np.where(np.isfinite(allowed), base + allowed * np.abs(base), np.inf)
    single = np.count_nonzero(weights) == 1
    blend = 1.0 if single else {'mean': 1.0, 'worst': 0.0, 'pareto': _FRONT}[self.kind]
    return Aggregate(weights, shift, scale, limits, np.array(blend))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aggregate:
  """Losses [..., J] -> the objective [...], of NumPy's arrays or traced by JAX.

  Attributes:
    weights: [J], of the tasks; 0 where one does not count.
    shift, scale: [J]; a loss counts as (loss - shift) / scale.
    limits: [J], the highest losses that are allowed; infinite where any is.
    blend: share of the weighted mean; the rest is the weighted worst.
  """

  weights: np.ndarray
  shift: np.ndarray
  scale: np.ndarray
  limits: np.ndarray
  blend: np.ndarray

  def __call__(self, losses):
    xp = jnp if isinstance(losses, jax.Array) else np
    scaled = (losses - self.shift) / self.scale
    mean = (self.weights * scaled).sum(-1) / self.weights.sum()
    heavy = self.weights / self.weights.max()
    worst = xp.where(heavy > 0, heavy * scaled, -xp.inf).max(-1)
    beyond = xp.maximum(losses - self.limits, 0.0) / self.scale
    return self.blend * mean + (1 - self.blend) * worst + _PENALTY * beyond.sum(-1)

  def stderr(self, losses: np.ndarray, stderrs: np.ndarray) -> float:
    """The objective's standard error, the tasks' errors [J] taken as independent and small.

    Each task is moved by its own standard error in turn and the changes are added in squares.
    """
    moved = self(losses + np.diag(stderrs))
    return float(np.sqrt(np.square(moved - self(losses)).sum()))


def losses_of(scores: Mapping[str, Mapping], tasks: Sequence[str]) -> np.ndarray:
  """[J], of a trial's scores; NaN where a score is not finite."""
  values = [loss(scores[task]) for task in tasks]
  return np.array([value if math.isfinite(value) else math.nan for value in values])


def stderrs_of(scores: Mapping[str, Mapping], tasks: Sequence[str]) -> np.ndarray:
  """[J]; a score without a standard error counts as exact."""
  return np.array([scores[task].get('stderr') or 0.0 for task in tasks])


def front(losses: np.ndarray) -> np.ndarray:
  """[n] of bool: which of the losses [n, J] no other is better than in every task."""
  no_worse = (losses[:, None] <= losses).all(-1)
  better = (losses[:, None] < losses).any(-1)
  return ~(no_worse & better).any(0) & np.isfinite(losses).all(-1)


def _direction(count: int, number: int) -> np.ndarray:
  """[count] weights that sum to 1: of one task each, and then evenly spread by their number."""
  if number < count:
    return np.eye(count)[number]
  sequence = qmc.Sobol(count, rng=np.random.default_rng(0)).fast_forward(number)
  spread = -np.log(np.clip(sequence.random(1)[0], 1e-3, 1 - 1e-3))  # Evenly on the simplex.
  return spread / spread.sum()
