"""Reads a run directory into plain values; what is missing stays empty, what is damaged is named.

Every file is checked against the shape that the report needs of it, so that a damaged or foreign
file costs its own part of the page and nothing else.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from optimer_jax.errors import UserError
from optimer_jax.evaluation.scores import UNITS, Score, compare, loss
from optimer_jax.files import read_json, read_jsonl

# Shapes: a type, [shape] for lists, {...: shape} for any keys but at least one, {'key': shape} for
# these keys at least, and {'key?': shape} for keys that may be absent or null. Numbers are finite;
# a Share may be null, where there is nothing to have a share of, and so may a Maybe.
Count = int
Number = float
Size = 'at least 0'
Share = 'from 0 to 1'
Maybe = 'a number or null'
SCORE = {'value': Size, 'stderr?': Size, 'unit?': str, 'count?': Count, 'truncated?': Count}
PAIRED = {'difference': Number, 'stderr?': Size, 'p?': Share}
PER_EXAMPLE = {...: {'values': [Maybe], 'sizes': [Size]}}
EVALUATION = {
  'scores': {...: SCORE},
  'weights?': {...: Number},
  'tasks?': {...: str},
  'per_example?': PER_EXAMPLE,
}
LOOK = {'model': str, 'weights?': {...: Number}, 'tasks': {...: str}, 'time?': str}
COMPARISON = {'a': str, 'b': str, **PAIRED, 'per_task?': {...: PAIRED}}
TRIAL = {
  'trial': Count,
  'sampler': str,
  'weights': {...: Number},
  'scores': {...: {**SCORE, 'value': Maybe}},
  'objective': Maybe,
  'numbers?': dict,
  'search?': dict,
  'tasks?': {...: str},
  'pool?': str,
}
EXAMPLES = {'trial': Count, 'per_example': PER_EXAMPLE}
BEST = {
  'objective': str,
  'weights': {...: Number},
  'ratios?': {...: Number},
  'numbers?': dict,
  'chosen': str,
  'objectives?': {...: Maybe},
  'best_observed?': {'objective': Number},
  'surrogate_optimum?': {'objective': Maybe, 'predicted?': Number},
  'first_answer?': {'trials': Count, 'predicted': Number},
  'difference?': {'difference': Number, 'stderr': Number},
  'front?': {
    'tasks': [str],
    'observed': [{'weights': {...: Number}, 'losses': {...: Number}}],
    'predicted': [{'weights': {...: Number}, 'losses': {...: Number}}],
  },
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
BASELINE = {'model': str, 'kind': str, 'dev': Maybe, 'tried': Count, 'tokens': Count}
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
  if shape in (Share, Maybe) and value is None:
    return ''
  if shape in (Number, Count, Size, Share, Maybe):
    kinds = int if shape is Count else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
      return f'{where or "the value"} is not a finite number'
    out = {Size: value < 0, Share: not 0 <= value <= 1}.get(shape, False)
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
  """One search: its trials in order (rows of the ledger) and its answer, {} before there is one.

  `examples` maps a trial's number to its development scores by example, where they were kept.
  Where vectors have a weight for each group of parameters (`grouped`), weights are their means.
  """

  name: str
  trials: list[dict]
  best: dict
  examples: dict[int, dict]
  grouped: bool = False


@dataclass(frozen=True)
class Run:
  """What a run directory holds. `problems` are sentences about files that could not be used.

  `tasks` are those scored on test; `looks` has a row for every time that a model was.
  """

  name: str
  datasets: list[str]
  tasks: list[str]
  evaluations: dict[str, dict]
  comparisons: list[dict]
  looks: list[dict]
  studies: list[Study]
  geometry: dict
  trajectories: dict[str, dict]
  training: dict[str, list[dict]]
  costs: list[dict]
  baselines: list[dict]
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

  def many(
    file: Path, shape: object, fits: Callable[[object], str] = lambda value: ''
  ) -> list[dict]:
    if not file.exists():
      return []
    try:
      lines = sum(bool(line.strip()) for line in file.read_bytes().splitlines())
      rows = [row for row in read_jsonl(file) if not (fault(row, shape) or fits(row))]
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
    if file.stem != 'comparisons' and (value := one(file, EVALUATION, _in_range))
  }
  problems += _drop_others(evaluations)
  studies = []
  for folder in sorted((path / 'studies').glob('*/')):
    best = one(folder / 'best.json', BEST) or {}
    trials = many(folder / 'trials.jsonl', TRIAL, _in_range)
    # A trial that was scored again after a kill stands twice: the last line counts.
    kept = many(folder / 'examples.jsonl', EXAMPLES)
    examples = {row['trial']: row['per_example'] for row in kept}
    # What a trial's objective is measured by may have been scored after it.
    measured = best.get('objectives', {})
    trials = [
      {**row, 'objective': measured.get(str(row['trial']), row['objective'])} for row in trials
    ]
    infeasible = [row for row in trials if any(s['value'] is None for s in row['scores'].values())]
    trials = [row for row in trials if row['objective'] is not None]
    if infeasible:
      problems.append(
        f'studies/{folder.name}/trials.jsonl has no finite score of '
        f'trial {", ".join(str(row["trial"]) for row in infeasible)}: left out here.'
      )
    # A ledger outlives its vectors: scores of an older pool say nothing about this one.
    current = [row for row in trials if row.get('pool') == trials[-1].get('pool')]
    if older := len(trials) - len(current):
      problems.append(
        f'studies/{folder.name}/trials.jsonl also holds {older} trials of another vector pool: '
        'left out here.'
      )
    grouped = any(':' in name for row in [*current, best] for name in row.get('weights', ()))
    for row in filter(None, [*current, best] if grouped else []):
      row['weights'] = _by_vector(row['weights'])
    if current or best:
      studies.append(Study(folder.name, current, best, examples, grouped))
  geometry = one(path / 'vectors' / 'geometry.json', GEOMETRY, _square) or {}
  ways = path / 'vectors' / 'trajectory.json'
  trajectories = one(ways, {...: TRAJECTORY}, _in_step) or {}
  training = {
    folder.name: rows
    for folder in sorted((path / 'cpt').glob('*/'))
    if (rows := many(folder / 'metrics.jsonl', STEP))
  }
  comparisons = one(path / 'evaluations' / 'comparisons.json', [COMPARISON]) or []
  looks = many(path / 'evaluations' / 'test_looks.jsonl', LOOK)
  costs = many(path / 'costs.jsonl', COST)
  baselines = one(path / 'baselines.json', [BASELINE]) or []
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
    tasks=_union(*(value['scores'] for value in evaluations.values())),
    evaluations=evaluations,
    comparisons=comparisons,
    looks=looks,
    studies=studies,
    geometry=geometry,
    trajectories=trajectories,
    training=training,
    costs=costs,
    baselines=baselines,
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


def seeds(trials: list[dict]) -> dict[str, int]:
  """Where in `trials` 'base' (w = 0) and 'average' (w = 1/K) stand."""
  found = {}
  for i, trial in enumerate(trials):
    weights = list(trial['weights'].values())
    if not any(weights):
      found.setdefault('base', i)
    elif all(math.isclose(w, 1 / len(weights), rel_tol=1e-6) for w in weights):
      found.setdefault('average', i)
  return found


class Measured(NamedTuple):
  """A loss, or a difference of losses; `stderr` is nan and `p` None where not known."""

  value: float
  stderr: float
  p: float | None = None


def kind(scores: Iterable[Mapping]) -> str:
  """The unit that the scores share ('bits/byte' where there are none), or 'mixed'."""
  units = {_unit(score) for score in scores}
  return units.pop() if len(units) == 1 else 'mixed' if units else 'bits/byte'


def kinds(run: Run) -> dict[str, str]:
  """The kind of each test task, and of the 'mean' over the core tasks."""
  scores = {task: s for each in run.evaluations.values() for task, s in each['scores'].items()}
  return {
    'mean': kind(scores[task] for task in core(run)),
    **{task: kind([score]) for task, score in scores.items()},
  }


def core(run: Run) -> list[str]:
  """The test tasks that a mean is over: of those of OptiMer, base and average alike the ones that
  the search sees too, if there are any.

  A model may have been scored on more tasks, which then stand for themselves, or on fewer, and has
  no mean.
  """
  central = [run.evaluations[n] for n in ('optimer', 'base', 'average') if n in run.evaluations]
  sets = [set(each['scores']) for each in central or run.evaluations.values()]
  shared = set.intersection(*sets) if sets else set()
  study = answer(run) or next(iter(run.studies), None)
  trials = study.trials if study else []
  searched = {task for row in trials for task in row['scores'] if _counts(row, task)}
  return sorted(shared & searched or shared)


def _counts(trial: dict, task: str) -> bool:
  """Whether the task has a weight in the objective of the trial's study."""
  weights = (trial.get('search') or {}).get('objective weights')
  return not isinstance(weights, dict) or weights.get(task) != 0


def losses(scores: Mapping[str, dict], tasks: Collection[str]) -> dict[str, Measured]:
  """The loss of each task, and the 'mean' over `tasks` where all of these were scored."""
  each = {
    task: Measured(loss(score), _known(score.get('stderr'))) for task, score in scores.items()
  }
  return _with_mean(each, tasks)


def paired(run: Run, a: str, b: str) -> dict[str, Measured]:
  """Losses of evaluation `a` minus those of `b`, paired by example: of each task in common, and the
  'mean' over the core tasks where both have them all; {} if there is nothing to compare.

  As measured by the evaluation (comparisons.json) where it has the pair, else from the examples.
  """
  known = [set(run.evaluations[name]['scores']) for name in (a, b) if name in run.evaluations]
  for row in run.comparisons:
    sign = {(a, b): 1, (b, a): -1}.get((row['a'], row['b']))
    if sign:
      tasks = row.get('per_task') or {}
      each = {t: _signed(one, sign) for t, one in tasks.items() if all(t in k for k in known)}
      found, whole = _with_mean(each, core(run)), _signed(row, sign)
      # Its mean is of the tasks that were searched when it was written; it alone knows p.
      same = not tasks or ('mean' in found and abs(found['mean'].value - whole.value) < 1e-9)
      return {**found, 'mean': whole} if same else found
  if len(known) < 2:
    return {}
  return difference(run.evaluations[a], run.evaluations[b], core(run))


def difference(one: Mapping, two: Mapping, tasks: Collection[str]) -> dict[str, Measured]:
  """Losses of `one` minus those of `two` ({'scores', 'per_example'}), as `paired` gives them.

  The mean is over `tasks`. Where the examples were not kept, or are others, stderr is nan.
  """
  each, pairs = {}, {}
  for task, score in one['scores'].items():
    other = two['scores'].get(task)
    if other and _of(one, task) == _of(two, task):
      each[task] = Measured(loss(score) - loss(other), math.nan)
      if pair := _pair(one, two, task):
        pairs[task] = pair
  if pairs:
    found = compare(*({task: pair[i] for task, pair in pairs.items()} for i in (0, 1)))
    each |= {task: _signed(row) for task, row in found['per_task'].items()}
    if set(each) == set(pairs) == set(tasks):
      return {'mean': _signed(found), **each}
  return _with_mean(each, tasks)


def _pair(one: Mapping, two: Mapping, task: str) -> tuple[Score, Score] | None:
  """The task's scores by example, if they are of the same examples and have a standard error."""
  kept = [(each.get('per_example') or {}).get(task) for each in (one, two)]
  if not all(kept):
    return None
  sizes = kept[0]['sizes']
  if sizes != kept[1]['sizes'] or len(sizes) < 2 or not sum(sizes):
    return None
  if any(len(each['values']) != len(sizes) or None in each['values'] for each in kept):
    return None
  unit = _unit(one['scores'][task])
  return tuple(
    Score(np.array(each['values'], float), np.array(sizes, float), unit) for each in kept
  )


def _with_mean(each: dict[str, Measured], tasks: Collection[str]) -> dict[str, Measured]:
  """Adds the mean over `tasks`, whose examples are independent, if all are there."""
  if not tasks or not set(tasks) <= set(each):
    return each
  value = sum(each[task].value for task in tasks) / len(tasks)
  error = math.sqrt(sum(each[task].stderr ** 2 for task in tasks)) / len(tasks)
  p = each[next(iter(tasks))].p if len(tasks) == 1 else None
  return {'mean': Measured(value, error, p), **each}


def _signed(row: Mapping, sign: int = 1) -> Measured:
  return Measured(sign * row['difference'], _known(row.get('stderr')), row.get('p'))


def _known(stderr: float | None) -> float:
  return math.nan if stderr is None else stderr


def _of(scored: Mapping, task: str) -> tuple[str, str | None]:
  """Unit and digest of the data: what two scores of a task must share to be compared."""
  return _unit(scored['scores'][task]), (scored.get('tasks') or {}).get(task)


def _unit(score: Mapping) -> str:
  return score.get('unit') or 'bits/byte'


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


def _by_vector(weights: dict[str, float]) -> dict[str, float]:
  """Of 'vector:group', the mean of each vector's."""
  found = {}
  for name, weight in weights.items():
    found.setdefault(name.partition(':')[0], []).append(weight)
  return {vector: sum(each) / len(each) for vector, each in found.items()}


def _union(*names) -> list[str]:
  # Sorted, so that a data set keeps its colour whichever files there are.
  return sorted({name for some in names for name in some})


def _in_range(value: dict) -> str:
  for task, score in value['scores'].items():
    unit, found = _unit(score), score['value']
    if unit not in UNITS:
      return f'scores.{task}.unit is {unit}, not {" or ".join(UNITS)}'
    if found is None and value['objective'] is not None:
      return f'scores.{task}.value is not a finite number'
    if found is not None and (found > 1 if unit == 'accuracy' else found <= 0):
      return f'scores.{task}.value is {found}, which is no {unit}'
  return ''


def _drop_others(evaluations: dict[str, dict]) -> list[str]:
  """Leaves out scores on other data, or in another unit, than others of the task; says which."""
  first, problems = {}, []
  rank = {name: i for i, name in enumerate(('base', 'optimer', 'average'))}
  for name in sorted(evaluations, key=lambda name: (rank.get(name, len(rank)), name)):
    scores = evaluations[name]['scores']
    for task in list(scores):
      model, there = first.setdefault(task, (name, _of(evaluations[name], task)))
      if there != _of(evaluations[name], task):
        problems.append(
          f'evaluations/{name}.json has {task} on other data, or in another unit, than '
          f'{model}.json: left out here, until both are evaluated again.'
        )
        del scores[task]
    if not scores:
      del evaluations[name]
  return problems


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
