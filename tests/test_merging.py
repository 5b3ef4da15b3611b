"""Vectors, pools and the weighted sum."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_jax.checkpoints import leaves as leaves_on_disk
from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.names import contracted_axes
from optimer_jax.checkpoints.quantized import Quantized
from optimer_jax.errors import UsageError, UserError
from optimer_jax.gemma3 import SIZES, Gemma3Config, Model, from_leaves, init_leaves, to_leaves
from optimer_jax.merging import methods
from optimer_jax.merging.candidates import MergeConfig, candidates
from optimer_jax.merging.streamed import merge_streamed
from optimer_jax.merging.weighted_sum import Groups, weighted_sum
from optimer_jax.vectors.extract import extract
from optimer_jax.vectors.pool import load_pool, open_pool

NAMES = ('ja', 'zh', 'code')


@pytest.fixture(scope='module')
def small():
  """Sizes that many leaves share: every shape is a program of each method."""
  return Gemma3Config(2, 16, 32, 2, 2, 16, window=8, query_scalar=16.0, vocab_size=60)


@pytest.fixture(scope='module')
def run(small, tmp_path_factory):
  return make_run(tmp_path_factory.mktemp('run'), small)


def make_run(path, config):
  """A base, three models near it, and their vectors."""
  base = init_leaves(config, 0)
  root = store.save(path / 'base', 'base', config, base)
  for i, name in enumerate(NAMES, 1):
    noise = init_leaves(config, i)
    leaves = {n: leaf + np.float32(0.1) * noise[n] for n, leaf in base.items()}
    parents = {'base': root.fingerprint}
    store.save(path / 'cpt' / name, 'cpt', config, leaves, parents=parents, facts={'tokens': 9})
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


def test_a_base_of_minus_zeros_is_not_changed_by_zero_weights():
  base = {'a': jnp.asarray([-0.0, 0.0, 1.5, -2.0])}
  vectors = ({'a': jnp.asarray([1.0, -1.0, 2.0, 0.0])},) * 2
  out = weighted_sum({'a': jnp.ones(4)}, base, vectors, jnp.zeros(2))
  np.testing.assert_array_equal(np.signbit(out['a']), np.signbit(base['a']))
  np.testing.assert_array_equal(out['a'], base['a'])


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize(
  ('groups', 'names'),
  [
    (Groups(), ['all']),
    (Groups(blocks=3), ['embedding', 'block 2', 'block 0', 'block 1']),
    (
      Groups(modules=True),
      ['embedding', 'norms', *(f'{x}_proj' for x in ('down', 'gate', 'up', 'k', 'o', 'q', 'v'))],
    ),
  ],
)
def test_weights_of_groups(scan, groups, names):
  """Against plain sums leaf by leaf, in both layouts of the parameters; one program for all w."""
  config = dataclasses.replace(SIZES['tiny'], vocab_size=64)  # 8 layers: a period and two
  model = Model(config, scan=scan)
  assert sorted(groups.names(config)) == sorted(names)
  base, *vectors = (init_leaves(config, seed) for seed in range(3))
  trees = [jax.tree.map(jnp.asarray, from_leaves(model, x)) for x in (base, *vectors)]
  rng = np.random.default_rng(0)
  index = groups.index(model)
  before = weighted_sum._cache_size()
  for _ in range(2):
    w = rng.standard_normal((len(names), 2)).astype(np.float32)
    out = weighted_sum(jax.tree.map(jnp.copy, trees[0]), trees[0], trees[1:], jnp.asarray(w), index)
    for name, leaf in to_leaves(config, out).items():
      u, v = w[groups.names(config).index(groups.of(name, 8))]
      expected = base[name] + (u * vectors[0][name] + v * vectors[1][name])
      np.testing.assert_array_equal(leaf, expected, err_msg=name)
  assert weighted_sum._cache_size() == before + 1


def test_blocks_of_layers_are_even():
  blocks = [Groups(blocks=3).of(f'layers.{i}.mlp.up_proj', 8) for i in range(8)]
  assert blocks == ['block 0'] * 3 + ['block 1'] * 3 + ['block 2'] * 2
  both = Groups(modules=True, blocks=2)
  assert both.of('layers.7.attn.q_proj', 8) == 'block 1 q_proj'
  assert both.of('final_norm.scale', 8) == 'block 1 norms'
  assert both.of('embedder.embedding', 8) == 'embedding'
  for wrong in (0, 9):
    with pytest.raises(UsageError, match='8 layers cannot be divided'):
      Groups(blocks=wrong).of('layers.0.mlp.up_proj', 8)


def test_sixteen_quantized_vectors():
  rng = np.random.default_rng(0)
  base = {'a': jnp.asarray(rng.standard_normal((6, 10)), jnp.float32)}
  vectors = tuple(
    {
      'a': Quantized(
        jnp.asarray(rng.integers(-127, 128, (6, 10)), jnp.int8),
        jnp.asarray(rng.random((1, 10)), jnp.float32),
      )
    }
    for _ in range(16)
  )
  w = rng.standard_normal(16).astype(np.float32)
  out = weighted_sum(jax.tree.map(jnp.copy, base), base, vectors, jnp.asarray(w))
  expected = np.asarray(base['a'], np.float64)
  for weight, vector in zip(w, vectors, strict=True):
    x = vector['a']
    expected = expected + weight * np.asarray(x.values, np.float64) * np.asarray(x.scale)
  np.testing.assert_allclose(out['a'], expected, rtol=0, atol=1e-3)


# Candidates of the search, and the same merge from files.

CONFIGS = {
  'weighted sum': MergeConfig(),
  'task_arithmetic': MergeConfig('task_arithmetic', scale=0.9),
  'ties': MergeConfig('ties', density=0.3),
  'ties, global': MergeConfig('ties', density=0.3, scope='global'),
  'dare_ties': MergeConfig('dare_ties', density=0.5, seed=3, rescale=False),
  'linear': MergeConfig('linear'),
  'multislerp': MergeConfig('multislerp'),
}
POINT = {'ja': 0.2, 'zh': 0.5, 'code': 0.4}


@pytest.mark.parametrize(
  ('how', 'scan'), [*((how, False) for how in CONFIGS), ('weighted sum', True), ('ties', True)]
)
def test_a_merge_from_files_is_the_candidate_bit_for_bit(
  run, small, tmp_path, monkeypatch, how, scan
):
  config = CONFIGS[how]
  if config.scope == 'global':  # one program has all leaves
    small = dataclasses.replace(small, num_layers=1)
    run = make_run(tmp_path, small)
  found = candidates(load_pool(run / 'base', paths(run), Model(small, scan=scan)), config)(POINT)
  monkeypatch.setattr(leaves_on_disk, 'BLOCK', 128)  # several blocks of rows for every matrix
  streamed = merged_from_files(run, config)
  for name, leaf in to_leaves(small, found).items():
    np.testing.assert_array_equal(streamed[name], leaf, err_msg=name)
  base = store.load(run / 'base')[1]
  assert any((streamed[name] != leaf).any() for name, leaf in base.items())


def paths(run):
  return {name: run / 'vectors' / name for name in NAMES}


def merged_from_files(run, config, vectors=None):
  opened = open_pool(run / 'base', vectors or paths(run))
  plan = config.kind, config.numbers([POINT[name] for name in opened.vectors])
  blocks = {}
  for leaf, rows in merge_streamed(
    lambda leaf: plan,
    opened.base,
    [*opened.vectors.values()],
    dtypes=dict.fromkeys(opened.base, 'float32'),
    splits={leaf: contracted_axes(leaf) for leaf in opened.base},
    seed=config.seed,
  ):
    blocks.setdefault(leaf, []).append(rows)
  return {leaf: np.concatenate(rows) for leaf, rows in blocks.items()}


def test_a_density_of_the_search_goes_before_the_configured_one(run, small):
  p = pool(run, small)
  point = {**POINT, 'density': 0.2}
  found = candidates(p, MergeConfig('ties', density=0.9))(point)
  expected = candidates(p, MergeConfig('ties', density=0.2))(POINT)
  other = candidates(p, MergeConfig('ties', density=0.9))(POINT)
  same = [
    np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  ]
  assert all(same)
  assert not np.array_equal(jax.tree.leaves(found)[0], jax.tree.leaves(other)[0])


def test_candidates_of_a_method_compile_once_for_a_shape(run, small):
  candidate = candidates(pool(run, small), MergeConfig('ties', density=0.5))
  candidate({**POINT, 'density': 0.5})
  programs = [f for f in vars(methods).values() if hasattr(f, '_cache_size')]
  before = [program._cache_size() for program in programs]
  candidate({'ja': 0.9, 'zh': 0.1, 'code': -0.3, 'density': 0.25})
  assert before == [program._cache_size() for program in programs] and len(programs) > 3


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_the_search_runs_from_the_compressed_form(run, small, tmp_path, dtype):
  vectors = {}
  for name in NAMES:
    vectors[name] = tmp_path / name
    extract(run / 'base', run / 'cpt' / name, vectors[name], name, dtype)
  found = candidates(load_pool(run / 'base', vectors, Model(small)))(POINT)
  streamed = merged_from_files(run, MergeConfig(), vectors)
  for name, leaf in to_leaves(small, found).items():
    np.testing.assert_array_equal(streamed[name], leaf, err_msg=name)


def test_methods_that_no_weights_turn_into_the_base_are_not_searched():
  for method in ('linear', 'model_stock', 'multislerp', 'sce', 'slerp'):
    with pytest.raises(UsageError, match=f'{method} cannot be searched'):
      MergeConfig(method).check_searchable(4)
  with pytest.raises(UsageError, match="no merge method 'tise': did you mean 'ties'"):
    MergeConfig('tise').check_searchable(4)
  with pytest.raises(UsageError, match='task_arithmetic keeps all of a vector'):
    MergeConfig().check_searchable(4, (0.1, 0.9))
  MergeConfig('della', density=0.5).check_searchable(4, (0.2, 0.8))
  for bounds in ((0.1, 0.8), (0.2, 1.0)):
    with pytest.raises(UserError, match='leaves the open interval'):
      MergeConfig('della', density=0.5).check_searchable(4, bounds)
  with pytest.raises(UserError, match=r'density 1.5, .* is not between 0 and 1'):
    MergeConfig('ties', density=1.5).check_searchable(4)


@pytest.mark.parametrize('how', ['weighted sum', 'ties', 'multislerp'])
def test_a_damaged_leaf_stops_a_merge_from_files(run, tmp_path, how):
  shutil.copytree(run, tmp_path / 'run')
  path = tmp_path / 'run' / 'vectors' / 'zh'
  leaves = store.load(path)[1]
  leaves['layers.0.attn.k_proj'] = leaves['layers.0.attn.k_proj'] * np.float32(1 + 1e-6)
  store.save(tmp_path / 'near', 'vector', store.read_manifest(path).model, leaves)
  shutil.rmtree(path / 'leaves')
  shutil.copytree(tmp_path / 'near' / 'leaves', path / 'leaves')
  with pytest.raises(UserError, match=r'zh: the values of layers\.0\.attn\.k_proj are damaged'):
    merged_from_files(tmp_path / 'run', CONFIGS[how])
