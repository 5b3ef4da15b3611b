"""The merge methods: against mergekit's numbers, by blocks as in memory, and their own laws."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_jax.errors import UsageError, UserError
from optimer_jax.merging import methods, selection
from optimer_jax.merging.methods import Kind
from tests import mergekit_vectors

KEPT = np.load(mergekit_vectors.FILE)
# Everything but divisions by sums that torch takes in another order.
EXACT = (
  *('task_arithmetic', 'task_arithmetic_cancelling', 'ties', 'ties_sum', 'ties_negative'),
  *('ties_norm', 'breadcrumbs', 'breadcrumbs_dense', 'breadcrumbs_ties', 'sce_tiny'),
  *('slerp_straight', 'bf16_task_arithmetic', 'bf16_ties', 'bf16_breadcrumbs'),
  'bf16_breadcrumbs_ties',
)
few = functools.partial(settings, deadline=None, derandomize=True)


def setup(case):
  """Kind, numbers, base and vectors of one of mergekit's cases."""
  method, given_, inputs, k = case
  base, *models = KEPT[f'in/{inputs}'][: k + 1]
  kind = Kind(
    method, given_.get('normalize', given_.get('normalize_weights')), given_.get('rescale')
  )
  own = {name: given_[name] for name in ('density', 'gamma', 'epsilon', 't') if name in given_}
  if 'select_topk' in given_:
    own['density'] = given_['select_topk']
  numbers = methods.numbers(given_.get('weight', [1.0] * k), scale=given_.get('lambda', 1.0), **own)
  methods.check(kind, numbers, k)
  return kind, numbers, base, [model - base for model in models]


def in_memory(kind, numbers, base, vectors, key=None, dtype=np.float32, **more):
  key = methods.leaf_key(0, 'leaf') if key is None else key
  out = jnp.zeros(base.shape, dtype)
  return np.asarray(methods.merge_leaf(kind, out, base, vectors, numbers, key, **more))


def blocks_of(base, vectors, rows):
  def blocks(start, stop):
    for i in range(start, stop, rows):
      j = min(i + rows, stop)
      yield i, base[i:j], [vector[i:j] for vector in vectors]

  return blocks


def by_blocks(kind, numbers, base, vectors, rows, split=0, cuts=None, key=None):
  key = methods.leaf_key(0, 'leaf') if key is None else key
  blocks = blocks_of(base, vectors, rows)
  stats = methods.leaf_statistics(kind, numbers, base.shape, blocks, key, split=split, cuts=cuts)
  return np.concatenate(
    [
      methods.merge_rows(kind, np.float32, b, v, numbers, stats, key, i, split=split)
      for i, b, v in blocks(0, len(base))
    ]
  )


@pytest.mark.parametrize('name', mergekit_vectors.CASES)
def test_equals_mergekit(name):
  kind, numbers, base, vectors = setup(mergekit_vectors.CASES[name])
  wanted = KEPT[f'out/{name}']
  got = in_memory(kind, numbers, base, vectors)
  if name in EXACT:
    np.testing.assert_array_equal(got, wanted)
  np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(by_blocks(kind, numbers, base, vectors, len(base) // 2), got)


def test_bfloat16_file_is_mergekits():
  """One rounding, at the end."""
  case = mergekit_vectors.CASES['bf16_ties']
  kind, numbers, base, vectors = setup(case)
  stored = base.astype(ml_dtypes.bfloat16)
  got = in_memory(kind, numbers, stored, vectors, dtype=ml_dtypes.bfloat16)
  np.testing.assert_array_equal(got, KEPT['out/bf16_ties'].astype(ml_dtypes.bfloat16))
  assert got.dtype == ml_dtypes.bfloat16


def test_mergekit_still_gives_the_kept_numbers():
  pytest.importorskip('mergekit')
  mergekit_vectors.check()


@pytest.mark.parametrize('name', mergekit_vectors.RANDOM)
def test_random_methods_have_mergekits_moments(name):
  kind, numbers, base, vectors = setup(mergekit_vectors.RANDOM[name])
  draws = mergekit_vectors.DRAWS
  keys = jax.random.split(jax.random.key(5), draws)
  merge = lambda key: methods.merge_leaf(kind, jnp.zeros(base.shape), base, vectors, numbers, key)
  outs = np.asarray(jax.jit(jax.vmap(merge))(keys), np.float64)
  error = np.sqrt((KEPT[f'deviation/{name}'] ** 2 + outs.std(0) ** 2) / draws)
  assert (np.abs(outs.mean(0) - KEPT[f'mean/{name}']) <= 5 * error + 1e-6).all()
  moved = (outs != base).mean(0)
  chance = (moved + KEPT[f'moved/{name}']) / 2
  error = np.sqrt(2 * chance * (1 - chance) / draws)
  assert (np.abs(moved - KEPT[f'moved/{name}']) <= 5 * error + 1e-9).all()
  np.testing.assert_allclose(moved.mean(), KEPT[f'moved/{name}'].mean(), atol=0.02)


@pytest.mark.parametrize(
  ('name', 'split'), [('dare_linear', 0), ('della_linear', 0), ('della_linear', 1)]
)
def test_thinning_keeps_the_density(name, split):
  draw = np.random.default_rng(1)
  tau = draw.standard_normal((96, 128)).astype(np.float32)
  base = np.zeros_like(tau)
  numbers = methods.numbers([1.0], density=0.3, epsilon=0.2)
  kind = Kind(name, rescale=False)
  kept = np.mean(
    [in_memory(kind, numbers, base, [tau], jax.random.key(i), split=split) != 0 for i in range(40)],
    axis=0,
  )
  error = (0.3 * 0.7 / (40 * kept.size)) ** 0.5
  assert abs(kept.mean() - 0.3) < 5 * error
  if name == 'della_linear':
    axis = 0 if split else 1
    rank = np.argsort(np.argsort(np.abs(tau), axis), axis) / (tau.shape[axis] - 1)
    for low in (0, 0.25, 0.5, 0.75):
      some = (rank >= low) & (rank <= low + 0.25)
      wanted = (0.1 + 0.4 * rank[some]).mean()
      assert abs(kept[some].mean() - wanted) < 5 * (0.25 / (40 * some.sum())) ** 0.5


def reference(x, k, side, split):
  """The k first elements by a stable sort, in the order in which others store the leaf."""
  flat = np.abs(np.asarray(x, np.float32)).reshape(selection.matrix(x.shape, split))
  flat = (flat.T if split else flat).reshape(-1)
  order = np.argsort(-flat if side == selection.TOP else flat, kind='stable')
  mask = np.zeros(flat.size, bool)
  mask[order[:k]] = True
  a, b = selection.matrix(x.shape, split)
  return (mask.reshape(b, a).T if split else mask).reshape(a, b)


def masks(x, k, side, split, rows):
  """By both implementations."""
  size, flat = x.size, x.reshape(selection.matrix(x.shape, split))
  larger = k if side == selection.TOP else size - k
  source = selection.Source(
    x.shape, split, lambda i, j: ((s, [x[s : min(s + rows, j)]]) for s in range(i, j, rows))
  )
  host = selection.host_cuts([source], [(larger,)], (side,))[0][0, 0]
  halves = np.array(selection.halves(larger), np.int32)
  (device,) = methods._cuts_over([x], (split,), side, halves)
  bits = selection.bits_of(jnp.asarray(flat))
  return [
    np.asarray(selection.part(bits, cut, side, split, jnp.int32(0))) for cut in (host, device)
  ]


@given(
  st.lists(st.integers(-4, 4), min_size=96, max_size=96),
  st.integers(0, 96),
  st.sampled_from([selection.TOP, selection.BOTTOM]),
  st.sampled_from([0, 2]),
  st.integers(1, 5),
  st.sampled_from([1e-20, 0.125, 3e8]),
)
@few(max_examples=60)
def test_selection_is_that_of_a_stable_sort(values, k, side, split, rows, size):
  x = (np.array(values, np.float32) * np.float32(size)).reshape(4, 3, 8)
  wanted = reference(x, k, side, split)
  for mask in masks(x, k, side, split, rows):
    np.testing.assert_array_equal(mask, wanted)
  assert wanted.sum() == k


@pytest.mark.parametrize('kind', ['rows', 'coarse', 'bfloat16', 'sorted', 'equal'])
@pytest.mark.parametrize(('side', 'split'), [(selection.TOP, 0), (selection.BOTTOM, 1)])
def test_selection_in_a_leaf_that_is_sampled(kind, split, side):
  draw = np.random.default_rng(3)
  x = draw.standard_normal((192, 500)).astype(np.float32)
  if kind == 'rows':  # the first rows say nothing of the others
    x *= np.exp(np.linspace(-4, 4, 192, dtype=np.float32))[:, None]
  elif kind == 'coarse':
    x = np.round(x)
  elif kind == 'bfloat16':
    x = x.astype(ml_dtypes.bfloat16)
  elif kind == 'sorted':  # what the sample sees is not what is there
    x[:] = 0.5
    x[1::2, 1:] += draw.random((96, 499), np.float32)
  elif kind == 'equal':
    x[:] = 0.5
  for k in (0, 777, 70000):
    wanted = reference(x, k, side, split)
    for mask in masks(x, k, side, split, 100):
      np.testing.assert_array_equal(mask, wanted)


@pytest.mark.parametrize('name', ['ties', 'breadcrumbs'])
def test_global_scope_ranks_over_all_leaves(name):
  draw = np.random.default_rng(4)
  shapes = {'a': ((6, 8), 1), 'b': ((5,), 0), 'c': ((2, 3, 7), 2)}
  vectors = [
    {n: draw.integers(-3, 4, shape).astype(np.float32) for n, (shape, _) in shapes.items()}
    for _ in range(2)
  ]
  kind = Kind(name, normalize=False, scope='global')
  numbers = methods.numbers([1.0, 1.0], density=[0.3, 0.55], gamma=0.1)
  methods.check(kind, numbers, 2)
  splits = {n: split for n, (_, split) in shapes.items()}
  device = methods.device_global_cuts(kind, vectors, numbers, splits)
  leaves = {
    n: (shape, split, blocks_of(vectors[0][n], [v[n] for v in vectors], 2))
    for n, (shape, split) in shapes.items()
  }
  host = methods.host_global_cuts(kind, numbers, leaves)
  size = sum(np.prod(shape) for shape, _ in shapes.values())
  for i in range(2):
    # One long vector, leaf after leaf as others store them.
    stored = [
      (x.reshape(selection.matrix(x.shape, splits[n])).T if splits[n] else x).reshape(-1)
      for n, x in vectors[i].items()
    ]
    flat = np.abs(np.concatenate(stored))
    count = int(numbers.density[i] * size)
    if name == 'ties':
      chosen = np.argsort(-flat, kind='stable')[:count]
    else:
      last = size - int(0.1 * size)
      chosen = np.argsort(flat, kind='stable')[last - count : last]
    mask = np.zeros(size, bool)
    mask[chosen] = True
    start = 0
    for n, x in vectors[i].items():
      part = mask[start : start + x.size]
      start += x.size
      a, b = selection.matrix(x.shape, splits[n])
      part = (part.reshape(b, a).T if splits[n] else part).reshape(a, b)
      for cuts in (device[n][i], host[n][i]):
        got = kept(name, x.reshape(a, b), cuts, splits[n])
        np.testing.assert_array_equal(got, part)


def kept(name, x, cuts, split):
  """What the cuts of a vector keep of a leaf's matrix."""
  bits, row = selection.bits_of(jnp.asarray(x)), jnp.int32(0)
  if name == 'ties':
    return selection.part(bits, jnp.asarray(cuts[0]), selection.TOP, split, row)
  dropped, upto = (
    selection.part(bits, jnp.asarray(cut), selection.BOTTOM, split, row) for cut in cuts
  )
  return upto & ~dropped


def test_global_cuts_serve_both_merges():
  base, vectors = random_leaf((6, 8), 2)
  kind = Kind('ties', scope='global')
  numbers = methods.numbers([0.4, 0.6], density=0.3)
  trees = [{'a': v, 'b': 9 * v[:3]} for v in vectors]
  cuts = methods.device_global_cuts(kind, trees, numbers, {'a': 0, 'b': 0})['a']
  whole = in_memory(kind, numbers, base, vectors, cuts=cuts)
  got = by_blocks(kind, numbers, base, vectors, 3, cuts=np.asarray(cuts))
  np.testing.assert_array_equal(got, whole)
  # Most of what is kept lies in the other leaf.
  assert 0 < np.mean(whole != base) < 0.3


def random_leaf(shape, k, seed=0):
  draw = np.random.default_rng(seed)
  base = draw.standard_normal(shape).astype(np.float32)
  return base, [(0.2 * draw.standard_normal(shape)).astype(np.float32) for _ in range(k)]


SPLIT = [Kind(name) for name in ('ties', 'sce', 'model_stock', 'slerp', 'dare_ties')]
SPLIT += [Kind('breadcrumbs_ties', rescale=True)]


@pytest.mark.parametrize('kind', SPLIT, ids=lambda kind: kind.name)
def test_blocks_of_any_size_give_the_same_bits(kind):
  base, vectors = random_leaf((6, 4, 6), 1 if kind.name == 'slerp' else 2)
  numbers = methods.numbers([0.3, 0.7][: len(vectors)], density=0.4, gamma=0.1)
  whole = in_memory(kind, numbers, base, vectors, split=2)
  rows = 4 if kind.name in ('ties', 'model_stock') else 3  # with a shorter last block, and without
  got = by_blocks(kind, numbers, base, vectors, rows, split=2)
  np.testing.assert_array_equal(got, whole)


def test_della_by_blocks():
  kind = Kind('della', rescale=False)
  base, vectors = random_leaf((8, 10), 1)
  numbers = methods.numbers([0.3], density=0.5)
  whole = in_memory(kind, numbers, base, vectors)
  np.testing.assert_array_equal(by_blocks(kind, numbers, base, vectors, 4), whole)
  whole = in_memory(kind, numbers, base, vectors, split=1)
  np.testing.assert_array_equal(by_blocks(kind, numbers, base, vectors, 8, split=1), whole)
  with pytest.raises(UsageError, match='give it whole'):
    by_blocks(kind, numbers, base, vectors, 4, split=1)


def test_storage_of_others_gives_the_same_merge():
  """A projection merged as [in, out] is its [out, in] form merged."""
  base, vectors = random_leaf((6, 8), 2)
  vectors = [np.round(8 * v) / 8 for v in vectors]  # with many equals
  numbers = methods.numbers([0.5, 0.5], density=0.4, gamma=0.1)
  for name in ('ties', 'breadcrumbs_ties'):
    ours = in_memory(Kind(name), numbers, base, vectors, split=1)
    theirs = in_memory(Kind(name), numbers, base.T.copy(), [v.T.copy() for v in vectors])
    np.testing.assert_array_equal(ours, theirs.T)


@pytest.mark.parametrize('name', ['breadcrumbs', 'model_stock'])
def test_layers_under_vmap(name):
  base, vectors = random_leaf((3, 6, 8), 2)
  numbers = methods.numbers([0.3, 0.6], density=0.4, gamma=0.1)
  kind = Kind(name)
  keys = jnp.stack([methods.leaf_key(0, f'layers.{i}.mlp.up_proj') for i in range(3)])
  merge = lambda out, base, vectors, key: methods.merge_leaf(
    kind, out, base, vectors, numbers, key, split=1
  )
  stacked = jax.jit(jax.vmap(merge))(jnp.zeros(base.shape), base, vectors, keys)
  for i in range(3):
    one = in_memory(kind, numbers, base[i], [v[i] for v in vectors], keys[i], split=1)
    np.testing.assert_array_equal(stacked[i], one)


def test_new_numbers_do_not_recompile():
  base, vectors = random_leaf((6, 8), 2)
  programs = (methods._cuts_over, methods._merge_into, methods._sum_rows)
  for name in ('ties', 'sce', 'della', 'slerp'):
    sizes = None
    some = vectors[:1] if name == 'slerp' else vectors
    for density in (0.2, 0.3, 0.5, 0.55):
      numbers = methods.numbers([density] * len(some), density=density, epsilon=0.1, t=density)
      in_memory(Kind(name), numbers, base, some)
      sizes = sizes or [program._cache_size() for program in programs]
    assert [program._cache_size() for program in programs] == sizes


def test_traced_numbers():
  """Densities and weights inside a jit: ranks come from the host."""
  base, vectors = random_leaf((6, 8), 2)
  kind = Kind('ties')
  merge = jax.jit(
    lambda numbers, above: methods.merge_leaf(
      kind, jnp.zeros(base.shape), base, vectors, numbers, jax.random.key(0), above=above
    )
  )
  for density in (0.1, 0.6):
    numbers = methods.numbers([0.3, 0.7], density=density)
    got = merge(numbers, methods.ranks(kind, numbers, base.size))
    np.testing.assert_array_equal(got, in_memory(kind, numbers, base, vectors))
  assert merge._cache_size() == 1


def test_ranks_are_pythons():
  size = 262144 * 5376
  for density in (0.2, 0.29, 1 / 3, 0.7):
    numbers = methods.numbers([1.0], density=density, gamma=0.01)
    high, low = methods.ranks(Kind('ties'), numbers, size)[0, 0]
    assert int(high) * 65536 + int(low) == int(density * size)
    upper, lower = methods.ranks(Kind('breadcrumbs'), numbers, size)[0].astype(int) @ (65536, 1)
    assert lower == int(0.01 * size)
    assert upper - lower == int(density * size)
  tiny = methods.numbers([1.0], density=1e-9)
  assert methods.ranks(Kind('ties'), tiny, 50).tolist() == [[[0, 1]]]


DELTAS = ('task_arithmetic', 'ties', 'dare_linear', 'breadcrumbs', 'model_stock', 'sce')


@pytest.mark.parametrize('name', DELTAS)
def test_nothing_added_is_the_base(name):
  base, vectors = random_leaf((6, 8), 2)
  base[0] = -0.0
  base[1, :2] = 1e-40  # not a normal number
  if name in ('model_stock', 'sce'):
    vectors = [np.zeros_like(v) for v in vectors]
  got = in_memory(Kind(name), methods.numbers([0.0, 0.0], density=0.5), base, vectors)
  normal = np.abs(base) != np.float32(1e-40)
  np.testing.assert_array_equal(got.view(np.int32)[normal], base.view(np.int32)[normal])


def test_one_model_alone():
  base, vectors = random_leaf((6, 8), 3)
  for i in range(3):
    got = in_memory(Kind('task_arithmetic'), methods.numbers(np.eye(3)[i]), base, vectors)
    np.testing.assert_array_equal(got, base + vectors[i])


@given(st.permutations(range(3)), st.integers(0, 3))
@few(max_examples=12)
def test_the_order_of_vectors_does_not_matter(order, seed):
  base, vectors = random_leaf((6, 8), 3, seed)
  weights, density = np.array([0.3, 0.7, 0.4]), np.array([0.3, 0.5, 0.8])
  for name in ('linear', 'ties', 'model_stock', 'multislerp'):
    numbers = methods.numbers(weights, density=density)
    other = methods.numbers(weights[order], density=density[order])
    want = in_memory(Kind(name), numbers, base, vectors)
    got = in_memory(Kind(name), other, base, [vectors[i] for i in order])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@given(st.integers(-20, 20), st.integers(0, 5))
@few(max_examples=12)
def test_selection_does_not_see_the_scale(power, seed):
  base, vectors = random_leaf((6, 8), 2, seed)
  zero = np.zeros_like(base)
  numbers = methods.numbers([0.5, 0.25], density=[0.3, 0.6])
  factor = np.float32(2.0**power)
  for name in ('ties', 'breadcrumbs', 'dare_ties'):
    want = in_memory(Kind(name), numbers, zero, vectors)
    got = in_memory(Kind(name), numbers, zero, [v * factor for v in vectors])
    np.testing.assert_array_equal(got, want * factor)


@given(st.floats(-2, 2), st.floats(-2, 2))
@few(max_examples=12)
def test_task_arithmetic_is_linear(a, b):
  base, vectors = random_leaf((6, 8), 2)
  got = in_memory(Kind('task_arithmetic'), methods.numbers([a, b]), base, vectors)
  want = base.astype(float) + a * vectors[0].astype(float) + b * vectors[1].astype(float)
  np.testing.assert_allclose(got, want, rtol=3e-7, atol=3e-7)


def test_vectors_have_masks_of_their_own():
  base, _ = random_leaf((40, 50), 0)
  one = np.ones_like(base)
  kind = Kind('dare_linear', rescale=False)
  numbers = methods.numbers([1.0, 2.0], density=0.5)
  got = in_memory(kind, numbers, np.zeros_like(base), [one, one])
  counts = np.bincount(got.astype(int).reshape(-1), minlength=4) / got.size
  np.testing.assert_allclose(counts, 0.25, atol=5 * (0.25 * 0.75 / got.size) ** 0.5)
  other = in_memory(kind, numbers, np.zeros_like(base), [one, one], methods.leaf_key(0, 'other'))
  assert 0.6 < np.mean(got != other) < 0.9


@pytest.mark.parametrize(
  ('kind', 'numbers', 'k', 'says'),
  [
    (Kind('tie'), methods.numbers([1.0]), 1, "'tie': did you mean 'ties'"),
    (Kind('ties', scope='model'), methods.numbers([1.0]), 1, "ties: scope .* not 'model'"),
    (Kind('sce', scope='global'), methods.numbers([1.0]), 1, 'sce: scope global'),
    (Kind('ties'), methods.numbers([1.0]), 2, 'ties: 1 weights for 2 vectors'),
    (Kind('ties'), methods.numbers([1.0], density=1.2), 1, 'ties: density 1.2'),
    (Kind('ties'), methods.numbers([1.0, 1], density=[0.5, -1]), 2, 'ties: density 0.5, -1'),
    (Kind('breadcrumbs'), methods.numbers([1.0], gamma=2), 1, 'breadcrumbs: gamma 2'),
    (Kind('della'), methods.numbers([1.0], density=0.9), 1, 'della: density 0.9 .* epsilon 0.15'),
    (Kind('della'), methods.numbers([1.0], density=0.1), 1, 'della: density 0.1'),
    (Kind('slerp'), methods.numbers([1.0, 1]), 2, 'slerp: takes 1 vector, not 2'),
    (Kind('model_stock'), methods.numbers([1.0]), 1, 'model_stock: .* not 1'),
    (Kind('sce'), methods.numbers([1.0, 1], density=[0.1, 0.2]), 2, 'sce: .* not 0.1, 0.2'),
    (Kind('linear'), methods.numbers([1.0, -1]), 2, 'linear: the weights 1, -1 sum to 0'),
    (Kind('task_arithmetic'), methods.numbers([np.nan]), 1, 'weights nan is not finite'),
  ],
)
def test_refused(kind, numbers, k, says):
  with pytest.raises(UserError, match=says):
    methods.check(kind, numbers, k)
