"""What studies ask and answer, on losses of many examples whose minimum is known."""

import json

import numpy as np
import pytest

from optimer_jax.errors import UserError
from optimer_jax.evaluation.scores import Score, joined, places
from optimer_jax.search.loop import run_study
from optimer_jax.search.objectives import Objective
from optimer_jax.search.study import Study, StudyConfig

NAMES, TASKS, EXAMPLES, PARTS = ['ja', 'zh', 'code', 'law'], ['reading', 'sums'], 64, 4
LOWEST = {'reading': np.array([0.7, 0.2, 0.1, 0.4]), 'sums': np.array([0.1, 0.3, 0.8, 0.2])}
OFFSETS = np.random.default_rng(0).uniform(-0.5, 0.5, EXAMPLES)
PARAMETERS = {name: (name,) for name in NAMES}


def loss(task: str, w: np.ndarray) -> float:
  return 2.0 + float(((w - LOWEST[task]) ** 2).sum())


class Evaluate:
  """Counts what it is asked; examples differ far more than candidates do."""

  def __init__(self, names=NAMES):
    self.points, self.examples, self.names = [], 0, names

  def __call__(self, point, gradients=False, stop=None):
    self.points.append(dict(point))
    w = np.array([point[name] for name in self.names])
    rng = np.random.default_rng(np.frombuffer(w.tobytes(), np.uint32))
    sizes = np.ones(EXAMPLES)
    whole = {
      task: Score(loss(task, w) + OFFSETS + 0.02 * rng.standard_normal(EXAMPLES), sizes)
      for task in TASKS
    }
    for done in range(1, PARTS + 1):
      own = [places(EXAMPLES, (i, PARTS)) for i in range(done)]
      scores = {
        task: joined([Score(s.values[at], s.sizes[at]) for at in own], PARTS, EXAMPLES)
        for task, s in whole.items()
      }
      if done < PARTS and (stop or (lambda *_: False))(scores, done):
        break
    self.examples += sum(len(score.values) for score in scores.values())
    result = {
      'scores': {task: score.summary() for task, score in scores.items()},
      'per_example': {task: score.per_example() for task, score in scores.items()},
      'seconds': 1.0,
      'flops': 1e9,
    }
    if gradients:
      result['gradients'] = {
        task: dict(zip(self.names, (2 * (w - LOWEST[task])).tolist(), strict=True))
        for task in TASKS
      }
    return result if done == PARTS else {**result, 'parts': done}


def run(directory, evaluate=None, others=(), parameters=PARAMETERS, data='data', **config):
  config = StudyConfig(**{'name': directory.name, 'trials': 8, 'sampler': 'composite', **config})
  study = Study(config, parameters, dict.fromkeys(TASKS, data), 'pool')
  return run_study(directory, study, evaluate or Evaluate(), others)


def ledger(directory):
  rows = [json.loads(line) for line in (directory / 'trials.jsonl').read_text().splitlines()]
  return [{key: value for key, value in row.items() if key != 'time'} for row in rows]


def worst(weights) -> float:
  w = np.array([weights[name] for name in NAMES])
  return max(loss(task, w) for task in TASKS)


def test_what_cannot_win_is_given_up_and_its_score_said_with_its_error(tmp_path):
  evaluate = Evaluate()
  best = run(tmp_path, evaluate, sampler='sobol', trials=20)
  rows = ledger(tmp_path)
  given_up = [row for row in rows if 'parts' in row]
  assert len(given_up) >= 10 and evaluate.examples < 0.6 * 20 * EXAMPLES * len(TASKS)
  assert all(row['sampler'] == 'sobol' for row in given_up)
  misses = []
  for row in given_up:
    w = np.array([row['weights'][name] for name in NAMES])
    for task in TASKS:
      score = row['scores'][task]
      assert score['count'] == row['parts'] * EXAMPLES / PARTS
      misses.append((score['value'] - loss(task, w) - OFFSETS.mean()) / score['stderr'])
  # The truth has noise of its own, 0.02 / 8 from the examples, beside the standard error.
  assert np.abs(misses).max() < 5 and np.sqrt(np.mean(np.square(misses))) < 2
  # Nothing that was given up would have won.
  whole = run(tmp_path / 'whole', sampler='sobol', trials=20, parts=1)
  assert best['best_observed']['weights'] == whole['best_observed']['weights']
  assert 'parts' not in best['best_observed'] and 'parts' not in best['surrogate_optimum']
  # Begun again from half of its ledger it goes the same way.
  lines = (tmp_path / 'trials.jsonl').read_text().splitlines(keepends=True)
  (tmp_path / 'trials.jsonl').write_text(''.join(lines[:9]))
  run(tmp_path, sampler='sobol', trials=20)
  assert ledger(tmp_path) == rows


def test_a_new_objective_begins_with_every_score_of_the_pool(tmp_path, capsys):
  run(tmp_path / 'mean', trials=10)
  capsys.readouterr()
  evaluate = Evaluate()
  others = [tmp_path / 'mean' / 'trials.jsonl']
  asked = {'objective': Objective('worst'), 'others': others}
  best = run(tmp_path / 'worst', evaluate, trials=2, **asked)
  assert 'before anything is evaluated' in capsys.readouterr().err
  assert len(evaluate.points) == 2 == best['evaluations'] and best['reused'] == 10
  full = run(tmp_path / 'full', objective=Objective('worst'), trials=12)
  gain = worst(dict.fromkeys(NAMES, 0.0)) - worst(full['weights'])
  assert worst(best['weights']) < worst(full['weights']) + 0.01 * gain
  first = best['first_answer']
  assert abs(worst(first['weights']) + OFFSETS.mean() - first['predicted']) < 3 * first['stderr']
  # What the other study does later changes nothing.
  rows = ledger(tmp_path / 'worst')
  run(tmp_path / 'mean', trials=12)
  (tmp_path / 'worst' / 'trials.jsonl').unlink()
  run(tmp_path / 'worst', trials=2, **asked)
  assert ledger(tmp_path / 'worst') == rows
  # Other data, or a study that wants nothing of the others, begin anew.
  for name, change in [('data', {'data': 'other'}), ('alone', {'reuse': ()})]:
    assert run(tmp_path / name, trials=3, **asked, **change)['reused'] == 0
  assert run(tmp_path / 'named', trials=1, reuse=('mean',), **asked)['reused'] == 12
  with pytest.raises(UserError, match="no study 'maen' to begin with"):
    run(tmp_path / 'none', trials=3, reuse=('maen',), **asked)


def test_gradients_find_the_optimum_in_a_few_trials(tmp_path):
  best = run(tmp_path, sampler='gradient', trials=4)
  rows = ledger(tmp_path)
  assert ['gradients' in row for row in rows] == [True, True, True, False]
  middle = np.mean([*LOWEST.values()], axis=0)
  assert np.allclose([best['weights'][name] for name in NAMES], middle, atol=0.02)
  assert set(rows[0]['gradients']) == set(TASKS)


def test_a_limit_is_kept(tmp_path):
  """Reading must be a tenth better than the base, which costs sums what it would have won."""
  limited = Objective(weights={'reading': 0}, limits={'reading': -0.1})
  best = run(tmp_path, sampler='gradient', trials=8, objective=limited)
  w = np.array([best['weights'][name] for name in NAMES])
  allowed = 0.9 * (loss('reading', np.zeros(4)) + OFFSETS.mean())
  assert loss('reading', w) + OFFSETS.mean() <= allowed + 0.01
  free = run(
    tmp_path / 'free', sampler='gradient', trials=5, objective=Objective(weights={'reading': 0})
  )
  f = np.array([free['weights'][name] for name in NAMES])
  assert loss('sums', f) < 2.005 < loss('sums', w)
  assert loss('reading', f) + OFFSETS.mean() > allowed


def test_losses_in_units_of_what_training_alone_wins(tmp_path):
  best = run(tmp_path, trials=9, objective=Objective('worst', scale='best'))
  rows = ledger(tmp_path)
  assert [row['sampler'] for row in rows[:6]] == ['seed'] * 6
  assert [sum(row['weights'].values()) for row in rows[2:6]] == [1.0] * 4
  values = best['objectives']
  assert abs(values['2'] - 1) < 1e-12 and rows[1]['objective'] is None
  assert best[best['chosen']]['objective'] < values['1'] < 1
  again = run(tmp_path, trials=9, objective=Objective('worst', scale='best'))
  assert again == best


def test_a_front_of_two_tasks(tmp_path):
  best = run(tmp_path, sampler='gradient', trials=8, objective=Objective('pareto'))
  for kind in ('observed', 'predicted'):
    assert len(best['front'][kind]) >= 5
  # Between the two lowest points both losses follow from how far along one is.
  apart = ((LOWEST['sums'] - LOWEST['reading']) ** 2).sum()
  for point in best['front']['predicted']:
    reading, sums = (point['losses'][task] - 2 - OFFSETS.mean() for task in TASKS)
    assert abs(np.sqrt(max(reading, 0)) + np.sqrt(max(sums, 0)) - np.sqrt(apart)) < 0.1
  shares = [p['losses']['reading'] - p['losses']['sums'] for p in best['front']['predicted']]
  assert min(shares) < -0.3 * apart and max(shares) > 0.3 * apart


@pytest.mark.parametrize('sampler', ['composite', 'vizier', 'sobol', 'cmaes'])
def test_weights_on_a_simplex(tmp_path, sampler):
  if sampler == 'cmaes':
    pytest.importorskip('cmaes')
  best = run(tmp_path, sampler=sampler, trials=6, simplex=True)
  rows = ledger(tmp_path)
  for row in (row for row in rows if row['sampler'] != 'seed'):
    weights = row['weights'].values()
    assert min(weights) >= 0 and abs(sum(weights) - 1) < 1e-6
  assert len({json.dumps(row['weights']) for row in rows}) == 6
  assert abs(sum(best['weights'].values()) - 1) < 1e-6


def test_ranges_of_single_vectors(tmp_path):
  run(tmp_path, sampler='sobol', trials=12, ranges={'ja': (-0.5, 0.5), 'zh': (0.0, 2.0)})
  found = {name: [row['weights'][name] for row in ledger(tmp_path)] for name in NAMES}
  assert -0.5 <= min(found['ja']) < -0.2 and 0.2 < max(found['ja']) <= 0.5
  assert 1.0 < max(found['zh']) <= 2.0 and max(found['code']) <= 1.0


def test_groups_of_weights(tmp_path):
  parameters = {'ja': ('ja:low', 'ja:high'), 'zh': ('zh:low', 'zh:high')}
  names = [name for each in parameters.values() for name in each]

  best = run(tmp_path, Evaluate(names), parameters=parameters, sampler='gradient', trials=6)
  assert set(best['weights']) == set(names) and set(best['ratios']) == {'ja', 'zh'}
  middle = np.mean([*LOWEST.values()], axis=0)
  assert np.allclose([best['weights'][name] for name in names], middle, atol=0.03)
  rows = ledger(tmp_path)
  assert set(rows[0]['weights'].values()) == {0.5}
