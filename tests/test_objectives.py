"""What objectives make of losses."""

import jax
import numpy as np
import pytest

from optimer_jax.search.objectives import Objective, front, losses_of, stderrs_of

TASKS = ['a', 'b', 'c']
BASE = np.array([1.0, 2.0, 0.5])
CPT = np.array([[0.8, 2.2, 0.6], [1.1, 1.5, 0.5]])
ANCHORS = np.concatenate([BASE[None], CPT])
HERE = np.array([0.9, 1.75, 0.5])


def at(objective, number=None):
  losses = np.concatenate([ANCHORS, HERE[None]])
  anchors = ANCHORS if objective.scale == 'best' else BASE[None]
  return objective.at(TASKS, losses, anchors, number)


@pytest.mark.parametrize(
  'objective, value',
  [
    (Objective(), HERE.mean()),
    (Objective('worst'), 1.75),
    (Objective(weights={'a': 3, 'b': 0}), (3 * 0.9 + 0.5) / 4),
    (Objective('worst', weights={'b': 0}), 0.9),
    (Objective(scale='base'), (0.9 + 0.875 + 1) / 3),
    (Objective('worst', scale='base'), 1.0),
    # c is better than the base nowhere: it keeps its unit, and counts from the best that there is.
    (Objective(scale='best'), (0.5 + 0.5 + 0.0) / 3),
    (Objective('worst', scale='best'), 0.5),
    (Objective(limits={'a': 0.0, 'c': 0.01}), HERE.mean()),
    (Objective(limits={'c': -0.1}), HERE.mean() + 10 * 0.05),
    (Objective(scale='base', limits={'b': -0.2}), (0.9 + 0.875 + 1) / 3 + 10 * 0.15 / 2),
  ],
)
def test_objectives(objective, value):
  objective.check(TASKS)
  aggregate = at(objective)
  assert np.isclose(aggregate(HERE), value, rtol=1e-14)
  assert np.allclose(aggregate(np.stack([HERE, HERE])), value)
  assert np.isnan(aggregate(np.array([0.9, np.nan, 0.5])))
  with jax.enable_x64(True):
    traced = jax.jit(lambda aggregate, losses: aggregate(losses))
    assert np.isclose(traced(aggregate, jax.numpy.asarray(HERE)), value, rtol=1e-14)


def test_every_objective_is_one_program():
  traced = jax.jit(lambda aggregate, losses: aggregate(losses))
  for objective in (Objective(), Objective('worst', scale='best'), Objective(limits={'a': 0.1})):
    traced(at(objective), jax.numpy.asarray(HERE))
  assert traced._cache_size() == 1


def test_the_standard_error_is_that_of_independent_tasks():
  errors = np.array([0.3, 0.4, 0.0])
  assert np.isclose(at(Objective()).stderr(HERE, errors), 0.5 / 3)
  assert np.isclose(at(Objective('worst')).stderr(HERE, errors), 0.4)


def test_scores_become_losses():
  scores = {
    'a': {'value': 0.75, 'stderr': 0.1, 'unit': 'accuracy'},
    'b': {'value': None, 'unit': 'bits/byte'},
  }
  found = losses_of(scores, ['b', 'a'])
  assert np.isnan(found[0]) and found[1] == 0.25
  assert stderrs_of(scores, ['b', 'a']).tolist() == [0.0, 0.1]


def test_the_directions_of_a_front_lead_all_along_it():
  """On the circle about (1, 1, 1) that is the front of two tasks, each direction has its point."""
  objective = Objective('pareto', {'c': 0})
  objective.check(TASKS)
  angle = np.linspace(0, np.pi / 2, 1000)
  losses = np.stack([1 - np.cos(angle), 1 - np.sin(angle), angle], 1)
  found = [
    angle[objective.at(TASKS, losses, np.ones((1, 3)), number)(losses).argmin()]
    for number in range(16)
  ]
  assert np.isclose(
    angle[objective.at(TASKS, losses, np.ones((1, 3)))(losses).argmin()], np.pi / 4, atol=1e-3
  )
  histogram, _ = np.histogram(found, 4, (0, np.pi / 2))
  assert histogram.min() >= 1 and len(set(found)) == 16


def test_a_front_is_what_nothing_beats():
  losses = np.array([[1, 3], [2, 2], [3, 1], [2, 3], [3, 3], [1, np.nan], [1, 3]])
  assert front(losses).tolist() == [True, True, True, False, False, False, True]
