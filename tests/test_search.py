"""The search on surfaces whose optimum is known."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimer_jax.errors import UsageError, UserError
from optimer_jax.search.loop import run_study
from optimer_jax.search.objectives import Objective
from optimer_jax.search.study import Study, StudyConfig
from optimer_jax.search.vizier import VizierSampler, surrogate_optimum

NAMES = ['ja', 'zh', 'math', 'code']
SPACE = dict.fromkeys(NAMES, (0.0, 1.0))
OPTIMUM = np.array([0.2, 0.35, 0.45, 0.6])
FLOOR = 2.0


def surface(weights: dict[str, float]) -> float:
  return FLOOR + float(np.sum((np.array([weights[n] for n in NAMES]) - OPTIMUM) ** 2))


def evaluate(weights: dict[str, float]) -> dict:
  """Two tasks about the surface, with noise of 0.1% of it that depends on the weights alone."""
  seed = np.frombuffer(np.array([weights[n] for n in NAMES]).tobytes(), np.uint32)
  noise = 0.001 * FLOOR * np.random.default_rng(seed).standard_normal(2)
  values = dict(zip(('reading', 'writing'), surface(weights) + noise + [-0.3, 0.3], strict=True))
  scores = {
    task: {'value': value, 'stderr': 0.02, 'count': 32, 'unit': 'bits/byte'}
    for task, value in values.items()
  }
  return {'scores': scores, 'seconds': 0.5, 'flops': 1e9}


def run(directory, evaluate=evaluate, pool='pool-a', tasks=('reading', 'writing'), **config):
  config = StudyConfig(**{'trials': 12, **config})
  study = Study(config, {name: (name,) for name in NAMES}, dict.fromkeys(tasks, 'data'), pool)
  return run_study(directory, study, lambda point, **_: evaluate(point))


def refuse(weights):
  raise AssertionError(f'evaluated again: {weights}')


def ledger(directory):
  """The ledger without its clock."""
  rows = [json.loads(line) for line in (directory / 'trials.jsonl').read_text().splitlines()]
  return [{key: value for key, value in row.items() if key != 'time'} for row in rows]


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
  """An unbroken study, and what was asked of it on the way."""
  directory = tmp_path_factory.mktemp('unbroken')
  asked = []
  best = run(directory, lambda weights: asked.append(weights) or evaluate(weights))
  return directory, best, asked


def test_finds_the_optimum_of_a_noisy_surface(unbroken):
  directory, best, asked = unbroken
  rows = ledger(directory)
  assert [row['trial'] for row in rows] == list(range(1, 13))
  assert [row['sampler'] for row in rows] == ['seed'] * 2 + ['vizier'] * 9 + ['surrogate']
  assert [row['weights'] for row in rows] == asked
  assert set(asked[0].values()) == {0.25} and set(asked[1].values()) == {0.0}
  regret, uniform = surface(best['weights']) - FLOOR, surface(asked[0]) - FLOOR
  # How the bandit goes on depends on the last bits, which differ between processors.
  assert regret < 0.1 * uniform
  assert abs(best['surrogate_optimum']['predicted'] - FLOOR) < 0.02
  assert math.isclose(sum(best['ratios'].values()), 1.0)
  assert best['evaluations'] == 12 and json.loads((directory / 'best.json').read_text()) == best
  assert best['best_observed']['objective'] == min(row['objective'] for row in rows[:-1])


def test_a_finished_study_answers_at_once_and_can_be_given_more_trials(unbroken, tmp_path):
  directory, best, _ = unbroken
  (directory / 'best.json').unlink()
  assert run(directory, refuse) == best
  copy(directory, tmp_path, 12)
  more = run(tmp_path, trials=13)
  assert ledger(tmp_path)[:12] == ledger(directory) and more['evaluations'] == 13


def copy(directory, to, rows, database=False):
  """The first rows of a ledger, as a study killed there would have left them."""
  to.mkdir(exist_ok=True)
  lines = (directory / 'trials.jsonl').read_text().splitlines(keepends=True)
  (to / 'trials.jsonl').write_text(''.join(lines[:rows]))
  if database:
    (to / 'study.db').write_bytes((directory / 'study.db').read_bytes())


@pytest.mark.parametrize('damage', ['missing', 'garbage', 'ahead', 'torn line'])
def test_the_ledger_is_the_truth(unbroken, tmp_path, damage):
  directory, _, _ = unbroken
  copy(directory, tmp_path, 10, database=damage == 'ahead')
  if damage == 'garbage':
    (tmp_path / 'study.db').write_bytes(b'SQLite format 3\0' + b'\xff' * 5000)
  if damage == 'torn line':
    with open(tmp_path / 'trials.jsonl', 'a') as file:
      file.write('{"trial": 11, "sampler": "viz')
  asked = []
  run(tmp_path, lambda weights: asked.append(weights) or evaluate(weights))
  rows = ledger_without_torn(tmp_path) if damage == 'torn line' else ledger(tmp_path)
  assert rows == ledger(directory)
  assert len(asked) == 2


def ledger_without_torn(directory):
  path = directory / 'trials.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(line for line in lines if line.endswith('}\n')))
  return ledger(directory)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'pool': 'pool-b'}, ['pool-a', 'pool-b']),
    ({'tasks': ['reading', 'sums']}, ['reading, writing', 'reading, sums']),
    ({'objective': Objective('worst')}, ['objective kind', 'mean', 'worst']),
    ({'upper': 0.5}, ['bounds', '1.0', '0.5']),
    ({'sampler': 'sobol'}, ['sampler', 'vizier', 'sobol']),
    ({'seed': 1}, ['seed', '0', '1']),
  ],
)
def test_a_study_of_something_else_is_refused(unbroken, change, words):
  directory, _, _ = unbroken
  with pytest.raises(UserError) as error:
    run(directory, refuse, **change)
  assert all(word in str(error.value) for word in words)


def test_a_lost_line_is_named(unbroken, tmp_path):
  directory, _, _ = unbroken
  copy(directory, tmp_path, 6)
  lines = (tmp_path / 'trials.jsonl').read_text().splitlines()
  lines[3] = lines[3][:50]
  (tmp_path / 'trials.jsonl').write_text('\n'.join(lines) + '\n')
  with pytest.raises(UserError, match='lost trial 4'):
    run(tmp_path, refuse)


def test_one_process_a_study(tmp_path):
  def search_in_between(weights):
    with pytest.raises(UserError, match='another process'):
      run(tmp_path, refuse)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, search_in_between)


@pytest.mark.parametrize(
  'config, words',
  [
    ({'trials': 2, 'reuse': ()}, 'at least 3'),
    ({'upper': 0.2}, 'must hold 0 and 1/K'),
    ({'lower': 0.1}, 'must hold 0 and 1/K'),
    ({'ranges': {'fr': (0, 1)}}, "'fr', which is none of ja"),
    ({'simplex': True, 'density': (0.1, 0.9)}, 'without groups or a density'),
    ({'simplex': True, 'lower': -0.5}, 'between 0 and 1'),
    ({'sampler': 'vizir'}, "no sampler 'vizir'"),
    ({'objective': Objective('meen')}, 'one of mean, worst, pareto'),
    ({'objective': Objective(scale='gain')}, 'one of loss, base, best'),
    ({'objective': Objective(limits={'english': 0.01})}, "'english', which is no task"),
    ({'objective': Objective(weights={'reading': 0, 'writing': 0})}, 'one above'),
    ({'objective': Objective('pareto')}, 'vizier sees one number'),
    ({'objective': Objective('pareto', {'reading': 0}), 'sampler': 'composite'}, 'two or three'),
  ],
)
def test_a_config_without_sense_is_a_usage_error(tmp_path, config, words):
  with pytest.raises(UsageError, match=words):
    run(tmp_path, refuse, **config)


def test_a_candidate_that_is_not_a_number_is_infeasible(tmp_path):
  calls = []

  def sometimes_nan(weights):
    calls.append(weights)
    result = evaluate(weights)
    if len(calls) in (2, 3):
      result['scores']['writing']['value'] = (math.nan, math.inf)[len(calls) - 2]
    return result

  best = run(tmp_path, sometimes_nan, trials=5)
  rows = ledger(tmp_path)
  assert [row['objective'] is None for row in rows] == [False, True, True, False, False]
  assert rows[1]['scores']['writing']['value'] is None
  assert len({json.dumps(row['weights']) for row in rows}) == 5
  assert 'NaN' not in (tmp_path / 'trials.jsonl').read_text()
  assert best['weights'] in (rows[0]['weights'], rows[3]['weights'], rows[4]['weights'])
  observed = [(row['weights'], row['objective']) for row in rows]
  sampler = VizierSampler(tmp_path / 'study.db', SPACE, 0, observed)
  assert [trial.infeasible for trial in sampler._trials()] == [False, True, True, False, False]


def test_a_pool_that_scores_nothing_finite_stops_at_once(tmp_path):
  def nan(weights):
    result = evaluate(weights)
    result['scores']['reading']['value'] = math.nan
    return result

  for attempt in (nan, refuse):
    with pytest.raises(UserError, match='reading'):
      run(tmp_path, attempt)
  assert len(ledger(tmp_path)) == 2


def test_the_surrogate_of_one_finite_score_is_that_score():
  observed = [(dict.fromkeys(NAMES, 0.25), 1.7), (dict.fromkeys(NAMES, 0.0), None)]
  weights, predicted = surrogate_optimum(SPACE, 0, observed)
  assert (weights, predicted) == (dict.fromkeys(NAMES, 0.25), 1.7)


def test_suggestions_neither_touch_nor_recompile_the_model(tmp_path, compiled):
  traces = []

  @jax.jit
  def model(x):
    traces.append(x.dtype)
    return jnp.sin(x) @ jnp.ones((3, 3))

  x = jnp.arange(6.0).reshape(2, 3)
  expected = np.asarray(model(x))
  observed = [(dict.fromkeys(NAMES, v), surface(dict.fromkeys(NAMES, v))) for v in (0.25, 0.0)]
  sampler = VizierSampler(tmp_path / 'study.db', SPACE, 3, observed)
  for _ in range(3):
    compiled.clear()
    (weights,) = sampler.suggest(1)
    suggestion_compiles = list(compiled)
    assert sampler.suggest(1) == [weights]  # Not yet observed.
    sampler.observe(weights, surface(weights))
    assert not jax.config.jax_enable_x64 and jnp.ones(3).dtype == jnp.float32
    compiled.clear()
    out = model(x)
    assert out.dtype == jnp.float32 and np.array_equal(out, expected)
    assert not compiled and traces == [jnp.float32]
  # What is left to compile for a new number of trials are single operations.
  assert len(suggestion_compiles) <= 8


def test_the_density_is_searched_beside_the_weights(tmp_path):
  asked = []

  def evaluate_sparse(point):
    asked.append(point)
    found = evaluate({name: point[name] for name in NAMES})
    found['scores']['reading']['value'] += 4 * (point['density'] - 0.4) ** 2
    return found

  best = run(tmp_path, evaluate_sparse, density=(0.1, 0.9))
  rows = ledger(tmp_path)
  assert [{**row['weights'], **row['numbers']} for row in rows] == asked
  assert [row['numbers']['density'] for row in rows[:2]] == [0.9, 0.9]
  assert all(0.1 <= row['numbers']['density'] <= 0.9 for row in rows)
  assert best['numbers'] == best[best['chosen']]['numbers'] != {'density': 0.9}
  assert run(tmp_path, refuse, density=(0.1, 0.9)) == best
  with pytest.raises(UserError, match=r"'density': \[0\.1, 0\.9\].*not.*0\.8"):
    run(tmp_path, refuse, density=(0.1, 0.8))
  with pytest.raises(UserError, match='written with bounds'):
    run(tmp_path, refuse)
  with pytest.raises(UsageError, match='0 < lower < upper <= 1'):
    run(tmp_path / 'other', refuse, density=(0.0, 0.8))
