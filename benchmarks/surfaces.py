"""Pools as a search sees them: simulated, interpolated from a ledger, or the real thing.

All have K weights in the box [0, 1]^K and J tasks, and know their optimum.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.interpolate
import scipy.optimize

from optimer_jax.errors import UserError
from optimer_jax.files import read_jsonl
from optimer_jax.merging.candidates import candidates
from optimer_jax.merging.weighted_sum import ALL
from optimer_jax.run import Run, engine_of, model_of, prepare, tasks_of
from optimer_jax.search.objectives import losses_of
from optimer_jax.vectors.pool import load_pool

OBJECTIVES = {'mean': np.mean, 'worst': np.max}
NEAR = 0.3  # Of a trial to an optimum, for a spline between trials to be believed.
NOISE = 0.01  # Of the simulated losses, as a share of what merging gains.


@dataclasses.dataclass(frozen=True)
class Surface:
  """What is searched.

  Attributes:
    k: K, the number of weights.
    losses: weights [K] -> the tasks' losses [J].
    gradients: weights [K] -> [J, K].
    at: the weights [K] of the objective's minimum over the box.
    best: that minimum.
    gain: the objective at the base minus that.
    noise: standard deviation of what is seen of a loss.
  """

  k: int
  losses: Callable[[np.ndarray], np.ndarray]
  gradients: Callable[[np.ndarray], np.ndarray]
  at: np.ndarray
  best: float
  gain: float
  noise: float


def simulate(k: int, objective: str, kind: str, seed: int) -> Surface:
  """Bowls around points near the vectors' own, one for each task, bent as `kind` says."""
  rng = np.random.default_rng([k, seed])
  lowest = rng.uniform(-0.3, 0.3, (k, k))  # [J, K]
  np.fill_diagonal(lowest, rng.uniform(0.4, 1.0, k))
  vectors = rng.standard_normal((k, k, 2 * k))  # [J, K, .], as each task feels them
  vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
  lengths = np.exp(rng.uniform(np.log(0.3), np.log(3.0), k) / 2)
  felt = np.exp(rng.uniform(np.log(0.1), 0.0, (k, k)) / 2)
  np.fill_diagonal(felt, 1.0)
  vectors *= (lengths * felt)[:, :, None]
  bowls = np.einsum('jkv,jlv->jkl', vectors, vectors)
  across = rng.standard_normal((k, k))
  across /= np.linalg.norm(across, axis=1, keepdims=True)
  steepness = np.sqrt(np.einsum('jkk->jk', bowls))

  def shape(w):
    x = w - lowest  # [J, K]
    along = np.einsum('jk,jk->j', across, x)
    slope = np.einsum('jkl,jl->jk', bowls, x)
    value = np.einsum('jk,jk->j', x, slope) / 2
    if kind == 'cubic':
      return value + 0.3 * along**3, slope + 0.9 * along[:, None] ** 2 * across
    if kind == 'saturating':
      return 1 - np.exp(-value), np.exp(-value)[:, None] * slope
    if kind == 'ridge':
      walls = 0.1 * np.log(np.cosh(8 * along))
      return value + walls, slope + 0.8 * np.tanh(8 * along)[:, None] * across
    if kind == 'kink':
      return (steepness * np.abs(x)).sum(1) / 2, steepness * np.sign(x) / 2
    return value, slope

  base = rng.uniform(1.9, 2.1, k) - shape(np.zeros(k))[0]
  return _surface(
    k, lambda w: base + shape(w)[0], lambda w: shape(w)[1], objective, starts=40, noise=NOISE
  )


def live(run: Run, objective: str) -> Surface:
  """The run's own pool: every look at it merges, and scores the development set.

  Losses and gradients are in shares of the base's losses.
  """
  pool = load_pool(run.path / 'base', run.vector_paths, model_of(run))
  tasks = prepare(tasks_of(run, 'dev'), engine_of(run), 'dev').values()
  candidate, names = candidates(pool), [*run.vector_paths]
  params = lambda w: candidate(dict(zip(names, w, strict=True)))

  @functools.lru_cache(maxsize=10_000)
  def seen(w):
    merged = params(w)
    return np.array([task.score(merged).loss for task in tasks])

  @functools.lru_cache(maxsize=10_000)
  def slopes(w):
    merged = params(w)
    return np.array([task.gradient(merged, pool.vectors, ALL)[1][0] for task in tasks])

  base = seen((0.0,) * len(names))
  return _surface(
    len(names),
    lambda w: seen(tuple(w.tolist())) / base,
    lambda w: slopes(tuple(w.tolist())) / base[:, None],
    objective,
    starts=6,
  )


def from_ledger(directory: Path, objective: str) -> Surface:
  """Every data set's loss, in shares of the base's, interpolated between all trials of its pool.

  A polynomial of degree two, or one where there are too few trials, and a cubic spline through
  what is left. Gradients are its differences.

  Args:
    directory: of a run, or what was kept of one: DIRECTORY/studies/NAME/trials.jsonl.
    objective: a key of OBJECTIVES, of the losses on the text of what was trained on.

  Raises:
    UserError: there are too few trials, or none near the optimum, which is then an invention.
  """
  studies, found = directory / 'studies', {}
  for row in (row for path in studies.glob('*/trials.jsonl') for row in read_jsonl(path)):
    names = [*row['weights']]
    if not {*names} <= {*row['scores']} or row.get('numbers') or 'parts' in row:
      continue
    of = found.setdefault(json.dumps([row['pool'], row['tasks'], names]), {})
    of[tuple(row['weights'][name] for name in names)] = losses_of(row['scores'], names)
  # Of the trials that were scored on the same data, where there are most.
  found = max(found.values(), key=len, default={})
  points, losses = np.array([*found]), np.array([*found.values()])
  size, k = points.shape if found else (0, 0)
  base = found.get((0.0,) * k)
  if size < 3 * k or base is None:
    raise UserError(f'{studies} has {size} trials of all examples: search more of them first')
  degree = 2 if size >= (k + 1) * (k + 2) else 1
  spline = scipy.interpolate.RBFInterpolator(points, losses / base, kernel='cubic', degree=degree)
  step = 1e-4 * np.eye(k)
  surface = _surface(
    k,
    lambda w: spline(w[None])[0],
    lambda w: ((spline(w + step) - spline(w - step)) / 2e-4).T,
    objective,
    starts=20,
  )
  far = np.linalg.norm(points - surface.at, axis=1).min()
  if far > NEAR:
    raise UserError(
      f'{studies}: no trial is near the {objective} optimum that a spline through {size} makes up: '
      'search with the sampler sobol first, so that there are trials everywhere'
    )
  return surface


def has_pool(run: Run) -> bool:
  return all((path / 'manifest.json').exists() for path in run.vector_paths.values())


def _surface(k, losses, gradients, objective, starts, noise=0.0) -> Surface:
  best, at = _minimum(k, losses, gradients, objective == 'mean', starts)
  gain = OBJECTIVES[objective](losses(np.zeros(k))) - best
  return Surface(k, losses, gradients, at, best, float(gain), noise * gain)


def _minimum(k, losses, gradients, mean, starts) -> tuple[float, np.ndarray]:
  """The least z over the box and z, with the mean of the losses, or each of them, below z."""
  rng, best = np.random.default_rng(0), (np.inf, None)
  some = (lambda a: a.mean(0, keepdims=True)) if mean else (lambda a: a)
  below = {
    'type': 'ineq',
    'fun': lambda x: x[-1] - some(losses(x[:-1])),
    'jac': lambda x: (lambda g: np.c_[-g, np.ones(len(g))])(some(gradients(x[:-1]))),
  }
  for _ in range(starts):
    w = rng.uniform(0, 1, k) * rng.uniform(0.1, 1)
    found = scipy.optimize.minimize(
      lambda x: x[-1],
      np.append(w, some(losses(w)).max()),
      jac=lambda x: np.append(np.zeros(k), 1.0),
      bounds=[(0, 1)] * k + [(None, None)],
      constraints=below,
      method='SLSQP',
    )
    at = np.clip(found.x[:-1], 0, 1)
    best = min(best, (float(some(losses(at)).max()), at), key=lambda each: each[0])
  return best
