"""What a finished run came to: `python -m benchmarks.quickstart_report RUN`.

Prints a table for a person and, as the last line, one JSON object: wall time in seconds (all
stages, resumed attempts summed), peak memory in GB, test scores of every model ('bpb', or 'scores'
in several `units`; their mean is of the losses), the weights found, the paired difference of
OptiMer from the uniform average, what was gained over that on development and on test, and how
often test was scored. A run that is not finished is one sentence and exit 1.
"""

import json
import math
import sys
import textwrap
from pathlib import Path

from optimer_jax.errors import UserError
from optimer_jax.report.held_out import gains, looked
from optimer_jax.report.outcome import SCORES, against_training, count, level, mean
from optimer_jax.report.read import Measured, Run, answer, kinds, paired, read_run, stages


def summary(run: Run) -> dict:
  """The JSON object. Raises UserError naming what the run lacks."""
  study = answer(run)
  needed = ['base', *(f'cpt-{name}' for name in run.datasets), 'average', 'optimer']
  lacks = [f'evaluations/{name}.json' for name in needed if name not in run.evaluations]
  lacks += [] if study else ['studies/NAME/best.json']
  lacks += [] if run.costs else ['costs.jsonl']
  if lacks:
    raise UserError(
      f'the run {run.name} is not finished: it lacks {", ".join(lacks)}'
      f'{" (" + " ".join(run.problems) + ")" if run.problems else ""}; start it again'
    )
  difference = paired(run, 'optimer', 'average').get('mean')
  if not difference:
    raise UserError(
      f'the run {run.name} scored optimer and average on different tasks: evaluate both again'
    )
  rows, units = stages(run.costs), kinds(run)
  return {
    'wall_s': round(sum(row['seconds'] for row in rows), 3),
    'peak_rss_gb': max(row['rss'] for row in rows),
    'units': units,
    'bpb' if {*units.values()} == {'bits/byte'} else 'scores': {
      'base': _scores(run, 'base'),
      'cpt': {name: _scores(run, f'cpt-{name}') for name in run.datasets},
      'average': _scores(run, 'average'),
      'optimer': _scores(run, 'optimer'),
    },
    'weights': study.best['weights'],
    'optimer_minus_average': _measured('difference', difference),
    'gain_over_average': {
      split: _measured('gain', found)
      for split, found in zip(
        ('development', 'test'), gains(run, 'average').get('mean', ()), strict=False
      )
    },
    'test_looks': dict(zip(('times', 'models'), looked(run), strict=True)),
    **({'exported': _scores(run, 'exported')} if 'exported' in run.evaluations else {}),
  }


def _scores(run: Run, name: str) -> dict[str, float]:
  each = {task: score['value'] for task, score in run.evaluations[name]['scores'].items()}
  over_all = mean(run, name)
  return {**each, 'mean': over_all.value} if over_all else each


def _measured(what: str, found: Measured) -> dict:
  return {what: found.value, 'stderr': None if math.isnan(found.stderr) else found.stderr}


def table(found: dict) -> str:
  """The same for a person."""
  units, scores = found['units'], found.get('bpb') or found['scores']
  models = {
    'base': scores['base'],
    **{f'CPT {name}': each for name, each in scores['cpt'].items()},
    'uniform average': scores['average'],
    'OptiMer': scores['optimer'],
    **({'OptiMer, exported': found['exported']} if 'exported' in found else {}),
  }
  columns = [*(name for name in units if name != 'mean'), 'mean']
  wide = [max(9, len(name)) for name in columns]
  of_tasks = {units[name] for name in columns[:-1]}
  what = f'test {SCORES[of_tasks.pop() if len(of_tasks) == 1 else "mixed"]}'
  first = max(map(len, [what, *models]))
  lines = [_line(what, columns, first, wide)]
  for label, each in models.items():
    values = [_cell(each[n], units[n], n) if n in each else '-' for n in columns]
    lines.append(_line(label, values, first, wide))
  weights = ', '.join(f'{name} {value:.4f}' for name, value in found['weights'].items())
  difference = found['optimer_minus_average']
  splits = [
    f'{_error(one, "gain")} on {split}' for split, one in found['gain_over_average'].items()
  ]
  looks = found['test_looks']
  bits = units['mean'] == 'bits/byte'
  return '\n'.join(
    [
      *lines,
      '',
      f'weights: {weights}',
      f'OptiMer minus uniform average: {_error(difference, "difference", "+")} '
      f'(paired{"" if bits else ", of the mean loss"})',
      f'gain over the uniform average: {", ".join(splits) or "not known on both splits"}',
      f'test was scored {count(looks["times"], "time")}, for {count(looks["models"], "model")}',
      f'wall time {found["wall_s"]:.0f} s, peak memory {found["peak_rss_gb"]:.2f} GB',
      '',
    ]
  )


def _cell(value: float, unit: str, column: str) -> str:
  # Scores of accuracy are its shares; their mean is of the losses.
  return level(1 - value if unit == 'accuracy' and column != 'mean' else value, unit)


def _error(found: dict, key: str, sign: str = '') -> str:
  error = '?' if found['stderr'] is None else f'{found["stderr"]:.4f}'
  return f'{found[key]:{sign}.4f} ± {error}'


def _line(label: str, cells: list[str], first: int, wide: list[int]) -> str:
  return '  '.join([label.ljust(first), *(c.rjust(w) for c, w in zip(cells, wide, strict=True))])


def main(arguments: list[str]) -> int:
  """Prints both; returns the exit status."""
  if len(arguments) != 1:
    print('usage: python -m benchmarks.quickstart_report RUN', file=sys.stderr)
    return 2
  try:
    run = read_run(Path(arguments[0]))
    found = summary(run)
  except UserError as error:
    print(error, file=sys.stderr)
    return 1
  print(table(found))
  print(textwrap.fill(against_training(run), 100), end='\n\n')
  print(json.dumps(found))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
