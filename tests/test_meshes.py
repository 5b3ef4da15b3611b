"""Meshes of several slices or processes, and what they do to each parameter.

`main` is what a process of the first test does.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from optimer_jax import cli
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import SIZES, Model, abstract_params, logical_axes
from optimer_jax.parallel import startup
from optimer_jax.parallel.sharding import (
  MESH_AXES,
  RULES,
  MeshConfig,
  axis_sizes,
  batch_sharding,
  explain,
  make_mesh,
  shardings,
  spec,
)
from optimer_jax.planning import placement, topologies
from optimer_jax.planning.topologies import topology
from optimer_jax.progress import say
from tests import together

CONFIGS = (
  MeshConfig(),
  MeshConfig(1, -1, 2),
  MeshConfig(2, 2, 2, slices=2),
  MeshConfig(-1, 2, 1, slices=2),
)
AXES, SHAPE = ('vocab', 'embed'), (16, 8)


def main(out: Path) -> None:
  startup.start(out / 'cache')
  print(f'{jax.process_index()} prints')
  say(f'{jax.process_index()} speaks')
  devices, found = jax.devices(), {}
  table = np.arange(128.0, dtype=np.float32).reshape(SHAPE)
  for config in CONFIGS:
    mesh = make_mesh(config)
    where = NamedSharding(mesh, spec(AXES, SHAPE, mesh))
    held = where.devices_indices_map(SHAPE)
    rows = jax.make_array_from_callback((16,), batch_sharding(mesh), lambda at: table[:, 0][at])
    found[str(config)] = {
      'mesh': [[[devices.index(d) for d in line] for line in plane] for plane in mesh.devices],
      'held': [[(at.start, at.stop) for at in held[d]] for d in devices],
      'sum': float(jax.jit(lambda x: x.sum())(rows)),
    }
  name = f'{jax.process_count()}-{jax.process_index()}.json'
  (out / name).write_text(json.dumps(found))


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  """What one process with eight devices, and two with four each, left."""
  out = tmp_path_factory.mktemp('meshes')
  code = 'from tests.test_meshes import Path, main; import sys; main(Path(sys.argv[1]))'
  running = {}
  for processes in (1, 2):
    logs = out / str(processes)
    logs.mkdir()
    running[logs] = together.start(['-c', code, out], logs, processes, 8 // processes)
  for logs, started in running.items():
    assert not any(together.finish(started, logs))
  return out


def test_two_processes_make_the_mesh_of_one(folder):
  one, *two = (
    json.loads((folder / name).read_text()) for name in ('1-0.json', '2-0.json', '2-1.json')
  )
  assert one == two[0] == two[1]
  assert {row['sum'] for row in one.values()} == {float(8 * np.arange(16).sum())}
  for config in CONFIGS:
    sizes = axis_sizes(config, 8)
    # The order of the devices is that of the processes, and slices are equal parts of it.
    assert one[str(config)]['mesh'] == np.arange(8).reshape(sizes).tolist()


def test_one_of_two_processes_prints(folder):
  said = [(folder / '2' / f'{i}.log').read_text() for i in (0, 1)]
  assert '0 prints' in said[0] and '0 speaks' in said[0]
  assert 'prints' not in said[1] and 'speaks' not in said[1]


# What cannot be.


@pytest.mark.parametrize(
  ('config', 'sentence'),
  [
    (MeshConfig(1, 2, 4, slices=2), 'data=1 does not divide into slices=2'),
    (MeshConfig(-1, 4, 1, slices=4), 'data=2 does not divide into slices=4'),
    (MeshConfig(slices=0), 'data=8 does not divide into slices=0'),
    (MeshConfig(2, 2, 1, slices=2), 'data=2, fsdp=2, tensor=1 does not fit 8 devices'),
  ],
)
def test_slices_that_do_not_fit(config, sentence, refused):
  refused(lambda: axis_sizes(config, 8), sentence)


def test_an_unknown_axis_is_named(refused):
  mesh = AbstractMesh((2, 2, 2), MESH_AXES)
  known = 'known are batch, length, residual_length, embed'
  refused(lambda: spec(('embed', 'experts'), (8, 8), mesh), "'experts' is no logical axis", known)
  axes, shapes = {'a': ('rows',)}, {'a': jax.ShapeDtypeStruct((8,), 'float32')}
  refused(lambda: shardings(axes, shapes, mesh), "'rows' is no logical axis", known)


def test_the_table_names_mesh_axes_only():
  for wanted in RULES.values():
    assert set(wanted) <= set(MESH_AXES) and len(set(wanted)) == len(wanted)


# Why an axis is whole.


@pytest.mark.parametrize(
  ('axes', 'shape', 'expected', 'whole'),
  [
    (('embed', 'heads', 'head_dim'), (640, 4, 256), ('fsdp', 'tensor', None), ()),
    (
      *(('embed', 'kv_heads', 'head_dim'), (640, 1, 256), ('fsdp', None, None)),
      ('kv_heads 1 is not divisible by tensor 4',),
    ),
    (
      *(('batch', 'length', 'embed'), (64, 8, 32), (('data', 'fsdp'), None, None)),
      ('embed: fsdp splits batch already',),
    ),
    (('mlp', 'vocab'), (8, 8), ('tensor', None), ('vocab: tensor splits mlp already',)),
    # What does not divide takes nothing from the next.
    (
      *(('batch', 'embed'), (31, 32), (None, 'fsdp')),
      ('batch 31 is not divisible by data 2 x fsdp 16',),
    ),
    ((None, 'layers'), (7, 5), (None, None), ()),
  ],
)
def test_why_an_axis_is_whole(axes, shape, expected, whole):
  mesh = AbstractMesh((2, 16, 4), MESH_AXES)
  found, why = explain(axes, shape, mesh)
  assert found == PartitionSpec(*expected) and why == whole
  # A mesh of one device asks nothing of anybody.
  alone = explain(axes, shape, AbstractMesh((1, 1, 1), MESH_AXES))
  assert alone == (PartitionSpec(*[None] * len(axes)), ())


@pytest.mark.parametrize(('size', 'scan'), [('270m', False), ('27b', True)])
def test_placements_are_the_shardings(size, scan):
  mesh = AbstractMesh((2, 16, 4), MESH_AXES)
  model = Model(SIZES[size], scan=scan)
  abstract = abstract_params(model)
  places = shardings(logical_axes(model), abstract, mesh)
  held = jax.tree.map(lambda a, where: np.prod(where.shard_shape(a.shape)), abstract, places)
  rows = placement.placements(model.config, mesh)
  assert sum(row.elements for row in rows) == sum(jax.tree.leaves(held))
  assert sum(row.count * np.prod(row.shape) for row in rows) == model.config.num_params


def printed(capsys, *arguments: str) -> list[list[str]]:
  cli.main(['plan', '--shardings', *arguments])
  return [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(topologies, 'prepare', lambda: None)


def test_the_placements_of_small_models_say_what_is_whole(quick, capsys):
  lines = printed(capsys, '--model=270m', '--topology=v5e:4x4', '--mesh=fsdp=-1,tensor=4')
  assert ' '.join(lines[0]) == '270m on v5e:4x4: data=1 x fsdp=4 x tensor=4'
  rows = {line[0]: line[1:] for line in lines[2:-1]}
  # 18 layers of [640, 1, 256] over fsdp alone, and [640, 4, 256] over both.
  reason = 'kv_heads 1 is not divisible by tensor 4'
  for name in ('k_proj', 'v_proj'):
    assert ' '.join(rows[f'layers.*.attn.{name}']) == (
      f'18 embed 640/fsdp kv_heads 1 head_dim 256 {18 * 640 * 256 / 4 * 4 / 2**20:.3f} {reason}'
    )
  assert ' '.join(rows['layers.*.attn.q_proj']) == (
    f'18 embed 640/fsdp heads 4/tensor head_dim 256 {18 * 640 * 4 * 256 / 16 * 4 / 2**20:.3f}'
  )
  assert sum('divisible' in line for line in lines) == 2
  assert lines[-1][-1] == '6.67%'


def test_the_placements_of_27b_on_two_slices(quick, capsys):
  mesh = '--mesh=data=2,fsdp=-1,tensor=4'
  lines = printed(capsys, '--model=27b', mesh, '--topology=v5e:16x16', '--topology=2xv5e:16x16')
  cut = len(lines) // 2
  one, two = lines[:cut], lines[cut:]
  assert ' '.join(one[0]) == '27b on v5e:16x16: data=2 x fsdp=32 x tensor=4'
  assert ' '.join(two[0]) == '27b on 2xv5e:16x16: data=2 x fsdp=64 x tensor=4'
  assert not any('divisible' in line for line in lines)
  # Data splits no parameter: each slice has them all.
  assert (one[-1][-1], two[-1][-1]) == ('0.78%', '0.39%')


def test_a_mesh_that_splits_nothing_shows(quick, capsys):
  lines = printed(capsys, '--model=270m', '--mesh=data=8,fsdp=1')
  assert ' '.join(lines[0]) == '270m on 8 devices: data=8 x fsdp=1 x tensor=1'
  assert not any('/' in word for line in lines[2:] for word in line) and lines[-1][-1] == '100.00%'


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['--topology=v5e:4x4'], '--shardings goes with a mesh, as in --mesh=fsdp=-1,tensor=4'),
    (['--mesh=fsdp=4', '--find-smallest'], '--shardings goes with a mesh'),
    (['--mesh=fsdp=-1'], 'a size of -1 is what a slice leaves'),
    (['--mesh=fsdp=2', '--topology=v5e:2x2'], 'fsdp=2, tensor=1 does not fit 4 devices'),
    (['--mesh=fsdp=-1', '--topology=2xv5e:2x2'], 'data=1 does not divide into slices=2'),
    (['--mesh=fsdp=2', '--model=9b'], "'9b' is no size; known are 270m"),
  ],
)
def test_placements_that_cannot_be(arguments, sentence, quick, capsys):
  with pytest.raises(SystemExit):
    cli.main(['plan', '--shardings', '--model=270m', *arguments])
  out, err = capsys.readouterr()
  assert sentence in err and err.count('\n') == 1 and not out


# TPUs, as libtpu describes them.


def described(name: str) -> list:
  pytest.importorskip('libtpu')
  return topologies.devices(topology(name))


def steps(devices: np.ndarray) -> set[int]:
  """Links between neighbours along the last axis."""
  at = np.asarray([device.coords for device in devices.flat]).reshape(*devices.shape, -1)
  return set(np.abs(np.diff(at, axis=-2)).sum(-1).flat)


@pytest.mark.parametrize(
  ('name', 'config'),
  [
    ('v5e:4x4', MeshConfig(1, 4, 4)),
    ('v5e:16x16', MeshConfig(1, 64, 4)),
    ('v5e:16x16', MeshConfig(1, -1, 8)),
    ('v5p:4x4x4', MeshConfig(-1, 4, 4)),
    ('2xv5e:4x4', MeshConfig(2, 4, 4, slices=2)),
    ('2xv5e:4x4', MeshConfig(4, 2, 4, slices=2)),
    ('4xv6e:4x4', MeshConfig(-1, 4, 4, slices=4)),
  ],
)
def test_neighbours_in_the_mesh_are_neighbours_in_the_slice(name, config):
  devices = described(name)
  mesh = make_mesh(config, devices)
  assert set(mesh.devices.flat) == set(devices)
  assert mesh.devices.shape == axis_sizes(config, len(devices))
  assert steps(mesh.devices) == {1}
  slices = np.vectorize(lambda device: getattr(device, 'slice_index', 0))(mesh.devices)
  inside = slices.reshape(config.slices, -1)
  assert (inside == inside[:, :1]).all() and len(set(inside[:, 0])) == config.slices


def test_slices_are_as_many_as_there_are(refused: Callable):
  two, one = described('2xv5e:2x2'), described('v5e:2x2')
  sentence = 'slices={}, and the slices of the devices are {}: set MeshConfig.slices = {}'
  refused(lambda: make_mesh(MeshConfig(2, 4, 1), two), sentence.format(1, 2, 2))
  refused(lambda: make_mesh(MeshConfig(2, 2, 1, slices=2), one), sentence.format(2, 1, 1))
  with pytest.raises(UserError, match='data=1 does not divide into slices=2'):
    make_mesh(MeshConfig(1, 8, 1, slices=2), two)
