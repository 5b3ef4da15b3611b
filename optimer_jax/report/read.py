"""Reads a run directory into plain values; what is missing stays empty, what is damaged is named.

Every file is checked against the shape that the report needs of it, so that a damaged or foreign
file costs its own part of the page and nothing else.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optimer_jax.errors import UserError
from optimer_jax.files import read_json, read_jsonl

# Shapes: a type, [shape] for lists, {...: shape} for any keys but at least one, {'key': shape} for
# these keys at least, and {'key?': shape} for keys that may be absent or null. Numbers are finite;
# only a Share may be null, where there is nothing to have a share of.
Count = int
Number = float
Size = 'at least 0'
Positive = 'above 0'
Share = 'from 0 to 1'
SCORE = {'value': Positive, 'stderr': Size}
PAIRED = {'difference': Number, 'stderr': Size}
EVALUATION = {
  'scores': {...: SCORE},
  'weights?': {...: Number},
  'mean?': Positive,
  'per_example?': {...: {'nats': [Number], 'bytes': [Number]}},
}
COMPARISON = {'a': str, 'b': str, **PAIRED, 'per_task?': {...: PAIRED}}
TRIAL = {
  'trial': Count,
  'sampler': str,
  'weights': {...: Number},
  'scores': {...: SCORE},
  'objective': Number,
  'pool?': str,
}
BEST = {
  'objective': str,
  'weights': {...: Number},
  'ratios?': {...: Number},
  'chosen': str,
  'best_observed?': {'scores': {...: SCORE}, 'objective': Number},
  'surrogate_optimum?': {'scores': {...: SCORE}, 'objective': Number, 'predicted?': Number},
}
GEOMETRY = {
  'datasets': [str],
  'norm': {...: Size},
  'relative_norm?': {...: Size},
  'cosine': [[Number]],
  'by_layer?': {...: [Size]},
  'by_module?': {...: {...: Size}},
  'layer_module?': {...: {...: [Size]}},
  'cosine_by_layer?': [[[Number]]],
  'cosine_by_module?': {...: [[Number]]},
  'sign_agreement?': [[Share]],
  'sign_unanimous?': Share,
  'sign_elected?': Share,
  'effective_rank?': {...: {...: {'effective': Size, 'stable': Size, 'bound': Count}}},
  'embedding_share?': {...: Size},
  'embedding_rows_touched?': {...: Share},
}
TRAJECTORY = {
  'steps': [Count],
  'step_norm': [Size],
  'step_cosine': [Number],
  'norm': [Size],
  'final_cosine': [Number],
  'projection': [Number],
  'straightness': Size,
}
STEP = {'step': Count, 'loss?': Number, 'dev_bits_per_byte?': Number}
COST = {
  'stage': str,
  'seconds': Size,
  'flops?': Size,
  'tokens?': Size,
  'peak_rss_gb?': Size,
}
MANIFEST = {
  'kind?': str,
  'fingerprint?': str,
  'model?': dict,
  'versions?': dict,
  'notes?': [str],
}


def fault(value: object, shape: object, where: str = '') -> str:
  """Says what in `value` departs from `shape`, or '' if nothing does."""
  if shape is Share and value is None:
    return ''
  if shape in (Number, Count, Size, Positive, Share):
    kinds = int if shape is Count else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
      return f'{where or "the value"} is not a finite number'
    out = {
      Size: value < 0,
      Positive: value <= 0,
      Share: not 0 <= value <= 1,
    }.get(shape, False)
    return f'{where} is {value}, not {shape}' if out else ''
  if isinstance(shape, type):
    return '' if isinstance(value, shape) else f'{where or "the value"} is not a {shape.__name__}'
  if isinstance(shape, list):
    if not isinstance(value, list):
      return f'{where or "the value"} is not a list'
    items = [(f'{where}[{i}]', item, shape[0]) for i, item in enumerate(value)]
  else:
    if not isinstance(value, dict):
      return f'{where or "the value"} is not an object'
    if ... in shape and not value:
      return f'{where or "the value"} is empty'
    items = []
    for key, inner in shape.items():
      if key is ...:
        items += [(f'{where}.{name}'.strip('.'), item, inner) for name, item in value.items()]
      elif not key.endswith('?'):
        if key not in value:
          return f'{where + "." if where else ""}{key} is missing'
        items.append((f'{where}.{key}'.strip('.'), value[key], inner))
      elif value.get(key[:-1]) is not None:
        items.append((f'{where}.{key[:-1]}'.strip('.'), value[key[:-1]], inner))
  return next((found for at, item, inner in items if (found := fault(item, inner, at))), '')


@dataclass(frozen=True)
class Study:
  """One search: its trials in order (rows of the ledger) and its answer, {} before there is one."""

  name: str
  trials: list[dict]
  best: dict


@dataclass(frozen=True)
class Run:
  """What a run directory holds. `problems` are sentences about files that could not be used."""

  name: str
  datasets: list[str]
  tasks: list[str]
  evaluations: dict[str, dict]
  comparisons: list[dict]
  studies: list[Study]
  geometry: dict
  trajectories: dict[str, dict]
  training: dict[str, list[dict]]
  costs: list[dict]
  manifest: dict
  gin: str
  problems: list[str]


def read_run(path: Path) -> Run:
  """Reads RUN. Raises UserError if `path` holds nothing that a run would hold."""
  path = Path(path)
  known = ('base', 'cpt', 'vectors', 'studies', 'evaluations', 'costs.jsonl', 'operative.gin')
  if not any((path / name).exists() for name in known):
    raise UserError(
      f'{path} is not a run directory (it has none of {", ".join(known)}): check the path'
    )
  problems = []

  def one(file: Path, shape: object, fits: Callable[[object], str] = lambda value: '') -> object:
    if not file.exists():
      return None
    try:
      value = read_json(file)
      found = fault(value, shape) or fits(value)
    except UserError as error:
      found = error.__cause__ or error.__context__ or 'it cannot be read'
    except OSError as error:
      found = error.strerror
    if not found:
      return value
    problems.append(f'{file.relative_to(path)} is damaged ({found}): it is left out here.')
    return None

  def many(file: Path, shape: object) -> list[dict]:
    if not file.exists():
      return []
    try:
      lines = sum(bool(line.strip()) for line in file.read_bytes().splitlines())
      rows = [row for row in read_jsonl(file) if not fault(row, shape)]
    except OSError as error:
      problems.append(
        f'{file.relative_to(path)} is damaged ({error.strerror}): it is left out here.'
      )
      return []
    if lost := lines - len(rows):
      what = 'a line that is' if lost == 1 else f'{lost} lines that are'
      problems.append(
        f'{file.relative_to(path)} has {what} cut short or damaged, of {lines}: left out here.'
      )
    return rows

  evaluations = {
    file.stem: value
    for file in sorted((path / 'evaluations').glob('*.json'))
    if file.stem != 'comparisons' and (value := one(file, EVALUATION))
  }
  studies = []
  for folder in sorted((path / 'studies').glob('*/')):
    best = one(folder / 'best.json', BEST) or {}
    trials = many(folder / 'trials.jsonl', TRIAL)
    # A ledger outlives its vectors: scores of an older pool say nothing about this one.
    current = [row for row in trials if row.get('pool') == trials[-1].get('pool')]
    if older := len(trials) - len(current):
      problems.append(
        f'studies/{folder.name}/trials.jsonl also holds {older} trials of another vector pool: '
        'left out here.'
      )
    if current or best:
      studies.append(Study(folder.name, current, best))
  geometry = one(path / 'vectors' / 'geometry.json', GEOMETRY, _square) or {}
  ways = path / 'vectors' / 'trajectory.json'
  trajectories = one(ways, {...: TRAJECTORY}, _in_step) or {}
  training = {
    folder.name: rows
    for folder in sorted((path / 'cpt').glob('*/'))
    if (rows := many(folder / 'metrics.jsonl', STEP))
  }
  comparisons = one(path / 'evaluations' / 'comparisons.json', [COMPARISON]) or []
  costs = many(path / 'costs.jsonl', COST)
  manifest = one(path / 'base' / 'manifest.json', MANIFEST) or {}
  gin = path / 'operative.gin'
  rows = [row for study in studies for row in study.trials]
  return Run(
    name=path.resolve().name,
    datasets=_union(
      geometry.get('datasets', []),
      trajectories,
      training,
      (folder.name for folder in (path / 'cpt').glob('*/') if not folder.name.startswith('.')),
      *(row['weights'] for row in rows),
      *(study.best.get('weights', {}) for study in studies),
      (name.removeprefix('cpt-') for name in evaluations if name.startswith('cpt-')),
    ),
    tasks=_union(*(value['scores'] for value in [*evaluations.values(), *rows])),
    evaluations=evaluations,
    comparisons=comparisons,
    studies=studies,
    geometry=geometry,
    trajectories=trajectories,
    training=training,
    costs=costs,
    manifest=manifest,
    gin=gin.read_text(encoding='utf-8', errors='replace') if gin.is_file() else '',
    problems=problems,
  )


def answer(run: Run) -> Study | None:
  """The study that the evaluated OptiMer model came from, else the first with an answer."""
  answered = [study for study in run.studies if study.best]
  used = run.evaluations.get('optimer', {}).get('weights')
  same = [study for study in answered if study.best['weights'] == used]
  return next(iter([*same, *answered]), None)


def mean(evaluation: dict) -> float:
  """The mean over tasks, bits/byte: as the evaluation wrote it, or unweighted."""
  if evaluation.get('mean') is not None:
    return evaluation['mean']
  scores = [score['value'] for score in evaluation['scores'].values()]
  return sum(scores) / len(scores)


def mean_stderr(scores: dict[str, dict]) -> float:
  """Standard error of the mean over tasks, whose texts are independent."""
  return math.hypot(*(score['stderr'] for score in scores.values())) / len(scores)


def paired(run: Run, a: str, b: str) -> dict:
  """Evaluation `a` minus `b`: {'difference', 'stderr', 'per_task'}, paired per example; {} if not.

  As measured by the evaluation (comparisons.json) where it has the pair. Otherwise by the same
  estimator, which is here again so that a page is drawn without JAX: the standard error of the
  difference of two ratios sum(nats) / sum(bytes) on the same examples, linearised; nan where the
  examples were not kept.
  """
  for row in run.comparisons:
    sign = {(a, b): 1, (b, a): -1}.get((row['a'], row['b']))
    if sign:
      tasks = row.get('per_task') or {}
      turned = {
        task: {**one, 'difference': sign * one['difference']} for task, one in tasks.items()
      }
      return {**row, 'a': a, 'b': b, 'difference': sign * row['difference'], 'per_task': turned}
  if a not in run.evaluations or b not in run.evaluations:
    return {}
  one, two = run.evaluations[a], run.evaluations[b]
  if set(one['scores']) != set(two['scores']):
    return {}
  tasks = {
    task: {
      'difference': score['value'] - two['scores'][task]['value'],
      'stderr': _paired_stderr(*((e.get('per_example') or {}).get(task) for e in (one, two))),
    }
    for task, score in one['scores'].items()
  }
  return {
    'a': a,
    'b': b,
    'difference': mean(one) - mean(two),
    'stderr': mean_stderr(tasks),
    'per_task': tasks,
  }


def _paired_stderr(one: dict | None, two: dict | None) -> float:
  if not one or not two or one['bytes'] != two['bytes'] or len(one['bytes']) < 2:
    return math.nan
  size, total = len(one['bytes']), sum(one['bytes'])
  if not total or len(one['nats']) != size or len(two['nats']) != size:
    return math.nan
  change = [x - y for x, y in zip(one['nats'], two['nats'], strict=True)]
  rate = sum(change) / total
  rest = math.hypot(*(c - rate * b for c, b in zip(change, one['bytes'], strict=True)))
  return math.sqrt(size / (size - 1)) * rest / (total * math.log(2))


def stages(costs: list[dict]) -> list[dict]:
  """One row a stage in order of first start: resumed attempts summed, the highest peak memory."""
  summed = {}
  for row in costs:
    stage = summed.setdefault(
      row['stage'],
      {'stage': row['stage'], 'attempts': 0, 'seconds': 0, 'flops': 0, 'tokens': 0, 'rss': 0},
    )
    stage['attempts'] += 1
    for key in ('seconds', 'flops', 'tokens'):
      stage[key] += row.get(key) or 0
    stage['rss'] = max(stage['rss'], row.get('peak_rss_gb') or 0)
  return list(summed.values())


def _union(*names) -> list[str]:
  # Sorted, so that a data set keeps its colour whichever files there are.
  return sorted({name for some in names for name in some})


def _square(value: dict) -> str:
  size = len(value['datasets'])
  for key, matrix in {
    'cosine': value['cosine'],
    'sign_agreement': value.get('sign_agreement'),
    **{f'cosine_by_layer[{i}]': m for i, m in enumerate(value.get('cosine_by_layer') or [])},
    **{f'cosine_by_module.{k}': m for k, m in (value.get('cosine_by_module') or {}).items()},
  }.items():
    if matrix is not None and [len(row) for row in matrix] != [size] * size:
      return f'{key} is not {size} x {size}'
  lost = [name for name in value['datasets'] if name not in value['norm']]
  return f'norm of {lost[0]} is missing' if lost else ''


def _in_step(value: dict) -> str:
  for name, way in value.items():
    size = len(way['steps'])
    if not size or way['steps'][-1] <= 0:
      return f'{name}.steps has no last step'
    for key in ('step_norm', 'norm', 'final_cosine', 'projection'):
      if len(way[key]) != size:
        return f'{name}.{key} has not {size} values'
    if len(way['step_cosine']) != size - 1:
      return f'{name}.step_cosine has not {size - 1} values'
  return ''
