"""Splash attention, interpreted, is the plain path, on one device and on eight.

`main` is what a process with eight devices does.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from optimer_jax import configs
from optimer_jax.errors import UsageError
from optimer_jax.gemma3 import (
  Gemma3Config,
  Model,
  abstract_params,
  from_leaves,
  leaf_shapes,
  logical_axes,
  prefix_cache,
  splash,
  token_nats,
  transformer,
)
from optimer_jax.gemma3.splash import Packed, attend
from optimer_jax.gemma3.transformer import REMAT, hidden
from optimer_jax.parallel.sharding import MeshConfig, batch_sharding, make_mesh, shardings

ROWS, LENGTH, WINDOW, HEADS, HEAD_DIM = 4, 256, 100, 4, 128
DEVICES = 8
# Two key-value heads are split over two devices, repeated for four, and kept whole for eight, over
# which four query heads do not divide either; nor do four rows over eight devices.
MESHES = ((2, 2, 2), (1, 2, 4), (1, 1, 8), (4, 2, 1))
KV_HEADS = (1, 2)
WINDOWS = {'local': WINDOW, 'global': None}


def model_of(kv_heads: int, **options) -> Model:
  """A period of layers: five local, one global."""
  config = Gemma3Config(
    6, 32, 64, HEADS, kv_heads, HEAD_DIM, WINDOW, query_scalar=HEAD_DIM, vocab_size=96
  )
  return Model(config, scan=True, **options)


def params_of(model: Model) -> dict:
  rng = np.random.default_rng(1)
  shapes = leaf_shapes(model.config)
  return from_leaves(
    model, {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
  )


def batch_of() -> dict[str, np.ndarray]:
  """A whole document; two and padding, twice; nothing but padding."""
  rng = np.random.default_rng(0)
  shape = ROWS, LENGTH
  segment_ids = np.ones(shape, np.int32)
  for row, cut, end in ((1, 30, 200), (2, 128, 240), (3, 0, 0)):
    segment_ids[row, cut:] = 2
    segment_ids[row, end:] = 0
  starts = np.pad(np.diff(segment_ids, axis=1) != 0, ((0, 0), (1, 0))) * np.arange(LENGTH)
  return {
    'tokens': rng.integers(0, 96, shape, dtype=np.int32),
    'positions': (np.arange(LENGTH) - np.maximum.accumulate(starts, axis=1)).astype(np.int32),
    'segment_ids': segment_ids,
  }


def arrays_of(kv_heads: int) -> list[np.ndarray]:
  """Queries, keys, values, and a cotangent of what they give."""
  rng = np.random.default_rng(2)
  heads = HEADS, kv_heads, kv_heads, HEADS
  return [rng.normal(size=(ROWS, LENGTH, n, HEAD_DIM)).astype(np.float32) for n in heads]


def dense(q, k, v, view: Packed):
  """`attend` as it is defined."""
  distance = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)
  seen = (distance >= 0) & (distance < (view.window or LENGTH))
  seen = seen & (view.segment_ids[:, :, None] == view.segment_ids[:, None, :])
  k, v = (jnp.repeat(a, HEADS // a.shape[2], axis=2) for a in (k, v))
  logits = jnp.einsum('BTNH,BSNH->BNTS', q, k)
  probs = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf))
  return jnp.einsum('BNTS,BSNH->BTNH', probs, v)


def with_gradients(attention, kv_heads: int, kind: str) -> tuple:
  """The output, and the gradients to q, k and v."""
  q, k, v, cotangent = arrays_of(kv_heads)
  view = Packed(jnp.asarray(batch_of()['segment_ids']), WINDOWS[kind])

  @jax.jit
  def run(q, k, v, cotangent):
    out, back = jax.vjp(lambda *a: attention(*a, view), q, k, v)
    return out, *back(cotangent)

  return run(q * HEAD_DIM**-0.5, k, v, cotangent)


def loss_and_gradient(model: Model, params: dict, batch: dict) -> tuple:
  nats = lambda p: token_nats(model, p, **batch)[0].sum()
  return jax.jit(jax.value_and_grad(nats))(params)


def distance(found, expected) -> float:
  """Largest difference of each array, relative to its largest value: the largest of these."""
  pairs = zip(*(jax.tree.leaves(jax.device_get(x)) for x in (found, expected)), strict=True)
  return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def program(model: Model, length: int = LENGTH, **more) -> str:
  """What is computed of a batch, for a person to read."""
  tokens = jnp.zeros((ROWS, length), jnp.int32)
  return str(jax.make_jaxpr(lambda p: hidden(model, p, tokens, **more))(abstract_params(model)))


# One device.


@pytest.mark.parametrize('kind', WINDOWS)
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_kernel(kv_heads, kind):
  expected = with_gradients(dense, kv_heads, kind)
  assert distance(with_gradients(attend, kv_heads, kind), expected) <= 1e-5


def test_model():
  model, batch = model_of(1), batch_of()
  params = params_of(model)
  splash_model = dataclasses.replace(model, attention='splash')
  real = batch['segment_ids'] > 0
  states = [jax.jit(hidden, static_argnums=0)(m, params, **batch) for m in (splash_model, model)]
  assert np.isfinite(states[0]).all()
  assert distance(states[0][real], states[1][real]) <= 1e-5
  found, expected = (loss_and_gradient(m, params, batch) for m in (splash_model, model))
  assert distance(found, expected) <= 1e-5


def test_where_splash_is_used(monkeypatch):
  model = model_of(2)
  params = params_of(model)
  forced = dataclasses.replace(model, attention='splash')
  assert 'pallas_call' in program(forced)
  mask = f'bool[{ROWS},{LENGTH},{LENGTH}]'
  assert mask not in program(forced) and mask in program(model)
  prefix = jax.eval_shape(
    lambda p: prefix_cache(model, p, jnp.zeros(128, jnp.int32), jnp.int32(3)), params
  )
  prefix = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), prefix)
  for more in ({'length': 200}, {'prefix': prefix}, {'branch_ids': jnp.zeros((ROWS, LENGTH))}):
    assert 'pallas_call' not in program(forced, **more)
  assert 'pallas_call' not in program(model)

  for module in (splash, transformer):
    monkeypatch.setattr(module, 'platform', lambda: 'tpu')
  run = jax.jit(lambda p: loss_and_gradient(model, p, batch_of()))
  lowered = jax.export.export(run, platforms=['tpu'])(abstract_params(model)).mlir_module()
  assert 'splash_mha_fwd' in lowered and 'tpu_custom_call' in lowered
  assert 'pallas_call' not in program(dataclasses.replace(model, attention='plain'))


# What layers keep.


@pytest.mark.parametrize('scan', [False, True])
def test_gradients_do_not_depend_on_what_is_kept(small, scan):
  model = Model(dataclasses.replace(small, num_layers=7 if scan else 2), scan=scan)
  rng = np.random.default_rng(0)
  params = params_of(model)
  batch = {
    'tokens': rng.integers(0, 300, (2, 24)),
    'positions': np.tile(np.arange(24), (2, 1)),
    'segment_ids': np.ones((2, 24), np.int32),
  }
  results = [
    loss_and_gradient(dataclasses.replace(model, remat=remat), params, batch) for remat in REMAT
  ]
  for result in results[1:]:
    assert distance(result, results[0]) <= 1e-6


def test_only_the_least_memory_costs_a_second_forward_kernel():
  kernels = {}
  for remat in REMAT:
    model = model_of(2, attention='splash', remat=remat)
    loss = lambda p, model=model: hidden(model, p, jnp.zeros((ROWS, LENGTH), jnp.int32)).sum()
    whole = jax.make_jaxpr(jax.grad(loss))(abstract_params(model)).jaxpr
    used, _ = dce_jaxpr(whole, [True] * len(whole.outvars))  # as XLA will
    kernels[remat] = str(used).count('pallas_call')
  # Of a local and of a global layer: one forward and two backward.
  assert kernels == {'none': 6, 'layer': 8, 'dots': 6}


@pytest.mark.parametrize(
  ('key', 'value'), [('remat', 'dot'), ('remat', False), ('attention', 'flash')]
)
def test_unknown_names(key, value):
  known = {'remat': 'none, layer, dots', 'attention': 'auto, plain, splash'}[key]
  with pytest.raises(UsageError, match=f'Model.{key} is {value!r}: it must be one of {known}'):
    model_of(1, **{key: value})
  with pytest.raises(UsageError, match=f'Run.{key} is {value!r}: it must be one of {known}'):
    configs.read_run(['runs/quickstart_tiny.gin'], [f'Run.{key}={value!r}'])


# Eight devices.


def main(out: Path) -> None:
  assert jax.device_count() == DEVICES
  results = {}
  for kv_heads in KV_HEADS:
    expected = with_gradients(dense, kv_heads, 'local')
    for mesh in MESHES:
      with jax.set_mesh(make_mesh(MeshConfig(*mesh))):
        results[f'{kv_heads} {mesh}'] = distance(
          with_gradients(attend, kv_heads, 'local'), expected
        )

  model = model_of(2)
  params, batch = params_of(model), batch_of()
  expected = loss_and_gradient(model, params, batch)
  mesh = make_mesh(MeshConfig(1, 2, 4))
  placement = shardings(logical_axes(model), abstract_params(model), mesh)
  with jax.set_mesh(mesh):
    params, batch = jax.device_put(params, placement), jax.device_put(batch, batch_sharding(mesh))
    found = loss_and_gradient(dataclasses.replace(model, attention='splash'), params, batch)
  results['model'] = distance(found, expected)
  out.write_text(json.dumps(results))


@pytest.fixture(scope='module')
def results(tmp_path_factory) -> dict:
  out = tmp_path_factory.mktemp('attention') / 'results.json'
  flags = os.environ.get('XLA_FLAGS', '')
  process = subprocess.run(
    [
      sys.executable,
      '-c',
      'import sys; from tests.test_attention import Path, main; main(Path(sys.argv[1]))',
      str(out),
    ],
    env=os.environ | {'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={DEVICES}'},
    cwd=Path(__file__).parents[1],
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  return json.loads(out.read_text())


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('kv_heads', KV_HEADS)
def test_kernel_on_every_mesh(results, kv_heads, mesh):
  assert results[f'{kv_heads} {mesh}'] <= 1e-5


def test_model_on_a_mesh(results):
  assert results['model'] <= 1e-5
