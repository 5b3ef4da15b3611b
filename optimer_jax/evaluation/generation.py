"""Answers to prompts, many at a time: a row that is done makes room for the next prompt.

Two programs serve every candidate: one reads a few prompts into free rows, one writes tokens of
every row until an answer may have ended. Between them the host looks for stop strings and fills up
the rows. When no prompts are left, the rows still at work go on in a batch of half the size.

B: rows that write at once. b: prompts that are read at once, an eighth of the most rows. W: tokens
of the longest of them, rounded up. S: slots of a row's cache.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimer_jax.data.tokenizer import Tokenizer
from optimer_jax.errors import UserError
from optimer_jax.evaluation.engine import Engine
from optimer_jax.gemma3 import Model, prefix_cache
from optimer_jax.gemma3.decoding import empty_cache, insert, prefill, step
from optimer_jax.gemma3.transformer import Layers, Prefix
from optimer_jax.parallel.sharding import constrain

CHUNK = 16  # tokens that are written before the host looks at them, at most
LEAST_PREFIX = 32  # tokens that all prompts must begin with, to be computed once


class Prompt(NamedTuple):
  """What to go on from: int32 [n] with BOS first, how many tokens to add, and where to stop."""

  tokens: np.ndarray
  max_new: int
  stops: tuple[str, ...] = ()


class Generation(NamedTuple):
  """An answer: the text before the first stop, every token, and why it ended.

  That is 'stop', 'eos' or 'length'; `truncated` says whether the prompt was cut.
  """

  text: str
  tokens: np.ndarray
  ended: str
  truncated: bool


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  Attributes:
    temperature: 0 takes the most likely token.
    top_k: draw among this many; 0: all.
    top_p: draw among the fewest tokens that have this much of the probability.
    seed: of the draws. A prompt's draws depend on it and on the prompt's place in the list only.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0


class _Rows(NamedTuple):
  """The state of B rows, on the device."""

  token: jax.Array  # int32 [B], to be written next
  at: jax.Array  # int32 [B], counted from the row's first own token
  left: jax.Array  # int32 [B], tokens that may be written; 0: the row is free
  number: jax.Array  # int32 [B], of the prompt
  cache: Layers


def generate_texts(
  engine: Engine,
  params: dict,
  prompts: Sequence[Prompt],
  sampling: Sampling = Sampling(),
  chosen: Sequence[int] | None = None,
) -> list[Generation]:
  """Answers each prompt, or those at the places `chosen`, in the order given.

  A prompt that leaves no room for its answer in the context keeps BOS and its last tokens.

  Raises:
    UserError: an answer alone may be as long as the context.
  """
  most_new = max((prompt.max_new for prompt in prompts), default=0)
  if most_new > engine.context - 2:
    raise UserError(
      f'answers of {most_new} tokens leave no room for a prompt in a context of {engine.context}: '
      'shorten them, or take a longer context'
    )
  room = [engine.context - prompt.max_new for prompt in prompts]
  texts = [
    np.concatenate([p.tokens[:1], p.tokens[1:][-(most - 1) :]]).astype(np.int32)
    for p, most in zip(prompts, room, strict=True)
  ]
  shared = common_prefix(texts)
  shared = shared if len(texts) >= 4 and shared >= LEAST_PREFIX else 0
  own = {i: texts[i][shared:] for i in (range(len(texts)) if chosen is None else chosen)}
  prefix, written = None, {}
  with contextlib.nullcontext() if engine.mesh is None else jax.set_mesh(engine.mesh):
    if shared:
      padded = np.zeros(bucket(shared), np.int32)
      padded[:shared] = texts[0][:shared]
      prefix = _prefix(engine.model, params, padded, np.int32(shared))
    for slots, numbers in _by_slots(engine, prompts, own).items():
      written |= _generate(engine, params, prompts, own, numbers, slots, prefix, sampling)
  return [Generation(*written[i], len(texts[i]) < len(prompts[i].tokens)) for i in own]


def common_prefix(texts: Sequence[np.ndarray]) -> int:
  """How many tokens all of `texts` begin with, leaving each at least one of its own."""
  if not texts:
    return 0
  most = min(map(len, texts)) - 1
  # The first and the last in order differ earliest.
  first, last = min(t.tolist() for t in texts), max(t.tolist() for t in texts)
  return next((i for i in range(most) if first[i] != last[i]), most)


def bucket(size: int) -> int:
  """The next of 32, 48, 64, 96, 128, … : few shapes, at most a third of them padding."""
  top = 32
  while top < size:
    top *= 2
  return top * 3 // 4 if top > 32 and size <= top * 3 // 4 else top


def _by_slots(engine: Engine, prompts: Sequence[Prompt], own: dict) -> dict[int, list[int]]:
  """Prompt numbers by the slots that they need, longest first; too few join those above them."""
  groups = {}
  for number in sorted(own, key=lambda n: (-len(own[n]) - prompts[n].max_new, n)):
    slots = bucket(len(own[number]) + prompts[number].max_new)
    last = next(reversed(groups), None)
    if last is not None and len(groups[last]) < engine.generate_rows:
      slots = last
    groups.setdefault(slots, []).append(number)
  return groups


def _generate(
  engine: Engine,
  params: dict,
  prompts: Sequence[Prompt],
  own: dict[int, np.ndarray],
  queue: list[int],
  slots: int,
  prefix: Prefix | None,
  sampling: Sampling,
) -> dict[int, tuple[str, np.ndarray, str]]:
  model, tokenizer = engine.model, engine.tokenizer
  few = -(-max(engine.generate_rows // 8, 1) // engine.shards) * engine.shards  # as many a device
  static = {'model': model, 'slots': slots}
  # A program is specialised on how to draw, not on the seed.
  static['sampling'] = dataclasses.replace(sampling, seed=0)
  both = {'params': params, 'prefix': prefix, 'seed': np.uint32(sampling.seed & 0xFFFFFFFF)}
  queue = sorted(queue, key=lambda n: (-len(own[n]), n))
  # Where fewer rows are wanted to begin with, fewer are made.
  batch = few
  while batch < min(len(queue), engine.generate_rows):
    batch *= 2
  ends = tokenizer.holding(stop[-1] for number in queue for stop in prompts[number].stops)
  ends[tokenizer.eos] = True
  rows = _empty_rows(model, batch, slots)
  # When the rows get fewer depends on the candidate, what is compiled must not: with no row to keep
  # nothing is written.
  smaller, fewer = batch, rows
  while smaller > few:
    smaller //= 2
    fewer = _take(fewer, np.zeros(smaller, np.int32))
    fewer, _ = _write(**static, **both, rows=fewer, keep=np.zeros(smaller, bool), ends=ends)
  active, tokens, done = {}, {n: [] for n in queue}, {}
  while queue or active:
    free = [row for row in range(batch) if row not in active]
    while queue and (len(free) >= few or not active):
      now, queue = queue[:few], queue[few:]
      into, free = free[: len(now)], free[len(now) :]
      active.update(zip(into, now, strict=True))
      width = bucket(max(len(own[n]) for n in now))
      arrays = _prompt_arrays(few, width, now, into, own, prompts, batch)
      rows = _begin(**static, **both, rows=rows, **arrays)
    while not queue and len(active) <= batch // 2 >= few:
      batch //= 2
      into = (list(active) + free)[:batch]
      rows = _take(rows, np.array(into, np.int32))
      active = {into.index(row): number for row, number in active.items()}
      free = [row for row in range(batch) if row not in active]
    keep = np.isin(np.arange(batch), list(active))
    rows, out = _write(**static, **both, rows=rows, keep=keep, ends=ends)
    for row, now in zip(range(batch), np.asarray(out), strict=True):
      if row in active:
        number = active[row]
        tokens[number].extend(now[now >= 0].tolist())
        answer = _ended(tokenizer, prompts[number], tokens[number])
        if answer:
          done[number] = answer
          del active[row]
  return done


def _prompt_arrays(few, width, numbers, into, own, prompts, batch) -> dict[str, np.ndarray]:
  """The arguments of `_begin`, filled up with rows that are out of range."""
  tokens = np.zeros((few, width), np.int32)
  lengths, left, number = np.ones(few, np.int32), np.zeros(few, np.int32), np.zeros(few, np.int32)
  place = np.full(few, batch, np.int32)
  for i, (n, row) in enumerate(zip(numbers, into, strict=True)):
    tokens[i, : len(own[n])] = own[n]
    lengths[i], left[i], number[i], place[i] = len(own[n]), prompts[n].max_new, n, row
  return {'tokens': tokens, 'lengths': lengths, 'left': left, 'number': number, 'into': place}


def _ended(
  tokenizer: Tokenizer, prompt: Prompt, tokens: list[int]
) -> tuple[str, np.ndarray, str] | None:
  """The answer, if it has come to its end."""
  text = tokenizer.decode(np.array(tokens, np.int32)) if prompt.stops else ''
  places = [place for stop in prompt.stops if (place := text.find(stop)) >= 0]
  if places:
    return text[: min(places)], np.array(tokens, np.int32), 'stop'
  eos = tokens[-1:] == [tokenizer.eos]
  if not eos and len(tokens) < prompt.max_new:
    return None
  text = text or tokenizer.decode(np.array(tokens, np.int32))
  return text, np.array(tokens, np.int32), 'eos' if eos else 'length'


_prefix = jax.jit(prefix_cache, static_argnames='model')


@functools.partial(jax.jit, static_argnames=('model', 'batch', 'slots'))
def _empty_rows(model: Model, batch: int, slots: int) -> _Rows:
  zeros = jnp.zeros(batch, jnp.int32)
  return _split(_Rows(zeros, zeros, zeros, zeros, empty_cache(model, batch, slots)))


def _split(rows: _Rows) -> _Rows:
  """The caches as rows and heads are split over devices; what the host looks at, everywhere."""
  cache = jax.tree.map(
    lambda a: constrain(a, (None,) * (a.ndim - 4) + ('batch', None, 'kv_heads', 'head_dim')),
    rows.cache,
  )
  return _Rows(*(constrain(a, (None,)) for a in rows[:-1]), cache)


@functools.partial(jax.jit, static_argnames=('model', 'slots', 'sampling'), donate_argnames='rows')
def _begin(
  model, slots, sampling, params, prefix, seed, rows, tokens, lengths, left, number, into
) -> _Rows:
  """Reads prompts [b, W] into the rows `into` [b]; those out of range are padding."""
  x, cache = prefill(model, params, tokens, lengths, slots, prefix)
  token = _pick(params, x, sampling, seed, number, left)

  def put(a, b):
    return a.at[into].set(b, mode='drop')

  return _split(
    _Rows(
      put(rows.token, token),
      put(rows.at, lengths),
      put(rows.left, left),
      put(rows.number, number),
      insert(rows.cache, into, cache),
    )
  )


@functools.partial(jax.jit, static_argnames=('model', 'slots', 'sampling'), donate_argnames='rows')
def _write(
  model, slots, sampling, params, prefix, seed, rows, keep, ends
) -> tuple[_Rows, jax.Array]:
  """Writes up to CHUNK tokens of each row that `keep` [B] holds: int32 [B, CHUNK], -1: nothing.

  It stops early where the host has to look: after a token of `ends` [V], and at the end of a row.
  """
  rows = rows._replace(left=jnp.where(keep, rows.left, 0))

  def going(state):
    i, look, *_ = state
    return (i < CHUNK) & ~look

  def one(state):
    i, _, rows, out = state
    active = rows.left > 0
    out = out.at[:, i].set(jnp.where(active, rows.token, -1))
    left = jnp.where(active, rows.left - 1, 0)
    look = jnp.any(active & (ends[rows.token] | (left == 0)))
    x, cache = step(model, params, rows.token, rows.at, rows.cache, slots, prefix)
    token = _pick(params, x, sampling, seed, rows.number, left)
    # A row that is done stays where it is, and writes what nobody sees.
    at = jnp.where(left > 0, rows.at + 1, rows.at)
    return i + 1, look, rows._replace(token=token, at=at, left=left, cache=cache), out

  out = jnp.full((keep.shape[0], CHUNK), -1, jnp.int32)
  idle = ~jnp.any(rows.left > 0)
  *_, rows, out = jax.lax.while_loop(going, one, (0, idle, rows, out))
  return _split(rows), constrain(out, (None, None))


@jax.jit
def _take(rows: _Rows, numbers: jax.Array) -> _Rows:
  few = [a[numbers] for a in rows[:-1]]
  cache = jax.tree.map(lambda a: jnp.take(a, numbers, axis=a.ndim - 4), rows.cache)
  return _split(_Rows(*few, cache))


def _pick(params, x, sampling: Sampling, seed, number, left) -> jax.Array:
  """The next token int32 [B] after hidden states x [B, D]; `number` and `left` [B] seed a draw."""
  table = params['embedder']['embedding'].astype(x.dtype)
  # For a few rows a CPU is faster with the table on the left, for more with it on the right.
  if len(x) < 16:
    logits = jnp.einsum('VD,BD->VB', table, x, preferred_element_type=jnp.float32).T
  else:
    logits = jnp.einsum('BD,VD->BV', x, table, preferred_element_type=jnp.float32)
  if not sampling.temperature:
    return _argmax(logits)
  logits = logits / sampling.temperature
  if sampling.top_k or sampling.top_p < 1:
    k = sampling.top_k or logits.shape[1]
    ordered = jax.lax.top_k(logits, min(k, logits.shape[1]))[0]
    probability = jax.nn.softmax(ordered)
    # Kept is what the more likely ones leave short of top_p.
    kept = jnp.cumsum(probability, axis=1) - probability < sampling.top_p
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=1, keepdims=True)
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  key = jax.random.key(seed)
  keys = jax.vmap(lambda n, i: jax.random.fold_in(jax.random.fold_in(key, n), i))(number, left)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _argmax(logits: jax.Array) -> jax.Array:
  """int32 [B], the first largest of each row [B, V]: of blocks and then within one.

  XLA's CPU code for a maximum is many times faster than that for where it is.
  """
  blocks = logits.reshape(len(logits), math.gcd(logits.shape[1], 512), -1)
  block = blocks.max(2).argmax(1)
  row = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  return (block * blocks.shape[2] + row.argmax(1)).astype(jnp.int32)
