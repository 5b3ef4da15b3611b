"""The loop of a study: from its seeds through a sampler's suggestions to the optimum at its end."""

import contextlib
import fcntl
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from optimer_jax.errors import UserError
from optimer_jax.files import append_jsonl, read_jsonl, write_json
from optimer_jax.progress import say
from optimer_jax.search.answer import best_of, feasible, first_answer, recommended, shown
from optimer_jax.search.ledger import append_trial, begin_with, make_row, point_of, read_ledger
from optimer_jax.search.objectives import Aggregate
from optimer_jax.search.racing import cannot_win, estimated, rival_of
from optimer_jax.search.samplers import Sampler, make_sampler
from optimer_jax.search.study import Study


def run_study(
  directory: Path | str,
  study: Study,
  evaluate: Callable[..., Mapping],
  others: Sequence[Path] = (),
) -> dict:
  """Runs the study to its end, from wherever it stands, and returns the content of best.json.

  Killed at any moment and started again, it evaluates no candidate twice and gives the ledger of
  an unbroken run (but for times). A finished study returns at once.

  Args:
    directory: of the study; holds trials.jsonl (the truth), examples.jsonl (the scores of each
      example), prior.jsonl (what other studies had measured), study.db and best.json.
    study: what is searched, and how.
    evaluate: (point, gradients=False, stop=None) -> {'scores': {task: {'value', 'stderr', 'unit',
      …}}, 'seconds', 'flops'} and, to be kept beside the ledger, 'per_example'; with `gradients`
      also 'gradients': {task: {weight: dL/dw}}. After each part of the examples but the last,
      stop(scores so far, parts done) says whether to go no further; the result then has 'parts',
      those done. A value that is not finite makes the candidate infeasible.
    others: ledgers of other studies.

  Raises:
    UserError: the directory holds a study of something else or is in use, or every candidate is
      infeasible.
  """
  config, directory = study.config, Path(directory)
  with held(directory):
    rows = read_ledger(directory / 'trials.jsonl', study)
    prior = begin_with(directory / 'prior.jsonl', rows, others, study)
    first = first_answer(study, prior)
    seeds = seeds_left(study, prior)
    kept = read_jsonl(directory / 'examples.jsonl')
    examples = {row['trial']: row['per_example'] for row in kept}
    last = max(config.trials, len(rows) + 1, len(seeds) + 1)
    last = len(rows) if finished(study, rows) else last
    begun, before, sampler = time.monotonic(), len(rows), None
    for number in range(len(rows) + 1, last + 1):
      every, rival, found, asked = [*prior, *rows], None, None, {}
      if number <= len(seeds):
        kind, point = 'seed', seeds[number - 1]
        asked = {'gradients': config.sampler == 'gradient'}
      elif number < last:
        if sampler is None or config.objective.kind == 'pareto':
          sampler = _sampler(study, directory, every, number - len(seeds) - 1, last - number)
        kind, (point,) = config.sampler, sampler.suggest(1)
        if sampler.wants_gradients:
          asked = {'gradients': True}
        elif config.parts > 1 and config.objective.kind != 'pareto':
          objective = study.objective(every)
          if rival := rival_of(study, rows, objective, examples):
            asked = {'stop': functools.partial(cannot_win, study, objective, rival)}
      else:
        kind, found = 'surrogate', recommended(study, every)
        point = found.point

      result = known_result(every, point) or evaluate(dict(point), **asked)
      if set(result['scores']) != set(study.tasks):
        raise ValueError(f'scored {sorted(result["scores"])}, not {sorted(study.tasks)}')
      if per_example := result.get('per_example'):
        examples[number] = per_example
        append_jsonl(directory / 'examples.jsonl', {'trial': number, 'per_example': per_example})
      if 'parts' in result:
        result = estimated(study, rival, result)
      row = make_row(number, kind, point, result, study)
      objective = study.objective([*every, row])
      row['objective'] = None if objective is None else study.value(row, objective)
      if found:
        row |= {'predicted': found.predicted, 'predicted_stderr': found.stderr}
      append_trial(directory / 'trials.jsonl', row)
      rows.append(row)
      if sampler:
        sampler.observe(*study.observations([row], objective))
      left = (time.monotonic() - begun) / (number - before) * (last - number)
      say(line(study, row, [*prior, *rows], objective, last, left))
    best = best_of(study, prior, rows, examples, first)
    write_json(directory / 'best.json', best)
  return best


def seeds_left(study: Study, prior: Sequence[Mapping]) -> list[dict[str, float]]:
  """The seeds that no other study has scored on all examples."""
  known = {tuple(point_of(row).items()) for row in prior if 'parts' not in row}
  return [seed for seed in study.seeds() if tuple(seed.items()) not in known]


def finished(study: Study, rows: Sequence[Mapping]) -> bool:
  """Whether the study has its trials, the last of which is the optimum of the others."""
  return len(rows) >= study.config.trials and rows[-1]['sampler'] == 'surrogate'


def _sampler(
  study: Study, directory: Path, rows: Sequence[Mapping], number: int, left: int
) -> Sampler:
  """A sampler that knows the trials; on a front, one that looks in the direction `number`."""
  feasible(study, rows)  # With nothing to stand on, stop here.
  front = study.config.objective.kind == 'pareto'
  objective = study.objective(rows, number if front else None)
  return make_sampler(
    study.config.sampler,
    study.space,
    study.config.seed,
    [*study.tasks],
    objective,
    directory / 'study.db',
    study.observations(rows, objective),
    study.config.simplex,
    left,
  )


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
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


def known_result(rows: Sequence[Mapping], point: Mapping[str, float]) -> dict | None:
  """The result of a candidate that was scored on all examples before; it costs nothing again."""
  for row in rows:
    if point_of(row) == point and 'parts' not in row:
      return {'scores': row['scores'], 'seconds': 0.0, 'flops': 0.0}
  return None


def line(
  study: Study,
  row: Mapping,
  rows: Sequence[Mapping],
  objective: Aggregate | None,
  last: int,
  left: float,
) -> str:
  """What is said of a trial: its place, its objective, the best of `rows`, and seconds left."""
  said = f'study {study.config.name}: trial {row["trial"]}/{last} ({row["sampler"]}) '
  said += shown(point_of(row))
  if objective is not None:
    value = study.value(row, objective)
    said += ': infeasible' if value is None else f': {value:.4f}'
    if 'parts' in row:
      said += f' (given up after {row["parts"]} of {study.config.parts} parts)'
    done = [
      (v, r) for r in rows if 'parts' not in r and (v := study.value(r, objective)) is not None
    ]
    if done:
      value, best = min(done, key=lambda each: each[0])
      where = f' of {best["study"]}' if 'study' in best else ''
      said += f', best {value:.4f} (trial {best["trial"]}{where})'
  return f'{said}, {left:.0f} s left'
