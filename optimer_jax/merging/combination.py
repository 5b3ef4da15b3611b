"""The arithmetic of the merge methods, on a leaf or on some of its rows: see methods.py.

Nothing here depends on how a leaf is cut into blocks, nor on how a compiler fuses: sums are taken
in an order that is set here, and products are rounded before they are added.
"""

import math

import jax
import jax.numpy as jnp

from optimer_jax.merging import selection
from optimer_jax.merging.selection import BOTTOM, TOP

_ANGLES = ('model_stock', 'multislerp')


def times(x, y):
  """x * y, rounded. Compilers fuse a product into a following sum, here so and there not.

  What stands between the two changes nothing but a bit of a NaN, which they cannot know.
  """
  product = x * y
  nan = jnp.isnan(product).astype(jnp.int32)
  bits = jax.lax.bitcast_convert_type(product, jnp.int32)
  return jax.lax.bitcast_convert_type(bits ^ nan, jnp.float32)


class Leaf:
  """A leaf or a block of its rows as float32 matrices [a, B], and what belongs to it."""

  def __init__(self, kind, split, base, vectors, numbers, key, start):
    shape = base.shape
    a, b = selection.matrix(shape, split)
    self.kind, self.method, self.split, self.key = kind, kind.method, split, key
    self.numbers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), numbers)
    self.base = base.reshape(a, b).astype(jnp.float32)
    self.vectors = [v.reshape(a, b).astype(jnp.float32) for v in vectors]
    self.first_row = jnp.asarray(start, jnp.int32) * math.prod(shape[1 : split or 1])
    self.rank_axis = 0 if split or len(shape) == 1 else 1

  def kept(self, i, cuts):
    """Which elements of vector i are kept: bool [a, B], or None for all."""
    density, keeps = self.numbers.density[i], self.method.keeps
    if keeps == 'all':
      return None
    if keeps in ('largest', 'between'):
      bits = selection.bits_of(self.vectors[i])
      if keeps == 'largest':
        return selection.part(bits, cuts[i, 0], TOP, self.split, self.first_row)
      dropped, upto = (
        selection.part(bits, cuts[i, e], BOTTOM, self.split, self.first_row) for e in range(2)
      )
      return upto & ~dropped
    if keeps == 'varied':
      bits = selection.bits_of(variance(self.vectors))
      return selection.part(bits, cuts[0, 0], TOP, self.split, self.first_row)
    a, b = self.vectors[i].shape
    rows = self.first_row + jnp.arange(a, dtype=jnp.int32)
    key = jax.random.fold_in(self.key, i)
    uniform = jax.vmap(
      lambda row: jax.random.uniform(jax.random.fold_in(key, row), (b,), jnp.float32)
    )(rows)
    if keeps == 'random':
      return uniform < density
    order = jnp.argsort(jnp.abs(self.vectors[i]), axis=self.rank_axis, stable=True)
    rank = jnp.argsort(order, axis=self.rank_axis).astype(jnp.float32)
    rank = rank / max(1, rank.shape[self.rank_axis] - 1)
    epsilon = self.numbers.epsilon[i]
    chance = (density - epsilon) + times(rank, 2 * epsilon)
    return uniform < jnp.where((density <= 0) | (density >= 1), density, chance)

  def thinned(self, i, cuts):
    kept = self.kept(i, cuts)
    return self.vectors[i] if kept is None else jnp.where(kept, self.vectors[i], 0)


def variance(vectors):
  """Over the K vectors, as sum_(i<j) (x_i - x_j)^2 / K^2 in pairs of float32.

  Rounded correctly but for a few elements in a million, as a float64 computation is: which elements
  sce keeps hangs on the last bit.
  """

  def two_sum(x, y):
    total = x + y
    back = total - x
    return total, (x - (total - back)) + (y - back)

  def two_product(x, y):
    def cut(x):
      head = times(x, jnp.float32(4097))
      head = head - (head - x)
      return head, x - head

    (a, b), (c, d), whole = cut(x), cut(y), times(x, y)
    rest = ((times(a, c) - whole) + times(a, d) + times(b, c)) + times(b, d)
    return whole, rest

  k = len(vectors)
  high = low = jnp.zeros_like(vectors[0])
  for i in range(k):
    for j in range(i):
      x, tail = two_sum(vectors[i], -vectors[j])
      square, rest = two_product(x, x)
      high, error = two_sum(high, square)
      high, low = two_sum(high, error + (low + (rest + times(2 * x, tail))))
  square = jnp.float32(k * k)
  share = high / square
  back, rest = two_product(share, jnp.broadcast_to(square, share.shape))
  return share + (((high - back) - rest) + low) / square


def _terms(leaf, cuts) -> list[jax.Array]:
  """The matrices whose sums over the leaf the method needs."""
  vectors, name = leaf.vectors, leaf.kind.name
  if name in _ANGLES:
    k = len(vectors)
    return [times(vectors[i], vectors[j]) for i in range(k) for j in range(i, k)]
  if name == 'slerp':
    model = leaf.base + vectors[0]
    pairs = ((leaf.base, leaf.base), (leaf.base, model), (model, model))
    return [times(x, y) for x, y in pairs]
  thinned = [leaf.thinned(i, cuts) for i in range(len(vectors))]
  if name == 'sce':
    return [times(x, x) for x in thinned]
  return [jnp.abs(x) for x in (*vectors, *thinned)]


def tree(x):
  """Sums the last axis, sixteen at a time: the order is set here, not by the compiler."""
  while x.shape[-1] > 1:
    width = -(-x.shape[-1] // 16)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, 16 * width - x.shape[-1])]
    parts = jnp.pad(x, pad).reshape(*x.shape[:-1], 16, width)
    parts = [parts[..., i, :] for i in range(16)]
    while len(parts) > 1:
      parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    # A level is stored before the next, or the compiler would compute it anew for each use.
    x = jax.lax.optimization_barrier(parts[0])
  return x[..., 0]


def sums_needed(kind) -> bool:
  return kind.method.rescale or kind.name in (*_ANGLES, 'slerp', 'sce')


def row_sums(leaf, cuts):
  """float32 [S, a]."""
  return jnp.stack([tree(term) for term in _terms(leaf, cuts)])


def combine(leaf, stats):
  """The merged block, float32 [a, B]."""
  name, method, numbers = leaf.kind.name, leaf.method, leaf.numbers
  base, vectors, weights = leaf.base, leaf.vectors, leaf.numbers.weights
  k = len(vectors)
  if name == 'linear':
    total = sum(times(weights[i], base + vector) for i, vector in enumerate(vectors))
    return total / _sum(weights) if method.normalize else total
  if name == 'slerp':
    here, there = _slerp(numbers.t, stats.sums)
    return times(here, base) + times(there, base + vectors[0])
  if name == 'sce':
    return moved(base, _sce(leaf, stats))
  if name in _ANGLES:
    shares = (_stock if name == 'model_stock' else _on_sphere)(leaf, stats.sums)
    return moved(base, sum(times(shares[i], vector) for i, vector in enumerate(vectors)))

  deltas = []
  for i in range(k):
    delta = leaf.thinned(i, stats.cuts)
    if method.rescale:
      before, after = stats.sums[i], stats.sums[k + i]
      small = (before < 1e-7) | (after < 1e-7)
      delta = times(delta, jnp.where(small, 1, before / jnp.where(small, 1, after)))
    deltas.append(times(weights[i], delta))
  if method.elects:
    sign = jnp.where(sum(deltas) >= 0, 1, -1)
    elected = [jnp.sign(delta) == sign for delta in deltas]
    total = sum(jnp.where(e, delta, 0) for e, delta in zip(elected, deltas, strict=True))
    divisor = sum(jnp.where(e, weights[i], 0) for i, e in enumerate(elected))
    divisor = jnp.where(divisor == 0, 1, divisor)
  else:
    total, divisor = sum(deltas), _sum(weights)
    divisor = jnp.where(jnp.abs(divisor) < 1e-8, 1, divisor)
  if method.normalize:
    total = total / divisor
  return moved(base, times(total, numbers.scale))


def _sum(weights):
  return sum(weights[i] for i in range(weights.shape[0]))


def moved(base, delta):
  """base + delta, and the very base where nothing is added: -0.0 + 0.0 would be 0.0."""
  return jnp.where(delta == 0, base, base + delta)


def _slerp(t, sums):
  """What the base and the model are multiplied by."""
  norms = [jnp.sqrt(sums[i]) for i in (0, 2)]
  a, b = (jnp.where(norm > 1e-8, norm, 1) for norm in norms)
  cosine = jnp.clip(sums[1] / a / b, -1, 1)
  straight = jnp.abs(cosine) > 0.9995
  angle = jnp.arccos(jnp.where(straight, 0, cosine))
  sine = jnp.sin(angle)
  here = jnp.where(straight, 1 - t, jnp.sin(times(1 - t, angle)) / sine)
  return here, jnp.where(straight, t, jnp.sin(times(t, angle)) / sine)


def _gram(sums, k):
  table = iter(range(k * (k + 1) // 2))
  at = {(i, j): next(table) for i in range(k) for j in range(i, k)}
  return lambda i, j: sums[at[min(i, j), max(i, j)]]


def _stock(leaf, sums):
  """Model Stock, equation 2: the way to the mean of the models, shared by the vectors."""
  k = len(leaf.vectors)
  gram = _gram(sums, k)
  norms = [jnp.sqrt(gram(i, i)) for i in range(k)]
  cosines = [
    jnp.clip(gram(i, j) / jnp.maximum(times(norms[i], norms[j]), 1e-6), -1, 1)
    for i in range(k)
    for j in range(i + 1, k)
  ]
  cosine = sum(cosines) / len(cosines)
  below = 1 + times(jnp.float32(k - 1), cosine)
  singular = jnp.abs(below) < 1e-6
  # K cosine / below of the way, of which each vector has 1 / K.
  return [jnp.where(singular, 0, cosine / jnp.where(singular, 1, below))] * k


def _on_sphere(leaf, sums):
  """Multi-SLERP: the mean direction at the mean norm."""
  k, weights = len(leaf.vectors), leaf.numbers.weights
  if k == 1:
    return [jnp.float32(1)]
  if leaf.method.normalize:
    weights = weights / _sum(weights)
  gram = _gram(sums, k)
  norms = [jnp.sqrt(gram(i, i)) for i in range(k)]
  shares = [weights[i] / (norms[i] + 1e-8) for i in range(k)]
  square = sum(times(times(shares[i], shares[j]), gram(i, j)) for i in range(k) for j in range(k))
  length = jnp.sqrt(jnp.maximum(square, 0))
  norm = sum(times(weights[i], norms[i]) for i in range(k))
  # Vectors that cancel, or a leaf that no model changed: the plain sum.
  none = length < 1e-8
  stretch = norm / jnp.where(none, 1, length)
  return [jnp.where(none, weights[i], times(shares[i], stretch)) for i in range(k)]


def _sce(leaf, stats):
  """SCE: select by variance, weigh by squares, erase the minority's signs."""
  k = len(leaf.vectors)
  vectors = [leaf.thinned(i, stats.cuts) for i in range(k)]
  squares = stats.sums
  total = _sum(squares)
  small = total < times(jnp.float32(1e-6), stats.size.astype(jnp.float32))
  weights = [jnp.where(small, 1 / k, squares[i] / jnp.where(small, 1, total)) for i in range(k)]
  sign = jnp.where(sum(vectors) >= 0, 1, -1)
  shares = [jnp.where(jnp.sign(v) == sign, w, 0) for v, w in zip(vectors, weights, strict=True)]
  merged = sum(times(vector, share) for vector, share in zip(vectors, shares, strict=True))
  return merged / jnp.maximum(sum(shares), 1e-6)
