"""The samplers of a study: one interface, and one table of names.

    sampler = make_sampler('gradient', space, seed, tasks, objective, path, observed)
    points = sampler.suggest(4)
    sampler.observe(Observation(points[0], 1.14, {'ja': 1.05, …}))

A sampler's suggestions depend on its seed and on what was observed, and on nothing else: asked
again before anything new is observed it gives the same ones, and one made anew from the ledger's
trials goes on as the old one would have. What the study evaluates first (the uniform average and
the base) it observes like everything else.

`vizier` and the peers see the objective alone. `composite` sees every task's loss and models each
(`surrogate`); `gradient` is the same fed with exact gradients, which the study then takes at every
trial. Where leaving each trial out in turn shows that the model is not to be trusted, both ask
Vizier. The same model says in the end where the optimum lies (`recommend`), whoever suggested the
trials.

On a simplex the weights are none below 0 and sum to 1.
"""

import dataclasses
import difflib
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from scipy.stats import qmc

from optimer_jax.errors import UsageError, UserError
from optimer_jax.search import simplexes, surrogate, vizier
from optimer_jax.search.vizier import Space, VizierSampler

Point = dict[str, float]

_EXPLORE = (1.0, 2.0, 4.0, 8.0)  # Standard deviations of the objective that a suggestion may gain,
_TO_EXPLORE = 4  # all of them as long as so many trials are left for each weight, else a share.
# Those that a recommendation is charged: the optimum of the mean alone may lie far from few trials.
_CAUTION = 1.0
_NEAR = 0.02  # Of the box's width: nearer than that to a trial, another teaches nothing.
_MISTRUST = 3.0  # Root mean square of the standardised leave-one-out errors; 1 is as it should be.
_LEVELS = 5  # Of the grid, in each direction.


@dataclasses.dataclass(frozen=True)
class Observation:
  """One evaluated candidate.

  Attributes:
    point: value by parameter.
    objective: to be minimised; None where the candidate was infeasible.
    losses: by task.
    stderrs: by task, of what was not scored on all examples.
    gradients: {task: {parameter: dL/dw}}, where they were taken.
  """

  point: Mapping[str, float]
  objective: float | None
  losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
  stderrs: Mapping[str, float] = dataclasses.field(default_factory=dict)
  gradients: Mapping[str, Mapping[str, float]] | None = None


@dataclasses.dataclass(frozen=True)
class Recommendation:
  """Where a model of the trials has its optimum.

  Attributes:
    point: value by parameter.
    predicted: the objective there.
    stderr: its standard deviation under the model; None if Vizier's GP was asked, which does not
      say.
    misfit: root mean square of the standardised leave-one-out errors of the model of the tasks: 1
      is as it should be, and from 3 on Vizier is asked; None if there are too few trials for it.
    losses: of each task as predicted there; None where Vizier was asked.
  """

  point: Point
  predicted: float
  stderr: float | None
  misfit: float | None
  losses: Mapping[str, float] | None = None


class Sampler(Protocol):
  """What a study asks of a sampler. `wants_gradients` says that its trials shall have them."""

  wants_gradients: bool

  def suggest(self, n: int) -> list[Point]:
    """The next n candidates, inside the bounds."""

  def observe(self, observation: Observation) -> None:
    """Takes note of a candidate that was evaluated."""


def recommend(
  space: Space,
  seed: int,
  tasks: Sequence[str],
  objective: Callable[[jax.Array], jax.Array],
  observed: Sequence[Observation],
  simplex: bool = False,
) -> Recommendation:
  """The optimum as the trials have it, at a distance from what they do not know.

  Arguments are those of `make_sampler`.

  At least one trial must be feasible.
  """
  names, data = sorted(space), _data(space, tasks, observed)
  misfit = None
  if _learnable(data):
    model = surrogate.fit(**data)
    misfit = _misfit(model, len(observed))
    if misfit < _MISTRUST:
      x, predicted, stderr = surrogate.minimise(model, objective, -_CAUTION, seed, simplex)
      losses = surrogate.predict(model, x[None])[0][0].tolist()
      by_task = dict(zip(tasks, losses, strict=True))
      return Recommendation(_named(names, x), predicted, stderr, misfit, by_task)
  if simplex:
    point, predicted = vizier.surrogate_optimum(
      simplexes.sticks(names), seed, _scalars(simplexes.on_sticks(names, observed))
    )
    point = simplexes.from_sticks(names, point)
  else:
    point, predicted = vizier.surrogate_optimum(space, seed, _scalars(observed))
  return Recommendation(point, predicted, None, misfit)


class Vizier:
  """OSS Vizier's GP bandit on the scalar objective."""

  wants_gradients = False

  def __init__(self, space, seed, tasks, objective, path, observed):
    self._sampler = VizierSampler(path, space, seed, _scalars(observed))

  def suggest(self, n):
    return self._sampler.suggest(n)

  def observe(self, observation):
    self._sampler.observe(*_scalars([observation])[0])


class Composite:
  """A model of each task's loss, and Vizier where it is not to be trusted."""

  def __init__(self, space, seed, tasks, objective, path, observed, simplex, left, wants_gradients):
    self.wants_gradients, self._left = wants_gradients, left
    self._space, self._seed, self._tasks, self._path = space, seed, tasks, path
    self._objective, self._simplex = objective, simplex
    self._observed = list(observed)
    self._asked = None  # Vizier, once it was

  def suggest(self, n):
    data, names = _data(self._space, self._tasks, self._observed), sorted(self._space)
    if not _learnable(data):
      points = _sobol(self._space, self._seed, len(self._observed), n)
      return [*map(simplexes.scaled, points)] if self._simplex else points
    model = surrogate.fit(**data)
    if _misfit(model, len(self._observed)) >= _MISTRUST:
      if self._asked is None:
        self._asked = self._vizier()
      return self._asked.suggest(n)
    points = []
    while True:
      x = self._next(model, data)
      points.append(_named(names, x))
      if len(points) == n:
        return points
      # For the next of the batch, take this one to have been observed as predicted.
      mean, _ = surrogate.predict(model, x[None])
      data['points'] = np.concatenate([data['points'], x[None]])
      data['values'] = np.concatenate([data['values'], mean])
      if data['stderrs'] is not None:
        data['stderrs'] = np.concatenate([data['stderrs'], data['stderrs'].mean(0)[None]])
      if data['gradients'] is not None:
        unknown = np.full((1, *data['gradients'].shape[1:]), np.nan)
        data['gradients'] = np.concatenate([data['gradients'], unknown])
      model = surrogate.fit(**data, hyper=[each.hyper for each in model.processes])

  def observe(self, observation):
    self._observed.append(observation)
    self._left = self._left and self._left - 1
    if self._asked is not None:
      self._asked.observe(observation)

  def _vizier(self):
    make = functools.partial(OnSimplex, Vizier) if self._simplex else Vizier
    return make(self._space, self._seed, self._tasks, self._objective, self._path, self._observed)

  def _next(self, model, data):
    """The most promising point that is not as good as tried; bolder until there is one."""
    # What the last few trials find far away, none is left to make use of.
    few = 1.0 if self._left is None else min(1.0, self._left / (_TO_EXPLORE * len(self._space)))
    for explore in _EXPLORE:
      x, _, _ = surrogate.minimise(model, self._objective, few * explore, self._seed, self._simplex)
      away = np.abs(data['points'] - x) / (data['upper'] - data['lower'])
      if away.max(axis=1).min() > _NEAR:
        break
    return x


def _data(space: Space, tasks: Sequence[str], observed: Sequence[Observation]) -> dict:
  """The arguments of `surrogate.fit`; an infeasible candidate is as bad as the worst of all."""
  names, lost = sorted(space), math.nan
  bounds = np.array([space[name] for name in names], float).T
  rows = [[lost if (y := t.losses.get(task)) is None else y for task in tasks] for t in observed]
  values = np.array(rows, float).reshape(-1, len(tasks))
  good = np.isfinite(values).all(axis=1)
  if not good.any():
    observed, values, good = [], values[:0], good[:0]
  else:
    values = np.where(good[:, None], values, values[good].max(axis=0))
  stderrs = gradients = None
  if any(any(trial.stderrs.values()) for trial in observed):
    stderrs = np.array([[trial.stderrs.get(task, 0.0) for task in tasks] for trial in observed])
  if any(trial.gradients for trial in observed):
    gradients = np.full((*values.shape, len(names)), np.nan)
    for i, trial in enumerate(observed):
      for j, task in enumerate(tasks):
        if good[i] and task in (trial.gradients or ()):
          gradients[i, j] = [trial.gradients[task][name] for name in names]
  points = np.array([[trial.point[name] for name in names] for trial in observed])
  return {
    'points': points.reshape(len(observed), len(names)),
    'values': values,
    'lower': bounds[0],
    'upper': bounds[1],
    'stderrs': stderrs,
    'gradients': gradients,
  }


def _learnable(data: dict) -> bool:
  return len(np.unique(data['points'], axis=0)) >= 2


def _misfit(model: surrogate.Surrogate, count: int) -> float:
  """How far leaving each trial out in turn speaks against the model."""
  return float(np.sqrt(np.mean(surrogate.leave_one_out(model)[:count] ** 2)))


class Optuna:
  """One of Optuna's samplers, told of all trials anew each time: it keeps no state."""

  wants_gradients = False

  def __init__(self, kind, space, seed, tasks, objective, path, observed):
    self._optuna = importlib.import_module('optuna')
    self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
    self._kind, self._seed = kind, seed
    self._space = {
      name: self._optuna.distributions.FloatDistribution(*space[name]) for name in sorted(space)
    }
    self._observed = list(observed)

  def suggest(self, n):
    optuna = self._optuna
    seed = int(np.random.SeedSequence([self._seed, len(self._observed)]).generate_state(1)[0])
    study = optuna.create_study(sampler=getattr(optuna.samplers, self._kind)(seed=seed))
    for trial in self._observed:
      failed = trial.objective is None
      study.add_trial(
        optuna.trial.create_trial(
          state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
          params=dict(trial.point),
          distributions=self._space,
          value=None if failed else trial.objective,
        )
      )
    return [dict(study.ask(self._space).params) for _ in range(n)]

  def observe(self, observation):
    self._observed.append(observation)


class CmaEs:
  """CMA-ES, led through its generations again each time; other trials do not count."""

  wants_gradients = False

  def __init__(self, space, seed, tasks, objective, path, observed):
    self._cmaes = importlib.import_module('cmaes')
    self._names, self._seed = sorted(space), seed
    self._bounds = np.array([space[name] for name in self._names], float)
    self._observed = list(observed)

  def suggest(self, n):
    width = np.ptp(self._bounds, axis=1)
    unit = np.stack([np.zeros(len(width)), np.ones(len(width))], axis=1)
    found = self._cmaes.CMA(mean=np.full(len(width), 0.5), sigma=0.2, bounds=unit, seed=self._seed)
    values = {_key(trial.point): trial.objective for trial in self._observed}
    worst = max((y for y in values.values() if y is not None), default=0.0)
    points = []
    while True:
      generation = [found.ask() for _ in range(found.population_size)]
      named = [_named(self._names, self._bounds[:, 0] + x * width) for x in generation]
      known = [_key(point) in values for point in named]
      points += [point for point, there in zip(named, known, strict=True) if not there]
      if len(points) >= n:
        return points[:n]
      # A suggestion beyond the generation: its unknown members count as the worst for now.
      found.tell(
        [
          (x, y if (y := values.get(_key(point))) is not None else worst)
          for x, point in zip(generation, named, strict=True)
        ]
      )

  def observe(self, observation):
    self._observed.append(observation)


class Design:
  """Points that do not depend on what they score."""

  wants_gradients = False

  def __init__(self, points, space, seed, tasks, objective, path, observed):
    self._points, self._space, self._seed = points, space, seed
    self._seen = len(observed)

  def suggest(self, n):
    return self._points(self._space, self._seed, self._seen, n)

  def observe(self, observation):
    self._seen += 1


def _sobol(space: Space, seed: int, first: int, n: int) -> list[Point]:
  """Points first, first + 1, … of a scrambled Sobol sequence."""
  sequence = qmc.Sobol(len(space), rng=np.random.default_rng(seed))
  if first:
    sequence.fast_forward(first)
  # One at a time: SciPy warns of numbers that are no power of two.
  return [_scaled(space, sequence.random(1)[0]) for _ in range(n)]


def _random(space: Space, seed: int, first: int, n: int) -> list[Point]:
  return [
    _scaled(space, np.random.default_rng([seed, i]).random(len(space)))
    for i in range(first, first + n)
  ]


def _grid(space: Space, seed: int, first: int, n: int) -> list[Point]:
  """Points of an even grid, scattered: a search that ends early has still seen all of the box."""
  size = _LEVELS ** len(space)
  if first + n > size:
    raise UserError(
      f'the grid has {size} points and no more: give the study fewer trials, or another sampler'
    )
  # Steps coprime to the size meet every point once.
  step = max(1, round(size * 0.6180339887))
  while math.gcd(step, size) != 1:
    step += 1
  places = [(seed + i * step) % size for i in range(first, first + n)]
  digits = [[place // _LEVELS**k % _LEVELS for k in range(len(space))] for place in places]
  return [_scaled(space, np.array(digit) / (_LEVELS - 1)) for digit in digits]


class OnSimplex:
  """A sampler of the scalar objective, led over the simplex by stick-breaking."""

  wants_gradients = False

  def __init__(self, make, space, seed, tasks, objective, path, observed):
    self._names = sorted(space)
    sticks, there = simplexes.sticks(self._names), simplexes.on_sticks(self._names, observed)
    self._sampler = make(sticks, seed, tasks, objective, path, there)

  def suggest(self, n):
    return [simplexes.from_sticks(self._names, point) for point in self._sampler.suggest(n)]

  def observe(self, observation):
    for there in simplexes.on_sticks(self._names, [observation]):
      self._sampler.observe(there)


_SCALAR: dict[str, Callable[..., Sampler]] = {
  'vizier': Vizier,
  'tpe': lambda *args: Optuna('TPESampler', *args),
  'gp': lambda *args: Optuna('GPSampler', *args),
  'cmaes': CmaEs,
  'sobol': lambda *args: Design(_sobol, *args),
  'grid': lambda *args: Design(_grid, *args),
  'random': lambda *args: Design(_random, *args),
}
MODELLING = ('composite', 'gradient')  # They see each task.
PEERS = {'tpe': ('optuna',), 'gp': ('optuna', 'torch'), 'cmaes': ('cmaes',)}  # what they need
SAMPLERS = ('vizier', *MODELLING, *[name for name in _SCALAR if name != 'vizier'])


def make_sampler(
  name: str,
  space: Space,
  seed: int,
  tasks: Sequence[str],
  objective: Callable[[jax.Array], jax.Array],
  path: Path | str,
  observed: Sequence[Observation] = (),
  simplex: bool = False,
  left: int | None = None,
) -> Sampler:
  """The sampler of that name.

  Args:
    name: one of SAMPLERS.
    space: bounds by parameter.
    seed: of all its random numbers.
    tasks: the J tasks, in the order in which `objective` takes their losses.
    objective: losses [J] -> scalar, to be minimised, as `surrogate.minimise` takes it.
    path: Vizier's SQLite file, for the samplers that use it.
    observed: the ledger's trials, in order.
    simplex: the weights are to be on the simplex; the bounds are then those of all simplexes.
    left: candidates that it will be asked for, if that is known: with few, the composite explores
      less.

  Raises:
    UsageError, UserError: as `check_sampler` says.
  """
  check_sampler(name)
  arguments = space, seed, tasks, objective, path, observed
  if name in MODELLING:
    return Composite(*arguments, simplex, left, wants_gradients=name == 'gradient')
  return OnSimplex(_SCALAR[name], *arguments) if simplex else _SCALAR[name](*arguments)


def check_sampler(name: str) -> None:
  """Whether a study can have it, before anything that it stands on is computed.

  Raises:
    UsageError: there is none of that name; the message gives the nearest.
    UserError: it needs a package that is not installed.
  """
  if name not in SAMPLERS:
    near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0)
    raise UsageError(
      f'there is no sampler {name!r}: did you mean {near[0]!r}? (known: {", ".join(SAMPLERS)})'
    )
  for package in PEERS.get(name, ()):
    if importlib.util.find_spec(package) is None:
      raise UserError(
        f'the sampler {name!r} needs the package {package}: install it with pip install '
        "'optimer_jax[peers]', or choose another sampler"
      )


def _scalars(observed: Sequence[Observation]) -> list[vizier.Observation]:
  return [(dict(trial.point), trial.objective) for trial in observed]


def _key(point: Mapping[str, float]) -> tuple:
  """A point without its last digits, which may be lost on the way to a simplex and back."""
  return tuple(round(point[name], 6) for name in sorted(point))


def _named(names: Sequence[str], x: np.ndarray) -> Point:
  return dict(zip(names, map(float, x), strict=True))


def _scaled(space: Space, unit: np.ndarray) -> Point:
  """A point of the unit cube in the space, whose parameters count in the order of their names."""
  return {
    name: space[name][0] + (space[name][1] - space[name][0]) * float(u)
    for name, u in zip(sorted(space), unit, strict=True)
  }
