"""What a search is worth on a trained pool: samplers at equal cost, and other objectives for less.

    python -m benchmarks.pool --gin_file=runs/quickstart.gin [--trials N] [--seeds S]

The vectors must be there (`optimer pipeline`, or `extract`). Every study has a name of its own
in RUN/studies, keeps its ledger, and is not done again.

Samplers: all have N trials but gradient, which has as many as cost the same (a trial with gradients
is counted as three forward evaluations; the last one has none). None reuses another's trials or
gives a candidate up before its end, so that costs are equal. Their answers are scored on the run's
test split, which no study saw, and compared with that of vizier in pairs.

Objectives: another one on the same pool, once with N trials of its own, and once with a quarter of
them after the first study (vizier, seed 0). `worst` is the worst domain relative to the base;
`limited` the mean of all domains but one, which must keep nine tenths of what the first study's
answer gained on it. What is compared is the objective on the development set, as a share of what
the full search gained over the base.

Prints tables and, as the last line, one JSON object.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping

import numpy as np

from benchmarks import print_found
from optimer_jax import pipeline
from optimer_jax.configs import read_run
from optimer_jax.evaluation.scores import Score, compare
from optimer_jax.files import read_jsonl
from optimer_jax.merging.candidates import candidates
from optimer_jax.progress import say
from optimer_jax.run import Run, engine_of, model_of, prepare, tasks_of
from optimer_jax.search.evaluation import GRADIENT_COST
from optimer_jax.search.objectives import Objective, losses_of
from optimer_jax.search.study import StudyConfig
from optimer_jax.vectors.pool import load_pool

SAMPLERS = ('vizier', 'composite', 'gradient', 'tpe')


def studies(trials: int, seeds: int) -> dict[str, StudyConfig]:
  """The studies of equal cost, by name."""
  few = (trials - 1) // GRADIENT_COST + 1
  return {
    f'pool-{sampler}-{seed}': StudyConfig(
      name=f'pool-{sampler}-{seed}',
      trials=few if sampler == 'gradient' else trials,
      sampler=sampler,
      parts=1,
      reuse=(),
      seed=seed,
    )
    for seed in range(seeds)
    for sampler in SAMPLERS
  }


def limited(run: Run, first: Mapping) -> Objective:
  """All domains but the last, which keeps nine tenths of what the first study gained on it."""
  last = run.names[-1]
  rows = _base(run, 'pool-vizier-0'), _taken(first)
  (before,), (after,) = (losses_of(row['scores'], [last]) for row in rows)
  return Objective(weights={last: 0.0}, limits={last: float(0.9 * (after - before) / before)})


def search(run: Run, config: StudyConfig) -> dict:
  """The study's answer, searched for unless it stands there."""
  return pipeline.search(dataclasses.replace(run, study=config))


def on_test(run: Run, answers: Mapping[str, Mapping]) -> dict[str, dict[str, Score]]:
  """The test scores of each answer's model."""
  pool = load_pool(run.path / 'base', run.vector_paths, model_of(run))
  tasks = prepare(tasks_of(run, 'test'), engine_of(run), 'test')
  candidate, found = candidates(pool), {}
  for name, best in answers.items():
    params = candidate(best['weights'])
    found[name] = {task: prepared.score(params) for task, prepared in tasks.items()}
    say(f'{name}: {_mean(found[name]):.4f} on test')
  return found


def measure(run: Run, trials: int, seeds: int) -> dict:
  """Runs what is missing, prints the tables, and returns the last line."""
  configs = studies(trials, seeds)
  answers = {name: search(run, config) for name, config in configs.items()}
  scores = on_test(run, answers)
  print(f'{"":18}{"trials":>7}{"test":>9}{"minus vizier":>14}{"± s.e.":>9}')
  samplers = {}
  for name, config in configs.items():
    rival = f'pool-vizier-{config.seed}'
    apart = compare(scores[name], scores[rival])
    samplers.setdefault(config.sampler, []).append(
      {
        'seed': config.seed,
        'trials': config.trials,
        'forward_equivalents': _forwards(run, config),
        'test': _mean(scores[name]),
        'minus_vizier': apart['difference'],
        'stderr': apart['stderr'],
      }
    )
    print(
      f'{config.sampler + " " + str(config.seed):18}{config.trials:>7}{_mean(scores[name]):>9.4f}'
      f'{apart["difference"]:>+14.4f}{apart["stderr"]:>9.4f}'
    )
  first = answers['pool-vizier-0']
  objectives = {'worst': Objective('worst', scale='base'), 'limited': limited(run, first)}
  few = max(trials // 4, 1)
  print(f'\n{"":12}{"full":>9}{"a quarter":>11}{"first answer":>14}{"behind, %":>11}')
  again = {}
  for name, objective in objectives.items():
    whole = StudyConfig(f'pool-{name}-full', trials, objective=objective, reuse=())
    less = StudyConfig(f'pool-{name}-again', few, 'composite', objective, reuse=('pool-vizier-0',))
    full = search(run, whole)
    found = search(run, less)
    base = full['objectives'][str(_base(run, whole.name)['trial'])]
    gain = base - _value(full)
    again[name] = {
      'evaluations': found['evaluations'],
      'full_evaluations': full['evaluations'],
      'full': _value(full),
      'again': _value(found),
      'behind_share_of_gain': (_value(found) - _value(full)) / gain,
      'first_answer': found['first_answer']['predicted'],
      'first_answer_stderr': found['first_answer']['stderr'],
    }
    print(
      f'{name:12}{_value(full):>9.4f}{_value(found):>11.4f}{found["first_answer"]["predicted"]:>14.4f}'
      f'{100 * again[name]["behind_share_of_gain"]:>11.2f}'
    )
  return {'samplers': samplers, 'objectives': again}


def _forwards(run: Run, config: StudyConfig) -> float:
  """What the study cost in evaluations of all examples."""
  rows = _rows(run, config.name)
  whole = next(row['flops'] for row in rows if 'gradients' not in row and 'parts' not in row)
  return sum(row['flops'] for row in rows) / whole


def _rows(run: Run, study: str) -> list[dict]:
  return read_jsonl(run.path / 'studies' / study / 'trials.jsonl')


def _base(run: Run, study: str) -> dict:
  return next(row for row in _rows(run, study) if not any(row['weights'].values()))


def _taken(best: Mapping) -> Mapping:
  return best[best['chosen']]


def _value(best: Mapping) -> float:
  return _taken(best)['objective']


def _mean(scores: Mapping[str, Score]) -> float:
  return float(np.mean([score.loss for score in scores.values()]))


def main(arguments: list[str]) -> int:
  """Prints the tables and the JSON object; returns the exit status."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.pool')
  parser.add_argument('--gin_file', action='append', required=True, metavar='FILE')
  parser.add_argument('--gin_bindings', action='append', default=[], metavar='NAME=VALUE')
  parser.add_argument('--trials', type=int, default=16, metavar='N')
  parser.add_argument('--seeds', type=int, default=3, metavar='S')
  options = parser.parse_args(arguments)
  read = lambda: read_run(options.gin_file, options.gin_bindings)
  return print_found(lambda: measure(read(), options.trials, options.seeds))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
