"""What a study is: its configuration, and the questions that its trials answer."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from optimer_jax.errors import UsageError, UserError
from optimer_jax.merging.weighted_sum import Groups
from optimer_jax.search.ledger import point_of
from optimer_jax.search.objectives import Aggregate, Objective, losses_of, stderrs_of
from optimer_jax.search.samplers import MODELLING, Observation, check_sampler

DENSITY = 'density'  # the one parameter of a merge method that is searched with the weights


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """A study.

  Attributes:
    name: what the study is called.
    trials: evaluations in all: the seeds (the uniform average, the base, and the CPT models where
      the objective is measured by them), a sampler's suggestions, and the optimum of the model of
      them all, evaluated last. A study may be given more trials later.
    sampler: of `samplers.SAMPLERS`.
    objective: what is minimised.
    lower, upper: bounds of every merge weight; they hold 0 (the base) and 1/K (the average).
    ranges: other bounds, of single vectors by name.
    simplex: search weights that are none below 0 and sum to 1.
    density: bounds of the merge method's density, to search it too.
    groups: which parameters share a vector's merge weight; by default all.
    parts: a candidate is scored on this many parts of the examples, one after another, and given
      up once it cannot win any more; 1 always scores all.
    reuse: names of other studies of the pool, to begin with what they have measured; default: all.
    seed: of all random numbers.
  """

  name: str = 'default'
  trials: int = 14
  sampler: str = 'vizier'
  objective: Objective = dataclasses.field(default_factory=Objective)
  lower: float = 0.0
  upper: float = 1.0
  ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
  simplex: bool = False
  density: tuple[float, float] | None = None
  groups: Groups = dataclasses.field(default_factory=Groups)
  parts: int = 4
  reuse: tuple[str, ...] | None = None
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Study:
  """What is asked, and of what.

  Attributes:
    config: how it is asked.
    parameters: the names of the merge weights of each of the K vectors, one for each group.
    tasks: digest of the data of each of the J tasks.
    pool: fingerprint of the vector pool.
    method: how candidates are merged; '' for the weighted sum.

  Raises:
    UsageError: the configuration makes no sense.
  """

  config: StudyConfig
  parameters: Mapping[str, Sequence[str]]
  tasks: Mapping[str, str]
  pool: str
  method: str = ''

  def __post_init__(self):
    check_sampler(self.config.sampler)
    self.config.objective.check([*self.tasks])
    if problem := _problem(self):
      raise UsageError(f'study {self.config.name}{problem}')

  @property
  def names(self) -> list[str]:
    """Of all merge weights."""
    return [name for names in self.parameters.values() for name in names]

  @property
  def numbers(self) -> dict[str, tuple[float, float]]:
    """Bounds of what else is searched."""
    return {DENSITY: tuple(self.config.density)} if self.config.density else {}

  @property
  def space(self) -> dict[str, tuple[float, float]]:
    """Bounds of everything that is searched."""
    bounds = (self.config.lower, self.config.upper)
    ranges = {vector: tuple(self.config.ranges.get(vector, bounds)) for vector in self.parameters}
    weights = {name: ranges[v] for v, names in self.parameters.items() for name in names}
    return {**weights, **self.numbers}

  @property
  def search(self) -> dict:
    """What must stay as it is while the study goes on."""
    config = self.config
    objective = dataclasses.asdict(config.objective)
    return {
      **{f'objective {key}': value for key, value in objective.items()},
      'bounds': {name: list(bounds) for name, bounds in self.space.items()},
      'sampler': config.sampler,
      'simplex': config.simplex,
      'parts': config.parts,
      'seed': config.seed,
      'merge method': self.method,
    }

  def seeds(self) -> list[dict[str, float]]:
    """The points that are evaluated first; a density is then as high as it may be."""
    average = dict.fromkeys(self.names, 1 / len(self.parameters))
    points = [average, dict.fromkeys(self.names, 0.0)]
    points += [a for a in self.config.objective.anchors(self.parameters) if a not in points]
    return [
      {**point, **{name: high for name, (_, high) in self.numbers.items()}} for point in points
    ]

  def objective(self, rows: Sequence[Mapping], number: int | None = None) -> Aggregate | None:
    """The objective as these trials define it; None before they do.

    Args:
      rows: of the ledger.
      number: of the direction in which a front is looked for; default: all its tasks alike.

    Raises:
      UserError: a model by which it is measured has no finite score.
    """
    anchors = []
    for point in self.config.objective.anchors(self.parameters):
      there = [row for row in rows if row['weights'] == point and 'parts' not in row]
      if not there:
        return None
      anchors.append(losses_of(there[0]['scores'], self.tasks))
      if bad := [task for task, x in zip(self.tasks, anchors[-1], strict=True) if np.isnan(x)]:
        raise UserError(
          f'study {self.config.name}: its objective is measured by the model of the weights '
          f'{point}, which has no finite score of {bad[0]}: check that task, or choose the scale '
          "'loss' and no limits"
        )
    shape = (-1, len(self.tasks))
    losses = np.reshape([losses_of(row['scores'], self.tasks) for row in rows], shape)
    return self.config.objective.at([*self.tasks], losses, np.reshape(anchors, shape), number)

  def value(self, row: Mapping, objective: Aggregate) -> float | None:
    """The objective of a trial; None if a score is not finite."""
    value = float(objective(losses_of(row['scores'], self.tasks)))
    return value if math.isfinite(value) else None

  def observations(self, rows: Sequence[Mapping], objective: Aggregate) -> list[Observation]:
    """What a sampler is told of the trials.

    The examples are the same in all trials, so that only what was not scored on all of them is
    uncertain.
    """
    found = []
    for row in rows:
      errors = stderrs_of(row['scores'], self.tasks) * ('parts' in row)
      found.append(
        Observation(
          point_of(row),
          self.value(row, objective),
          dict(zip(self.tasks, losses_of(row['scores'], self.tasks).tolist(), strict=True)),
          dict(zip(self.tasks, errors.tolist(), strict=True)),
          row.get('gradients'),
        )
      )
    return found


def _problem(study: Study) -> str:
  """What is wrong with the configuration, to go on after the study's name; '' if nothing is."""
  config, k = study.config, len(study.parameters)
  if not k:
    return ' has no vectors to weigh: train or name at least one'
  if config.objective.kind == 'pareto' and config.sampler not in MODELLING:
    return (
      f': {config.sampler} sees one number, and not the tasks of a front: choose the sampler '
      f'{" or ".join(MODELLING)}'
    )
  if config.trials < 3 and config.reuse == ():
    return (
      f' has {config.trials} trials: it needs at least 3 (the uniform average, the base, and the '
      'optimum of what was learnt)'
    )
  if config.trials < 1 or config.parts < 1:
    return ': StudyConfig.trials and StudyConfig.parts are 1 or more'
  if unknown := sorted(set(config.ranges) - set(study.parameters)):
    return f' has a range for {unknown[0]!r}, which is none of {", ".join(study.parameters)}'
  if config.density and not 0.0 < config.density[0] < config.density[1] <= 1.0:
    return (
      f': the density is searched between {config.density[0]} and {config.density[1]}, but needs '
      '0 < lower < upper <= 1'
    )
  if config.density and DENSITY in study.names:
    return f': no data set can be called {DENSITY!r} here'
  if config.simplex and (config.density or len(study.names) != k or k < 2):
    return ': a simplex is of the weights of two vectors or more, without groups or a density'
  for name in study.names:
    low, high = study.space[name]
    if not low <= 0.0 < 1 / k <= high:
      return (
        f': the bounds [{low}, {high}] of {name} must hold 0 and 1/K = {1 / k:.3g}, the weights of '
        'the base and of the uniform average'
      )
  if config.simplex and any(bounds != (0.0, 1.0) for bounds in study.space.values()):
    return ': on a simplex all weights lie between 0 and 1: leave the bounds as they are'
  return ''
