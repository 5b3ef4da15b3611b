"""The verb `evaluate`: any model on the test split of the run's tasks, and two of them in pairs.

  RUN/evaluations/NAME.json         scores, and those of every example
  RUN/evaluations/comparisons.json  paired differences
  RUN/evaluations/test_looks.jsonl  a line for every model that test data were looked at with

What was scored is not scored again while the model and the task's data are the same. Who chooses
among models by test scores selects on test: the looks show it.
"""

import dataclasses
import datetime
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from optimer_jax.checkpoints import base as bases
from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.names import Source
from optimer_jax.data.tokenizer import Tokenizer
from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation import scores
from optimer_jax.evaluation.engine import Engine, Prepared
from optimer_jax.files import append_jsonl, read_json, read_jsonl, write_json
from optimer_jax.gemma3 import Gemma3Config, Model
from optimer_jax.gemma3.placement import place_leaves
from optimer_jax.merging.candidates import MergeConfig, candidates
from optimer_jax.merging.weighted_sum import ALL, Groups
from optimer_jax.parallel.processes import in_turn, once
from optimer_jax.parallel.startup import release_memory
from optimer_jax.progress import say
from optimer_jax.run import (
  Run,
  best_of,
  counted,
  engine_of,
  pool_of,
  prepare,
  stage,
  tasks_of,
  vector_fingerprints,
)
from optimer_jax.vectors.extract import check_parent, origin


@dataclasses.dataclass(frozen=True)
class _Subject:
  """A model to be scored: one of `weights`, `artifact` and `source` says where its parameters are.

  Attributes:
    name: of its file in RUN/evaluations.
    identity: changes whenever its parameters may.
    weights: of the run's vectors.
    merging: how the weighted vectors become a model.
    groups: what shares its weights.
    artifact: a base, CPT model or merged model of this project.
    source: what `checkpoints.base.open_source` takes.
  """

  name: str
  identity: dict
  weights: Mapping[str, float] | None = None
  merging: MergeConfig | None = None
  groups: Groups = ALL
  artifact: Path | None = None
  source: str | None = None


def evaluate(run: Run, models: Sequence[str] = ()) -> dict[str, dict]:
  """Scores models on the test split of the run's tasks.

  Args:
    run: the run. Its base need not be imported where only `Run.base` itself is asked for.
    models: `base`, `cpt-NAME` (base + one vector), `average`, `optimer` (the study's answer, which
      is also called `studies/NAME`), `exported` (its checkpoint); other weights, as in `ja=0.5` or
      `ja=0.3,zh=0.2`, unnamed ones being 0; an artifact (`cpt/ja`, `merged/mine`,
      `snapshots/ja/100`) by its place in the run or its path; else what `Run.base` takes, to begin
      with a Hugging Face directory. Default: those of the first lines but `studies/NAME`.

  Returns:
    What RUN/evaluations/NAME.json holds, by name, of the models asked for.

  Raises:
    UsageError: a model or task is none.
    UserError: a file of the model or of a task is missing, damaged or of something else.
  """
  standard = not models
  subjects = [_subject(run, model) for model in models or _standard(run)]
  engine = _engine(run, subjects)
  tasks = tasks_of(run, 'test')
  prepared = {engine.model: prepare(tasks, engine, 'test')}
  searched = counted(run, tasks)
  read = _reader(run, engine)
  found = {}
  for subject in subjects:
    old = _old(run, subject)
    todo = {
      name: task
      for name, task in prepared[engine.model].items()
      if old.get('tasks', {}).get(name) != task.digest
    }
    if todo:
      with stage(run, f'evaluate/{subject.name}') as cost:
        model, params = read(subject)
        if model not in prepared:  # another size of model reads the same tokens
          prepared[model] = prepare(tasks, dataclasses.replace(engine, model=model), 'test')
        old = _scored(run, subject, {name: prepared[model][name] for name in todo}, params, old)
        del params
        each = [old['scores'][name]['tokens'] for name in todo]
        cost['tokens'] = sum(each)
        cost['flops'] = cost['tokens'] * model.config.flops_per_token(run.length)
    found[subject.name] = _written(run, subject, old, searched)
  if standard:
    for other in sorted(found.keys() - {'optimer'}):
      compare(run, 'optimer', other, searched)
  return found


def name_of(model: str) -> str:
  """What a model's file in RUN/evaluations is called."""
  return re.sub(r'[^\w.=,-]+', '-', model).strip('.-')


def compare(run: Run, a: str, b: str, of_mean: Sequence[str] = ()) -> dict:
  """The paired difference of two evaluated models, kept in RUN/evaluations/comparisons.json.

  Args:
    run: the run.
    a, b: names of files in RUN/evaluations.
    of_mean: the tasks that the mean is over; default: all that both were scored on.

  Returns:
    'a', 'b', 'difference', 'stderr' and 'p' of the mean, and 'per_task' of these, of the losses
    a - b: less is better for a.

  Raises:
    UserError: they have no task in common.
  """
  return once(lambda: _compared(run, a, b, of_mean))


def _compared(run: Run, a: str, b: str, of_mean: Sequence[str]) -> dict:
  directory = run.path / 'evaluations'
  one, two = (read_json(directory / f'{name}.json') for name in (a, b))
  common = [t for t, digest in one['tasks'].items() if two['tasks'].get(t) == digest]
  if not common:
    raise UserError(f'{a} and {b} were scored on no task in common: evaluate both on one')

  def of(names: Sequence[str]) -> dict:
    sides = [
      {t: scores.from_summary(e['scores'][t], e['per_example'][t]) for t in names}
      for e in (one, two)
    ]
    return scores.compare(*sides)

  found = {'a': a, 'b': b, **of([t for t in of_mean if t in common] or common)}
  found['per_task'] |= {t: of([t])['per_task'][t] for t in common if t not in found['per_task']}
  path = directory / 'comparisons.json'
  others = read_json(path) if path.exists() else []
  write_json(path, [*(c for c in others if (c['a'], c['b']) != (a, b)), found])
  return found


def looks(run: Run) -> dict[str, int]:
  """How many different models the test data of each task were looked at with so far."""
  seen: dict[str, set] = {}
  for row in read_jsonl(run.path / 'evaluations' / 'test_looks.jsonl'):
    for task in row['tasks']:
      seen.setdefault(task, set()).add(str(row['identity']))
  return {task: len(models) for task, models in seen.items()}


# What is asked for.


def _standard(run: Run) -> list[str]:
  return ['base', *(f'cpt-{name}' for name in run.vector_paths), 'average', 'optimer', 'exported']


def _subject(run: Run, model: str) -> _Subject:
  names = [*run.vector_paths]
  points = {f'cpt-{name}': {n: float(n == name) for n in names} for name in names}
  points['average'] = dict.fromkeys(names, 1 / len(names)) if names else {}
  name = name_of(model)
  if model in points and names:
    return _merged(run, name, points[model], MergeConfig())
  if model in ('optimer', f'studies/{run.study.name}'):
    best = best_of(run)
    merging = run.merging.at(best.get('numbers', {}))
    return _merged(run, name, best['weights'], merging, run.study.groups)
  if re.fullmatch(r'[\w-]+=[^/]*', model):
    return _merged(run, name, _weights(model, names), run.merging)
  place = {'base': str(run.path / 'base'), 'exported': 'export/optimer'}.get(model, model)
  path = run.path / place if (run.path / place).exists() else Path(place)
  if model == 'base' or (path / 'manifest.json').exists():
    manifest = store.read_manifest(path)
    if manifest.kind == 'vector':
      raise UsageError(f'{model} is a vector: give it a weight, as in {path.name}=0.5')
    check_parent(manifest, store.read_manifest(run.path / 'base').fingerprint, path, run.path)
    weights = manifest.facts.get('weights')
    return _Subject(name, {'artifact': manifest.fingerprint}, weights, artifact=path)
  weights = best_of(run)['weights'] if model == 'exported' else None
  source = str(path) if path.exists() else place
  return _Subject(name, {'source': origin(source)}, weights, source=source)


def _merged(
  run: Run, name: str, weights: Mapping[str, float], merging: MergeConfig, groups: Groups = ALL
) -> _Subject:
  identity = {
    'vectors': vector_fingerprints(run),
    'weights': dict(weights),
    'merging': dataclasses.asdict(merging),
  }
  if groups != ALL:
    identity['groups'] = dataclasses.asdict(groups)
  return _Subject(name, identity, weights, merging, groups)


def _weights(text: str, names: Sequence[str]) -> dict[str, float]:
  try:
    given = {name: float(w) for name, w in (part.split('=') for part in text.split(','))}
  except ValueError:
    raise UsageError(f'the model {text!r} cannot be read: write it as in ja=0.3,zh=0.2') from None
  if unknown := sorted(given.keys() - set(names)):
    raise UsageError(f'there is no vector {unknown[0]!r}: there are {", ".join(names)}')
  return dict.fromkeys(names, 0.0) | given


# How it is read.


def _engine(run: Run, subjects: Sequence[_Subject]) -> Engine:
  """The run's; that of `Run.base` itself where it is not imported and only it is asked for."""
  if (run.path / 'base').exists() or [each.source for each in subjects] != [run.base]:
    return engine_of(run)
  source = in_turn(lambda: bases.open_source(run.base, run.cache_path))
  if not source.write_tokenizer:
    raise UserError(f'{run.base} has no tokenizer: import it into a run')
  with tempfile.TemporaryDirectory() as place:
    source.write_tokenizer(Path(place))
    tokenizer = Tokenizer.load(place)
  return engine_of(run, source.config, tokenizer)


def _reader(run: Run, engine: Engine) -> Callable[[_Subject], tuple[Model, dict]]:
  """From a subject to its model and parameters, which the next call may write over.

  The pool stays in memory while one merge after another is asked of it, and no longer.
  """
  model, pool = engine.model, [None, None]

  def read(subject: _Subject) -> tuple[Model, dict]:
    if subject.artifact is None and subject.source is None:
      kind = subject.merging, subject.groups
      if pool[0] != kind:
        pool[:] = [None, None]
        loaded = pool_of(dataclasses.replace(run, merging=subject.merging), engine)
        pool[:] = [kind, candidates(loaded, *kind)]
      return model, pool[1](subject.weights)
    pool[:] = [None, None]
    release_memory()
    if subject.artifact:
      manifest, leaves = store.open_leaves(subject.artifact)
      config = manifest.model
    else:
      source = in_turn(lambda: bases.open_source(subject.source, run.cache_path))
      config, leaves = bases.with_vocabulary(source, _kept(run, model.config, source))
    own = dataclasses.replace(model, config=config)
    return own, place_leaves(own, store.values(leaves), engine.mesh)

  return read


def _kept(run: Run, config: Gemma3Config, source: Source) -> np.ndarray | None:
  """The rows of a source's embedding that the run's tokenizer knows."""
  base = run.path / 'base'
  kept = bases.kept_vocabulary(base) if base.exists() else None
  known = config.vocab_size if kept is None else int(kept[-1]) + 1
  if source.config.vocab_size < known:
    raise UserError(
      f'{source.name} has a vocabulary of {source.config.vocab_size}, too small for the tokenizer '
      f'of {run.directory}: evaluate it without a run'
    )
  if kept is None and source.config.vocab_size > known:
    kept = np.arange(known, dtype=np.int32)
  return kept


# What is kept.


def _old(run: Run, subject: _Subject) -> dict:
  """What was scored of the same model before."""
  path = run.path / 'evaluations' / f'{subject.name}.json'
  old = read_json(path) if path.exists() else {}
  return old if old.get('identity') == subject.identity else {}


def _scored(
  run: Run, subject: _Subject, tasks: Mapping[str, Prepared], params: dict, old: Mapping
) -> dict:
  """`old` with the scores of these tasks; what is looked at is written down."""
  found = {key: dict(old.get(key, {})) for key in ('scores', 'tasks', 'per_example')}
  for name, task in tasks.items():
    score = task.score(params)
    found['scores'][name] = summary = score.summary()
    found['per_example'][name] = score.per_example()
    found['tasks'][name] = task.digest
    cut = f', {score.truncated} prompts truncated' if score.truncated else ''
    say(f'{subject.name}: {name} {scores.shown(summary)} ({task.count} examples{cut})')
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')[:-6] + 'Z'
  digests = {name: task.digest for name, task in tasks.items()}
  look = {'model': subject.name, 'weights': subject.weights, 'tasks': digests, 'time': now}
  path = run.path / 'evaluations' / 'test_looks.jsonl'
  once(lambda: append_jsonl(path, {**look, 'identity': subject.identity}))
  return found


def _written(run: Run, subject: _Subject, found: Mapping, searched: Sequence[str]) -> dict:
  """RUN/evaluations/NAME.json: the mean is that of the tasks that a search sees, if there are."""
  averaged = [name for name in searched if name in found['scores']] or [*found['scores']]
  losses = [scores.loss(found['scores'][name]) for name in averaged]
  mean = sum(losses) / len(losses)
  value = {
    'name': subject.name,
    'split': 'test',
    'weights': None if subject.weights is None else dict(subject.weights),
    'scores': found['scores'],
    'mean': mean if np.isfinite(mean) else None,
    'tasks': found['tasks'],
    'identity': subject.identity,
    'per_example': found['per_example'],
  }
  path = run.path / 'evaluations' / f'{subject.name}.json'

  def write() -> None:
    if not path.exists() or read_json(path) != value:
      write_json(path, value)

  once(write)
  return value
