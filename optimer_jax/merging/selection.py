"""Which elements of a vector are kept: exact ranks of |tau|, without sorting.

A magnitude is compared by its bits: |x| as float32, read as int32, has the order of |x|. Among
equal magnitudes the order is that in which others store the leaf: a leaf is seen as a matrix
[A, B]; with `split` = 0 as it lies (axis 0 by the rest), else the first `split` axes by the others,
which others store transposed ([out, in]). A *line* is a row of that storage, a *position* a place
in it.

A *cut* (bits, line, position) parts the elements in two: those beyond `bits`, and those equal to it
up to and including that place. A cut of side TOP keeps the larger ones, of side BOTTOM the smaller;
both take equals in storage order, as a stable sort does.

The same cuts are found in two ways: on the device for leaves in memory, on the host for leaves that
are read by blocks. They may differ in `bits` where no element lies between; the parts are the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

TOP, BOTTOM = 'top', 'bottom'
MOST = 2**31 - 1  # beyond the bits of any magnitude, any line and any position
_INFINITY = 0x7F800000  # its bits: above those of every number, and MOST - (-1) would overflow
_SAMPLE = 2**15  # magnitudes of a leaf in memory that are sorted to know where to look
_PIECE = 256  # magnitudes of one place of a leaf on disk
_COLLECT = 2**23  # elements that a first guess may collect
_SMALL = 2**16  # leaves up to this size are collected whole
_CHUNK = 2**17  # elements that the host looks at together: they stay in its cache


def matrix(shape: tuple[int, ...], split: int) -> tuple[int, int]:
  """[A, B] of a leaf."""
  axes = split or 1
  return math.prod(shape[:axes]), math.prod(shape[axes:])


def halves(count: int) -> tuple[int, int]:
  """A count that may not fit in int32, as int32 numbers: count = 65536 * first + second."""
  return count >> 16, count & 0xFFFF


# On the device.


def bits_of(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & MOST


def part(bits: jax.Array, cut: jax.Array, side: str, split: int, first_row: jax.Array) -> jax.Array:
  """Whether each element is on the cut's side.

  Args:
    bits: int32 [a, B], rows of the leaf's matrix.
    cut: int32 [3].
    side: TOP or BOTTOM.
    split: of the leaf.
    first_row: the matrix row of bits[0].
  """
  rows = first_row + jnp.arange(bits.shape[0], dtype=jnp.int32)[:, None]
  columns = jnp.arange(bits.shape[1], dtype=jnp.int32)[None]
  line, position = (columns, rows) if split else (rows, columns)
  value, last_line, last = cut
  limit = jnp.where(line < last_line, MOST, jnp.where(line == last_line, last, -1))
  beyond = bits > value if side == TOP else bits < value
  return beyond | ((bits == value) & (position <= limit))


def device_cuts(
  leaves: Sequence[jax.Array], splits: Sequence[int], larger: jax.Array, side: str
) -> list[jax.Array]:
  """The cut of each leaf that puts exactly `larger` elements of all leaves above it.

  A sample says where to look; then secant and bisection steps in turn, each of which counts the
  elements above a guess. Nothing as large as a leaf is kept, and no leaf is sorted.

  Args:
    leaves: matrices [A, B] of any float dtype, in the order in which equals are taken.
    splits: of the leaves.
    larger: int32 [2], `halves` of the number of elements above the cut, 0 to the size.
    side: the side on which the cut will be used; it settles which of the equals are above it.
  """
  size = sum(leaf.size for leaf in leaves)
  stride = max(1, size // _SAMPLE)
  sample = []
  for leaf in leaves:
    b = max(1, min(leaf.shape[1] // _PIECE, stride))
    sample.append(leaf[:: max(1, stride // b), ::b].reshape(-1))
  sample = jnp.sort(bits_of(jnp.concatenate(sample)))
  wanted = _float(larger)
  place = ((1 - wanted / float(size)) * sample.size).astype(jnp.int32)
  around = sample.size // 32 + 2
  start = sample[jnp.clip(place - around, 0, sample.size - 1)] - 1
  stop = sample[jnp.clip(place + around, 0, sample.size - 1)]

  def above(guess):
    return _total([_counts(_folded(bits_of(leaf) > guess), 1) for leaf in leaves])

  # More than `larger` elements lie above low, fewer above high, until one hits the number.
  def unfinished(state):
    low, high = state[:2]
    return high - low > 1

  def step(state):
    low, high, above_low, above_high, i = state
    span = high.astype(jnp.float32) - low.astype(jnp.float32)
    share = (_float(above_low) - wanted) / (_float(above_low) - _float(above_high))
    secant = low + (span * share).astype(jnp.int32)
    middle = low + ((high - low) >> 1)
    guess = jnp.where(i == 0, start, jnp.where(i == 1, stop, jnp.where(i % 2, middle, secant)))
    guess = jnp.clip(guess, low + 1, high - 1)
    count = above(guess)
    hit, more = (count == larger).all(), _less(larger, count)
    return (
      jnp.where(hit | more, guess, low),
      jnp.where(more, high, guess),
      jnp.where(hit | more, count, above_low),
      jnp.where(more, above_high, count),
      i + 1,
    )

  all_of_them = jnp.array(halves(size), jnp.int32)
  none = jnp.zeros(2, jnp.int32)
  whole, empty = (larger == all_of_them).all(), (larger == 0).all()
  low, high, above_low, above_high, _ = jax.lax.while_loop(
    unfinished,
    step,
    (
      jnp.where(empty, _INFINITY, jnp.int32(-1)),
      jnp.where(whole, -1, jnp.int32(_INFINITY)),
      jnp.where(empty, none, all_of_them),
      jnp.where(whole, all_of_them, none),
      jnp.int32(0),
    ),
  )
  exact = low == high
  left = _minus(larger, above_high) if side == TOP else _minus(above_low, larger)
  cuts = []
  for leaf, split in zip(leaves, splits, strict=True):
    line_axis = 1 if split else 0
    equal = _counts(bits_of(leaf) == high, 1 - line_axis)
    here = _normal(equal)
    ends = jnp.cumsum(equal, dtype=jnp.int32)
    quota = jnp.where(left[0] >= 2**15, MOST, left[0] * 65536 + left[1])
    line = jnp.searchsorted(ends, quota).astype(jnp.int32)
    inside = jnp.minimum(line, equal.size - 1)
    row = bits_of(jax.lax.dynamic_index_in_dim(leaf, inside, line_axis, keepdims=False)) == high
    rest = quota - ends[inside] + equal[inside]
    position = jnp.searchsorted(jnp.cumsum(row, dtype=jnp.int32), rest).astype(jnp.int32)
    some = jnp.where(_less(here, left) | (here == left).all(), MOST, jnp.stack([line, position]))
    some = jnp.where((left == 0).all(), -1, some)
    some = jnp.where(exact, -1 if side == TOP else MOST, some)
    cuts.append(jnp.concatenate([high[None], some]).astype(jnp.int32))
    left = _minus(left, jnp.where(_less(left, here), left, here))
  return cuts


def _folded(mask):
  """[A, B] as [A / 16, B] counts: XLA adds arrays in vectors, but on CPU reduces one by one."""
  if mask.shape[0] % 16:
    return mask
  groups = mask.reshape(-1, 16, mask.shape[1])
  parts = [groups[:, i].astype(jnp.int32) for i in range(16)]
  while len(parts) > 1:
    parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
  return jax.lax.optimization_barrier(parts[0])


def _counts(mask, axis):
  return jnp.sum(mask, axis=axis, dtype=jnp.int32)


def _normal(counts):
  return _carry(jnp.sum(counts >> 16, dtype=jnp.int32), jnp.sum(counts & 0xFFFF, dtype=jnp.int32))


def _carry(high, low):
  return jnp.stack([high + (low >> 16), low & 0xFFFF])


def _total(rows):
  total = jnp.zeros(2, jnp.int32)
  for counts in rows:
    total = _carry(*(total + _normal(counts)))
  return total


def _less(a, b):
  return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def _minus(a, b):
  return _carry(a[0] - b[0] - 1, a[1] - b[1] + 65536)


def _float(count):
  return count[0].astype(jnp.float32) * 65536 + count[1].astype(jnp.float32)


# On the host.


class Source(NamedTuple):
  """A leaf that is read by blocks.

  Attributes:
    shape: of the leaf.
    split: of the leaf.
    blocks: `blocks(start, stop)` gives (start row, magnitudes of each of the V vectors) of those
      rows of axis 0, block by block; signs do not matter.
  """

  shape: tuple[int, ...]
  split: int
  blocks: Callable[[int, int], Iterator[tuple[int, Sequence[np.ndarray]]]]


def host_cuts(
  sources: Sequence[Source], larger: Sequence[Sequence[int]], sides: Sequence[str]
) -> list[np.ndarray]:
  """The cuts of V vectors over all leaves; see `device_cuts`.

  Reads all blocks in order, collecting what lies between two magnitudes that a sample put around
  the cut: about a hundredth of a leaf. The sample is the first block's, so a leaf of several blocks
  that differ is read again, with a sample from all of them. Several leaves are sampled first. A row
  is read once more if the last of many equals lies in it.

  Args:
    sources: the leaves, in the order in which equals are taken.
    larger: [V][E], how many elements are above each of the E cuts of a vector.
    sides: [E].

  Returns:
    int32 [V, E, 3] for each leaf.
  """
  size = sum(math.prod(source.shape) for source in sources)
  cuts = [np.zeros((len(larger), len(sides), 3), np.int32) for _ in sources]
  unknown = [(v, e) for v in range(len(larger)) for e in range(len(sides))]
  pieces = [[] for _ in larger]  # of each vector: magnitudes from places all over the leaves
  widen, most = 1.0, max(_COLLECT / size, 0.002)
  if len(sources) > 1 and size > _SMALL:
    for source in sources:
      for _, vectors in source.blocks(0, source.shape[0]):
        _sample(vectors, pieces)
    most = 1.0

  def bracket(v, e):
    if size <= _SMALL:
      return 0, MOST
    return _bracket(pieces[v], larger[v][e] / size, widen, most)

  while unknown:
    for (v, e), seen in _count(sources, unknown, pieces, bracket).items():
      found = _settle(seen, larger[v][e], sides[e])
      if found is None:
        continue
      unknown = [at for at in unknown if at != (v, e)]
      for i, cut in enumerate(_places(seen, v, *found, sources)):
        cuts[i][v, e] = cut
    # The sample is whole now; if that was not enough, look further.
    widen, most = (1.0 if most < 1 else 8 * widen), 1.0
  return cuts


class _Seen(NamedTuple):
  """What one pass saw of a vector around a bracket."""

  low: int
  high: int
  above: list  # for each leaf: elements beyond high
  inside: list  # for each leaf: bits and storage index of the elements strictly between
  at_low: list  # for each leaf: elements equal to low in each group of its storage
  at_high: list
  groups: list  # for each leaf: the rows of each group, without a split


def _host_bits(flat: np.ndarray) -> np.ndarray:
  if flat.dtype == ml_dtypes.bfloat16:
    return (flat.view(np.uint16) & 0x7FFF).astype(np.int32) << 16
  return np.ascontiguousarray(flat, np.float32).view(np.int32) & MOST


def _sample(vectors, pieces):
  """Adds magnitudes from places all over a block."""
  rows, columns = len(vectors[0]), vectors[0].size // len(vectors[0])
  height = min(rows, -(-_PIECE // columns))
  count = min(rows // height, (rows * columns >> 16) + 63)
  for i in range(count):
    start = (rows - height) * i // max(1, count - 1)
    for v, block in enumerate(vectors):
      flat = block[start : start + height].reshape(-1)
      pieces[v].append(_host_bits(flat[:: max(1, flat.size // _PIECE)].copy()))


def _bracket(pieces, fraction, widen, most):
  """Two magnitudes 3.5 standard errors around the one that `fraction` of all elements exceed."""
  order = np.sort(np.concatenate(pieces))
  middle = order[min(len(order) - 1, int((1 - fraction) * len(order)))]
  # Rows differ more from each other than from themselves: their shares say how far the sample errs.
  share = np.array([np.mean(piece > middle) for piece in pieces])
  error = widen * (3.5 * share.std() / len(share) ** 0.5 + 2 / len(order) ** 0.5)
  error = min(error, most)
  low, high = (int((1 - f) * len(order)) for f in (fraction + error, fraction - error))
  return (
    int(order[low]) if fraction + error < 1 else 0,
    int(order[high]) if high < len(order) and fraction > error else MOST,
  )


def _height(b: int) -> int:
  """Matrix rows that are looked at together; a byte counts them."""
  return max(1, min(255, _CHUNK // b))


def _count(sources, unknown, pieces, bracket):
  """One pass over all blocks.

  Equals of the bracket's ends may be many (the deltas of bfloat16 files), so they are only counted,
  by groups of storage: of `_height` rows of a block, or with a split by columns.
  """
  seen, first_pass = {}, not pieces[0]
  for source in sources:
    a, b = matrix(source.shape, source.split)
    found = {at: ([], [], [], []) for at in unknown}
    groups = []
    for start, vectors in source.blocks(0, source.shape[0]):
      if first_pass:
        _sample(vectors, pieces)
      if not seen:
        seen = {at: _Seen(*bracket(*at), [], [], [], [], []) for at in unknown}
      first_row = start * (a // source.shape[0])
      steps = range(0, vectors[0].size // b, _height(b))
      groups += [(first_row + i, first_row + min(i + steps.step, steps.stop)) for i in steps]
      for v, rows in enumerate(vectors):
        edges = [at for at in unknown if at[0] == v]
        block = rows.reshape(-1, b)
        for row in steps if edges else ():
          bits = _host_bits(block[row : row + steps.step])
          for at in edges:
            low, high = seen[at].low, seen[at].high
            above, inside, at_low, at_high = found[at]
            above.append(np.count_nonzero(bits > high))
            # Unsigned, what is not beyond low is far beyond high.
            near = (bits - np.int32(low + 1)).view(np.uint32) < max(0, high - low - 1)
            near = np.flatnonzero(near)
            places = near + (first_row + row) * b
            if source.split:
              places = places % b * a + places // b
            inside.append((bits.reshape(-1)[near], places.astype(np.uint32)))
            for value, counts in ((low, at_low), (high, at_high)):
              equal = bits == value
              if source.split:
                counts.append(np.add.reduce(equal.view(np.uint8), axis=0, dtype=np.uint8))
              else:
                counts.append(np.count_nonzero(equal))
    for at, (above, inside, at_low, at_high) in found.items():
      one = seen[at]
      one.groups.append(groups)
      one.above.append(int(sum(above)))
      one.inside.append(tuple(np.concatenate(parts) for parts in zip(*inside, strict=True)))
      for counts, into in ((at_low, one.at_low), (at_high, one.at_high)):
        into.append(np.sum(counts, axis=0, dtype=np.int64) if source.split else np.array(counts))
  return seen


def _settle(seen, larger, side):
  """(bits, how many of the equals are on this side), None if the cut is outside the bracket."""
  left = larger - sum(seen.above)
  at_high, at_low = (sum(int(c.sum()) for c in counts) for counts in (seen.at_high, seen.at_low))
  if seen.low == seen.high:
    at_low = 0
  between = np.concatenate([bits for bits, _ in seen.inside])
  if left < 0 or left > at_high + between.size + at_low:
    return None
  if left <= at_high:
    value, equal = seen.high, at_high
  elif left <= at_high + between.size:
    left -= at_high
    value = int(np.partition(between, between.size - left)[between.size - left])
    left -= int(np.count_nonzero(between > value))
    equal = int(np.count_nonzero(between == value))
  else:
    left -= at_high + between.size
    value, equal = seen.low, at_low
  return value, left if side == TOP else equal - left


def _places(seen, v, value, quota, sources):
  """The cut of each leaf, where `quota` equals of all leaves are on its side."""
  for i, (bits, places) in enumerate(seen.inside):
    edge = {seen.low: seen.at_low, seen.high: seen.at_high}.get(value)
    equal = int(edge[i].sum()) if edge else int(np.count_nonzero(bits == value))
    if quota == 0 or quota >= equal:
      yield (value, MOST, MOST) if quota else (value, -1, -1)
    elif edge:
      ends = np.cumsum(edge[i])
      group = int(np.searchsorted(ends, quota))
      rest = int(quota - ends[group] + edge[i][group])
      yield value, *_find(sources[i], v, value, group, seen.groups[i], rest)
    else:
      a, b = matrix(sources[i].shape, sources[i].split)
      place = int(np.sort(places[bits == value])[quota - 1])
      yield value, *divmod(place, a if sources[i].split else b)
    quota -= min(quota, equal)


def _find(source, v, value, group, groups, quota):
  """Reads a group of storage again to find the last of its equals that are taken."""
  _, b = matrix(source.shape, source.split)
  first, stop = (0, source.shape[0]) if source.split else groups[group]
  for _, vectors in source.blocks(first, stop):
    block = vectors[v].reshape(-1, b)
    entries = np.ascontiguousarray(block[:, group]) if source.split else block.reshape(-1)
    equal = np.flatnonzero(_host_bits(entries) == value)
    if quota <= equal.size:
      place = int(equal[quota - 1])
      return (group, first + place) if source.split else divmod(first * b + place, b)
    quota -= equal.size
    first += len(block)
  raise AssertionError('the blocks changed between two passes')
