"""One device and eight compute the same: `main` is what a process with eight devices does."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from optimer_jax.checkpoints import store
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import (
  SIZES,
  Gemma3Config,
  Model,
  abstract_params,
  forward,
  from_leaves,
  leaf_shapes,
  logical_axes,
  to_leaves,
)
from optimer_jax.gemma3.placement import place_leaves
from optimer_jax.merging.weighted_sum import Groups, weighted_sum
from optimer_jax.parallel.sharding import (
  MESH_AXES,
  RULES,
  MeshConfig,
  batch_sharding,
  make_mesh,
  shardings,
  spec,
)
from optimer_jax.training.train import TrainConfig, optimizer, train_step

DEVICES = 8
MESHES = ((8, 1, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2))
KV_HEADS = (1, 2)
# Without clipping the first moment is a tenth of the gradient.
TRAINING = TrainConfig(steps=10, batch=8, learning_rate=4e-5, warmup=0, clip=1e9)


def cases(where: str) -> list[tuple]:
  """(K, scanned, mesh) of the suite, or of tests/long: each is compiled for seconds."""
  # One key-value head differs from two only where there is something to split over `tensor`.
  every = [
    (kv_heads, scan, mesh)
    for kv_heads in KV_HEADS
    for scan in (False, True)
    for mesh in MESHES
    if mesh[2] > 1 or kv_heads > 1
  ]
  # All axes together for each model, and every mesh for the one that compiles fastest.
  suite = [case for case in every if case[2] == (2, 2, 2) or case[:2] == (2, False)]
  return suite if where == 'suite' else [case for case in every if case not in suite]


def model_of(kv_heads: int, scan: bool) -> Model:
  # Scanned, two layers are a tail without a group, and six a group without a tail.
  layers = 6 if scan and kv_heads > 1 else 2
  config = Gemma3Config(layers, 32, 64, 4, kv_heads, 16, window=6, query_scalar=16, vocab_size=96)
  return Model(config, scan=scan)


def batch_of() -> dict[str, np.ndarray]:
  """Eight rows with two documents and padding each, of different lengths."""
  rng = np.random.default_rng(0)
  shape = (TRAINING.batch, 24)
  out = {key: np.zeros(shape, np.int32) for key in ('tokens', 'positions', 'segment_ids')}
  out['tokens'] = rng.integers(0, 96, shape, dtype=np.int32)
  for i in range(len(out['tokens'])):
    cut, end = 5 + i, 24 - i
    out['segment_ids'][i, :end] = 1 + (np.arange(end) >= cut)
    out['positions'][i, :end] = np.where(np.arange(end) < cut, np.arange(end), np.arange(end) - cut)
  return out


def compute(model: Model, mesh, params: dict) -> dict:
  """Logits and one training step, with its loss and gradients, on one mesh."""
  placement = shardings(logical_axes(model), abstract_params(model), mesh)
  rows = batch_sharding(mesh)
  batch = jax.device_put(batch_of(), rows)

  with jax.set_mesh(mesh):
    params = jax.device_put(params, placement)
    logits = jax.jit(forward, static_argnums=0)(model, params, **batch)
    state = {'params': params, 'optimizer': jax.jit(optimizer(TRAINING).init)(params)}
    state, metrics = train_step(model, TRAINING, state, batch)
  moments = optax.tree_utils.tree_get(state['optimizer'], 'mu')
  kept = jax.tree.map(
    lambda a, m, s: a.sharding.is_equivalent_to(s, a.ndim) and m.sharding == a.sharding,
    *(state['params'], moments, placement),
  )
  return {
    'logits': logits,
    'grads': moments,
    **{key: metrics[key] for key in ('loss', 'grad_norm', 'update_norm')},
    'params': state['params'],
    'kept': all(jax.tree.leaves(kept)),
  }


def shards(model: Model, mesh, params: dict) -> dict[str, list]:
  """The shape of each device's part of each parameter."""
  placement = shardings(logical_axes(model), abstract_params(model), mesh)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): [
      list(shard.data.shape) for shard in leaf.addressable_shards
    ]
    for path, leaf in jax.tree.leaves_with_path(jax.device_put(params, placement))
  }


def distance(found, expected) -> float:
  """Largest difference over all arrays of a tree, relative to the tree's largest value."""
  found, expected = (jax.tree.leaves(jax.device_get(x)) for x in (found, expected))
  scale = max(float(np.abs(b).max()) for b in expected)
  return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) / scale


def main(scan: bool, out: Path, where: str) -> None:
  assert jax.device_count() == DEVICES
  results = {}
  for kv_heads in KV_HEADS:
    model = model_of(kv_heads, scan)
    rng = np.random.default_rng(1)
    leaves = {
      name: rng.normal(0, 0.2, shape).astype(np.float32)
      for name, shape in leaf_shapes(model.config).items()
    }
    params = from_leaves(model, leaves)
    one = compute(model, make_mesh(MeshConfig(), jax.devices()[:1]), params)
    for mesh in MESHES:
      devices = make_mesh(MeshConfig(*mesh))
      results[f'shards {kv_heads} {scan} {mesh}'] = shards(model, devices, params)
      if (kv_heads, scan, mesh) not in cases(where):
        continue
      many = compute(model, devices, params)
      row = {k: distance(many[k], one[k]) for k in one if k != 'kept'}
      results[f'{kv_heads} {scan} {mesh}'] = row | {'kept': many['kept']}

  # An artifact written by one device, read by eight.
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=4, data=-1))
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in leaves.items()}
  places = shardings(to_leaves(model.config, logical_axes(Model(model.config))), shapes, mesh)
  with tempfile.TemporaryDirectory() as directory:
    store.save(f'{directory}/a', 'cpt', model.config, leaves)
    stored = store.values(store.open_leaves(f'{directory}/a')[1])
    loaded = to_leaves(model.config, place_leaves(Model(model.config), stored, mesh))
  results['load'] = {
    'equal': all(np.array_equal(loaded[k], leaves[k]) for k in leaves),
    'placed': all(loaded[k].sharding == places[k] for k in leaves),
    'shard': list(loaded['layers.0.attn.q_proj'].addressable_shards[0].data.shape),
  }
  results[f'merge {int(scan)}'] = merge(Model(model.config, scan=scan), leaves, mesh)
  out.write_text(json.dumps(results))


def merge(model: Model, leaves: dict, mesh) -> dict:
  """A weighted sum with weights for groups, of leaves sharded over a mesh."""
  base = from_leaves(model, leaves)
  placement = shardings(logical_axes(model), abstract_params(model), mesh)
  vectors = [jax.tree.map(lambda a, i=i: np.cos(a * i), base) for i in (1, 2)]
  groups = Groups(modules=True)
  weights = np.random.default_rng(0).random((len(groups.names(model.config)), 2), np.float32)
  index = groups.index(model)
  one = weighted_sum(jax.tree.map(jnp.array, base), base, vectors, weights, index)
  many, *placed = (jax.device_put(tree, placement) for tree in (base, base, *vectors))
  lowered = weighted_sum.lower(many, placed[0], placed[1:], weights, index).compile()
  many = weighted_sum(many, placed[0], placed[1:], weights, index)
  kept = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), many, placement)
  return {
    'equal': all(jax.tree.leaves(jax.tree.map(np.array_equal, many, one))),
    'placed': all(jax.tree.leaves(kept)),
    'collectives': re.findall(r'all-[a-z]+|collective-[a-z]+|reduce-scatter', lowered.as_text()),
  }


def found_by_eight(place: Path, where: str) -> dict:
  """What `main` finds for both layouts, each in a process with eight devices."""
  code = f"""
import sys
sys.modules['torch'] = None  # tensorboardX would import it
from tests.test_parallel import Path, main
main(bool(int(sys.argv[1])), Path(sys.argv[2]), {where!r})
"""
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    # Unoptimised code compiles twice as fast.
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={DEVICES} '
    '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
  }
  # Compiling is most of it, and one program's compiler keeps one core busy.
  running = [
    subprocess.Popen(
      [sys.executable, '-c', code, str(scan), str(place / f'{scan}.json')],
      env=environment,
      cwd=Path(__file__).parents[1],
      stderr=subprocess.PIPE,
      text=True,
    )
    for scan in (0, 1)
  ]
  errors = [process.communicate()[1] for process in running]
  for process, error in zip(running, errors, strict=True):
    assert process.returncode == 0, error
    assert 'Involuntary full rematerialization' not in error  # an array made whole everywhere
  found = [json.loads((place / f'{scan}.json').read_text()) for scan in (0, 1)]
  return found[0] | found[1]


def check_same(row: dict) -> None:
  for key in ('logits', 'loss', 'grads', 'grad_norm', 'update_norm', 'params'):
    assert row[key] <= 1e-5, (key, row[key])
  assert row['kept']  # a step leaves every parameter where it was


@pytest.fixture(scope='module')
def results(tmp_path_factory) -> dict:
  return found_by_eight(tmp_path_factory.mktemp('parallel'), 'suite')


@pytest.mark.parametrize(('kv_heads', 'scan', 'mesh'), cases('suite'))
def test_every_mesh_computes_the_same(results, kv_heads, scan, mesh):
  check_same(results[f'{kv_heads} {scan} {mesh}'])


# What one device of each mesh holds: D 32 over fsdp, N 4, K, F 64 and V 96 over tensor.
@pytest.mark.parametrize(
  ('mesh', 'kv_heads', 'expected'),
  [
    ((8, 1, 1), 2, {'q': (32, 4, 16), 'k': (32, 2, 16), 'gate': (32, 64), 'embedding': (96, 32)}),
    ((2, 4, 1), 2, {'q': (8, 4, 16), 'k': (8, 2, 16), 'gate': (8, 64), 'embedding': (96, 8)}),
    # Two key-value heads cannot be split over four devices, nor one over two: they stay whole.
    ((1, 2, 4), 2, {'q': (16, 1, 16), 'k': (16, 2, 16), 'gate': (16, 16), 'embedding': (24, 16)}),
    ((2, 2, 2), 2, {'q': (16, 2, 16), 'k': (16, 1, 16), 'gate': (16, 32), 'embedding': (48, 16)}),
    ((2, 2, 2), 1, {'q': (16, 2, 16), 'k': (16, 1, 16), 'gate': (16, 32), 'embedding': (48, 16)}),
  ],
)
def test_parameters_are_sharded(results, mesh, kv_heads, expected):
  q, k, gate, embedding = (expected[key] for key in ('q', 'k', 'gate', 'embedding'))
  layer = {
    'attn.q_proj': q,
    'attn.k_proj': k,
    'attn.v_proj': k,
    'attn.o_proj': (q[1], q[2], q[0]),
    'attn.q_norm.scale': (16,),
    'mlp.gate_proj': gate,
    'mlp.up_proj': gate,
    'mlp.down_proj': gate[::-1],
    'pre_attn_norm.scale': gate[:1],
  }
  top = {'embedder.embedding': embedding, 'final_norm.scale': gate[:1]}
  for scan in (False, True):
    stacks = {f'layers.{i}': () for i in range(2)}
    if scan:
      stacks = {'groups.local': (1, 5), 'groups.global': (1,)} if kv_heads > 1 else {'tail': (2,)}
    shards = results[f'shards {kv_heads} {scan} {mesh}']
    for name, shape in top.items():
      assert shards[name] == [list(shape)] * DEVICES, name
    for stack, leading in stacks.items():
      for name, shape in layer.items():
        assert shards[f'{stack}.{name}'] == [[*leading, *shape]] * DEVICES, (stack, name)


def test_artifacts_load_onto_a_mesh(results):
  assert results['load'] == {'equal': True, 'placed': True, 'shard': [16, 1, 16]}


@pytest.mark.parametrize('scan', [0, 1])
def test_a_sharded_merge_needs_no_communication(results, scan):
  assert results[f'merge {scan}'] == {'equal': True, 'placed': True, 'collectives': []}


# Meshes and the table.


@pytest.mark.parametrize(
  'sizes', [(8, 2, 1), (3, -1, 1), (-1, -1, 1), (0, 8, 1), (-1, 0, 1), (-2, -4, 1), (16, 1, 1)]
)
def test_meshes_that_do_not_fit(sizes):
  with pytest.raises(UserError, match='8 devices') as error:
    make_mesh(MeshConfig(*sizes), [object()] * 8)
  for axis, size in zip(MESH_AXES, sizes, strict=True):
    assert f'{axis}={size}' in str(error.value)


def test_one_device_makes_every_mesh_of_one():
  for sizes in ((-1, 1, 1), (1, -1, 1), (1, 1, -1), (1, 1, 1)):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:1])
    assert dict(mesh.shape) == {'data': 1, 'fsdp': 1, 'tensor': 1}


def test_specs():
  mesh = AbstractMesh((2, 16, 4), MESH_AXES)
  assert spec(('batch', 'length', 'embed'), (64, 8, 32), mesh) == PartitionSpec(
    ('data', 'fsdp'),
    None,
    None,  # fsdp is taken by the batch
  )
  # Between blocks the length is split over tensor, where it can be.
  for length, expected in ((8, ('tensor',)), (1, None)):
    found = spec(('batch', 'residual_length', 'embed'), (64, length, 32), mesh)
    assert found == PartitionSpec(('data', 'fsdp'), expected, None)
  assert spec(('vocab', 'embed'), (262_208, 2560), mesh) == PartitionSpec(('tensor',), ('fsdp',))
  assert spec(('vocab', 'embed'), (262_145, 2560), mesh) == PartitionSpec(None, ('fsdp',))
  assert spec(('embed', 'kv_heads', 'head_dim'), (640, 1, 256), mesh) == PartitionSpec(
    ('fsdp',), None, None
  )
  assert spec(('batch', 'length'), (3, 8), mesh) == PartitionSpec(None, None)


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('size', ['270m', '1b', '4b', '12b', '27b'])
def test_a_pod_holds_a_share_of_every_size(size, scan):
  mesh = AbstractMesh((1, 16, 4), MESH_AXES)
  model = Model(SIZES[size], scan=scan)
  axes = jax.tree.leaves(logical_axes(model), is_leaf=lambda a: isinstance(a, tuple))
  share = 0
  for names, leaf in zip(axes, jax.tree.leaves(abstract_params(model)), strict=True):
    assert set(names) <= RULES.keys()
    shard = NamedSharding(mesh, spec(names, leaf.shape, mesh)).shard_shape(leaf.shape)
    share += math.prod(shard)
  # All but the key-value heads of the small sizes, and the norms, is split 64 ways.
  assert 1 <= share * 64 / SIZES[size].num_params < 1.1
