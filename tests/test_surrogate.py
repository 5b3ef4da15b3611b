"""The model of the tasks' losses, on surfaces that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimer_jax.search import surrogate

K, J = 3, 2
LOWER, UPPER = np.zeros(K), np.ones(K)
TRUTH = np.random.default_rng(0)
BOWLS = TRUTH.standard_normal((J, K, K))
BOWLS = np.einsum('jkv,jlv->jkl', BOWLS, BOWLS) / K + 0.3 * np.eye(K)
LOWEST = TRUTH.uniform(0.1, 0.7, (J, K))


def losses(points):
  x = points[:, None] - LOWEST
  slopes = np.einsum('jkl,njl->njk', BOWLS, x)
  return 2 + np.einsum('njk,njk->nj', x, slopes) / 2, slopes


def somewhere(n, seed=1):
  return np.random.default_rng(seed).uniform(0, 1, (n, K))


def off(model):
  """The largest error over the box, against the spread of the values."""
  points = somewhere(200, seed=9)
  values = losses(points)[0]
  return np.abs(surrogate.predict(model, points)[0] - values).max() / np.ptp(values)


def test_a_quadratic_is_found_from_values_and_from_fewer_with_gradients():
  points = somewhere(16)  # A quadratic in three weights has ten coefficients.
  values, slopes = losses(points)
  assert off(surrogate.fit(points, values, LOWER, UPPER)) < 2e-3
  few = surrogate.fit(points[:4], values[:4], LOWER, UPPER, gradients=slopes[:4])
  assert off(few) < 2e-3
  assert off(surrogate.fit(points[:4], values[:4], LOWER, UPPER)) > 0.02


def test_gradients_never_hurt():
  """Whichever trials have one, the model is nearer to the truth with it than without."""
  points = somewhere(6, seed=2)
  values, slopes = losses(points)
  before = off(surrogate.fit(points, values, LOWER, UPPER))
  for with_gradients in (1, 3, 6):
    some = np.where(np.arange(6)[:, None, None] < with_gradients, slopes, np.nan)
    after = off(surrogate.fit(points, values, LOWER, UPPER, gradients=some))
    assert after < before
    before = after


def test_a_steep_fall_at_the_base_is_no_slope_elsewhere():
  """As a study begins, with gradients at the base and the average of what real pools look like."""
  shares = np.array([[0.5, 0.1, 0.2], [0.1, 0.4, 0.1]])

  def steep(w):
    left = shares / (1 + 10 * w[:, None])
    values = 2 + left.sum(2) + 0.2 * w.sum(1, keepdims=True) ** 2
    return values, -10 * left / (1 + 10 * w[:, None]) + 0.4 * w.sum(1)[:, None, None]

  seeds, points = np.array([[0.0] * K, [1 / K] * K]), somewhere(500, seed=9)
  values, slopes = steep(seeds)
  model = surrogate.fit(seeds, values, LOWER, UPPER, gradients=slopes)
  truth = steep(points)[0]
  errors = surrogate.predict(model, points)[0] - truth
  assert np.sqrt((errors**2).mean()) < 0.2 * np.ptp(truth)
  x, *_ = surrogate.minimise(model, jnp.mean, -1.0)
  best = truth.mean(1).min()
  assert steep(x[None])[0].mean() - best < 0.04 * (values[0].mean() - best)


def test_gradients_that_nobody_has_change_nothing():
  points = somewhere(5)
  values = losses(points)[0]
  without = surrogate.fit(points, values, LOWER, UPPER)
  none = surrogate.fit(points, values, LOWER, UPPER, gradients=np.full((5, J, K), np.nan))
  for a, b in zip(surrogate.predict(without, points), surrogate.predict(none, points), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_leaving_one_out_in_closed_form_is_leaving_it_out():
  points = somewhere(5)
  values, slopes = losses(points)
  values = values + 0.01 * np.random.default_rng(3).standard_normal(values.shape)
  for gradients in (None, slopes):
    fitted = surrogate.fit(points, values, LOWER, UPPER, gradients=gradients)
    found = surrogate.leave_one_out(fitted)
    (model,) = fitted.processes
    assert found.shape == (8, J) and not found[5:].any()
    for i in range(5):
      # Padding is what is left out: the covariance without it, written out.
      with jax.enable_x64(True):
        width = len(model.present) // 8
        there = np.flatnonzero(np.asarray(model.present))
        own = [row for row in there if row // width == i]
        rest = [row for row in there if row // width != i]
        factor = np.linalg.inv(np.asarray(model.whitener))
        covariance = factor @ factor.T
        flat = covariance @ np.asarray(model.weights)
      solved = np.linalg.solve(covariance[np.ix_(rest, rest)], covariance[np.ix_(rest, own)])
      error = (flat[own] - solved.T @ flat[rest])[0]
      variance = (covariance[np.ix_(own, own)] - covariance[np.ix_(own, rest)] @ solved)[0, 0]
      np.testing.assert_allclose(
        found[i], error / (np.asarray(model.scale) * np.sqrt(variance)), rtol=1e-5, atol=1e-7
      )


def test_intervals_hold_what_they_promise_on_smooth_functions():
  """Sums of three waves a task: 16 seen values predict 50 more."""
  errors = []
  for seed in range(12):
    rng = np.random.default_rng(seed)
    waves = rng.standard_normal((3, K, J)) * 1.5
    phases, heights = rng.uniform(0, 6, (3, J)), rng.uniform(0.3, 1, (3, J))
    points = rng.uniform(0, 1, (66, K))
    values = (heights * np.sin(np.einsum('nk,mkj->nmj', points, waves) + phases)).sum(1)
    model = surrogate.fit(points[:16], values[:16], LOWER, UPPER)
    mean, deviation = surrogate.predict(model, points[16:])
    errors.append((values[16:] - mean) / deviation)
  errors = np.abs(np.array(errors))
  inside = [(errors < z).mean() for z in (1, 2)]
  assert 0.5 < inside[0] < 0.95 and 0.85 < inside[1] <= 1.0


def test_two_alike_or_equal_trials_are_no_reason_to_fail():
  for points, values in [
    (np.zeros((1, K)), np.full((1, J), 2.0)),
    (np.zeros((2, K)), np.full((2, J), 2.0)),
    (np.stack([LOWER, UPPER]), np.full((2, J), 2.0)),
    (np.stack([LOWER, UPPER / K]), np.array([[2.0, 2.0], [1.5, 1.8]])),
  ]:
    model = surrogate.fit(points, values, LOWER, UPPER)
    mean, deviation = surrogate.predict(model, somewhere(5))
    assert np.isfinite(mean).all() and (deviation > 0).all()
    x, y, error = surrogate.minimise(model, jnp.mean, explore=1.0)
    assert np.isfinite([*x, y, error]).all()


@pytest.mark.parametrize('objective', [jnp.mean, jnp.max])
def test_the_optimum_of_an_objective(objective):
  points = somewhere(12)
  values, slopes = losses(points)
  model = surrogate.fit(points, values, LOWER, UPPER, gradients=slopes)
  x, y, error = surrogate.minimise(model, objective)
  truth = lambda w: float(objective(losses(w[None])[0][0]))
  everywhere = np.stack(np.meshgrid(*[np.linspace(0, 1, 41)] * K), -1).reshape(-1, K)
  best = min(np.asarray(objective(losses(everywhere)[0], axis=1)))
  assert ((x >= LOWER) & (x <= UPPER)).all()
  assert truth(x) < best + 1e-3 and abs(y - truth(x)) < 5e-3 and error < 5e-3


def test_the_optimum_on_the_border_of_another_box():
  lower, upper = np.array([-0.5, 0.0, 0.2]), np.array([0.0, 2.0, 0.4])
  points = lower + (upper - lower) * somewhere(12)
  values, slopes = losses(points)
  model = surrogate.fit(points, values, lower, upper, gradients=slopes)
  for explore in (0.0, 2.0):
    x, _, _ = surrogate.minimise(model, jnp.mean, explore)
    assert ((x >= lower) & (x <= upper)).all()
  assert surrogate.minimise(model, jnp.mean)[0][0] == 0.0


def constrained(values):
  """The first task, with the second no worse than 2.1."""
  return values[0] + 50 * jnp.maximum(values[1] - 2.1, 0)


def test_a_penalty_keeps_a_distance_where_the_model_is_unsure():
  points = somewhere(9)
  values, slopes = losses(points)
  sure = surrogate.fit(points, values, LOWER, UPPER, gradients=slopes)
  x, _, _ = surrogate.minimise(sure, constrained)
  assert losses(x[None])[0][0, 1] < 2.102
  noisy = values + 0.05 * np.random.default_rng(4).standard_normal(values.shape)
  unsure = surrogate.fit(points, noisy, LOWER, UPPER)
  x, _, _ = surrogate.minimise(unsure, constrained)
  mean, deviation = surrogate.predict(unsure, x[None])
  assert mean[0, 1] + deviation[0, 1] < 2.1


def test_gradients_of_some_tasks_alone():
  """Those of the second task, which comes first in the model, make that one sharper."""
  points = somewhere(5)
  values, slopes = losses(points)
  slopes[:, 0] = np.nan
  some = surrogate.fit(points, values, LOWER, UPPER, gradients=slopes)
  none = surrogate.fit(points, values, LOWER, UPPER)
  assert len(some.processes) == 2 and some.noise.shape == (J,)
  test, truth = somewhere(50, seed=9), losses(somewhere(50, seed=9))[0]
  wrong = [np.abs(surrogate.predict(model, test)[0] - truth).max(0) for model in (some, none)]
  assert wrong[0][1] < 0.02 * np.ptp(truth[:, 1]) < wrong[1][1]
  assert wrong[0][0] < 2 * wrong[1][0] and surrogate.leave_one_out(some).shape == (8, J)
  x, y, _ = surrogate.minimise(some, lambda losses: losses[1])
  assert abs(y - losses(x[None])[0][0, 1]) < 0.02


def test_uncertain_trials_count_less():
  points = np.concatenate([somewhere(16)] * 2)
  values = losses(points)[0]
  wrong = values + np.where(np.arange(32)[:, None] < 16, 0.0, 0.3)
  stderrs = np.where(np.arange(32)[:, None] < 16, 0.0, 0.3) * np.ones((1, J))
  weighed = surrogate.fit(points, wrong, LOWER, UPPER, stderrs=stderrs)
  assert off(weighed) < 0.3 * off(surrogate.fit(points, wrong, LOWER, UPPER))


def test_the_same_data_give_the_same_point_and_no_new_program(compiled):
  points = somewhere(8, seed=5)
  values, slopes = losses(points)

  def suggest(n):
    some = slice(0, n)
    model = surrogate.fit(points[some], values[some], LOWER, UPPER, gradients=slopes[some])
    return surrogate.minimise(model, jnp.max, explore=0.5)

  first = suggest(2)
  surrogate.predict(surrogate.fit(points[:2], values[:2], LOWER, UPPER), points[:1])
  compiled.clear()
  for n in range(3, 9):
    suggest(n)
  assert not compiled
  again = suggest(2)
  assert np.array_equal(first[0], again[0]) and first[1:] == again[1:]
  assert jnp.ones(3).dtype == jnp.float32 and not jax.config.jax_enable_x64
