"""Gradients with respect to merge weights, against differences of a float64 model."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optimer_jax.checkpoints.quantized import Quantized, channel_axes, channel_scale, quantize_rows
from optimer_jax.data.sources import Jsonl
from optimer_jax.data.tokenizer import Tokenizer, write_tiny_tokenizer
from optimer_jax.evaluation import scoring
from optimer_jax.evaluation.engine import Engine
from optimer_jax.evaluation.scoring import (
  Continuation,
  likelihood_gradient,
  log_likelihoods,
  plan,
)
from optimer_jax.evaluation.tasks import BitsPerByte
from optimer_jax.gemma3 import (
  Gemma3Config,
  Model,
  abstract_params,
  forward,
  from_leaves,
  layers,
  leaf_shapes,
  transformer,
)
from optimer_jax.merging import gradients
from optimer_jax.merging.weighted_sum import Groups, weighted_sum

BOS, VOCAB, LONGEST = 2, 300, 128
# Seven layers: all kinds in their stacks.
CONFIG = Gemma3Config(7, 32, 64, 4, 2, 16, window=8, query_scalar=16.0, vocab_size=VOCAB)
GROUPS = (Groups(), Groups(blocks=3), Groups(modules=True))
WEIGHTS = np.array([0.3, -0.2, 0.5], np.float32)
# A gradient is a sum of as many products as there are parameters, each rounded as often as there
# are layers, more or less, at random.
TOLERANCE = np.finfo(np.float32).eps * CONFIG.num_params**0.5
BOTH = pytest.mark.parametrize('scan', [False, True], ids=['unrolled', 'scanned'])


def quantized(leaf: str, rows: np.ndarray) -> np.ndarray | Quantized:
  if channel_axes(leaf) is None:
    return rows
  scale = channel_scale(leaf, [rows])
  return Quantized(quantize_rows(leaf, rows, scale), scale)


@functools.cache
def leaves_of(config: Gemma3Config) -> tuple[dict, ...]:
  """A base, and one vector of each form in which vectors are stored."""
  rng = np.random.default_rng(0)
  base, *vectors = (
    {n: rng.normal(0, scale, s).astype(np.float32) for n, s in leaf_shapes(config).items()}
    for scale in (0.2, 0.05, 0.05, 0.05)
  )
  return (
    base,
    vectors[0],
    {name: leaf.astype(jnp.bfloat16) for name, leaf in vectors[1].items()},
    {name: quantized(name, leaf) for name, leaf in vectors[2].items()},
  )


def merged(model: Model, weights: np.ndarray = WEIGHTS) -> tuple[dict, tuple[dict, ...]]:
  """A candidate, and the vectors, in the model's layout."""
  base, *vectors = (
    jax.tree.map(jnp.asarray, from_leaves(model, each)) for each in leaves_of(model.config)
  )
  params = weighted_sum(jax.tree.map(jnp.copy, base), base, vectors, jnp.asarray(weights))
  return params, tuple(vectors)


def requests_of(seed: int = 0) -> list[Continuation]:
  """Windows, texts after contexts of their own, two after one context, one of all twice."""
  rng = np.random.default_rng(seed)

  def tokens(count):
    return rng.integers(3, VOCAB, count).astype(np.int32)

  bos = np.array([BOS], np.int32)
  windows = [Continuation(bos, tokens(n)) for n in (127, 120, 100, 60, 128, 20)]
  others = [Continuation(np.r_[bos, tokens(5 + i)], tokens(20 + i)) for i in range(4)]
  return [*windows, *others, Continuation(others[0].context, tokens(9)), windows[3]]


REQUESTS = requests_of()
COUNTS = np.random.default_rng(5).uniform(0.5, 1.0, len(REQUESTS)) / 900


@pytest.fixture(scope='module')
def exact() -> dict:
  """The weighted sum of nats, and its gradient for each of `GROUPS`, in float64.

  By central differences: they err by the third derivative times 2e-11, and by 1e-11 of rounding.
  """
  (base, *vectors), step = leaves_of(CONFIG), 1e-5
  names = list(base)
  rows = np.zeros((len(REQUESTS), LONGEST + 1), np.int32)
  wanted = np.zeros(rows.shape)  # of each token, as the target of the one before
  for i, (context, target) in enumerate(REQUESTS):
    size = len(context) + len(target)
    rows[i, :size] = np.r_[context, target]
    wanted[i, len(context) : size] = COUNTS[i]
  wide = types.SimpleNamespace(**{**vars(jnp), 'float32': jnp.float64})
  model = Model(CONFIG, dtype='float64', scan=True)
  with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
    for module in (layers, transformer):
      patch.setattr(module, 'jnp', wide)
    vectors = [
      {
        name: np.asarray(leaf.dequantize() if isinstance(leaf, Quantized) else leaf, np.float64)
        for name, leaf in vector.items()
      }
      for vector in vectors
    ]

    @jax.jit
    def loss(weights):  # of each leaf [n, K]
      sums = {
        name: base[name].astype(np.float64)
        + sum(weights[i, k] * vector[name] for k, vector in enumerate(vectors))
        for i, name in enumerate(names)
      }
      scores = jax.nn.log_softmax(forward(model, from_leaves(model, sums), rows))
      picked = jnp.take_along_axis(scores[:, :-1], rows[:, 1:, None], -1)[..., 0]
      return -(picked * wanted[:, 1:]).sum()

    here = np.tile(WEIGHTS.astype(np.float64), (len(names), 1))
    value = loss(here)
    assert value.dtype == np.float64
    found = {'value': float(value)}
    for groups in GROUPS:
      numbers = groups.names(CONFIG)
      row = np.array([numbers.index(groups.of(name, CONFIG.num_layers)) for name in names])
      found[groups] = np.zeros((len(numbers), len(vectors)))
      for g, k in np.ndindex(found[groups].shape):
        way = step * np.outer(row == g, np.eye(len(vectors))[k])
        found[groups][g, k] = (loss(here + way) - loss(here - way)) / (2 * step)
  return found


@BOTH
@pytest.mark.parametrize('groups', GROUPS, ids=['all', 'blocks', 'modules'])
def test_equals_differences_in_float64(exact, scan, groups):
  model = Model(CONFIG, scan=scan)
  params, vectors = merged(model)
  planned = plan(REQUESTS, 256, 512, shards=4)
  batches = [batch for group in planned.groups for batch in group.batches]
  assert len(batches) > 1
  assert any((batch.segment_ids.max(1) == 0).any() for batch in batches)  # a row of padding
  assert any(batch.segment_ids.max() > 1 for batch in batches)
  assert any(batch.branch_ids.max() > 1 for batch in batches)
  nats, found = likelihood_gradient(model, params, vectors, planned, COUNTS, groups)
  expected = exact[groups]
  assert (found.shape, found.dtype) == (expected.shape, np.float64)
  np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
  np.testing.assert_allclose(nats @ COUNTS, exact['value'], rtol=1e-6)
  np.testing.assert_allclose(nats, log_likelihoods(model, params, planned).nats, rtol=1e-6)


def test_blocks_of_the_vocabulary(monkeypatch):
  """The last of three blocks begins within the second; the last column is of no piece."""
  monkeypatch.setattr(gradients, 'BLOCK', 128 * 32)
  rng = np.random.default_rng(0)
  table, *tables, y = (
    jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((VOCAB, 32),) * 3 + ((2, 9, 32),)
  )
  targets = jnp.asarray(rng.integers(0, VOCAB, (2, 9)))
  counts = jnp.asarray(rng.random((2, 9)) * (np.arange(9) < 7), jnp.float32)

  def loss(w, y):
    logits = y @ (table + w[0] * tables[0] + w[1] * tables[1]).T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -(counts * picked).sum()

  value, (slopes, dy) = jax.value_and_grad(loss, (0, 1))(jnp.zeros(2), y)
  nats, *found = gradients._cross_entropy(2, table, tables, y, targets, counts, 4)
  np.testing.assert_allclose((counts * nats).sum(), value, rtol=1e-6)
  for one, other in zip(found, (dy, slopes), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_programs_are_shared():
  model = Model(CONFIG)
  seen = []
  for weights, seed, groups in ((WEIGHTS, 0, GROUPS[0]), (-WEIGHTS, 7, GROUPS[2])):
    params, vectors = merged(model, weights)
    planned = plan(requests_of(seed), 256, 512, shards=4)
    found = likelihood_gradient(model, params, vectors, planned, COUNTS, groups)[1]
    seen.append((scoring._slopes._cache_size(), found.sum(0)))
  assert seen[0][0] == seen[1][0]
  assert np.abs(seen[0][1] - seen[1][1]).min() > 0


def test_what_is_not_finite_is_seen():
  model = Model(CONFIG)
  params, vectors = merged(model)
  params['layers'][3]['mlp']['up_proj'] *= np.nan
  planned = plan(REQUESTS, 256, 512, shards=4)
  nats, found = likelihood_gradient(model, params, vectors, planned, COUNTS)
  assert np.isnan(nats).all()
  assert np.isnan(found).all()


def test_a_shared_prefix_is_refused():
  shots = np.r_[BOS, np.arange(3, 90)].astype(np.int32)
  requests = [Continuation(np.r_[shots, i].astype(np.int32), shots[1:3]) for i in range(100, 140)]
  model = Model(CONFIG)
  params, vectors = merged(model)
  planned = plan(requests, 256, 512)
  with pytest.raises(ValueError, match='share a prefix'):
    likelihood_gradient(model, params, vectors, planned, np.ones(len(requests)))


# Memory.


def temporary(model: Model, vectors: int, rows: int = 1, length: int = 32, chunk: int = 8) -> int:
  """Bytes that a batch needs beside its arguments."""
  params = abstract_params(model)
  slots = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  names = ('tokens', 'positions', 'segment_ids', 'branch_ids', 'at', 'targets')
  lowered = scoring._slopes.lower(
    model,
    chunk,
    params,
    (params,) * vectors,
    jax.ShapeDtypeStruct((), jnp.int32),
    **dict.fromkeys(names, slots),
    factors=jax.ShapeDtypeStruct(slots.shape, jnp.float32),
  )
  fast = {'xla_backend_optimization_level': 0}  # to compile: memory is planned before
  return lowered.compile(compiler_options=fast).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(('scan', 'few', 'many'), [(False, 2, 6), (True, 12, 18)])
def test_no_more_than_a_layer_s_gradient_is_held(scan, few, many):
  """More layers take no more memory than what their tokens are in them."""
  sizes = {}
  for count in (few, many):
    config = Gemma3Config(count, 256, 1024, 4, 2, 64, window=64, vocab_size=512)
    sizes[count] = temporary(Model(config, scan=scan), 2)
  layer = 4 * sum(
    int(np.prod(shape)) for name, shape in leaf_shapes(config).items() if 'layers.0.' in name
  )
  assert sizes[many] - sizes[few] < (many - few) * layer / 2


def test_the_embedding_s_gradient_is_never_whole(monkeypatch):
  monkeypatch.setattr(gradients, 'BLOCK', 2**16)
  config = Gemma3Config(1, 256, 256, 4, 2, 64, window=64, vocab_size=32_768)
  assert temporary(Model(config), 3) < 4 * config.vocab_size * config.embed_dim / 2


# Of a task.

TEXT = 'the cat sat on the mat, and the answer is that of the dog. '


def test_bits_per_byte(tmp_path, small):
  write_tiny_tokenizer(tmp_path / 'tokenizer', [TEXT * 3], VOCAB)
  for split, about in (('dev', 'of dev '), ('test', 'of test ')):
    lines = [{'text': about + TEXT * n + 'x' * n} for n in range(1, 6)]
    (tmp_path / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  task = BitsPerByte(
    'x', *(Jsonl(str(tmp_path / f'{s}.jsonl')) for s in ('dev', 'test')), length=64, rows=8
  )
  model = Model(small)
  tokenizer = Tokenizer.load(tmp_path / 'tokenizer')
  engine = Engine(model, tokenizer, context=64, batch_tokens=256, cache=tmp_path)
  prepared = task.prepare(engine, 'dev')

  def value(weights):
    return prepared.score(merged(model, np.asarray(weights, np.float32))[0]).value

  params, vectors = merged(model)
  score, found = prepared.gradient(params, vectors)
  plain = prepared.score(params)
  np.testing.assert_allclose(score.values, plain.values, rtol=1e-6)
  np.testing.assert_array_equal(score.sizes, plain.sizes)
  assert (score.unit, score.tokens, score.truncated) == (plain.unit, plain.tokens, plain.truncated)
  _, parts = prepared.gradient(params, vectors, Groups(blocks=2))
  np.testing.assert_allclose(parts.sum(0), found[0], rtol=1e-12, atol=1e-12)
  # Differences are of float32 scores here: an error of eps is one of eps / step.
  step, expected = 1 / 64, []
  for way in step * np.eye(3):
    near, far = (value(WEIGHTS + n * way) - value(WEIGHTS - n * way) for n in (1, 2))
    expected.append((8 * near - far) / (12 * step))
  np.testing.assert_allclose(found, [expected], rtol=0, atol=plain.value * 1e-7 / step)
