"""The geometry of vectors and of training, against dense linear algebra in float64."""

import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_jax.checkpoints.names import Tensor
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import init_leaves
from optimer_jax.report.read import GEOMETRY, TRAJECTORY, fault
from optimer_jax.report.style import png
from optimer_jax.report.vector_plots import vector_figures
from optimer_jax.vectors.geometry import geometry, layer_of, module_of
from optimer_jax.vectors.trajectory import trajectory

NAMES = ('ja', 'zh', 'code')
EMBEDDING = 'embedder.embedding'


def tensor(array: np.ndarray) -> Tensor:
  return Tensor(array.shape, array.dtype.name, lambda start=0, stop=None: array[start:stop])


def readers(leaves: dict) -> dict[str, Tensor]:
  return {name: tensor(leaf) for name, leaf in leaves.items()}


def draw(small, seed: int, dtype=np.float32) -> dict:
  """A vector with zero elements, untouched embedding rows and norm scales that are not zero."""
  rng = np.random.default_rng(seed)
  leaves = {
    name: (0.02 * rng.standard_normal(leaf.shape) * (rng.random(leaf.shape) < 0.8)).astype(dtype)
    for name, leaf in init_leaves(small, seed).items()
  }
  leaves[EMBEDDING][rng.random(small.vocab_size) < 0.4] = 0
  return leaves


def flat(leaves: dict, wanted=lambda leaf: True) -> np.ndarray:
  return np.concatenate([v.reshape(-1) for n, v in leaves.items() if wanted(n)]).astype(np.float64)


def dense_cosines(vectors: dict, wanted=lambda leaf: True) -> np.ndarray:
  rows = np.stack([flat(v, wanted) for v in vectors.values()])
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  return rows @ rows.T


@pytest.fixture(scope='module')
def base(small) -> dict:
  return init_leaves(small, 0)


@pytest.fixture(scope='module')
def pool(small) -> dict:
  """Vectors of three dtypes with a common part, so that they are not orthogonal."""
  dtypes = (np.float32, ml_dtypes.bfloat16, np.float16)
  common = draw(small, 99)
  found = {}
  for i, (name, dtype) in enumerate(zip(NAMES, dtypes, strict=True), 1):
    own = draw(small, i)
    found[name] = {n: (own[n] + i / 4 * common[n] * (own[n] != 0)).astype(dtype) for n in own}
  return found


@pytest.fixture(scope='module')
def found(base, pool) -> dict:
  return geometry(readers(base), {name: readers(v) for name, v in pool.items()})


def test_norms_and_cosines_are_plain_linear_algebra(base, pool, found):
  close = dict(rtol=1e-12, atol=1e-14)
  for name, vector in pool.items():
    norm = np.linalg.norm(flat(vector))
    assert found['norm'][name] == pytest.approx(norm, rel=1e-12)
    relative = norm / np.linalg.norm(flat(base))
    assert found['relative_norm'][name] == pytest.approx(relative, rel=1e-12)
    for i in range(2):
      expected = np.linalg.norm(flat(vector, lambda leaf, i=i: layer_of(leaf) == i))
      assert found['by_layer'][name][i] == pytest.approx(expected, rel=1e-12)
    for module, value in found['by_module'][name].items():
      inside = lambda leaf, m=module: module_of(leaf) == m
      assert value == pytest.approx(np.linalg.norm(flat(vector, inside)), rel=1e-12)
    assert found['layer_module'][name].keys() == found['by_module'][name].keys() - {'embedding'}
    for module, values in found['layer_module'][name].items():
      for i, value in enumerate(values):
        both = lambda leaf, m=module, i=i: (layer_of(leaf), module_of(leaf)) == (i, m)
        assert value == pytest.approx(np.linalg.norm(flat(vector, both)), rel=1e-12)
  np.testing.assert_allclose(found['cosine'], dense_cosines(pool), **close)
  assert abs(found['cosine'][0][2]) > 0.05  # not a diagonal that any mistake would give too
  for i, matrix in enumerate(found['cosine_by_layer']):
    expected = dense_cosines(pool, lambda leaf, i=i: layer_of(leaf) == i)
    np.testing.assert_allclose(matrix, expected, **close)
  for module, matrix in found['cosine_by_module'].items():
    expected = dense_cosines(pool, lambda leaf, m=module: module_of(leaf) == m)
    np.testing.assert_allclose(matrix, expected, **close)
  assert len(found['cosine_by_layer']) == 2 and len(found['cosine_by_module']) == 9
  assert found['datasets'] == list(NAMES)
  assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_signs_are_counted_where_both_are_nonzero(pool, found):
  rows = np.stack([flat(v) for v in pool.values()])
  for i, j in itertools.product(range(3), repeat=2):
    both = (rows[i] != 0) & (rows[j] != 0)
    expected = np.mean(np.sign(rows[i][both]) == np.sign(rows[j][both]))
    assert found['sign_agreement'][i][j] == pytest.approx(expected, rel=1e-14)
  several = rows[:, (rows != 0).sum(0) >= 2]
  unanimous = [len(set(np.sign(column[column != 0]))) == 1 for column in several.T]
  assert found['sign_unanimous'] == pytest.approx(np.mean(unanimous), rel=1e-14)
  elected = np.where(several.sum(0) >= 0, 1, -1)
  right = np.abs(several)[np.sign(several) == elected].sum()
  assert found['sign_elected'] == pytest.approx(right / np.abs(several).sum(), rel=1e-12)
  assert 0.25 < found['sign_unanimous'] < found['sign_elected'] < 1


def test_share_of_the_embedding(pool, found):
  for name, vector in pool.items():
    table = vector[EMBEDDING].astype(np.float64)
    share = (table**2).sum() / (flat(vector) ** 2).sum()
    assert found['embedding_share'][name] == pytest.approx(share, rel=1e-12)
    touched = np.mean([any(row) for row in table])
    assert found['embedding_rows_touched'][name] == touched
    assert 0.5 < touched < 0.7


def entropy_rank(matrix: np.ndarray) -> float:
  squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
  shares = squares[squares > 0] / squares.sum()
  return float(np.exp(-(shares * np.log(shares)).sum()))


def test_ranks_of_the_sampled_matrices(small, pool, found):
  for name, vector in pool.items():
    ranks = found['effective_rank'][name]
    assert set(ranks) == {
      f'layers.{i}.{m}' for i in (0, 1) for m in ('attn.q_proj', 'mlp.down_proj')
    }
    for leaf, rank in ranks.items():
      matrix = vector[leaf].astype(np.float64).reshape(vector[leaf].shape[0], -1)
      assert rank['bound'] == min(matrix.shape) == 32
      assert rank['effective'] == pytest.approx(entropy_rank(matrix), rel=1e-9)
      squares = np.linalg.svd(matrix, compute_uv=False) ** 2
      assert rank['stable'] == pytest.approx(squares.sum() / squares[0], rel=1e-9)
      assert 1 < rank['stable'] < rank['effective'] < 32


def test_first_middle_and_last_layer_are_sampled(base):
  layers = {
    f'layers.{i}.{leaf}': np.full((4, 3), i + 1.0, np.float32)
    for i in range(11)
    for leaf in ('attn.q_proj', 'attn.v_proj', 'mlp.down_proj')
  }
  leaves = readers({EMBEDDING: np.ones((5, 3), np.float32), **layers})
  found = geometry(leaves, {'a': leaves})
  assert list(found['effective_rank']['a']) == [
    f'layers.{i}.{m}' for i in (0, 5, 10) for m in ('attn.q_proj', 'mlp.down_proj')
  ]
  # Layers in the order of their numbers, not of their names.
  np.testing.assert_allclose(found['by_layer']['a'], [6 * (i + 1) for i in range(11)])


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_equal_singular_values_give_their_number(base, small, rank):
  rng = np.random.default_rng(rank)
  vector = {name: np.zeros_like(leaf) for name, leaf in base.items()}
  for leaf in ('layers.0.attn.q_proj', 'layers.1.mlp.down_proj'):
    shape = vector[leaf].shape
    rows, columns = shape[0], int(np.prod(shape[1:]))
    left = np.linalg.qr(rng.standard_normal((rows, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, rank)))[0]
    vector[leaf] = (left @ right.T).reshape(shape).astype(np.float32)
  ranks = geometry(readers(base), {'a': readers(vector)})['effective_rank']['a']
  for leaf in ('layers.0.attn.q_proj', 'layers.1.mlp.down_proj'):
    # float32 leaves a residue of 1e-7 of the norm in the other directions.
    assert ranks[leaf]['effective'] == pytest.approx(rank, rel=1e-6)
    assert ranks[leaf]['stable'] == pytest.approx(rank, rel=1e-6)
  assert ranks['layers.1.attn.q_proj'] == {'effective': 0.0, 'stable': 0.0, 'bound': 32}


@settings(max_examples=10, deadline=None)
@given(st.floats(2.0**-6, 2.0**6), st.integers(0, 2))
def test_length_changes_no_direction(small, base, scale, which):
  pool = {name: draw(small, i) for i, name in enumerate(NAMES)}
  before = geometry(readers(base), {n: readers(v) for n, v in pool.items()})
  name = NAMES[which]
  pool[name] = {leaf: value.astype(np.float64) * scale for leaf, value in pool[name].items()}
  after = geometry(readers(base), {n: readers(v) for n, v in pool.items()})
  for key in ('cosine', 'cosine_by_layer'):
    np.testing.assert_allclose(after[key], before[key], rtol=0, atol=1e-13)
  for key in ('sign_agreement', 'sign_unanimous', 'embedding_rows_touched'):
    assert after[key] == before[key]
  assert after['norm'][name] == pytest.approx(scale * before['norm'][name], rel=1e-12)
  assert after['embedding_share'][name] == pytest.approx(before['embedding_share'][name])
  for leaf, rank in before['effective_rank'][name].items():
    assert after['effective_rank'][name][leaf] == pytest.approx(rank, rel=1e-10)


def recorded(leaves: dict, seen: list) -> dict[str, Tensor]:
  """Readers that write down (leaf, start, stop) and the elements of each read."""

  def reader(name, array):
    def read(start=0, stop=None):
      seen.append((name, start, stop, array[start:stop].size))
      return array[start:stop]

    return Tensor(array.shape, array.dtype.name, read)

  return {name: reader(name, array) for name, array in leaves.items()}


@pytest.mark.parametrize('block', [1, 1000, 4096])
def test_any_block_size_gives_the_same_and_reads_each_row_once(
  small, base, pool, found, block, monkeypatch
):
  monkeypatch.setattr('optimer_jax.checkpoints.leaves.BLOCK', block)
  seen = {name: [] for name in ('base', *NAMES)}
  other = geometry(
    recorded(base, seen['base']),
    {name: recorded(v, seen[name]) for name, v in pool.items()},
  )

  def same(a, b):
    if isinstance(a, dict):
      assert a.keys() == b.keys()
      return all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
      return len(a) == len(b) and all(map(same, a, b))
    return a == b if isinstance(a, str | int) else a == pytest.approx(b, rel=1e-11, abs=1e-14)

  assert same(found, other)
  for reads in seen.values():
    for leaf, array in base.items():
      own = sorted(read[1:] for read in reads if read[0] == leaf)
      edges = [0, *(stop for _, stop, _ in own)]
      assert [start for start, _, _ in own] == edges[:-1] and edges[-1] == array.shape[0]
      assert max(size for _, _, size in own) <= max(block, array[0].size)
  assert len(seen['base']) > len(base)


def test_long_sums_keep_their_digits():
  """4 million equal squares: a float32 sum of them would be off in the fourth digit."""
  size = 2**22
  leaves = {EMBEDDING: np.full((size, 1), 0.1, np.float32)}
  for leaf in ('layers.0.attn.q_proj', 'layers.0.mlp.down_proj'):
    leaves[leaf] = np.zeros((2, 2), np.float32)
  found = geometry(readers(leaves), {'a': readers(leaves)})
  assert found['norm']['a'] == pytest.approx(float(np.float32(0.1)) * size**0.5, rel=1e-14)


def test_zero_and_single_vectors(base, pool):
  zero = {name: np.zeros_like(leaf) for name, leaf in base.items()}
  found = geometry(readers(base), {'ja': readers(pool['ja']), 'none': readers(zero)})
  json.dumps(found, allow_nan=False)
  assert found['cosine'] == [[pytest.approx(1.0), 0.0], [0.0, 0.0]]
  assert found['sign_agreement'] == [[1.0, None], [None, None]]
  assert found['sign_unanimous'] is None and found['sign_elected'] is None
  assert found['embedding_share']['none'] == found['embedding_rows_touched']['none'] == 0
  alone = geometry(readers(zero), {'ja': readers(pool['ja'])})
  assert alone['relative_norm']['ja'] == 0 and alone['sign_unanimous'] is None


def test_opposite_vectors_and_two_of_them(base, pool):
  ja = {name: leaf.astype(np.float32) for name, leaf in pool['ja'].items()}
  minus = {name: -0.5 * leaf for name, leaf in ja.items()}
  found = geometry(readers(base), {'a': readers(ja), 'b': readers(minus)})
  assert found['cosine'][0][1] == pytest.approx(-1, rel=1e-12)
  assert found['sign_agreement'][0][1] == found['sign_unanimous'] == 0
  assert found['sign_elected'] == pytest.approx(2 / 3, rel=1e-12)


def test_another_structure_is_refused(base, pool):
  short = readers(pool['zh'])
  del short['layers.1.mlp.up_proj']
  with pytest.raises(UserError, match=r'vector zh has no leaf layers\.1\.mlp\.up_proj'):
    geometry(readers(base), {'ja': readers(pool['ja']), 'zh': short})
  wide = readers(pool['ja']) | {'layers.0.attn.q_proj': tensor(np.zeros((32, 4, 8), np.float32))}
  with pytest.raises(UserError, match=r'vector ja: layers\.0\.attn\.q_proj has shape \[32, 4, 8\]'):
    geometry(readers(base), {'ja': wide})


def test_the_report_reads_what_is_written(found, base, small):
  way = straightness_of(walk(base, [draw(small, 1), draw(small, 2)]))
  assert fault(found, GEOMETRY) == fault(way, TRAJECTORY) == ''
  assert found.keys() == {key.rstrip('?') for key in GEOMETRY} and way.keys() == TRAJECTORY.keys()
  figures = vector_figures(found, {'ja': way})
  assert len(figures) == 6
  assert all(png(figure).startswith(b'\x89PNG') for figure in figures.values())


def walk(base: dict, ways: list[dict], dtype=np.float64) -> list:
  """Checkpoints at steps 10, 20, … with the given differences."""
  theta, found = {n: v.astype(np.float64) for n, v in base.items()}, []
  for i, way in enumerate([None, *ways]):
    if way:
      theta = {name: value + way[name] for name, value in theta.items()}
    found.append((10 * i, {name: value.astype(dtype) for name, value in theta.items()}))
  return found


def straightness_of(found: list) -> dict:
  return trajectory([(step, readers(saved)) for step, saved in found])


def test_a_straight_line_is_straight(base, small):
  one = draw(small, 1, np.float64)
  lengths = (1.0, 0.5, 2.0, 0.25)
  found = straightness_of(walk(base, [{n: k * v for n, v in one.items()} for k in lengths]))
  norm = np.linalg.norm(flat(one))
  assert found['steps'] == [10, 20, 30, 40]
  np.testing.assert_allclose(found['step_norm'], norm * np.array(lengths), rtol=1e-12)
  np.testing.assert_allclose(found['step_cosine'], 1, rtol=0, atol=1e-12)
  np.testing.assert_allclose(found['final_cosine'], 1, rtol=0, atol=1e-12)
  np.testing.assert_allclose(found['projection'], np.cumsum(lengths) / 3.75, rtol=1e-12)
  assert found['straightness'] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize('dtype', [np.float32, np.float64, ml_dtypes.bfloat16])
def test_a_trajectory_is_plain_linear_algebra(base, small, dtype, monkeypatch):
  saved = walk(base, [draw(small, i) for i in range(1, 5)], dtype)
  found = straightness_of(saved)
  theta = np.stack([flat(theta) for _, theta in saved])
  away, ways = theta[1:] - theta[0], np.diff(theta, axis=0)
  tau = away[-1]
  norms, steps = np.linalg.norm(away, axis=1), np.linalg.norm(ways, axis=1)
  close = dict(rtol=1e-11, atol=1e-13)
  np.testing.assert_allclose(found['norm'], norms, **close)
  np.testing.assert_allclose(found['step_norm'], steps, **close)
  cosine = (ways[1:] * ways[:-1]).sum(1) / steps[1:] / steps[:-1]
  np.testing.assert_allclose(found['step_cosine'], cosine, **close)
  np.testing.assert_allclose(found['final_cosine'], away @ tau / norms / norms[-1], **close)
  np.testing.assert_allclose(found['projection'], away @ tau / (tau @ tau), **close)
  assert found['straightness'] == pytest.approx(norms[-1] / steps.sum(), rel=1e-12)
  json.dumps(found, allow_nan=False)
  for block in (1, 100):
    monkeypatch.setattr('optimer_jax.checkpoints.leaves.BLOCK', block)
    other = straightness_of(saved)
    for key, value in found.items():
      np.testing.assert_allclose(other[key], value, **close)


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**20))
def test_a_random_walk_is_less_straight(small, base, steps, seed):
  """Steps of one length that are orthogonal: straightness 1 / sqrt(steps)."""
  ways = [draw(small, seed + i) for i in range(steps)]
  ways = [{n: v / np.linalg.norm(flat(way)) for n, v in way.items()} for way in ways]
  found = straightness_of(walk(base, ways))
  assert found['straightness'] == pytest.approx(steps**-0.5, rel=0.05)
  assert np.abs(found['step_cosine']).max() < 0.05
  assert found['projection'][-1] == pytest.approx(1)
  assert 0 < found['final_cosine'][0] < 1


def test_no_way_and_the_way_back(base, small):
  still = straightness_of(walk(base, [{n: 0 * v for n, v in base.items()}] * 2))
  json.dumps(still, allow_nan=False)
  assert still['straightness'] == 0 and still['projection'] == [0, 0]
  one = draw(small, 1)
  back = straightness_of(walk(base, [one, {n: -v for n, v in one.items()}]))
  assert back['straightness'] == pytest.approx(0, abs=1e-12)
  assert back['step_cosine'] == [pytest.approx(-1)]


def test_what_is_no_trajectory_is_refused(base, pool):
  ends = [(0, readers(base)), (10, readers(base))]
  with pytest.raises(UserError, match='needs the base and a checkpoint'):
    trajectory(ends[:1])
  with pytest.raises(UserError, match=r'in the order of their steps.*\[10, 0\]'):
    trajectory(ends[::-1])
  with pytest.raises(
    UserError, match=r'step 20 has no leaf embedder\.embedding of shape \[300, 32'
  ):
    trajectory([*ends, (20, {})])
