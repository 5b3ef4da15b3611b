"""The model against transformers (torch), and against itself where it computes another way."""

import dataclasses
import functools
import json
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.parity import TINY, compiled, tiny, tiny_tokens, torch_logits, torch_model
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import (
  SIZES,
  Gemma3Config,
  Model,
  abstract_params,
  decoding,
  forward,
  from_leaves,
  init_leaves,
  leaf_shapes,
  logical_axes,
  to_leaves,
  token_nats,
)
from optimer_jax.gemma3.config import from_hf, to_hf
from optimer_jax.gemma3.layers import project
from optimer_jax.gemma3.loss import BLOCK
from optimer_jax.gemma3.transformer import embed_logits, hidden

CONFIG = next(iter(TINY.values()))  # both kinds of layer, a remainder, two key-value heads
BATCH, LENGTH = 2, 48
# Compiles twice as fast. For what is compared with a tolerance, or as tokens.
UNOPTIMISED = {'xla_backend_optimization_level': 0}
BOTH = pytest.mark.parametrize('scan', [False, True], ids=['unrolled', 'scanned'])


@functools.cache
def random_leaves(config: Gemma3Config = CONFIG) -> dict:
  rng = np.random.default_rng(1)
  # A small embedding: with a large one a tied model says the same token over and over.
  return {
    name: rng.normal(0, 0.06 if 'embed' in name else 0.3, shape).astype(np.float32)
    for name, shape in leaf_shapes(config).items()
  }


def params_of(model: Model) -> dict:
  return from_leaves(model, random_leaves(model.config))


SCANNED = Model(CONFIG, scan=True)


def logits(tokens: np.ndarray, model: Model = SCANNED) -> np.ndarray:
  """Of one document a row, padded on the right to the one shape that is compiled."""
  padded = np.zeros((BATCH, LENGTH), np.int32)
  padded[: tokens.shape[0], : tokens.shape[1]] = tokens
  found = np.asarray(compiled(model, params_of(model), padded))
  return found[: tokens.shape[0], : tokens.shape[1]]


# Logits.


@pytest.mark.parametrize('config', TINY.values(), ids=TINY.keys())
def test_logits_match_transformers(config, tmp_path):
  assert tiny(config, tmp_path) <= 1e-4


def test_the_comparison_sees_every_setting():
  # If the reference did not change with a setting, agreeing with it would prove nothing.
  expected = torch_logits(torch_model(CONFIG), tiny_tokens(CONFIG))
  for change in (
    {'window': 7},
    {'rope_scale': 7.0},
    {'query_scalar': 23.0},
    {'global_theta': 900_000.0},
    {'local_theta': 9_000.0},
  ):
    other = torch_model(dataclasses.replace(CONFIG, **change))
    found = torch_logits(other, tiny_tokens(CONFIG))
    assert np.abs(found - expected).max() > 1e-3, change


@BOTH
def test_bfloat16_activations(scan):
  tokens = tiny_tokens(CONFIG)
  model = Model(CONFIG, dtype='bfloat16', scan=scan)
  assert jax.eval_shape(lambda p: hidden(model, p, tokens), params_of(model)).dtype == 'bfloat16'
  found, expected = logits(tokens, model), logits(tokens)
  assert found.dtype == np.float32
  assert 1e-3 < np.sqrt(np.mean((found - expected) ** 2)) < 0.1 * expected.std()


def test_bfloat16_products_on_cpu_have_exact_gradients():
  # Of small integers every product and sum is exact; bfloat16 rounds only what comes out.
  draw = lambda *shape: np.random.default_rng(0).integers(-4, 5, shape).astype(np.float32)
  x, w, g = draw(2, 8, 6), draw(6, 2, 4), draw(2, 8, 2, 4)

  @jax.jit
  def found(x, w, g):
    y, pull = jax.vjp(lambda x, w: project('BTD,DNH->BTNH', x, w), x, w)
    return y, *pull(g)

  y, of_x, of_w = found(x.astype(jnp.bfloat16), w, g.astype(jnp.bfloat16))
  assert (y.dtype, of_x.dtype, of_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(y, np.einsum('BTD,DNH->BTNH', x, w).astype(jnp.bfloat16))
  np.testing.assert_array_equal(of_x, np.einsum('BTNH,DNH->BTD', g, w).astype(jnp.bfloat16))
  np.testing.assert_array_equal(of_w, np.einsum('BTD,BTNH->DNH', x, g))


# Sizes and layouts.


@pytest.mark.parametrize(
  ('size', 'layers', 'd', 'f', 'n', 'k', 'h', 'window', 'rope_scale', 'scalar', 'count'),
  [
    ('270m', 18, 640, 2048, 4, 1, 256, 512, 1, 256, 268_098_176),
    ('1b', 26, 1152, 6912, 4, 1, 256, 512, 1, 256, 999_885_952),
    ('4b', 34, 2560, 10240, 8, 4, 256, 1024, 8, 256, 3_880_099_328),
    ('12b', 48, 3840, 15360, 16, 8, 256, 1024, 8, 256, 11_765_788_416),
    ('27b', 62, 5376, 21504, 32, 16, 128, 1024, 8, 168, 27_009_002_240),
  ],
)
def test_sizes(size, layers, d, f, n, k, h, window, rope_scale, scalar, count):
  c = SIZES[size]
  assert c == Gemma3Config(
    layers, d, f, n, k, h, window, query_scalar=scalar, rope_scale=rope_scale, vocab_size=262_144
  )
  layer = {
    'attn.q_proj': (d, n, h),
    'attn.k_proj': (d, k, h),
    'attn.v_proj': (d, k, h),
    'attn.o_proj': (n, h, d),
    'attn.q_norm.scale': (h,),
    'attn.k_norm.scale': (h,),
    'mlp.gate_proj': (d, f),
    'mlp.up_proj': (d, f),
    'mlp.down_proj': (f, d),
    'pre_attn_norm.scale': (d,),
    'post_attn_norm.scale': (d,),
    'pre_mlp_norm.scale': (d,),
    'post_mlp_norm.scale': (d,),
  }
  assert leaf_shapes(c) == {
    'embedder.embedding': (262_144, d),
    'final_norm.scale': (d,),
    **{f'layers.{i}.{name}': shape for i in range(layers) for name, shape in layer.items()},
  }
  assert c.num_params == count
  for scan in (False, True):
    model = Model(c, scan=scan)
    params = abstract_params(model)
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(params)) == count
    axes = jax.tree.leaves(logical_axes(model), is_leaf=lambda a: isinstance(a, tuple))
    assert [len(a) for a in axes] == [a.ndim for a in jax.tree.leaves(params)]
  # The scanned layout traces one period; what it computes is compared on tiny models.
  out = jax.eval_shape(lambda p: forward(model, p, jnp.zeros((2, 8), jnp.int32)), params)
  assert (out.shape, out.dtype) == ((2, 8, 262_144), jnp.float32)


def test_scanned_shapes():
  params = abstract_params(Model(SIZES['270m'], scan=True))
  assert params['groups']['local']['attn']['q_proj'].shape == (3, 5, 640, 4, 256)
  assert params['groups']['global']['attn']['q_proj'].shape == (3, 640, 4, 256)
  assert 'tail' not in params
  tail = abstract_params(Model(SIZES['1b'], scan=True))['tail']
  assert tail['attn']['q_proj'].shape == (2, 1152, 4, 256)
  axes = logical_axes(Model(SIZES['270m'], scan=True))['groups']['local']['attn']['q_proj']
  assert axes == ('layers', 'layers', 'embed', 'heads', 'head_dim')


@BOTH
@pytest.mark.parametrize('config', TINY.values(), ids=TINY.keys())
def test_layouts_round_trip(config, scan):
  model = Model(config, scan=scan)
  for kind in (np.asarray, jnp.asarray):
    leaves = {name: kind(leaf) for name, leaf in random_leaves(config).items()}
    params = from_leaves(model, leaves)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(model))
    found = to_leaves(config, params)
    assert list(found) == list(leaf_shapes(config))
    for name, leaf in leaves.items():
      np.testing.assert_array_equal(found[name], leaf, strict=True, err_msg=name)


def test_random_leaves_depend_on_seed_and_name_only():
  one = init_leaves(CONFIG, 3)
  longer = init_leaves(Gemma3Config(9, 32, 64, 4, 2, 16, window=6, vocab_size=300), 3)
  assert all(np.array_equal(longer[name], leaf) for name, leaf in one.items())
  other = init_leaves(CONFIG, 4)
  for name, leaf in one.items():
    if name.endswith('.scale'):
      assert not leaf.any()
    else:
      assert leaf.std() == pytest.approx(0.02, rel=0.2) and not np.array_equal(leaf, other[name])


def test_flops():
  c, length = CONFIG, 40
  keys = sum(
    min(q + 1, length if c.is_global(i) else c.window)
    for i in range(c.num_layers)
    for q in range(length)
  )
  products = sum(math.prod(s) for s in leaf_shapes(c).values() if len(s) > 1)
  attention = 2 * 2 * c.num_heads * c.head_dim * keys / length
  assert c.flops_per_token(length) == pytest.approx(2 * products + attention)


# Packing and the loss.

# Three documents and padding; the longest is several windows long.
LENGTHS = (23, 9, 11)


@functools.cache
def documents() -> list[np.ndarray]:
  rng = np.random.default_rng(2)
  return [rng.integers(0, CONFIG.vocab_size, n, dtype=np.int32) for n in LENGTHS]


def packed(padding: int = 0) -> dict[str, np.ndarray]:
  """One row with the documents, and another of padding only."""
  row = {
    'tokens': np.concatenate(documents()),
    'positions': np.concatenate([np.arange(n, dtype=np.int32) for n in LENGTHS]),
    'segment_ids': np.repeat(np.arange(1, 4, dtype=np.int32), LENGTHS),
  }
  out = {key: np.zeros((BATCH, LENGTH), np.int32) for key in row}
  out['tokens'][:] = padding
  for key, value in row.items():
    out[key][0, : sum(LENGTHS)] = value
  return out


def test_packed_forward_equals_each_documents_own():
  model = Model(CONFIG, scan=True)
  run = jax.jit(functools.partial(forward, model))
  found = np.asarray(run(params_of(model), **packed()))[0]
  start = 0
  for document in documents():
    own = found[start : start + len(document)]
    np.testing.assert_allclose(own, logits(document[None])[0], atol=1e-5)
    start += len(document)
  other = np.asarray(run(params_of(model), **packed(padding=7)))[0]
  np.testing.assert_array_equal(other[:start], found[:start])


def plain_nats(model: Model, params: dict, tokens: jax.Array) -> jax.Array:
  """Cross-entropy of the next tokens by the book: [B, T - 1], all logits at once."""
  log_probs = jax.nn.log_softmax(forward(model, params, tokens)[:, :-1])
  return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize('chunks', [1, 3, 4])
def test_loss_equals_plain_cross_entropy(chunks):
  # 43 is a prime: only one chunk divides it. 48 of the other tests is divided by all.
  tokens = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (2, 43), dtype=np.int32)
  positions = np.broadcast_to(np.arange(43, dtype=np.int32), tokens.shape)
  segments = np.ones_like(tokens)
  segments[1, 30:] = 0
  model = Model(CONFIG, scan=True, loss_chunks=chunks)
  nats, mask = jax.jit(token_nats, static_argnums=0)(
    model, params_of(model), tokens, positions, segments
  )
  log_probs = np.asarray(jax.nn.log_softmax(logits(tokens)))
  expected = -np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
  scored = np.ones((2, 43), bool)
  scored[:, -1] = scored[1, 29:] = False
  np.testing.assert_array_equal(mask, scored)
  expected = np.where(scored, np.pad(expected, ((0, 0), (0, 1))), 0)
  np.testing.assert_allclose(nats, expected, atol=1e-5)


@BOTH
def test_packed_gradients_are_the_sum_of_the_documents(scan):
  model = Model(CONFIG, scan=scan, loss_chunks=5)
  loss = lambda p: token_nats(model, p, **packed())[0].sum()
  gradient = functools.partial(jax.jit, compiler_options=UNOPTIMISED)
  found_loss, found = gradient(jax.value_and_grad(loss))(params_of(model))

  each = np.zeros((3, max(LENGTHS)), np.int32)
  scored = np.zeros((3, max(LENGTHS) - 1), bool)
  for i, document in enumerate(documents()):
    each[i, : len(document)] = document
    scored[i, : len(document) - 1] = True
  unrolled = Model(CONFIG)
  own = lambda p: jnp.where(scored, plain_nats(unrolled, p, each), 0).sum()
  expected_loss, expected = gradient(jax.value_and_grad(own))(params_of(unrolled))

  assert float(found_loss) == pytest.approx(float(expected_loss), rel=1e-5)
  found, expected = (to_leaves(CONFIG, jax.tree.map(np.asarray, g)) for g in (found, expected))
  scale = max(np.abs(g).max() for g in expected.values())
  for name, gradient in expected.items():
    np.testing.assert_allclose(found[name], gradient, atol=1e-5 * scale, err_msg=name)
    assert np.abs(gradient).max() > 1e-4 * scale, name


def array_sizes(jaxpr) -> list[int]:
  """Elements of every array in a jaxpr, those of inner ones included."""
  sizes = [math.prod(v.aval.shape) for v in (*jaxpr.invars, *jaxpr.constvars)]
  for equation in jaxpr.eqns:
    sizes += [math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, 'shape')]
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      sizes += array_sizes(inner)
  return sizes


@BOTH
def test_gradient_never_holds_all_logits(scan):
  config = dataclasses.replace(CONFIG, vocab_size=4096)

  def largest(chunks):
    model = Model(config, scan=scan, loss_chunks=chunks)
    loss = lambda p: token_nats(model, p, **packed())[0].sum()
    return max(array_sizes(jax.make_jaxpr(jax.grad(loss))(abstract_params(model)).jaxpr))

  every = BATCH * LENGTH * config.vocab_size
  if scan:
    assert largest(1) == every  # so it would be seen
    assert largest(2) == every // 2
    assert largest(4) == config.vocab_size * config.embed_dim  # the embedding itself
  else:
    assert largest(1) == BATCH * LENGTH * BLOCK < every


# Decoding.

PROMPTS = (17, 12)
NEW = 16


def prompts() -> tuple[np.ndarray, np.ndarray]:
  tokens = np.random.default_rng(5).integers(5, CONFIG.vocab_size, (2, 17), dtype=np.int32)
  tokens[1, :10] = tokens[0, :10]
  return tokens, np.array(PROMPTS, np.int32)


@functools.cache
def uncached() -> np.ndarray:
  """Greedy continuations by a whole forward pass for each token."""
  tokens, lengths = prompts()
  out = []
  for row, n in zip(tokens, lengths, strict=True):
    text = list(row[:n])
    for _ in range(NEW):
      text.append(int(logits(np.array([text]))[0, -1].argmax()))
    out.append(text[n:])
  return np.array(out)


@functools.partial(jax.jit, static_argnums=0, compiler_options=UNOPTIMISED)
def greedy(model, params, tokens, lengths, shared):
  """Decoded with caches; the first `shared` tokens, alike in all rows, as a prefix (0: none)."""
  slots, prefix = tokens.shape[1] + NEW, None
  if shared is not None:
    prefix = decoding.prefix_cache(model, params, tokens[0, :12], shared)
    tokens = jnp.roll(tokens, -shared, axis=1)
    lengths = lengths - shared
  x, cache = decoding.prefill(model, params, tokens, lengths, slots, prefix)

  def one(carry, i):
    x, cache = carry
    token = embed_logits(params, x).argmax(-1).astype(jnp.int32)
    return decoding.step(model, params, token, lengths + i, cache, slots, prefix), token

  return jax.lax.scan(one, (x, cache), jnp.arange(NEW))[1].T


@BOTH
def test_cached_decoding_equals_uncached(scan):
  model = Model(CONFIG, scan=scan)
  tokens, lengths = prompts()
  assert len(set(uncached().ravel())) > NEW / 2  # not one token over and over
  assert max(lengths) + NEW > 4 * CONFIG.window
  np.testing.assert_array_equal(greedy(model, params_of(model), tokens, lengths, None), uncached())


@BOTH
@pytest.mark.parametrize('shared', [1, 10])
def test_decoding_after_a_shared_prefix(scan, shared):
  model = Model(CONFIG, scan=scan)
  tokens, lengths = prompts()
  found = greedy(model, params_of(model), tokens, lengths, jnp.int32(shared))
  np.testing.assert_array_equal(found, uncached())


def test_decoding_matches_transformers(tmp_path):
  import torch

  from optimer_jax.checkpoints.base import open_source, read_leaves

  theirs = torch_model(CONFIG)
  with torch.no_grad():
    theirs.model.embed_tokens.weight *= 0.2
  theirs.save_pretrained(tmp_path)
  tokens, lengths = prompts()
  expected = []
  for row, n in zip(tokens, lengths, strict=True):
    prompt = torch.tensor(row[None, :n], dtype=torch.long)
    whole = theirs.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      do_sample=False,
      max_new_tokens=NEW,
      eos_token_id=None,
      pad_token_id=0,
    )
    expected.append(whole[0, n:].numpy())
  _, leaves = read_leaves(open_source(str(tmp_path), tmp_path), None)
  model = Model(CONFIG, scan=True)
  found = greedy(model, from_leaves(model, leaves), tokens, lengths, None)
  np.testing.assert_array_equal(found, expected)


# config.json.

# What the hub's files say, less what has no part in the text tower.
HUB = {
  '270m': {
    'model_type': 'gemma3_text',
    'head_dim': 256,
    'hidden_activation': 'gelu_pytorch_tanh',
    'hidden_size': 640,
    'intermediate_size': 2048,
    'layer_types': (['sliding_attention'] * 5 + ['full_attention']) * 3,
    'num_attention_heads': 4,
    'num_hidden_layers': 18,
    'num_key_value_heads': 1,
    'query_pre_attn_scalar': 256,
    'rms_norm_eps': 1e-6,
    'rope_local_base_freq': 10_000.0,
    'rope_scaling': None,
    'rope_theta': 1_000_000.0,
    'sliding_window': 512,
    '_sliding_window_pattern': 6,
    'vocab_size': 262_144,
  },
  '1b': {
    'model_type': 'gemma3_text',
    'attn_logit_softcapping': None,
    'final_logit_softcapping': None,
    'cache_implementation': 'hybrid',
    'head_dim': 256,
    'hidden_activation': 'gelu_pytorch_tanh',
    'hidden_size': 1152,
    'intermediate_size': 6912,
    'num_attention_heads': 4,
    'num_hidden_layers': 26,
    'num_key_value_heads': 1,
    'query_pre_attn_scalar': 256,
    'rms_norm_eps': 1e-6,
    'rope_local_base_freq': 10_000,
    'rope_scaling': None,
    'rope_theta': 1_000_000,
    'sliding_window': 512,
    'sliding_window_pattern': 6,
    'vocab_size': 262_144,
  },
  # The multimodal ones nest the text tower and leave out what equals transformers' defaults.
  '4b': {
    'model_type': 'gemma3',
    'text_config': {
      'model_type': 'gemma3_text',
      'hidden_size': 2560,
      'intermediate_size': 10240,
      'num_hidden_layers': 34,
      'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
      'sliding_window': 1024,
    },
    'vision_config': {'hidden_size': 1152},
  },
  '12b': {
    'model_type': 'gemma3',
    'text_config': {
      'hidden_size': 3840,
      'intermediate_size': 15360,
      'model_type': 'gemma3_text',
      'num_attention_heads': 16,
      'num_hidden_layers': 48,
      'num_key_value_heads': 8,
      'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
      'sliding_window': 1024,
    },
  },
  '27b': {
    'model_type': 'gemma3',
    'text_config': {
      'head_dim': 128,
      'hidden_size': 5376,
      'intermediate_size': 21504,
      'model_type': 'gemma3_text',
      'num_attention_heads': 32,
      'num_hidden_layers': 62,
      'num_key_value_heads': 16,
      'query_pre_attn_scalar': 168,
      'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
      'sliding_window': 1024,
    },
  },
}


def expected_config(size: str) -> dict:
  multimodal = size in ('4b', '12b', '27b')
  return dataclasses.replace(SIZES[size], vocab_size=262_208 if multimodal else 262_144)


@pytest.mark.parametrize('size', HUB)
def test_config_of_the_hub(size):
  assert from_hf(HUB[size], 'config.json') == expected_config(size)


@pytest.mark.parametrize('size', HUB)
def test_config_of_transformers_5(size, tmp_path):
  """What transformers 5 makes of the hub's file and saves reads the same."""
  from transformers import AutoConfig
  from transformers.models.gemma3 import Gemma3Config as TheirConfig
  from transformers.models.gemma3 import Gemma3TextConfig

  given = {key: value for key, value in HUB[size].items() if key != 'model_type'}
  theirs = (TheirConfig if 'text_config' in given else Gemma3TextConfig)(**given)
  theirs.save_pretrained(tmp_path)
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert 'rope_parameters' in saved.get('text_config', saved)
  assert from_hf(saved, 'config.json') == expected_config(size)

  # And transformers reads what we write for a source without a config.json.
  ours = to_hf(SIZES[size], 'bfloat16')
  (tmp_path / 'config.json').write_text(json.dumps(ours))
  again = AutoConfig.from_pretrained(tmp_path)
  text = theirs.get_text_config()
  for key in (
    *('head_dim', 'hidden_activation', 'hidden_size', 'intermediate_size', 'layer_types'),
    *('num_attention_heads', 'num_hidden_layers', 'num_key_value_heads', 'query_pre_attn_scalar'),
    *('rms_norm_eps', 'rope_parameters', 'sliding_window', 'tie_word_embeddings'),
    *('attn_logit_softcapping', 'final_logit_softcapping', 'attention_bias'),
  ):
    assert getattr(again, key) == getattr(text, key), key


@pytest.mark.parametrize('name', [*SIZES, *TINY])
def test_config_round_trip(name):
  config = SIZES.get(name) or TINY[name]
  written = to_hf(config, 'float32')
  assert from_hf(written, 'config.json') == config
  # Either transformers' part alone says it all.
  four = {key: value for key, value in written.items() if key not in ('rope_parameters',)}
  five = {
    key: value
    for key, value in written.items()
    if key not in ('rope_theta', 'rope_local_base_freq', 'rope_scaling')
  }
  assert from_hf(four, 'config.json') == from_hf(five, 'config.json') == config


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    ({'model_type': 'gemma2'}, 'gemma2'),
    ({'final_logit_softcapping': 30.0}, 'final_logit_softcapping is 30.0'),
    ({'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping is 50.0'),
    ({'hidden_activation': 'gelu'}, "hidden_activation is 'gelu'"),
    ({'attention_bias': True}, 'attention_bias is True'),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings is False'),
    ({'use_bidirectional_attention': True}, 'use_bidirectional_attention is True'),
    ({'layer_types': ['full_attention'] * 18}, 'layer_types'),
    ({'layer_types': None, 'sliding_window_pattern': 4}, 'layer_types'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 8.0}}, "'yarn'"),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 8.0}}, "'dynamic'"),
    ({'rope_parameters': {'full_attention': {'rope_type': 'llama3'}}}, "'llama3'"),
    ({'rope_parameters': {'sliding_attention': {'rope_type': 'linear', 'factor': 2}}}, 'sliding'),
    ({'hidden_size': ...}, 'hidden_size is missing'),
    ({'sliding_window': None}, 'sliding_window'),
    ({'num_hidden_layers': '18'}, 'num_hidden_layers'),
  ],
)
def test_settings_that_are_refused(change, named):
  config = {**HUB['270m'], **change}
  config = {key: value for key, value in config.items() if value is not ...}
  with pytest.raises(UserError) as error:
    from_hf(config, 'some/config.json')
  assert 'some/config.json' in str(error.value) and named in str(error.value)
  nested = {'model_type': 'gemma3', 'text_config': config}
  if 'hidden_size' in config and change.get('model_type') is None:
    with pytest.raises(UserError, match=named):
      from_hf(nested, 'some/config.json')
