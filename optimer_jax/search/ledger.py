"""The trial ledger: one JSON line for every candidate ever evaluated in a study.

The ledger is the truth. A candidate that stands in it is never evaluated again, and whatever else
a study keeps (Vizier's database, best.json) can be rebuilt from it.
"""

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from optimer_jax.errors import UserError
from optimer_jax.files import append_jsonl, read_jsonl


def make_row(
  trial: int,
  sampler: str,
  weights: Mapping[str, float],
  numbers: Mapping[str, float],
  result: Mapping,
  objective: float,
  pool: str,
  search: Mapping,
  tasks: Mapping[str, str],
) -> dict:
  """A ledger row.

  Args:
    trial: 1, 2, … in the order of evaluation.
    sampler: 'seed', 'vizier' or 'surrogate'.
    weights: merge weights by data set.
    numbers: what else was searched, by name: the density.
    result: what the evaluation gave: 'scores', 'seconds' and 'flops'.
    objective: to be minimised; a value that is not finite becomes None (infeasible).
    pool: fingerprint of the vector pool.
    search: the objective's name, the bounds and the seed under which the row was found.
    tasks: digest of the data of each task.
  """
  return {
    'trial': trial,
    'sampler': sampler,
    'weights': {name: float(weight) for name, weight in weights.items()},
    'numbers': {name: float(number) for name, number in numbers.items()},
    'scores': _plain(result['scores']),
    'objective': _plain(objective),
    'seconds': _plain(result['seconds']),
    'flops': _plain(result['flops']),
    'pool': pool,
    'search': dict(search),
    'tasks': dict(tasks),
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')[:-6] + 'Z',
  }


def append_trial(path: Path | str, row: Mapping) -> None:
  """Appends the row and waits until it is on the disk."""
  append_jsonl(path, dict(row))


def read_ledger(
  path: Path | str, pool: str, names: Sequence[str], tasks: Mapping[str, str], search: Mapping
) -> list[dict]:
  """The rows of a study, in order; a missing ledger is [].

  Raises:
    UserError: the ledger is of another pool, other data sets, other tasks, other data of a task
      or another search configuration, or a line in the middle of it is lost.
  """
  rows = read_jsonl(path)
  for number, row in enumerate(rows, 1):
    for what, there, here in [
      ('the vector pool', row['pool'], pool),
      ('the data sets', sorted(row['weights']), sorted(names)),
      ('the tasks', sorted(row['scores']), sorted(tasks)),
      *[(key, row['search'].get(key), search.get(key)) for key in {**row['search'], **search}],
    ]:
      if there != here:
        raise UserError(
          f'{path} was written with {what} {_show(there)}, not {_show(here)}: '
          'give the study another name, or go back to what it was begun with'
        )
    there = row.get('tasks', {})
    if changed := sorted(task for task, digest in tasks.items() if there.get(task) != digest):
      raise UserError(
        f'the development data of {", ".join(changed)} are not those of trial {number} in {path} '
        '(their files, settings or tokenizer changed): bring them back, or give the study another '
        'name'
      )
    if row['trial'] != number:
      raise UserError(
        f'{path} has lost trial {number} (a damaged line): restore the file, or delete it and '
        'search again'
      )
  return rows


def _show(value: object) -> str:
  return ', '.join(value) if isinstance(value, list) else str(value)


def _plain(value):
  """NumPy and JAX scalars as Python's; NaN and infinities, which JSON does not have, as None."""
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  value = value.item() if hasattr(value, 'item') else value
  return None if isinstance(value, float) and not math.isfinite(value) else value
