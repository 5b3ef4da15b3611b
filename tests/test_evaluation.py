"""Bits per byte, its standard error and paired differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimer_jax.data.rows import Rows
from optimer_jax.evaluation.bits_per_byte import Score, compare, score
from optimer_jax.evaluation.bits_per_byte import _row_nats as row_nats
from optimer_jax.gemma3 import Model, forward, from_leaves, init_leaves


@pytest.fixture(scope='module')
def rows(small):
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, small.vocab_size, (7, 12)).astype(np.int32)
  lengths = np.array([12, 12, 5, 9, 12, 2, 12])
  segments = (np.arange(12) < lengths[:, None]).astype(np.int32)
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), (7, 12)) * segments
  return Rows('test', tokens * segments, segments, positions, (lengths - 1) * 3)


def params(small, seed=0):
  leaves = {n: jnp.asarray(a) * 8 for n, a in init_leaves(small, seed).items()}
  return from_leaves(Model(small), leaves)


def test_equals_plain_log_softmax(small, rows):
  p = params(small)
  found = score(Model(small), p, rows, batch=3)
  # What follows a token does not change its logits, so padding needs no care here.
  logits = jax.jit(forward, static_argnums=0)(Model(small), p, jnp.asarray(rows.tokens))
  logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
  for i, length in enumerate(rows.segment_ids.sum(axis=1)):
    expected = -sum(logp[i, t, rows.tokens[i, t + 1]] for t in range(length - 1))
    assert found.nats[i] == pytest.approx(expected, rel=1e-5, abs=1e-5)
  assert found.value == pytest.approx(found.nats.sum() / math.log(2) / rows.bytes.sum())


def test_batch_size_changes_nothing_and_candidates_do_not_recompile(small, rows):
  whole = score(Model(small), params(small), rows, batch=7)
  for batch in (1, 2, 4):
    part = score(Model(small), params(small), rows, batch)
    np.testing.assert_allclose(part.nats, whole.nats, rtol=0, atol=1e-4)
  size = row_nats._cache_size()
  other = score(Model(small), params(small, 1), rows, batch=7)
  assert row_nats._cache_size() == size
  assert not np.allclose(other.nats, whole.nats)


def test_standard_errors_are_those_of_resampling():
  rng = np.random.default_rng(0)
  sizes = rng.integers(50, 200, 60)
  nats = sizes * (1 + 0.3 * rng.standard_normal(60))
  other = nats - sizes * (0.02 + 0.05 * rng.standard_normal(60))
  a, b = {'x': Score(nats, sizes)}, {'x': Score(other, sizes)}
  draws = rng.integers(0, 60, (4000, 60))
  values = nats[draws].sum(1) / sizes[draws].sum(1) / math.log(2)
  paired = (nats - other)[draws].sum(1) / sizes[draws].sum(1) / math.log(2)
  assert a['x'].stderr == pytest.approx(values.std(), rel=0.1)
  found = compare(a, b)
  assert found['stderr'] == pytest.approx(paired.std(), rel=0.1)
  assert found['difference'] == pytest.approx(a['x'].value - b['x'].value)
  # Pairing is what makes small differences visible.
  assert found['stderr'] < a['x'].stderr / 2


def test_comparison_averages_tasks():
  one, two = Score(np.ones(4), np.full(4, 10)), Score(np.full(4, 2.0), np.full(4, 5))
  found = compare({'x': one, 'y': two}, {'x': two, 'y': two})
  assert found['difference'] == pytest.approx(found['per_task']['x']['difference'] / 2)
  assert found['per_task']['y'] == {'difference': 0.0, 'stderr': 0.0}
