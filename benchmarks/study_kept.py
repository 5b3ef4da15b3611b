"""What `benchmarks.study` keeps of a run of runs/study_270m.gin, and what it reads there."""

import dataclasses
import itertools
import json
import re
import shutil
import statistics
from pathlib import Path

from optimer_jax.errors import UserError
from optimer_jax.files import read_json, read_jsonl, write_json, write_text

FILES = (
  *('baselines.json', 'costs.jsonl', 'operative.gin', 'cpt/*/metrics.jsonl'),
  *('mixed/*/metrics.jsonl', 'evaluations/*.json', 'evaluations/*.jsonl'),
  *('studies/*/trials.jsonl', 'studies/*/best.json', 'tuned/*.jsonl'),
  *('vectors/geometry.json', 'vectors/trajectory.json'),
)


def keep(run: Path, folder: Path, timed: bool = True) -> None:
  """Copies what is small in a run directory into FOLDER/NAME.

  Evaluations come without the scores of examples, and stages without seconds if not `timed`.
  """
  if not (run / 'baselines.json').exists():
    raise UserError(f'{run} has no baselines.json: finish its pipeline first')
  target = folder / run.name
  for pattern in FILES:
    for file in sorted(run.glob(pattern)):
      place = target / file.relative_to(run)
      place.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(file, place)
  for file in (target / 'evaluations').glob('*.json'):
    value = read_json(file)
    if isinstance(value, dict):
      write_json(file, {key: kept for key, kept in value.items() if key != 'per_example'})
  if not timed:
    rows = [{**row, 'seconds': None} for row in read_jsonl(run / 'costs.jsonl')]
    write_text(target / 'costs.jsonl', ''.join(f'{json.dumps(row)}\n' for row in rows))
  manifest = next((run / 'cpt').glob('*/manifest.json'))
  write_json(target / 'training.json', read_json(manifest)['facts']['settings'])


@dataclasses.dataclass(frozen=True)
class Kept:
  """What one run left."""

  path: Path

  @property
  def training(self) -> dict:
    return read_json(self.path / 'training.json')

  @property
  def tokens(self) -> int:
    """Of a CPT run."""
    return self.training['steps'] * self.training['batch'] * self.training['length']

  @property
  def rows(self) -> dict[str, dict]:
    return {row['model']: row for row in read_json(self.path / 'baselines.json')}

  @property
  def domains(self) -> list[str]:
    return [*self.best('vizier')['weights']]

  def best(self, study: str) -> dict:
    return read_json(self.path / 'studies' / study / 'best.json')

  def trials(self, study: str) -> list[dict]:
    return read_jsonl(self.path / 'studies' / study / 'trials.jsonl')

  def alias(self, name: str) -> str:
    """What is chosen among several: a mixture by its loss on development text; a model by test."""
    if name == 'mix-best':
      grid = [n for n in self.rows if re.fullmatch(r'mixed-(uniform|ratios-\d+)', n)]
      return min(grid, key=lambda n: self.rows[n]['dev']) if len(grid) > 1 else name
    if name == 'best-single':
      names = [path.stem for path in (self.path / 'evaluations').glob('cpt-*.json')]
      return min(names, key=lambda n: self.evaluation(n)['mean'])
    return name

  def evaluation(self, name: str) -> dict | None:
    path = self.path / 'evaluations' / f'{self.alias(name)}.json'
    return read_json(path) if path.exists() else None

  def bits(self, name: str, task: str) -> float:
    """Per byte of a task's test text."""
    return self.evaluation(name)['scores'][task]['value']

  def difference(self, a: str, b: str) -> dict | None:
    """The paired difference a - b."""
    a, b = self.alias(a), self.alias(b)
    for row in read_json(self.path / 'evaluations' / 'comparisons.json'):
      for one, other, sign in ((a, b, 1), (b, a, -1)):
        if (row['a'], row['b']) == (one, other):
          return {'difference': sign * row['difference'], 'stderr': row['stderr']}
    return None

  @property
  def reached(self) -> float | None:
    """The share of its steps after which the uniform mixture was as good as the merge.

    By the losses on development text on its way, with straight lines between them; None if it never
    was, or if they were not kept.
    """
    goal, way = self.found, self.way
    for (step, loss), (next_step, next_loss) in itertools.pairwise([(0, self.dev_at(0)), *way]):
      if next_loss <= goal:
        return (step + (next_step - step) * (loss - goal) / (loss - next_loss)) / way[-1][0]
    return None

  @property
  def found(self) -> float:
    """The loss of the first search's answer on development text."""
    best = self.best('vizier')
    return self.loss(best[best['chosen']])

  @property
  def way(self) -> list[tuple[int, float]]:
    """The steps of the uniform mixture, and its loss on development text after them."""
    rows = read_jsonl(self.path / 'mixed' / 'uniform' / 'metrics.jsonl')
    return [(row['step'], row['dev_bits_per_byte']) for row in rows if 'dev_bits_per_byte' in row]

  def uniform(self, study: str, weight: float) -> dict:
    """The trial whose weights are all this: 0 is the base, 1/K the average."""
    return next(row for row in self.trials(study) if {*row['weights'].values()} == {weight})

  def dev_at(self, weight: float) -> float:
    """The loss on development text if all weights are this."""
    return self.loss(self.uniform('vizier', weight))

  def slopes(self, weight: float) -> dict[str, dict[str, float]]:
    """dL/dw of every task that counts, by task and vector, if all weights are this."""
    found = self.uniform('gradient', weight)['gradients']
    return {task: found[task] for task in self.domains}

  def loss(self, trial: dict) -> float:
    return statistics.fmean(trial['scores'][task]['value'] for task in self.domains)

  @property
  def timed(self) -> bool:
    """Whether the seconds of its stages were kept."""
    return all(row['seconds'] is not None for row in read_jsonl(self.path / 'costs.jsonl'))

  def costs(self, pattern: str, key: str) -> list[float]:
    """Of each stage whose name matches: what its attempts cost that did not find all done."""
    found = {}
    for row in read_jsonl(self.path / 'costs.jsonl'):
      worked = row.get('flops') != 0 or row.get('interrupted')
      if worked and re.fullmatch(pattern, row['stage']):
        found[row['stage']] = found.get(row['stage'], 0.0) + row.get(key, 0.0)
    return [*found.values()]

  @property
  def cosines(self) -> list[float]:
    """Of each pair of vectors."""
    matrix = read_json(self.path / 'vectors' / 'geometry.json')['cosine']
    return [value for i, row in enumerate(matrix) for value in row[:i]]

  @property
  def ways(self) -> list[dict]:
    """How straight each training run was."""
    path = self.path / 'vectors' / 'trajectory.json'
    return [*read_json(path).values()] if path.exists() else []
