"""Scores, their standard errors, and paired tests of two models."""

import itertools
import json
import math

import numpy as np
import pytest

from optimer_jax.evaluation.scores import Score, compare, from_summary, loss, shown


def solved(values) -> Score:
  return Score(np.asarray(values, np.float64), np.ones(len(values)), 'accuracy')


@pytest.fixture(scope='module')
def two() -> tuple[Score, Score]:
  """Bits of the same 60 texts by two models, one a little better."""
  rng = np.random.default_rng(0)
  sizes = rng.integers(50, 200, 60).astype(np.float64)
  bits = sizes * (1 + 0.3 * rng.standard_normal(60))
  return Score(bits, sizes), Score(bits - sizes * (0.02 + 0.05 * rng.standard_normal(60)), sizes)


def test_standard_errors_are_those_of_resampling(two):
  one, other = two
  draws = np.random.default_rng(1).integers(0, 60, (4000, 60))
  sizes = one.sizes[draws].sum(1)
  assert one.stderr == pytest.approx((one.values[draws].sum(1) / sizes).std(), rel=0.1)
  paired = (one.values - other.values)[draws].sum(1) / sizes
  found = compare({'x': one}, {'x': other})
  assert found['stderr'] == pytest.approx(paired.std(), rel=0.1)
  assert found['difference'] == pytest.approx(one.value - other.value)
  # Pairing is what makes small differences visible.
  assert found['stderr'] < one.stderr / 2


def test_p_values_are_those_of_all_sign_flips():
  """Of 12 examples there are 4,096 ways to flip; 10,000 draws come near their share."""
  rng = np.random.default_rng(2)
  for shift in (0.0, 0.4, 0.9):
    one, other = (Score(rng.normal(m, 1.0, 12), np.full(12, 2.0)) for m in (3.0 + shift, 3.0))
    difference = one.values - other.values
    flips = np.array([*itertools.product((-1, 1), repeat=12)]) @ difference
    exact = np.mean(np.abs(flips) >= abs(difference.sum()) * (1 - 1e-9))
    found = compare({'x': one}, {'x': other})['per_task']['x']['p']
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000) + 1e-4)


def test_a_real_difference_is_found_and_none_is_not_invented(two):
  one, other = two
  assert compare({'x': one}, {'x': other})['p'] < 0.05
  same = compare({'x': one}, {'x': one})
  assert (same['difference'], same['stderr'], same['p']) == (0.0, 0.0, 1.0)
  # With no difference at work, p below 0.05 comes up once in twenty times.
  rng = np.random.default_rng(3)
  draws = [
    compare({'x': solved(rng.integers(0, 2, 40))}, {'x': solved(rng.integers(0, 2, 40))})['p']
    for _ in range(200)
  ]
  assert 0 < np.mean(np.array(draws) < 0.05) < 0.1


def test_the_better_model_is_below_in_every_unit(two):
  right, wrong = solved([1, 1, 1, 0]), solved([0, 1, 0, 0])
  found = compare({'x': right, 'y': two[1]}, {'x': wrong, 'y': two[0]})
  assert found['per_task']['x']['difference'] == -0.5
  assert found['per_task']['y']['difference'] < 0
  each = [task['difference'] for task in found['per_task'].values()]
  assert found['difference'] == pytest.approx(sum(each) / 2)
  errors = [task['stderr'] for task in found['per_task'].values()]
  assert found['stderr'] == pytest.approx(math.hypot(*errors) / 2)
  assert loss(right.summary()) == right.loss == 0.25 and two[0].loss == two[0].value


def test_other_examples_are_refused(two):
  with pytest.raises(ValueError, match='x: the two scores are of other examples'):
    compare({'x': two[0]}, {'x': Score(two[1].values[:-1], two[1].sizes[:-1])})


def test_many_examples_take_little_memory():
  rng = np.random.default_rng(4)
  one, other = (solved(rng.random(15_000) < share) for share in (0.5, 0.52))
  assert compare({'x': one}, {'x': other})['p'] < 0.01


def test_what_is_written_is_read_again(two):
  broken = Score(np.array([1.0, np.nan]), np.ones(2), 'accuracy', truncated=1, tokens=9)
  for score in (*two, solved([1, 0, 1]), broken):
    text = json.dumps([score.summary(), score.per_example()], allow_nan=False)
    again = from_summary(*json.loads(text))
    np.testing.assert_array_equal(again.values, score.values)
    np.testing.assert_array_equal(again.sizes, score.sizes)
    assert again.summary() == score.summary()
  assert broken.summary()['value'] is None and math.isnan(broken.loss)
  assert solved([1]).summary()['stderr'] is None


def test_scores_for_people(two):
  assert shown(solved([1, 1, 0, 0]).summary()) == '50.0% ± 28.9'
  assert (
    shown(Score(np.array([4.0, 6.0]), np.full(2, 4.0)).summary()) == '1.2500 ± 0.2500 bits/byte'
  )
  assert shown(solved([1]).summary()) == '100.0%'
  assert shown(solved([math.nan, 1]).summary()) == 'not finite'
