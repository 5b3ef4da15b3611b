"""A study: from two seeds through Vizier's suggestions to the surrogate's optimum."""

import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from optimer_jax.errors import UsageError, UserError
from optimer_jax.files import append_jsonl, write_json
from optimer_jax.progress import say
from optimer_jax.search.ledger import append_trial, make_row, read_ledger
from optimer_jax.search.objectives import objective_named, standard_error
from optimer_jax.search.vizier import VizierSampler, surrogate_optimum

DENSITY = 'density'  # the one parameter of a merge method that is searched with the weights


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """A study.

  Attributes:
    name: what the study is called.
    trials: evaluations in all: the two seeds, Vizier's suggestions, and the surrogate's optimum,
      evaluated last. A study may be given more trials later.
    objective: name of a function in `objectives`, to be minimised.
    lower, upper: bounds of every merge weight; they hold 0 (the base) and 1/K (the average).
    density: bounds of the merge method's density, to search it too.
    seed: of Vizier's random numbers.
  """

  name: str = 'default'
  trials: int = 14
  objective: str = 'mean'
  lower: float = 0.0
  upper: float = 1.0
  density: tuple[float, float] | None = None
  seed: int = 0


def run_study(
  directory: Path | str,
  names: Sequence[str],
  evaluate: Callable[[dict[str, float]], Mapping],
  config: StudyConfig,
  pool: str,
  tasks: Mapping[str, str],
  method: str = '',
) -> dict:
  """Runs the study to its end, from wherever it stands, and returns the content of best.json.

  Killed at any moment and started again, it evaluates no candidate twice and gives the ledger of
  an unbroken run (but for times). A finished study returns at once.

  Args:
    directory: of the study; holds trials.jsonl (the truth), examples.jsonl, study.db and best.json.
    names: the K data sets of the pool.
    evaluate: {data set: weight}, and 'density' where it is searched -> {'scores': {task: {'value',
      'stderr', 'unit', …}}, 'seconds', 'flops'}, and 'per_example', which is kept beside the
      ledger; a value that is not finite makes the candidate infeasible.
    config: what to search.
    pool: fingerprint of the vector pool.
    tasks: the tasks that `evaluate` scores, each with a digest of the data that it scores on.
    method: how `evaluate` merges, where it is not the weighted sum.

  Raises:
    UsageError: the configuration makes no sense.
    UserError: the directory holds a study of something else or is in use, or every candidate is
      infeasible.
  """
  _check(config, names)
  objective = objective_named(config.objective)
  directory = Path(directory)
  ledger = directory / 'trials.jsonl'
  search = {key: getattr(config, key) for key in ('objective', 'lower', 'upper', 'seed')}
  if method:
    search['merge method'] = method
  space = dict.fromkeys(names, (config.lower, config.upper))
  numbers = {}
  if config.density:
    search['density'] = ' to '.join(map(str, config.density))
    numbers = {DENSITY: config.density}
  space |= numbers
  with _held(directory):
    rows = read_ledger(ledger, pool, names, tasks, search)
    finished = len(rows) >= config.trials and rows[-1]['sampler'] == 'surrogate'
    if not finished:
      sampler = VizierSampler(directory / 'study.db', space, config.seed, _observed(rows))
      last = max(config.trials, len(rows) + 1)
      begun, before = time.monotonic(), len(rows)
      for number in range(len(rows) + 1, last + 1):
        predicted = None
        if number == 3:
          _feasible(rows)  # With neither the average nor the base to stand on, stop here.
        if number <= 2:
          kind, point = 'seed', dict.fromkeys(names, (1 / len(names), 0.0)[number - 1])
          point |= {name: high for name, (_, high) in numbers.items()}
        elif number < last:
          kind, (point,) = 'vizier', sampler.suggest(1)
        else:
          kind = 'surrogate'
          point, predicted = surrogate_optimum(space, config.seed, _observed(rows))

        result = _known(rows, point) or evaluate(dict(point))
        if set(result['scores']) != set(tasks):
          raise ValueError(f'scored {sorted(result["scores"])}, not the tasks {sorted(tasks)}')
        value = objective(result['scores'])
        weights, others = ({x: point[x] for x in some} for some in (names, numbers))
        row = make_row(number, kind, weights, others, result, value, pool, search, tasks)
        if predicted is not None:
          row['predicted'] = predicted
        if examples := result.get('per_example'):
          append_jsonl(directory / 'examples.jsonl', {'trial': number, 'per_example': examples})
        append_trial(ledger, row)
        rows.append(row)
        sampler.observe(_point(row), row['objective'])

        left = (time.monotonic() - begun) / (number - before) * (last - number)
        say(_line(config.name, row, rows, last, left))
    best = _best(rows, config.objective)
    write_json(directory / 'best.json', best)
  return best


def _check(config: StudyConfig, names: Sequence[str]) -> None:
  if config.trials < 3:
    raise UsageError(
      f'study {config.name} has {config.trials} trials: it needs at least 3 (the uniform average, '
      "the base, and the surrogate's optimum)"
    )
  if not names or len(set(names)) != len(names):
    raise UsageError(f'study {config.name} needs distinct data sets, not {list(names)}')
  if config.density and not 0.0 < config.density[0] < config.density[1] <= 1.0:
    raise UsageError(
      f'study {config.name}: the density is searched between {config.density[0]} and '
      f'{config.density[1]}, but needs 0 < lower < upper <= 1'
    )
  if config.density and DENSITY in names:
    raise UsageError(f'study {config.name}: no data set can be called {DENSITY!r} here')
  if not config.lower <= 0.0 < 1 / len(names) <= config.upper:
    raise UsageError(
      f'study {config.name}: the bounds [{config.lower}, {config.upper}] must hold 0 and '
      f'1/K = {1 / len(names):.3g}, the weights of the base and of the uniform average'
    )


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
  """Keeps a second process out of the study; the kernel lets go when this one dies."""
  directory.mkdir(parents=True, exist_ok=True)
  handle = os.open(directory, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # A file system without locks.
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise UserError(
          f'another process is searching in {directory}: wait for it, or stop it'
        ) from None
    yield
  finally:
    os.close(handle)


def _observed(rows: Sequence[Mapping]) -> list:
  return [(_point(row), row['objective']) for row in rows]


def _point(row: Mapping) -> dict[str, float]:
  return {**row['weights'], **row.get('numbers', {})}


def _known(rows: Sequence[Mapping], point: Mapping[str, float]) -> dict | None:
  """The result of a candidate that stands in the ledger already; it costs nothing again."""
  for row in rows:
    if _point(row) == point:
      return {'scores': row['scores'], 'seconds': 0.0, 'flops': 0.0}
  return None


def _feasible(rows: Sequence[Mapping]) -> list[Mapping]:
  feasible = [row for row in rows if row['objective'] is not None]
  if not feasible:
    bad = sorted(t for t, score in rows[-1]['scores'].items() if score['value'] is None)
    raise UserError(
      f'no candidate has finite scores, not even the base and the average (see {", ".join(bad)}): '
      'check the vectors and the evaluation data'
    )
  return feasible


def _best(rows: Sequence[Mapping], objective: str) -> dict:
  """best.json: the surrogate's optimum beside the best of the other trials."""
  surrogate = rows[-1]
  observed = min(_feasible(rows[:-1]), key=lambda row: row['objective'])
  chosen = 'surrogate_optimum'
  if surrogate['objective'] is None or surrogate['objective'] > observed['objective']:
    chosen = 'best_observed'
  if surrogate['objective'] is not None:
    gain = observed['objective'] - surrogate['objective']
    error = standard_error(objective_named(objective), surrogate['scores'])
    if gain <= error:
      say(
        f"the surrogate's optimum ({surrogate['objective']:.4f}) is not better than the best "
        f'observed (trial {observed["trial"]}, {observed["objective"]:.4f}) by more than the '
        f'standard error of one evaluation ({error:.4f}): {chosen} is taken'
      )
  taken = surrogate if chosen == 'surrogate_optimum' else observed
  weights = taken['weights']
  positive = {name: max(weight, 0.0) for name, weight in weights.items()}
  total = sum(positive.values())
  return {
    'objective': objective,
    'best_observed': observed,
    'surrogate_optimum': surrogate,
    'chosen': chosen,
    'weights': weights,
    'numbers': taken.get('numbers', {}),
    # The base itself (all weights zero) is no mixture.
    'ratios': {name: weight / total if total else 0.0 for name, weight in positive.items()},
    'evaluations': len(rows),
  }


def _line(name: str, row: Mapping, rows: Sequence[Mapping], last: int, left: float) -> str:
  weights = ' '.join(f'{what} {value:.3f}' for what, value in _point(row).items())
  value = 'infeasible' if row['objective'] is None else f'{row["objective"]:.4f}'
  done = [other for other in rows if other['objective'] is not None]
  best = min(done, key=lambda other: other['objective'], default=None)
  so_far = f', best {best["objective"]:.4f} (trial {best["trial"]})' if best else ''
  return (
    f'study {name}: trial {row["trial"]}/{last} ({row["sampler"]}) {weights}: {value}{so_far}, '
    f'{left:.0f} s left'
  )
