"""What a finished run came to: `python -m benchmarks.quickstart_report RUN`.

Prints a table for a person and, as the last line, one JSON object: wall time in seconds (all
stages, resumed attempts summed), peak memory in GB, test bits per byte of every model, the weights
found, and the paired difference of OptiMer from the uniform average. A run that is not finished is
one sentence and exit 1.
"""

import json
import math
import sys
from pathlib import Path

from optimer_jax.errors import UserError
from optimer_jax.report.read import Run, answer, mean, paired, read_run, stages


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
  difference = paired(run, 'optimer', 'average')
  if not difference:
    raise UserError(
      f'the run {run.name} scored optimer and average on different tasks: evaluate both again'
    )
  rows = stages(run.costs)
  return {
    'wall_s': round(sum(row['seconds'] for row in rows), 3),
    'peak_rss_gb': max(row['rss'] for row in rows),
    'bpb': {
      'base': _scores(run, 'base'),
      'cpt': {name: _scores(run, f'cpt-{name}') for name in run.datasets},
      'average': _scores(run, 'average'),
      'optimer': _scores(run, 'optimer'),
    },
    'weights': study.best['weights'],
    'optimer_minus_average': {
      'difference': difference['difference'],
      'stderr': None if math.isnan(difference['stderr']) else difference['stderr'],
    },
    **({'exported': _scores(run, 'exported')} if 'exported' in run.evaluations else {}),
  }


def _scores(run: Run, name: str) -> dict[str, float]:
  evaluation = run.evaluations[name]
  each = {task: score['value'] for task, score in evaluation['scores'].items()}
  return {**each, 'mean': mean(evaluation)}


def table(found: dict) -> str:
  """The same for a person."""
  models = {
    'base': found['bpb']['base'],
    **{f'CPT {name}': scores for name, scores in found['bpb']['cpt'].items()},
    'uniform average': found['bpb']['average'],
    'OptiMer': found['bpb']['optimer'],
    **({'OptiMer, exported': found['exported']} if 'exported' in found else {}),
  }
  columns = list(dict.fromkeys(task for scores in models.values() for task in scores))
  columns = [*(name for name in columns if name != 'mean'), 'mean']
  wide = [max(9, len(name)) for name in columns]
  first = max(map(len, ['test bits per byte', *models]))
  lines = [_line('test bits per byte', columns, first, wide)]
  for label, scores in models.items():
    values = [f'{scores[name]:.4f}' if name in scores else '-' for name in columns]
    lines.append(_line(label, values, first, wide))
  weights = ', '.join(f'{name} {value:.4f}' for name, value in found['weights'].items())
  difference = found['optimer_minus_average']
  error = '?' if difference['stderr'] is None else f'{difference["stderr"]:.4f}'
  return '\n'.join(
    [
      *lines,
      '',
      f'weights: {weights}',
      f'OptiMer minus uniform average: {difference["difference"]:+.4f} ± {error} (paired)',
      f'wall time {found["wall_s"]:.0f} s, peak memory {found["peak_rss_gb"]:.2f} GB',
      '',
    ]
  )


def _line(label: str, cells: list[str], first: int, wide: list[int]) -> str:
  return '  '.join([label.ljust(first), *(c.rjust(w) for c, w in zip(cells, wide, strict=True))])


def main(arguments: list[str]) -> int:
  """Prints both; returns the exit status."""
  if len(arguments) != 1:
    print('usage: python -m benchmarks.quickstart_report RUN', file=sys.stderr)
    return 2
  try:
    found = summary(read_run(Path(arguments[0])))
  except UserError as error:
    print(error, file=sys.stderr)
    return 1
  print(table(found))
  print(json.dumps(found))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
