"""Vectors, pools and the weighted sum."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_jax.checkpoints import store
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import Model, init_leaves, to_leaves
from optimer_jax.merging.weighted_sum import weighted_sum
from optimer_jax.vectors.extract import extract
from optimer_jax.vectors.geometry import geometry
from optimer_jax.vectors.pool import load_pool

NAMES = ('ja', 'zh', 'code')


@pytest.fixture(scope='module')
def run(small, tmp_path_factory):
  """A base, three models near it, and their vectors."""
  path = tmp_path_factory.mktemp('run')
  base = init_leaves(small, 0)
  root = store.save(path / 'base', 'base', small, base)
  for i, name in enumerate(NAMES, 1):
    noise = init_leaves(small, i)
    leaves = {n: leaf + np.float32(0.1) * noise[n] for n, leaf in base.items()}
    parents = {'base': root.fingerprint}
    store.save(path / 'cpt' / name, 'cpt', small, leaves, parents=parents, facts={'tokens': 9})
    extract(path / 'base', path / 'cpt' / name, path / 'vectors' / name, name)
  return path


def pool(run, small):
  vectors = {name: run / 'vectors' / name for name in NAMES}
  return load_pool(run / 'base', vectors, Model(small))


def merged(p, weights):
  return weighted_sum(
    jax.tree.map(jnp.copy, p.base), p.base, p.vectors, jnp.asarray(weights, jnp.float32)
  )


def test_unit_weights_give_the_models_and_zero_the_base(run, small):
  p = pool(run, small)
  for a, b in zip(jax.tree.leaves(merged(p, [0, 0, 0])), jax.tree.leaves(p.base), strict=True):
    assert np.array_equal(a, b)
  for i, name in enumerate(NAMES):
    _, model = store.load(run / 'cpt' / name)
    found = merged(p, np.eye(3)[i])
    base = store.load(run / 'base')[1]
    for leaf, value in to_leaves(small, found).items():
      # tau is rounded once, and the sum once more.
      bound = np.spacing(np.maximum(np.abs(model[leaf]), np.abs(base[leaf])))
      assert (np.abs(np.asarray(value) - model[leaf]) <= bound).all(), leaf


floats = st.floats(-2, 2, width=32)


@settings(max_examples=25, deadline=None)
@given(st.lists(floats, min_size=3, max_size=3), st.lists(floats, min_size=3, max_size=3))
def test_linear_in_the_weights(u, v):
  rng = np.random.default_rng(0)
  base = {'a': jnp.zeros((5, 7)), 'b': jnp.zeros(3)}
  vectors = tuple(
    jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), base)
    for _ in range(3)
  )

  def sum_of(w):
    return weighted_sum(jax.tree.map(jnp.copy, base), base, vectors, jnp.asarray(w, jnp.float32))

  both = sum_of(np.float32(u) + np.float32(v))
  one, other = sum_of(u), sum_of(v)
  for a, b, c in zip(*map(jax.tree.leaves, (both, one, other)), strict=True):
    np.testing.assert_allclose(a, b + c, rtol=0, atol=1e-5)


def test_sums_in_float32_and_rounds_once():
  """bfloat16 steps of 1/256 would swallow each of these additions."""
  base = {'a': jnp.ones(4, jnp.bfloat16)}
  vectors = tuple({'a': jnp.full(4, 2.0**-9, jnp.bfloat16)} for _ in range(8))
  out = weighted_sum({'a': jnp.zeros(4, jnp.bfloat16)}, base, vectors, jnp.ones(8, jnp.float32))
  assert out['a'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(out['a'], np.float32), 1 + 8 * 2.0**-9)


def test_buffer_is_reused_and_weights_do_not_recompile(run, small):
  p = pool(run, small)
  buffer = jax.tree.map(jnp.copy, p.base)
  held = jax.tree.leaves(buffer)[0].unsafe_buffer_pointer()
  out = weighted_sum(buffer, p.base, p.vectors, jnp.asarray([0.1, 0.2, 0.3], jnp.float32))
  assert jax.tree.leaves(out)[0].unsafe_buffer_pointer() == held
  assert jax.tree.leaves(buffer)[0].is_deleted()
  size = weighted_sum._cache_size()
  weighted_sum(out, p.base, p.vectors, jnp.asarray([0.5, 0.0, -1.0], jnp.float32))
  assert weighted_sum._cache_size() == size


def test_bfloat16_vectors_record_their_rounding(run, small, tmp_path):
  manifest = extract(run / 'base', run / 'cpt' / 'ja', tmp_path / 'v', 'ja', 'bfloat16')
  _, rounded = store.load(tmp_path / 'v')
  _, exact = store.load(run / 'vectors' / 'ja')
  assert rounded['final_norm.scale'].dtype == ml_dtypes.bfloat16
  error = sum(np.sum((rounded[n].astype(np.float64) - v) ** 2) for n, v in exact.items())
  norm = sum(np.sum(v.astype(np.float64) ** 2) for v in exact.values())
  assert manifest.facts['rounding_error'] == pytest.approx((error / norm) ** 0.5, rel=1e-4)
  assert 1e-4 < manifest.facts['rounding_error'] < 2**-8


def test_geometry_is_plain_linear_algebra(run):
  _, base = store.load(run / 'base')
  vectors = {name: store.load(run / 'vectors' / name)[1] for name in NAMES}
  found = geometry(base, vectors)
  flat = np.stack(
    [np.concatenate([v.reshape(-1) for v in vectors[n].values()]) for n in NAMES]
  ).astype(np.float64)
  norms = np.linalg.norm(flat, axis=1)
  np.testing.assert_allclose(list(found['norm'].values()), norms, rtol=1e-5)
  np.testing.assert_allclose(
    found['cosine'], flat @ flat.T / np.outer(norms, norms), rtol=0, atol=1e-5
  )
  for i, name in enumerate(NAMES):
    squares = sum(x**2 for x in found['by_module'][name].values())
    assert squares == pytest.approx(norms[i] ** 2, rel=1e-5)
    assert len(found['by_layer'][name]) == 2


def test_foreign_and_damaged_vectors_are_refused(run, small, tmp_path):
  other = store.save(tmp_path / 'other', 'base', small, init_leaves(small, 7))
  with pytest.raises(UserError, match=r'vectors/ja was made from the base .* but .*other is'):
    load_pool(tmp_path / 'other', {'ja': run / 'vectors' / 'ja'}, Model(small))
  with pytest.raises(UserError, match='has another architecture'):
    wider = dataclasses.replace(small, vocab_size=400)
    load_pool(run / 'base', {'ja': run / 'vectors' / 'ja'}, Model(wider))
  with pytest.raises(UserError, match='is a cpt, but a vector is needed'):
    load_pool(run / 'base', {'ja': run / 'cpt' / 'ja'}, Model(small))
  leaves = init_leaves(small, 3)
  leaves['layers.1.mlp.up_proj'][3, 4] = np.inf
  parents = {'base': store.read_manifest(run / 'base').fingerprint}
  store.save(tmp_path / 'bad', 'cpt', small, leaves, parents=parents)
  with pytest.raises(UserError, match=r'layers\.1\.mlp\.up_proj has values that are not finite'):
    extract(run / 'base', tmp_path / 'bad', tmp_path / 'v', 'bad')
  with pytest.raises(UserError, match="float32 or bfloat16, not 'int3'"):
    extract(run / 'base', run / 'cpt' / 'ja', tmp_path / 'v', 'ja', 'int3')
  with pytest.raises(UserError, match='was made from the base'):
    extract(tmp_path / 'other', run / 'cpt' / 'ja', tmp_path / 'v', 'ja')
  assert not (tmp_path / 'v').exists()
  assert other.fingerprint != parents['base']
