"""Plans: which (context, target) requests are computed together, and in which shapes.

  request   a context and the target whose likelihood is asked for, after that context
  tree      a context as its trunk and all targets asked for after it as its branches
  group     trees whose trunks begin with the same tokens: that prefix is computed once
  row       T slots that hold several trees, which do not see each other
  batch     B rows: one call of one of a few compiled programs

A target's last token predicts nothing, so it takes no slot; the trunk's last hidden state predicts
the first token of every branch. Nothing here depends on parameters or devices.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from optimer_jax.errors import UserError

SMALLEST = 128  # slots of a row, and of a prefix
MIN_PREFIX = 32  # shorter ones are not worth looking at
# In batches, what else than tokens costs time: a group's half empty last batch, a program to
# compile (once, for all candidates), a call to launch.
GROUP_PRICE, SHAPE_PRICE, CALL_PRICE = 1 / 4, 1 / 8, 1 / 32
# Slots of a row at which its attention costs as much as the rest of a small model.
ATTENTION = 2048


class Continuation(NamedTuple):
  """One request: how likely is `target` after `context`?"""

  context: np.ndarray  # int32 [n >= 1], BOS first
  target: np.ndarray  # int32 [m >= 1]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
  """B rows of T slots; every array is int32 [B, T], filled from the left.

  Attributes:
    tokens, positions, segment_ids, branch_ids: of each slot, as `gemma3.transformer.hidden` takes
      them.
    at: the slots whose hidden states predict something, each once.
    targets: the target tokens of all requests in the row.
    columns: which entry of `at` predicts each target token.
    owner: which (distinct) request each target token belongs to, -1: none.
    scored: the most entries of `at` that a row uses.
  """

  tokens: np.ndarray
  positions: np.ndarray
  segment_ids: np.ndarray
  branch_ids: np.ndarray
  at: np.ndarray
  targets: np.ndarray
  columns: np.ndarray
  owner: np.ndarray
  scored: int


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Batches whose trees all go on from one prefix: int32 [P], `length` tokens and padding.

  One group may have no prefix: P and `length` are 0.
  """

  prefix: np.ndarray
  length: int
  batches: tuple[Batch, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """How R requests are computed.

  Attributes:
    groups: the work.
    distinct: int64 [R], which distinct request each is.
    lengths: int64 [R], tokens of each target.
    truncated: how many requests were cut to fit the context.
    tokens: how many tokens are computed for a candidate, padding not counted.
    slots: the same with padding.
    shards: ways in which the rows of every batch divide.
  """

  groups: tuple[Group, ...]
  distinct: np.ndarray
  lengths: np.ndarray
  truncated: int
  tokens: int
  slots: int
  shards: int

  @functools.cached_property
  def branched(self) -> bool:
    """Whether any targets share a context; else rows are documents one after the other."""
    return any(b.branch_ids.max(initial=0) > 1 for g in self.groups for b in g.batches)


class Tree(NamedTuple):
  trunk: np.ndarray  # int32 [n]
  branches: list[tuple[int, np.ndarray]]  # the distinct request and its target

  @property
  def scored(self) -> int:
    """Hidden states that predict something."""
    return 1 + sum(len(target) - 1 for _, target in self.branches)

  def size(self, cut: int) -> int:
    """Slots that it takes of a row, which has as many for target tokens as for computed ones.

    A prefix holds the first `cut` tokens of the trunk.
    """
    return max(len(self.trunk) - cut - 1 + self.scored, self.scored - 1 + len(self.branches))


def plan(
  requests: Sequence[Continuation], context: int, batch_tokens: int, shards: int = 1
) -> Plan:
  """Arranges requests in batches; the same on every host.

  Args:
    requests: R of them. A request longer than `context` keeps its first token (BOS), the end of
      its context, and its target; it is counted in `truncated`.
    context: tokens that a request may have.
    batch_tokens: slots of a batch, about.
    shards: ways in which the rows of every batch must divide (the mesh's data and fsdp axes).

  Raises:
    UserError: a target alone does not fit `context`, or a context or target is empty.
  """
  trees, distinct, truncated = _trees(requests, context)
  trees = sorted(
    itertools.chain.from_iterable(_split(tree, context) for tree in trees),
    key=lambda tree: _key(tree.trunk),
  )
  trunks = [tree.trunk for tree in trees]
  parts = _prefixes(trunks, batch_tokens)
  rest = set(range(len(trees))).difference(*(members for members, _ in parts))
  if rest:
    parts.append((sorted(rest), 0))
  layouts = _layouts([([trees[i] for i in m], cut) for m, cut in parts], batch_tokens, shards)
  groups = tuple(
    Group(_padded(trunks[members[0]][:cut]), cut, batches)
    for (members, cut), batches in zip(parts, layouts, strict=True)
  )
  return Plan(
    groups=groups,
    distinct=distinct,
    lengths=np.array([len(request.target) for request in requests], np.int64),
    truncated=truncated,
    tokens=sum(g.length + sum(int((b.segment_ids > 0).sum()) for b in g.batches) for g in groups),
    slots=sum(len(g.prefix) + sum(b.tokens.size for b in g.batches) for g in groups),
    shards=shards,
  )


# Requests to trees.


def _trees(requests: Sequence[Continuation], context: int) -> tuple[list[Tree], np.ndarray, int]:
  trees: dict[bytes, Tree] = {}
  seen: dict[tuple[bytes, bytes], int] = {}
  distinct, truncated = np.zeros(len(requests), np.int64), 0
  for number, (trunk, target) in enumerate(requests):
    trunk, target = np.asarray(trunk, np.int32), np.asarray(target, np.int32)
    if not len(trunk) or not len(target):
      raise UserError(
        f'request {number} has {len(trunk)} context and {len(target)} target tokens: '
        'it needs at least one of each'
      )
    if len(target) + 1 > context:
      raise UserError(
        f'request {number} has a target of {len(target)} tokens, which does not fit a context of '
        f'{context} with one token before it: shorten it or raise the context'
      )
    if len(trunk) + len(target) > context:
      truncated += 1
      trunk = np.concatenate([trunk[:1], trunk[len(trunk) - (context - len(target) - 1) :]])
    key = _key(trunk), _key(target)
    if key not in seen:
      seen[key] = len(seen)
      trees.setdefault(key[0], Tree(trunk, [])).branches.append((seen[key], target))
    distinct[number] = seen[key]
  return list(trees.values()), distinct, truncated


def _split(tree: Tree, context: int) -> Iterator[Tree]:
  """The tree in pieces with the same trunk: of a size that packs well, but few trunks."""
  trunk = len(tree.trunk)
  least = max(trunk + len(target) - 1 for _, target in tree.branches)
  limit = max(least, min(16 * trunk, max(4 * SMALLEST, 2 * least), context))
  piece = Tree(tree.trunk, [])
  for branch in tree.branches:
    if piece.branches and Tree(tree.trunk, [*piece.branches, branch]).size(0) > limit:
      yield piece
      piece = Tree(tree.trunk, [])
    piece.branches.append(branch)
  yield piece


def _key(tokens: np.ndarray) -> bytes:
  """Bytes that sort as the tokens do."""
  return tokens.astype('>i4').tobytes()


# Trees to groups.


class Node(NamedTuple):
  """Neighbouring trees, and the best that can be made of them."""

  members: list[int]
  left: int  # trees in no group
  saved: float  # tokens that the groups save
  groups: list[tuple[list[int], int]]  # (trees, tokens of the prefix)


def _prefixes(trunks: list[np.ndarray], batch_tokens: int) -> list[tuple[list[int], int]]:
  """The groups of sorted trunks, and the length of each group's prefix, that save most.

  Trees that share their first l tokens are neighbours, so that groups nest: going up from single
  trees, a set of them is one group where that saves more than the groups found inside.
  """
  price = GROUP_PRICE * batch_tokens

  def merged(depth: int, parts: list[Node]) -> Node:
    def combined(parts: list[Node]) -> Node:
      members, groups = ([i for p in parts for i in getattr(p, f)] for f in ('members', 'groups'))
      return Node(members, sum(p.left for p in parts), sum(p.saved for p in parts), groups)

    # A part that saves more by itself stays by itself.
    join = [part for part in parts if len(part.members) * depth >= part.saved]
    stay = combined([part for part in parts if len(part.members) * depth < part.saved])
    apart, joined = combined(parts), combined(join).members
    saved = stay.saved + len(joined) * depth - _bucket(depth) - price
    # Where there are groups already, a few stragglers are not worth calls of their own.
    stragglers = bool(apart.groups and apart.left and not stay.left)
    if depth < MIN_PREFIX or saved + stragglers * price <= apart.saved:
      return apart
    return Node(apart.members, stay.left, saved, [(joined, depth), *stay.groups])

  stack: list[tuple[int, list[Node]]] = []
  for i, trunk in enumerate(trunks):
    last = Node([i], 1, 0.0, [])
    shared = _shared(trunk, trunks[i + 1]) if i + 1 < len(trunks) else -1
    while stack and stack[-1][0] > shared:
      depth, parts = stack.pop()
      last = merged(depth, [*parts, last])
    if stack and stack[-1][0] == shared:
      stack[-1][1].append(last)
    else:
      stack.append((shared, [last]))
  return stack[0][1][0].groups if stack else []


def _shared(a: np.ndarray, b: np.ndarray) -> int:
  """Tokens that both begin with, but the last of either: it predicts, so it must be in a row."""
  most = min(len(a), len(b))
  differ = np.flatnonzero(a[:most] != b[:most])
  return int(min(differ[0] if len(differ) else most, most - 1))


# Trees to rows and batches.


def _bucket(size: int) -> int:
  """The next of 128, 256, 384, 512, 768, 1024, 1536, …: two to a doubling."""
  power = max(SMALLEST, 1 << (size - 1).bit_length())
  return power * 3 // 4 if power > 2 * SMALLEST and size <= power * 3 // 4 else power


def _padded(prefix: np.ndarray) -> np.ndarray:
  return np.pad(prefix, (0, _bucket(len(prefix)) - len(prefix) if len(prefix) else 0))


def _layouts(
  groups: list[tuple[list[Tree], int]], batch_tokens: int, shards: int
) -> list[tuple[Batch, ...]]:
  """The batches of each group: (trees, tokens that its prefix cuts off their trunks).

  Of several least lengths of rows, and several sets of batch sizes, those that cost least over all
  groups, so that groups have the same shapes.
  """
  sizes = [[tree.size(cut) for tree in trees] for trees, cut in groups]
  best, best_price = [], np.inf
  least = SMALLEST
  while least < 2 * _bucket(max(max(each, default=0) for each in [*sizes, [1]])):
    packed = [_pack(each, least) for each in sizes]
    for parts in ((1,), (1, 4), (1, 4, np.inf), (4,), (4, np.inf)):
      price, shapes, layouts = 0.0, set(), []
      for (_, cut), rows in zip(groups, packed, strict=True):
        layouts.append([])
        for length, those in rows.items():
          ladder = [max(int(batch_tokens // length / p) // shards, 1) * shards for p in parts]
          counts = _counts(len(those), ladder)
          layouts[-1].append((length, counts, those))
          shapes.update((_bucket(cut) if cut else 0, length, count) for count in counts)
          price += sum(counts) * length * (1 + length / ATTENTION)
          price += CALL_PRICE * batch_tokens * len(counts)
      price += SHAPE_PRICE * batch_tokens * len(shapes)
      if price < best_price:
        best, best_price = layouts, price
    least = _bucket(least + 1)
  return [_batches(*group, layout) for group, layout in zip(groups, best, strict=True)]


def _batches(
  trees: list[Tree], cut: int, layout: list[tuple[int, list[int], list[list[int]]]]
) -> tuple[Batch, ...]:
  batches = []
  for length, counts, rows in layout:
    # Rows with as much to score stand together: a batch takes as long as its longest row.
    rows = sorted(rows, key=lambda row: -sum(trees[i].scored for i in row))
    for count in counts:
      batches.append(_batch([[trees[i] for i in row] for row in rows[:count]], cut, count, length))
      rows = rows[count:]
  return tuple(batches)


def _pack(sizes: list[int], base: int) -> dict[int, list[list[int]]]:
  """Rows by their length, best fit, largest first; at least `base` slots a row."""
  rows: dict[int, list[list[int]]] = {}
  room: list[tuple[int, int, list[int]]] = []  # ascending; the number keeps lists uncompared
  for number, i in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
    found = bisect.bisect_left(room, (sizes[i], -1, []))
    if found < len(room):
      left, _, row = room.pop(found)
    else:
      row, left = [], max(_bucket(sizes[i]), base)
      rows.setdefault(left, []).append(row)
    row.append(i)
    if left > sizes[i]:
      bisect.insort(room, (left - sizes[i], number, row))
  return rows


def _counts(rows: int, ladder: list[int]) -> list[int]:
  """Rows of each batch: as many as fit of each size in turn, the last of them filled up."""
  counts = []
  for size in ladder:
    fit = (rows - sum(counts)) / size
    counts += [size] * max(math.ceil(fit) if size == ladder[-1] else math.floor(fit), 0)
  return counts


def _batch(rows: list[list[Tree]], cut: int, count: int, length: int) -> Batch:
  arrays = {
    field.name: np.full((count, length), -1 if field.name == 'owner' else 0, np.int32)
    for field in dataclasses.fields(Batch)
    if field.name != 'scored'
  }
  scored = 0
  for row, trees in enumerate(rows):
    slot = column = pick = 0  # the next free ones

    def write(start, row=row, **values):
      for name, value in values.items():
        arrays[name][row, start : start + len(value)] = value

    for segment, tree in enumerate(trees, 1):
      trunk = tree.trunk[cut:]
      inner = np.array([len(target) - 1 for _, target in tree.branches])
      lengths = [len(trunk), *inner]
      before = np.cumsum(inner) - inner  # tokens of the branches on the left
      size = len(trunk) + inner.sum()
      write(
        slot,
        tokens=np.concatenate([trunk, *(target[:-1] for _, target in tree.branches)]),
        positions=cut + np.arange(size) - np.repeat([0, *before], lengths),
        segment_ids=np.full(size, segment),
        branch_ids=np.repeat(np.arange(len(lengths)), lengths),
      )
      # The trunk's last token predicts the first one of every target.
      write(column, at=slot + np.arange(len(trunk) - 1, size))
      write(
        pick,
        columns=np.concatenate(
          [column + np.r_[0, 1 + b + np.arange(n)] for b, n in zip(before, inner, strict=True)]
        ),
        targets=np.concatenate([target for _, target in tree.branches]),
        owner=np.repeat([owner for owner, _ in tree.branches], inner + 1),
      )
      slot, column, pick = slot + size, column + 1 + inner.sum(), pick + len(inner) + inner.sum()
    scored = max(scored, int(column))
  return Batch(**arrays, scored=scored)
