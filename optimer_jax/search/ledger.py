"""The trial ledger: one JSON line for every candidate ever evaluated in a study.

The ledger is the truth. A candidate that stands in it is never evaluated again, and whatever else
a study keeps (Vizier's database, best.json) can be rebuilt from it.
"""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from optimer_jax.errors import UserError
from optimer_jax.files import append_jsonl, read_jsonl, write_text


def make_row(trial: int, sampler: str, point: Mapping[str, float], result: Mapping, study) -> dict:
  """A ledger row, still without its objective.

  Args:
    trial: 1, 2, … in the order of evaluation.
    sampler: 'seed', a sampler's name, or 'surrogate' for the optimum of what was learnt.
    point: merge weights by name, and what else was searched.
    result: what the evaluation gave: 'scores', 'seconds' and 'flops'; 'gradients' where they were
      taken; 'parts', if fewer than all parts of the examples were scored.
    study: the `Study` that the trial is of.
  """
  return {
    'trial': trial,
    'sampler': sampler,
    'weights': {name: float(point[name]) for name in study.names},
    'numbers': {name: float(point[name]) for name in study.numbers},
    'scores': _plain(result['scores']),
    **{key: _plain(result[key]) for key in ('parts', 'gradients') if key in result},
    'seconds': _plain(result['seconds']),
    'flops': _plain(result['flops']),
    'pool': study.pool,
    'search': study.search,
    'tasks': dict(study.tasks),
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')[:-6] + 'Z',
  }


def append_trial(path: Path | str, row: Mapping) -> None:
  """Appends the row and waits until it is on the disk."""
  append_jsonl(path, dict(row))


def point_of(row: Mapping) -> dict[str, float]:
  """Everything that was searched: merge weights and numbers."""
  return {**row['weights'], **row.get('numbers', {})}


def read_ledger(path: Path | str, study) -> list[dict]:
  """The rows of a study, in order; a missing ledger is [].

  Raises:
    UserError: the ledger is of another pool, other data sets, other tasks, other data of a task
      or another search configuration, or a line in the middle of it is lost.
  """
  rows, search = read_jsonl(path), study.search
  for number, row in enumerate(rows, 1):
    for what, there, here in [
      ('the vector pool', row['pool'], study.pool),
      ('the weights', sorted(row['weights']), sorted(study.names)),
      ('the tasks', sorted(row['scores']), sorted(study.tasks)),
      *[(key, row['search'].get(key), search.get(key)) for key in {**row['search'], **search}],
    ]:
      if there != here:
        raise UserError(
          f'{path} was written with {what} {_show(there)}, not {_show(here)}: '
          'give the study another name, or go back to what it was begun with'
        )
    there = row.get('tasks', {})
    if changed := sorted(task for task, digest in study.tasks.items() if there.get(task) != digest):
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


def begin_with(path: Path, rows: Sequence[Mapping], others: Sequence[Path], study) -> list[dict]:
  """What other studies of the pool measured before this one began, with the names of theirs.

  That is found when a study is begun and kept in `path`, so that it stays the same however often
  the study is stopped.

  Args:
    path: of the copy.
    rows: of the study's own ledger.
    others: ledgers of other studies; what is of another pool, other weights, another way to merge
      or other data of this study's tasks is left out.
    study: the `Study` that begins, which may name those that it wants.

  Raises:
    UserError: there is none of a name.
  """
  if path.exists() or rows:
    return read_jsonl(path)
  found, wanted = {}, study.config.reuse
  if wanted is not None:
    if unknown := sorted(set(wanted) - {other.parent.name for other in others}):
      raise UserError(f'there is no study {unknown[0]!r} to begin with: see StudyConfig.reuse')
    others = [other for other in others if other.parent.name in wanted]
  for other in sorted(others):
    for row in read_jsonl(other):
      alike = (
        row['pool'] == study.pool
        and sorted(row['weights']) == sorted(study.names)
        and sorted(row.get('numbers', {})) == sorted(study.numbers)
        and row['search'].get('merge method', '') == study.method
        and study.tasks.items() <= row.get('tasks', {}).items()
      )
      key = tuple(sorted(point_of(row).items()))
      if alike and ('parts' not in row or key not in found):
        found[key] = {**row, 'study': other.parent.name}
  lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in found.values()]
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, ''.join(lines))
  return read_jsonl(path)


def _show(value: object) -> str:
  return ', '.join(value) if isinstance(value, list) else str(value)


def _plain(value):
  """NumPy and JAX scalars as Python's; NaN and infinities, which JSON does not have, as None."""
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  value = value.item() if hasattr(value, 'item') else value
  return None if isinstance(value, float) and not math.isfinite(value) else value
