"""A model of every task's loss as a function of the merge weights, values and gradients alike.

The losses of merged models are almost quadratic in the weights, but for a steep fall at the base: a
tenth of a vector can do most of what all of it does. A task's loss is therefore a Gaussian process
whose prior is a polynomial of degree two plus a residual that varies faster the nearer the base:

    k(x, y) = c + x.y + a (x.y)^2 + b (|x|^2/2) (|y|^2/2) + r RQ(|u(x) - u(y)| / l)
    u(x) = asinh(x / s) / asinh(1 / s), of each weight

where x are weights in units of the box's width, so that the base is the origin; b lets all
directions curve alike, RQ is the rational quadratic kernel, of all length scales about l. Gradients
are observed through the kernel's derivatives. The tasks share a, b, r, l, s and the noise, so that
one factorisation serves them all, and a handful of trials is enough to fit them by marginal
likelihood under log-normal priors; each task has a scale of its own, integrated out. Only tasks
with gradients and tasks without any (bits per byte and accuracy) are fitted apart.

An objective is any function of the losses that JAX can trace. What is not known of the losses is
carried through it by samples: a maximum or a penalty is then treated as what it is.

Axes: n trials (padded), J tasks, K weights, N = n (1 + K) observations or n without gradients, S
samples. Everything runs in float64.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import qmc

from optimer_jax.search.descent import descend

# Medians and spreads of the log-normal priors of a, b, r, l (times the square root of K), the noise
# of values and of gradients, and s.
_MEDIAN = (0.3, 1.0, 0.03, 0.7, 0.01, 0.002, 0.2)
_SPREAD = (1.0, 1.0, 1.5, 0.5, 2.0, 2.0, 0.7)
_LENGTH_SPREAD = 0.3  # Of the directions' lengths, whose median is 1.
_REACH = 3.0  # Hyperparameters stay within so many spreads of the median.
_CONSTANT = 10.0  # c: about the mean of the values, which is subtracted, little is known.
_SHAPE = 2.0  # Of the rational quadratic: the smaller, the more length scales are mixed.
_JITTER = 1e-8  # Of variances, where rounding would make them negative.
_FREEDOM = 4.0  # Of the prior of the scales, in observations.
_FIT_STEPS, _SEARCH_STEPS = 40, 30
_SAMPLES, _STARTS, _SCAN = 64, 12, 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Process:
  """What `fit` found of some of the tasks, J of them.

  Attributes:
    points: [n, K], in units of the box's width.
    present: [N], 1 for an observation and 0 for padding.
    weights: [N, J], the covariance's inverse times the centred observations.
    whitener: [N, N], the inverse of the covariance's triangular factor, in units of 1 / `scale`.
    centre, scale: [J], of the tasks' losses.
    hyper: [7 + K], logarithms of a, b, r, l, both noises, s and the directions' lengths.
    lower, upper: [K], the box.
  """

  points: jax.Array
  present: jax.Array
  weights: jax.Array
  whitener: jax.Array
  centre: jax.Array
  scale: jax.Array
  hyper: jax.Array
  lower: jax.Array
  upper: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Surrogate:
  """What `fit` found.

  Attributes:
    processes: of the tasks with gradients and of those without.
    order: int [J], where the tasks are when those of the processes stand in a row.
  """

  processes: tuple[Process, ...]
  order: jax.Array

  @property
  def noise(self) -> np.ndarray:
    """[J], standard deviation of a value about the smooth surface."""
    found = [each.scale * jnp.exp(each.hyper[4]) for each in self.processes]
    return np.concatenate(found)[self.order]


def _x64(function):
  """Runs in float64, whatever the precision of the code outside."""

  @functools.wraps(function)
  def in_float64(*args, **kwargs):
    with jax.enable_x64(True):
      return function(*args, **kwargs)

  return in_float64


@_x64
def fit(
  points: np.ndarray,
  values: np.ndarray,
  lower: np.ndarray,
  upper: np.ndarray,
  stderrs: np.ndarray | None = None,
  gradients: np.ndarray | None = None,
  hyper: Sequence[np.ndarray] | None = None,
) -> Surrogate:
  """Fits the model.

  Shapes are padded to powers of two, so that trial after trial runs the same programs.

  Args:
    points: [n, K], merge weights.
    values: [n, J], finite losses.
    lower, upper: [K], the box that is searched.
    stderrs: [n, J], by how much more than the noise that all values have, which is fitted, each is
      uncertain; None if none is.
    gradients: [n, J, K], dL_j/dw_k, NaN where there are none; None if nowhere is one.
    hyper: of each process, [7 + K], the logarithms of another fit's hyperparameters, to be kept.
  """
  points, values = np.asarray(points, float), np.asarray(values, float)
  lower, upper = np.asarray(lower, float), np.asarray(upper, float)
  slopes = np.full((*values.shape, points.shape[1]), np.nan)
  if gradients is not None:
    slopes = np.asarray(gradients, float)
  sloped = np.isfinite(slopes).all(axis=2).any(axis=0)
  groups = [tasks for tasks in (np.flatnonzero(sloped), np.flatnonzero(~sloped)) if len(tasks)]
  processes = []
  for i, tasks in enumerate(groups):
    processes.append(
      _fit(
        points,
        values[:, tasks],
        lower,
        upper,
        None if stderrs is None else np.asarray(stderrs, float)[:, tasks],
        slopes[:, tasks] if sloped[tasks[0]] else None,
        None if hyper is None else hyper[i],
      )
    )
  return Surrogate(tuple(processes), jnp.asarray(np.argsort(np.concatenate(groups))))


def _fit(points, values, lower, upper, stderrs, gradients, hyper) -> Process:
  n, k = points.shape
  padded = max(8, 1 << (n - 1).bit_length())
  known = np.zeros((padded, 1 + k * (gradients is not None)))
  known[:n, 0] = 1.0
  x = _pad(points / (upper - lower), padded)
  y = _pad(values, padded)[:, None]  # [n, 1 + K, J], as the observations of one trial belong.
  if gradients is not None:
    slopes = np.moveaxis(gradients, 1, 2) * (upper - lower)[:, None]
    there = np.isfinite(slopes).all(axis=(1, 2))
    known[:n, 1:] = there[:, None]
    slopes = np.where(there[:, None, None], slopes, 0.0)
    y = np.concatenate([y, _pad(slopes, padded)], axis=1)
  noise = np.zeros(padded)
  if stderrs is not None:
    *_, prior = _centred(x, known, y)
    noise[:n] = np.mean(stderrs**2, axis=1) / np.asarray(prior)
  data = (jnp.asarray(x), jnp.asarray(known), jnp.asarray(y), jnp.asarray(noise))
  hyper = _fit_hyper(*data) if hyper is None else jnp.asarray(hyper)
  return _condition(*data, hyper, jnp.asarray(lower), jnp.asarray(upper))


@_x64
def predict(surrogate: Surrogate, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Means and standard deviations [m, J] of the smooth losses at the weights [m, K]."""
  mean, deviation = _predict_all(surrogate, jnp.asarray(points, float))
  return np.asarray(mean), np.asarray(deviation)


@_x64
def leave_one_out(surrogate: Surrogate) -> np.ndarray:
  """Standardised errors [n, J] (padding included as zeros) of each value as the others predict it.

  A trial is left out with its gradient; hyperparameters and scales stay. A model that can be
  trusted has errors like a normal variable's. (Dubrule 1983: no refit is needed.)
  """
  return np.asarray(_leave_one_out(surrogate))


@_x64
def minimise(
  surrogate: Surrogate,
  objective: Callable[[jax.Array], jax.Array],
  explore: float = 0.0,
  seed: int = 0,
  simplex: bool = False,
) -> tuple[np.ndarray, float, float]:
  """The best weights in the box, as the model sees them.

  Args:
    surrogate: of the tasks' losses.
    objective: losses [J] -> scalar, to be minimised; traced by JAX. A function, or a dataclass that
      is a pytree: other numbers in it are then no other program.
    explore: how many standard deviations of the objective to subtract from its mean: 0 for the
      optimum, more for where to look next, less than 0 for one that is safe.
    seed: of the samples and starting points.
    simplex: of the box, only weights that sum to 1; it has no numbers below 0.

  Returns:
    The weights [K], the objective's mean there and its standard deviation.
  """
  k, j = surrogate.processes[0].points.shape[1], len(surrogate.order)
  draws, scan = _draws(j, seed), _scan(k, seed)
  if not dataclasses.is_dataclass(objective):
    objective = jax.tree_util.Partial(objective)
  x, mean, deviation = _minimise(simplex, objective, surrogate, explore, draws, scan)
  return np.asarray(x), float(mean), float(deviation)


@functools.lru_cache(maxsize=64)
def _draws(j: int, seed: int) -> np.ndarray:
  """[S, J] standard normal, in opposite pairs."""
  half = qmc.MultivariateNormalQMC(np.zeros(j), rng=np.random.default_rng(seed)).random(
    _SAMPLES // 2
  )
  return np.concatenate([half, -half])


@functools.lru_cache(maxsize=64)
def _scan(k: int, seed: int) -> np.ndarray:
  """[., K] in the unit cube, evenly spread."""
  return qmc.Sobol(k, rng=np.random.default_rng(seed)).random(_SCAN)


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
  return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]))])


def _kernel(hyper, x, y):
  a, b, r, l = jnp.exp(hyper[:4])
  l = l * np.sqrt(len(x))
  s, lengths = jnp.exp(hyper[6]), jnp.exp(hyper[7:])
  x, y = x * lengths, y * lengths
  dot, away = x @ y, (jnp.arcsinh(x / s) - jnp.arcsinh(y / s)) / jnp.arcsinh(1 / s)
  bowl = b * (x @ x) * (y @ y) / 4
  residual = r * (1 + (away @ away) / (2 * _SHAPE * l**2)) ** -_SHAPE
  return _CONSTANT + dot + a * dot**2 + bowl + residual


def _against(hyper, x, points, width):
  """Covariance of the loss at x with every trial's observations: [n, 1], [n, 1 + K]."""
  if width == 1:
    return jax.vmap(lambda y: _kernel(hyper, x, y))(points)[:, None]
  value, slope = jax.vmap(lambda y: jax.value_and_grad(_kernel, 2)(hyper, x, y))(points)
  return jnp.concatenate([value[:, None], slope], axis=1)


def _covariance(hyper, x, known, noise):
  """[N, N] in units of the scale squared; padding has ones on the diagonal."""
  n, width = known.shape
  against = lambda y: _against(hyper, y, x, width)
  rows = jax.vmap(against)(x)[:, None]  # [n, 1, n, width]
  if width > 1:
    slopes = jnp.moveaxis(jax.vmap(jax.jacfwd(against))(x), 3, 1)  # [n, K, n, width]
    rows = jnp.concatenate([rows, slopes], axis=1)
  flat = known.reshape(-1)
  matrix = rows.reshape(n * width, n * width) * flat * flat[:, None]
  of_value = jnp.exp(2 * hyper[4]) + noise[:, None]
  of_slope = jnp.full((n, width - 1), jnp.exp(2 * hyper[5]))
  diagonal = jnp.concatenate([of_value, of_slope], axis=1).reshape(-1)
  return matrix + jnp.diag(jnp.where(flat > 0, diagonal + _JITTER, 1.0))


def _centred(x, known, y):
  """The observations [N, J], their number, the values' means [J], and the prior scale squared."""
  of_value = known[:, :1]
  count = of_value.sum()
  centre = (of_value * y[:, 0]).sum(0) / count
  values = of_value * (y[:, 0] - centre)
  flat = jnp.concatenate([values[:, None], y[:, 1:]], axis=1).reshape(-1, y.shape[2])
  # The scale is that of slopes: squares of values over squares of distances.
  middle = (of_value * x).sum(0) / count
  spread = (of_value * (x - middle) ** 2).sum()
  prior = (values**2).sum() / y.shape[2] / jnp.where(spread > 0, spread, 1.0)
  return flat, known.sum(), centre, prior + 1e-12


def _factor(hyper, x, known, noise):
  return jnp.linalg.cholesky(_covariance(hyper, x, known, noise))


@jax.jit
def _fit_hyper(x, known, y, noise):
  flat, count, _, prior = _centred(x, known, y)
  k = x.shape[1]
  median = jnp.log(jnp.asarray([*_MEDIAN, *[1.0] * k]))
  spread = jnp.asarray([*_SPREAD, *[_LENGTH_SPREAD] * k])

  def loss(z):
    factor = _factor(median + spread * z, x, known, noise)
    explained = jax.scipy.linalg.solve_triangular(factor, flat, lower=True)
    # Each task's scale integrated out under an inverse gamma prior: Student's t.
    misfit = jnp.log1p((explained**2).sum(0) / (_FREEDOM * prior))
    halves = (_FREEDOM + count) * misfit.sum()
    volume = 2 * jnp.log(jnp.diag(factor)).sum() * flat.shape[1]
    return (halves + volume + z @ z) / 2

  starts = jnp.zeros((3, len(median))).at[1, 4].set(-2.0).at[2, 2].set(2.0)
  bound = jnp.full(len(median), _REACH)
  found, losses = descend(loss, starts, -bound, bound, _FIT_STEPS)
  return median + spread * found[jnp.argmin(losses)]


@jax.jit
def _condition(x, known, y, noise, hyper, lower, upper) -> Process:
  flat, count, centre, prior = _centred(x, known, y)
  factor = _factor(hyper, x, known, noise)
  whitener = jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(factor)), lower=True)
  weights = whitener.T @ (whitener @ flat)
  scale = jnp.sqrt((_FREEDOM * prior + (flat * weights).sum(0)) / (_FREEDOM + count))
  return Process(x, known.reshape(-1), weights, whitener, centre, scale, hyper, lower, upper)


def _predict(surrogate, w):
  found = [_predict_some(process, w) for process in surrogate.processes]
  return tuple(jnp.concatenate(each)[surrogate.order] for each in zip(*found, strict=True))


def _predict_some(process, w):
  x = w / (process.upper - process.lower)
  n = len(process.points)
  width = len(process.present) // n
  against = _against(process.hyper, x, process.points, width).reshape(-1) * process.present
  mean = process.centre + against @ process.weights
  explained = jnp.square(process.whitener @ against).sum()
  variance = jnp.maximum(_kernel(process.hyper, x, x) - explained, _JITTER)
  return mean, process.scale * jnp.sqrt(variance)


_predict_all = jax.jit(jax.vmap(_predict, (None, 0)))


@jax.jit
def _leave_one_out(surrogate):
  found = [_leave_out(process) for process in surrogate.processes]
  return jnp.concatenate(found, axis=1)[:, surrogate.order]


def _leave_out(process):
  n = len(process.points)
  width = len(process.present) // n
  columns = process.whitener.reshape(n * width, n, width)
  blocks = jnp.einsum('vna,vnb->nab', columns, columns)  # Of the covariance's inverse.
  weights = process.weights.reshape(n, width, -1)
  covariance = jnp.linalg.inv(blocks)
  errors = jnp.einsum('nab,nbj->naj', covariance, weights)[:, 0]
  return errors / (process.scale * jnp.sqrt(covariance[:, 0, 0])[:, None])


@functools.partial(jax.jit, static_argnums=0)
def _minimise(simplex, objective, surrogate, explore, draws, scan):
  lower, upper = surrogate.processes[0].lower, surrogate.processes[0].upper
  inside = (lambda w: (w + 1e-9) / (w + 1e-9).sum()) if simplex else (lambda w: w)

  def moments(w):
    mean, deviation = _predict(surrogate, inside(w))
    values = jax.vmap(objective)(mean + deviation * draws)
    return values.mean(), jnp.sqrt(values.var() + 1e-18)

  def score(w):
    mean, deviation = moments(w)
    return mean - explore * deviation

  # From the trials and from everywhere: the better ones of both.
  width = upper - lower
  tried = jnp.clip(surrogate.processes[0].points * width, lower, upper)
  candidates = jnp.concatenate([tried, lower + width * scan])
  scores = jax.lax.map(score, candidates, batch_size=128)
  starts = candidates[jnp.argsort(scores)[:_STARTS]]
  found, scores = descend(score, starts, lower, upper, _SEARCH_STEPS)
  best = found[jnp.argmin(scores)]
  return inside(best), *moments(best)
