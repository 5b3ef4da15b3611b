"""What OptiMer is measured against: mixtures that are trained, other merges and searches.

  RUN/mixed/NAME         a model trained on a mixture, on as many tokens as all CPT runs together
  RUN/tuned/NAME.jsonl   what was tried of another merge on development text; RUN/merged/NAME: best
  RUN/studies/NAME       another search of the same vectors
  RUN/baselines.json     what each of them is, and its loss on development text
  RUN/evaluations        their test scores, and their paired differences from OptiMer

Whatever is chosen among several is chosen by development text. What stands there is not done again.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from scipy.stats import qmc

from optimer_jax.checkpoints import store
from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluate import compare, evaluate, name_of
from optimer_jax.evaluation.engine import Engine
from optimer_jax.files import append_jsonl, read_jsonl, write_json
from optimer_jax.gemma3.placement import place_leaves
from optimer_jax.merging import methods
from optimer_jax.merging.candidates import candidates
from optimer_jax.parallel.processes import once
from optimer_jax.pipeline import extract_each, kept_of, merge, search, train_mixture
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
from optimer_jax.search.objectives import losses_of
from optimer_jax.search.samplers import check_sampler
from optimer_jax.search.simplexes import from_sticks, sticks
from optimer_jax.search.study import StudyConfig
from optimer_jax.training.train import TrainConfig


def baselines(run: Run) -> list[dict]:
  """Trains, tunes and searches what `Run.baselines` names, and scores all of it on test.

  Each is compared with OptiMer, in pairs; a mixture also with the uniform one and with the best one
  before it; and what has the uniform mixture's vector with the uniform mixture.

  Returns:
    The rows of RUN/baselines.json: `model` (of RUN/evaluations), `kind` (mixture, merge or
    search), `dev` (the mean loss on development text of the tasks that count), `tried` (how many
    were scored to find it), `tokens` (trained on, the CPT runs' included) and `settings`.

  Raises:
    UsageError: the run asks for no baselines, or for a sampler that there is not.
    UserError: a sampler's package is not installed.
  """
  if run.baselines is None:
    raise UsageError('there is nothing to compare with: bind Run.baselines = @run.Baselines()')
  for study in run.baselines.searches:
    check_sampler(study.sampler)
  names, rows = counted(run, tasks_of(run, 'test')), []
  for row in itertools.chain(_mixtures(run), _merges(run), _searches(run)):
    rows.append({**row, 'dev': row['dev'] if math.isfinite(row['dev']) else None})
    once(functools.partial(write_json, run.path / 'baselines.json', rows))
    if row['model'] != 'optimer':
      compare(run, 'optimer', row['model'], names)
    for other in _rivals(rows):
      compare(run, row['model'], other, names)
  return rows


def _rivals(rows: list[dict]) -> list[str]:
  """What else the last row is compared with: the uniform mixture, and the best one before it."""
  *before, row = rows
  if not before:
    return []
  uniform = before[0]['model']
  if row['kind'] != 'mixture':
    return [uniform] if uniform in row['settings']['weights'] else []  # The search has its vector.
  best = min(before, key=lambda other: math.inf if other['dev'] is None else other['dev'])
  return [*dict.fromkeys((uniform, best['model']))]


def mixture_ratios(names: tuple[str, ...], count: int) -> dict[str, dict[str, float]]:
  """`count` ratios of data sets beside uniform ones, spread evenly over the simplex, by name."""
  ratios = {'uniform': dict.fromkeys(names, 1 / len(names))}
  box = [*sticks(names)]
  if box:
    points = qmc.Sobol(len(box), rng=np.random.default_rng(0)).random(count)
    for i, point in enumerate(points, 1):
      found = from_sticks(names, dict(zip(box, point.tolist(), strict=True)))
      ratios[f'ratios-{i}'] = {name: round(ratio, 4) for name, ratio in found.items()}
  return ratios


def _mixtures(run: Run) -> Iterator[dict]:
  """One model for each mixture, and what was trained on after the merge."""
  config, k = run.baselines, len(run.names)
  whole = dataclasses.replace(run.training, steps=k * run.training.steps, keep_every=0)
  longer = dataclasses.replace(whole, steps=whole.steps + config.heal_steps)
  plans = {
    name: (ratios, whole, None)
    for name, ratios in mixture_ratios(run.names, config.mixtures).items()
  }
  searched = best_of(run)['ratios']  # all 0 if the base itself was chosen
  if any(searched.values()) and config.retrain:
    plans['searched'] = (searched, whole, None)
  if any(searched.values()) and config.heal_steps:
    healing = dataclasses.replace(
      whole, steps=config.heal_steps, warmup=min(whole.warmup, config.heal_steps - 1)
    )
    slowly = dataclasses.replace(healing, learning_rate=healing.learning_rate / 4)
    plans['healed'] = (searched, healing, 'optimer')
    plans['healed-slowly'] = (searched, slowly, 'optimer')
    plans['uniform-longer'] = (plans['uniform'][0], longer, None)
  for name, (ratios, training, start) in plans.items():
    train_mixture(run, name, ratios, training, start)
  scores = _on_dev(run, [f'mixed/{name}' for name in plans])
  evaluate(run, [f'mixed/{name}' for name in plans])
  for name, (ratios, training, start) in plans.items():
    yield {
      'model': name_of(f'mixed/{name}'),
      'kind': 'mixture',
      'dev': scores[f'mixed/{name}'],
      'tried': 1,
      'tokens': _tokens(run, training) + (_tokens(run, whole) if start else 0),
      'settings': {'ratios': ratios, 'steps': training.steps},
    }


def _tokens(run: Run, training: TrainConfig) -> int:
  return training.steps * training.batch * run.length


def _on_dev(run: Run, models: list[str]) -> dict[str, float]:
  """The loss of trained models on development text, kept in RUN/tuned/mixtures.jsonl."""
  path = run.path / 'tuned' / 'mixtures.jsonl'
  known = {(row['model'], row['of']): row['scores'] for row in read_jsonl(path)}
  keys = [(model, store.read_manifest(run.path / model).fingerprint) for model in models]
  if todo := [key for key in keys if key not in known]:
    with stage(run, 'tune/mixtures') as cost:
      engine = engine_of(run)
      score = _scorer(run, engine, cost)
      for model, of in todo:
        leaves = store.values(store.open_leaves(run.path / model)[1])
        found = known[model, of] = score(place_leaves(engine.model, leaves, engine.mesh))
        row = {'model': model, 'of': of, 'scores': found}
        once(lambda row=row: append_jsonl(path, row))
  return {key[0]: _mean(run, known[key]) for key in keys}


def _merges(run: Run) -> Iterator[dict]:
  """The best of each other method, in which all vectors have one weight."""
  for method in run.baselines.methods:
    numbers, tried, dev = _tuned(run, method)
    weights = dict.fromkeys(run.vector_paths, numbers.pop('weight'))
    settings = dataclasses.replace(run.merging, method=method, **numbers)
    merge(dataclasses.replace(run, merging=settings), weights, method)
    evaluate(run, [f'merged/{method}'])
    yield {
      'model': name_of(f'merged/{method}'),
      'kind': 'merge',
      'dev': dev,
      'tried': tried,
      'tokens': len(run.names) * _tokens(run, run.training),
      'settings': {'weights': weights, **numbers},
    }


def _tuned(run: Run, method: str) -> tuple[dict, int, float]:
  """The numbers of a method that are best on development text, of how many, and their loss.

  A sum is tuned by its weights; where a method thins vectors or averages them, by what multiplies
  its result.
  """
  config, path = run.baselines, run.path / 'tuned' / f'{method}.jsonl'
  if methods.METHODS[method].keeps == 'all':
    grid = [{'weight': c} for c in config.coefficients]
  else:
    both = itertools.product(config.coefficients, config.densities)
    grid = [{'weight': 1.0, 'scale': c, 'density': d} for c, d in both]
  of = vector_fingerprints(run)
  known = [row for row in read_jsonl(path) if row['of'] == of]
  found = [next((row for row in known if row['numbers'] == numbers), None) for numbers in grid]
  if None in found:
    with stage(run, f'tune/{method}') as cost:
      settings = dataclasses.replace(run.merging, method=method)
      engine = engine_of(run)
      pool = pool_of(dataclasses.replace(run, merging=settings), engine)
      candidate, score = candidates(pool, settings), _scorer(run, engine, cost)
      for i, numbers in enumerate(grid):
        if found[i] is None:
          others = {key: value for key, value in numbers.items() if key != 'weight'}
          params = candidate({**dict.fromkeys(pool.names, numbers['weight']), **others})
          found[i] = {'numbers': numbers, 'of': of, 'scores': score(params)}
          once(lambda row=found[i]: append_jsonl(path, row))
          said = ', '.join(f'{key} {value:g}' for key, value in numbers.items())
          say(f'{method}: {said}: {_mean(run, found[i]["scores"]):.4f}')
  losses = [_mean(run, row['scores']) for row in found]
  best = int(np.nanargmin(losses))
  return dict(grid[best]), len(grid), losses[best]


def _searches(run: Run) -> Iterator[dict]:
  """The answers of the run's study and of those of `Run.baselines`."""
  config, whole = run.baselines, len(run.names) * _tokens(run, run.training)
  for study in (run.study, *config.searches):
    vectors = {**run.vectors, **_more_vectors(run, study)}
    own = dataclasses.replace(run, study=study, vectors=vectors)
    if own.vectors != run.vectors:
      once(lambda own=own: extract_each(own))
    if study is run.study:
      best, model = best_of(own), 'optimer'
    else:
      best, model = search(own), f'studies/{study.name}'
    evaluate(own, [model])
    yield {
      'model': name_of(model),
      'kind': 'search',
      'dev': _mean(run, best[best['chosen']]['scores']),
      'tried': best['evaluations'],
      'tokens': 2 * whole if study is config.with_mixture else whole,
      'settings': {
        'sampler': study.sampler,
        'objective': best['objective'],
        'weights': best['weights'],
      },
    }


def _more_vectors(run: Run, study: StudyConfig) -> dict[str, str]:
  """The models whose vectors a search has beside the run's, by name."""
  if study is run.baselines.with_mixture:
    return {'mixed-uniform': str(run.path / 'mixed' / 'uniform')}
  if study is not run.baselines.checkpoints:
    return {}
  found = {f'{name}-{step}': str(p) for name in run.names for step, p in kept_of(run, name)}
  if not found:
    raise UserError(
      'Baselines.checkpoints searches the checkpoints of training, and none was kept: set '
      'TrainConfig.keep_every'
    )
  return found


def _scorer(run: Run, engine: Engine, cost: dict) -> Callable[[dict], dict]:
  """From parameters to the summaries of their scores on development text; counts what it costs."""
  tasks = prepare(tasks_of(run, 'dev'), engine, 'dev')
  cost |= {'flops': 0.0, 'tokens': 0}

  def score(params: dict) -> dict:
    found = {name: task.score(params) for name, task in tasks.items()}
    tokens = sum(each.tokens for each in found.values())
    cost['tokens'] += tokens
    cost['flops'] += tokens * engine.model.config.flops_per_token(run.length)
    return {name: each.summary() for name, each in found.items()}

  return score


def _mean(run: Run, scores: Mapping[str, Mapping]) -> float:
  """The loss that is compared: the mean over the tasks that count."""
  return float(np.mean(losses_of(scores, counted(run, tasks_of(run, 'dev')))))
