"""Every sampler keeps to the one interface."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from small_run import make_run

from optimer_jax.baselines import baselines
from optimer_jax.errors import UsageError, UserError
from optimer_jax.pipeline import pipeline
from optimer_jax.run import Baselines
from optimer_jax.search import samplers
from optimer_jax.search.samplers import PEERS, SAMPLERS, Observation, make_sampler, recommend
from optimer_jax.search.study import StudyConfig

SPACE = {'ja': (0.0, 1.0), 'code': (-0.5, 1.5), 'zh': (0.0, 0.8)}
TASKS = ['reading', 'sums']
LOWEST = np.array([[0.2, 0.7, 0.1], [0.5, 0.1, 0.6]])


def evaluate(point, gradients=False):
  x = np.array([point[name] for name in SPACE]) - LOWEST
  values = dict(zip(TASKS, map(float, 2 + (x**2).sum(1)), strict=True))
  slopes = {
    task: dict(zip(SPACE, map(float, row), strict=True))
    for task, row in zip(TASKS, 2 * x, strict=True)
  }
  mean = sum(values.values()) / len(values)
  return Observation(point, mean, values, gradients=slopes if gradients else None)


def first_trials(gradients=False):
  return [evaluate(dict.fromkeys(SPACE, weight), gradients) for weight in (1 / 3, 0.0)]


def make(name, path, observed=(), seed=0, objective=jnp.mean):
  for package in PEERS.get(name, []):
    pytest.importorskip(package)
  path.mkdir(exist_ok=True)
  return make_sampler(name, SPACE, seed, TASKS, objective, path / 'study.db', observed)


@pytest.mark.parametrize('name', SAMPLERS)
def test_every_sampler(name, tmp_path):
  sampler = make(name, tmp_path / 'a')
  observed = first_trials(sampler.wants_gradients)
  for observation in observed:
    sampler.observe(observation)
  for _ in range(2):
    (point,) = sampler.suggest(1)
    assert sampler.suggest(1) == [point]  # Nothing new was observed.
    assert list(sorted(point)) == sorted(SPACE)
    assert all(low <= point[x] <= high for x, (low, high) in SPACE.items())
    observed.append(evaluate(point, sampler.wants_gradients))
    sampler.observe(observed[-1])
  # From the ledger it goes on as if it had never stopped; another seed goes elsewhere.
  (point,) = sampler.suggest(1)
  assert make(name, tmp_path / 'b', observed).suggest(1) == [point]
  assert len({tuple(p.values()) for p in [*(o.point for o in observed), point]}) == 5
  if name not in ('composite', 'gradient'):  # Their models decide more than their seed.
    assert make(name, tmp_path / 'c', observed, seed=1).suggest(1) != [point]


@pytest.mark.parametrize(
  'name', ['composite', 'gradient', 'cmaes', 'sobol', 'grid', 'random', 'tpe']
)
def test_a_batch_has_different_points(name, tmp_path):
  sampler = make(name, tmp_path, first_trials(name == 'gradient'))
  points = sampler.suggest(3)
  assert len({tuple(point.values()) for point in points}) == 3
  assert points[:1] == sampler.suggest(1)


def test_gradients_lead_to_the_optimum_at_once(tmp_path):
  observed = first_trials(gradients=True)
  sampler = make('gradient', tmp_path, observed)
  assert sampler.wants_gradients
  observed.append(evaluate(*sampler.suggest(1), gradients=True))
  found = recommend(SPACE, 0, TASKS, jnp.mean, observed)
  assert np.allclose([found.point[name] for name in SPACE], LOWEST.mean(0), atol=0.02)
  best = evaluate(found.point)
  assert abs(best.objective - found.predicted) < 0.01 and found.stderr < 0.1


def test_a_model_that_leave_one_out_refutes_gives_way_to_vizier(tmp_path, monkeypatch):
  observed = first_trials()
  asked = make('vizier', tmp_path / 'a', observed).suggest(1)
  sampler = make('composite', tmp_path / 'b', observed)
  assert sampler.suggest(1) != asked
  monkeypatch.setattr(samplers, '_MISTRUST', 0.0)
  assert sampler.suggest(1) == asked
  assert recommend(SPACE, 0, TASKS, jnp.mean, observed).stderr is None


def test_infeasible_trials_are_avoided_and_do_no_harm(tmp_path):
  for name in ('composite', 'tpe', 'cmaes'):
    sampler = make(name, tmp_path, first_trials())
    (point,) = sampler.suggest(1)
    sampler.observe(Observation(point, None, {'reading': math.nan, 'sums': None}))
    assert sampler.suggest(1) != [point]
  nothing = Observation(dict.fromkeys(SPACE, 0.0), None, {'reading': None, 'sums': None})
  sampler = make('composite', tmp_path / 'other', [nothing])
  assert len({tuple(point.values()) for point in sampler.suggest(2)}) == 2


def test_the_grid_meets_all_its_points_once(tmp_path):
  sampler = make('grid', tmp_path)
  points = sampler.suggest(125)
  assert len({tuple(point.values()) for point in points}) == 125
  assert {point['code'] for point in points} == {-0.5, 0.0, 0.5, 1.0, 1.5}
  with pytest.raises(UserError, match='125 points'):
    sampler.suggest(126)


def test_an_unknown_name_and_a_missing_package(tmp_path, monkeypatch):
  with pytest.raises(UsageError, match="did you mean 'vizier'"):
    make('vizzier', tmp_path)
  monkeypatch.setitem(__import__('sys').modules, 'optuna', None)
  with pytest.raises(UserError, match=r'needs the package optuna.*optimer_jax\[peers\]'):
    make_sampler('tpe', SPACE, 0, TASKS, jnp.mean, tmp_path / 'study.db')


@pytest.mark.parametrize('verb', [pipeline, baselines])
def test_missing_packages_are_asked_for_before_anything_is_computed(verb, tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'optuna', None)
  others = Baselines(studies=(StudyConfig(name='tpe', sampler='tpe'),))
  with pytest.raises(UserError, match="'tpe' needs the package optuna"):
    verb(make_run(tmp_path / 'run', baselines=others))
  assert not (tmp_path / 'run').exists()
