"""Plans for TPU slices: the table, the bounds, the walk, and where libtpu is, its compiler."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks import plan as benchmark
from optimer_jax import cli
from optimer_jax.errors import UsageError, UserError
from optimer_jax.gemma3 import SIZES
from optimer_jax.parallel.sharding import MESH_AXES, MeshConfig
from optimer_jax.planning import plan as planning
from optimer_jax.planning import stages, topologies
from optimer_jax.planning.plan import COLUMNS, GIB, Plan, exceeded, line, plan, walk
from optimer_jax.planning.roofline import Work, roofline, work
from optimer_jax.planning.stages import STAGES, Case, UnsuitableMesh, default_mesh, program
from optimer_jax.planning.topologies import CHIPS, known, topology
from optimer_jax.training.train import TrainConfig

V5E_4 = topology('v5e:2x2')


# The table.


@pytest.mark.parametrize(
  ('name', 'chips', 'hosts'),
  [
    ('v5e:1x1', 1, 1),
    ('v5e:16x16', 256, 64),
    ('v6e:2x4', 8, 2),
    ('v5p:2x2x1', 4, 1),
    ('v4:4x4x4', 64, 16),
    ('v5p:8x8x12', 768, 192),  # known to the compiler, though not in the walk
    ('2xv5e:16x16', 512, 128),
    ('3xv5e:1x1', 3, 3),
  ],
)
def test_a_name_says_chips_and_hosts(name, chips, hosts):
  found = topology(name)
  assert (found.name, found.chips, found.hosts) == (name, chips, hosts)
  assert found.devices == chips


@pytest.mark.parametrize(
  ('name', 'sentence'),
  [
    ('v5e-16', 'name one as in v5e:16x16'),
    ('v5:4x4', 'did you mean v5e:4x4?'),
    ('v5e:2x2x2', 'a slice of v5e has 2 sides'),
    ('v5p:4x4', 'a slice of v5p has 3 sides'),
    ('v5e:0x4', 'of 1 chip or more'),
    ('0xv5e:4x4', 'of 1 chip or more'),
    ('2*v5e:4x4', 'did you mean v5e:4x4?'),
  ],
)
def test_other_names_are_refused(name, sentence):
  with pytest.raises(UsageError) as refused:
    topology(name)
  assert sentence in str(refused.value)


def test_known_slices_grow():
  slices = known()
  assert {each.kind for each in slices} == set(CHIPS) == {'v4', 'v5e', 'v5p', 'v6e'}
  assert [each.chips for each in slices] == sorted(each.chips for each in slices)
  assert [each.name for each in known(('v5e',))][:4] == ['v5e:1x1', 'v5e:2x2', 'v5e:2x4', 'v5e:4x4']
  assert all(each.chip.limit_gib <= each.chip.hbm_gib + 1 for each in slices)


# The bounds, by hand.

# The tiny model: 8 layers of attention 2 x 96 x 32 x (4 + 2) + 2 x 32, mlp 3 x 96 x 256 and norms
# 4 x 96; embedding 1024 x 96; last norm 96.
PARAMS = 8 * (36_928 + 73_728 + 384) + 98_304 + 96


def test_a_training_step_by_hand():
  assert SIZES['tiny'].num_params == PARAMS
  case = Case('tiny', 'train', V5E_4, 8, 64, training=TrainConfig(accumulate=2))
  found = work(case, {'data': 1, 'fsdp': 2, 'tensor': 2})
  # Rows as long as the window: a query sees 32.5 keys on average, in every layer.
  matrices = PARAMS - 96 - 8 * (4 * 96 + 2 * 32)
  forward = (2 * matrices + 4 * 8 * 32.5 * 4 * 32) * 8 * 64
  assert found.model_flops == pytest.approx(3 * forward, rel=1e-12)
  assert found.flops == pytest.approx(4 * forward, rel=1e-12)
  # Three passes of bfloat16: two pieces read half of the weights each; 256 of the 512 tokens lie on
  # a chip, each read and written in each layer. Then eight float32 of a quarter of the parameters.
  passes = 3 * 2 * (2 * PARAMS / 2 + 2 * 8 * 256 * 96)
  assert found.bytes == pytest.approx(passes + 8 * 4 * PARAMS / 4, rel=1e-12)
  assert found.tokens == 512
  kept = work(dataclasses.replace(case, remat='none'), {'data': 1, 'fsdp': 2, 'tensor': 2})
  assert kept.flops == kept.model_flops == found.model_flops
  assert kept.bytes < found.bytes


def test_the_other_stages_by_hand():
  at = {'data': 1, 'fsdp': 4, 'tensor': 1}
  count = lambda stage: work(Case('tiny', stage, V5E_4, 8, 64, vectors=5), at)
  assert count('extract') == Work(PARAMS, PARAMS, PARAMS / 4 * (4 + 4 + 2), 0)
  assert count('merge') == Work(10 * PARAMS, 10 * PARAMS, PARAMS / 4 * 2 * 7, 0)
  scored = count('evaluate')
  assert scored.bytes == 2 * (PARAMS + 2 * 8 * 128 * 96)
  assert scored.model_flops == scored.flops
  trained = work(Case('tiny', 'train', V5E_4, 8, 64), at)
  assert trained.model_flops == pytest.approx(3 * scored.flops)


def test_slices_have_their_own_parameters():
  count = lambda stage, data: work(
    Case('tiny', stage, topology('2xv5e:2x2'), 8, 64),
    {'data': data, 'fsdp': 8 // data, 'tensor': 1},
  )
  for stage in ('extract', 'merge'):
    assert count(stage, 2).bytes == 2 * count(stage, 1).bytes
  moments = 8 * 4 * PARAMS / 8
  assert count('train', 2).bytes == pytest.approx(count('train', 1).bytes + moments, rel=1e-12)


def test_the_bound_is_the_slower_of_computing_and_moving():
  # Four v5e: 788e12 FLOP/s, and 819e9 bytes/s each.
  computing = roofline(Work(3 * 788e12, 4 * 788e12, 819e9, 1000), V5E_4)
  assert computing.step_s == pytest.approx(4)
  assert computing.mfu == pytest.approx(0.75)
  assert computing.tokens_per_day == pytest.approx(1000 * 86_400 / 4)
  moving = roofline(Work(3 * 788e12, 4 * 788e12, 8 * 819e9, 1000), V5E_4)
  assert moving.step_s == pytest.approx(8)
  assert moving.mfu == pytest.approx(3 / 8)
  merging = roofline(Work(1.0, 1.0, 2 * 819e9, 0), V5E_4)
  assert merging == dataclasses.replace(merging, step_s=2.0, mfu=None, tokens_per_day=None)


# What lies on a device, on the mesh of one that is here.


def test_bytes_before_a_step():
  mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)
  size = lambda stage: program(Case('tiny', stage, V5E_4, 8, 64, vectors=5), mesh).bytes_before
  rows = 4 * 8 * 64
  # Masters and two moments, the optimizer's counter, three arrays of rows.
  assert size('train') == 3 * 4 * PARAMS + 4 + 3 * rows
  assert size('extract') == 2 * 4 * PARAMS
  # Base, five vectors and a candidate in bfloat16; five weights, or six arrays and a number.
  assert size('merge') == 7 * 2 * PARAMS + 5 * 4
  assert size('evaluate') == 7 * 2 * PARAMS + 6 * rows + 4


def test_bytes_of_a_pool_elsewhere():
  mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)
  config = SIZES['tiny']
  top = config.vocab_size * config.embed_dim + config.embed_dim
  norms = config.num_layers * (4 * config.embed_dim + 2 * config.head_dim) + config.embed_dim
  stacks = 5 + 1 + 2  # layers that share an array of weights, for each of 13 parameters
  for stage, others in (('merge', 5 * 4), ('evaluate', 6 * 4 * 8 * 64 + 4)):
    size = lambda pool, stage=stage: (
      program(Case('tiny', stage, V5E_4, 8, 64, vectors=5, pool=pool), mesh).bytes_before
    )
    assert size('host') == 2 * 2 * PARAMS + 5 * 2 * norms + others
    weights = 13 * stacks * 5 * 4 if stage == 'evaluate' else 0
    assert size('scan') == 6 * 2 * PARAMS + 2 * top + weights + others


@pytest.mark.parametrize(
  ('stage', 'batch', 'accumulate', 'sizes'),
  [
    ('train', 128, 1, (1, 128, 2)),
    ('train', 128, 4, (1, 32, 8)),
    ('train', 6, 1, (1, 2, 128)),
    ('evaluate', 512, 4, (1, 256, 1)),
    ('merge', 1, 1, (1, 256, 1)),
  ],
)
def test_the_default_mesh_splits_rows_first(stage, batch, accumulate, sizes):
  training = TrainConfig(accumulate=accumulate)
  case = Case('27b', stage, topology('v5e:16x16'), batch, training=training)
  assert dataclasses.astuple(default_mesh(case)) == (*sizes, 1)
  # As many rows for each of two slices: data is between them.
  two = dataclasses.replace(case, topology=topology('2xv5e:16x16'), batch=2 * batch)
  assert dataclasses.astuple(default_mesh(two)) == (2, *sizes[1:], 2)


@pytest.mark.parametrize(
  ('changed', 'sentence'),
  [
    ({'size': '28b'}, "'28b' is no size; known are 270m"),
    ({'stage': 'search'}, "'search' is no stage; known are train, extract, merge, evaluate"),
    ({'pool': 'auto'}, "'auto' is no pool; known are device, scan, host"),
    ({'batch': 0}, 'must be 1 or more'),
    ({'training': TrainConfig(accumulate=3)}, 'batch 64 does not divide into 3 pieces'),
  ],
)
def test_a_wrong_case_is_refused(changed, sentence):
  with pytest.raises(UsageError) as refused:
    Case(**{'size': 'tiny', 'stage': 'train', 'topology': V5E_4, **changed})
  assert sentence in str(refused.value)


# The walk, by a compiler of ours.


def fake(need_gib: float):
  """A `plan` that needs so much memory in all, split over the chips."""

  def plan(case: Case) -> Plan:
    if case.topology.chips == 1:
      raise UnsuitableMesh('one chip')
    need = need_gib * GIB / case.topology.chips
    limit = case.topology.chip.limit_gib * GIB
    counted = work(case, {'data': 1, 'fsdp': case.topology.chips, 'tensor': 1})
    bound = roofline(counted, case.topology)
    mesh = {'data': 1, 'fsdp': case.topology.chips, 'tensor': 1}
    return Plan(case, mesh, 0.75 * need, 0.25 * need, 1.5, limit, counted, bound)

  return plan


def test_the_walk_ends_at_the_first_that_fits():
  case = Case('27b', 'merge', V5E_4)
  found = list(walk(case, known(('v5e',)), fake(300)))
  assert [each.case.topology.name for each in found] == [
    f'v5e:{sides}' for sides in ('2x2', '2x4', '4x4', '4x8')
  ]
  assert [each.fits for each in found] == [False, False, False, True]
  assert found[-1].row()['hbm_gib'] == pytest.approx(300 / 32, abs=0.01)
  # Of four chips, those with the most memory come last.
  assert [each.case.topology.name for each in walk(case, known(), fake(300))][:4] == [
    f'{kind}' for kind in ('v5e:2x2', 'v4:2x2x1', 'v6e:2x2', 'v5p:2x2x1')
  ]


def test_a_walk_may_find_nothing(capsys):
  assert not any(each.fits for each in walk(Case('27b', 'train', V5E_4), known(), fake(1e6)))
  planning.print_plans('27b', ['merge'], ['v5e'], True, compile=fake(1e6))
  assert 'merge: fits none of v5e:1x1, v5e:2x2' in capsys.readouterr().out


def test_lines_are_under_their_columns(capsys):
  planning.print_plans('27b', [], ['v5e:8x8', 'v5p:2x2x2'], False, compile=fake(100), batch=8)
  *head, last = capsys.readouterr().out.splitlines()
  assert '\n'.join(head[:2]) == COLUMNS
  assert len(head) + 1 == 2 + len(STAGES) * 2
  assert {len(row) for row in [*head[2:], last]} == {len(COLUMNS.splitlines()[0])}
  case = Case('27b', 'train', V5E_4)
  nothing = dataclasses.replace(fake(1000)(case), temporaries=None, compile_s=None)
  assert not nothing.fits and line(nothing).split()[6:10] == ['-', '187.50', '15.75', 'no']
  row = nothing.row()
  assert row['compile_s'] is None and row['temporaries_gib'] is None
  assert json.loads(json.dumps(row)) == row


# The compiler's answers.


def test_the_compilers_refusal_has_figures():
  said = (
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
    'required for HLO temporaries (20.50{}) exceeds available HBM (15.75G). HLO module: jit_f.'
  )
  assert exceeded(said.format('G')) == 20.5 * 2**30
  assert exceeded(said.format('T')) == 20.5 * 2**40
  assert exceeded('RESOURCE_EXHAUSTED: ran out of memory in memory space vmem') is None


def test_without_libtpu_one_sentence(monkeypatch, capsys):
  monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError) as refused:
    plan(Case('tiny', 'train', V5E_4, 8, 64))
  assert str(refused.value).endswith("not installed: pip install 'optimer_jax[tpu]'")
  monkeypatch.setattr(topologies, 'prepare', lambda: None)
  assert benchmark.main(['--quick']) == 1
  assert 'optimer_jax[tpu]' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['--model=27b'], 'name a slice, as in --topology=v5e:16x16, or give --find-smallest'),
    (['--model=27b', '--topology=v9:2x2'], "'v9:2x2' is no slice of v4, v5e, v5p, v6e"),
    (['--model=27b', '--topology=v5e:2x2', '--find-smallest'], "'v5e:2x2' is no kind of chip"),
    (['--model=27b', '--topology=v5e:2x2', '--mesh=fsdp'], '--mesh .fsdp. cannot be read'),
    (['--model=27b', '--topology=v5e:2x2', '--mesh=expert=4'], 'cannot be read: write it as in'),
    (['--model=27b', '--topology=v5e:2x2', '--gin.Run.length=8'], 'give one with --gin_file'),
    (['--model=99b', '--topology=v5e:2x2'], "'99b' is no size"),
    (['--model=27b', '--topology=v5e:2x2', '--pool=hbm'], "'hbm' is no pool; known are device"),
  ],
)
def test_usage_is_one_sentence(arguments, sentence, capsys, monkeypatch):
  monkeypatch.setattr(topologies, 'prepare', lambda: None)
  with pytest.raises(SystemExit) as stop:
    cli.main(['plan', *arguments])
  err = capsys.readouterr().err
  assert stop.value.code == 2 and err.count('\n') == 1
  assert sentence.replace('.fsdp.', "'fsdp'") in err


def test_settings_come_from_gin_and_flags(monkeypatch):
  asked = []
  monkeypatch.setattr(topologies, 'prepare', lambda: None)
  monkeypatch.setattr(planning, 'print_plans', lambda *a, **settings: asked.append((a, settings)))
  gin = ['--gin_file=runs/quickstart_tiny.gin', '--gin.TrainConfig.accumulate=2']
  cli.main(['plan', '--model=1b', '--topology=v5e:2x2', '--stage=train', *gin, '--length=512'])
  cli.main(['plan', '--model=1b', '--find-smallest', '--mesh=fsdp=-1,tensor=2', '--vectors=3'])
  (arguments, settings), (_, flags) = asked
  assert arguments == ('1b', ['train'], ['v5e:2x2'], False)
  assert settings['training'].accumulate == 2
  assert settings['batch'] == settings['training'].batch
  assert settings['length'] == 512 and settings['mesh'] == MeshConfig(-1, 1, 1)
  assert flags == {'mesh': MeshConfig(1, -1, 2), 'vectors': 3}


def test_benchmark_rows(monkeypatch, capsys):
  monkeypatch.setattr(topologies, 'prepare', lambda: None)
  monkeypatch.setattr(benchmark, 'plan', fake(500))
  assert benchmark.main([]) == 0
  rows = json.loads(capsys.readouterr().out.splitlines()[-1])['rows']
  keys = {'model', 'stage', 'topology', 'layers', 'fits', 'hbm_gib', 'limit_gib', 'compile_s'}
  assert all(keys < set(row) and row['layers'] == 62 for row in rows)
  assert {row['stage'] for row in rows if row['smallest']} == set(STAGES)
  assert benchmark.main(['--quick']) == 0
  (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])['rows']
  assert (row['stage'], row['topology'], row['batch'], row['seq']) == (
    *('train', 'v5e:16x16'),
    *(128, 4096),
  )


# With libtpu.


def test_the_compiler_knows_the_table():
  pytest.importorskip('libtpu')
  for each in known():
    found = topologies.devices(each)
    assert len(found) == each.devices, each.name
    assert len({device.process_index for device in found}) == each.hosts, each.name
  with pytest.raises(UsageError, match=r'no slice v5e:3x3; it does know v5e:1x1, v5e:2x2'):
    topologies.devices(topology('v5e:3x3'))


def test_the_limits_are_the_compilers():
  pytest.importorskip('libtpu')
  for name in ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'):
    each = topology(name)
    mesh = Mesh(np.asarray(topologies.devices(each)).reshape(1, -1, 1), MESH_AXES)
    large = stages._whole((2**37,), 'float32', mesh)
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
      jax.jit(lambda x: x + 1).lower(large).compile()
    found = planning.EXCEEDED.search(str(refused.value))
    assert found[4] == 'G' and 0 <= float(found[3]) - each.chip.limit_gib < 0.015


def test_the_tiny_model_for_a_real_slice():
  pytest.importorskip('libtpu')
  mesh = MeshConfig(1, 2, 2)
  case = Case('tiny', 'train', V5E_4, 8, 256, mesh)
  found = plan(case)
  # The compiler pads small arrays, and a step needs at least its gradients.
  bare = program(case, planning.make_mesh(mesh, topologies.devices(V5E_4))).bytes_before
  assert found.fits and bare <= found.arguments < 3 * bare
  assert found.temporaries > 4 * PARAMS / 4
  assert found.compile_s > 0
  merged = plan(dataclasses.replace(case, stage='merge'))
  # The candidate is written into the last one's memory: only the program is new.
  assert merged.fits and merged.temporaries < found.temporaries
  assert jax.default_backend() == 'cpu'
  with pytest.raises(UnsuitableMesh, match='3 rows cannot be split over data=1 x fsdp=2'):
    plan(dataclasses.replace(case, batch=3))
  with pytest.raises(UnsuitableMesh, match='v5e:2x2: a mesh of data=1, fsdp=2, tensor=3'):
    plan(dataclasses.replace(case, mesh=MeshConfig(1, 2, 3)))


def test_two_slices_are_compiled_for():
  pytest.importorskip('libtpu')
  case = Case('tiny', 'merge', topology('2xv5e:2x2'), vectors=2)
  found = plan(case)
  assert found.fits and found.mesh == {'data': 2, 'fsdp': 4, 'tensor': 1}
  assert found.row()['topology'] == '2xv5e:2x2' and found.row()['chips'] == 8
  # The number of slices is the topology's, whatever the mesh was made for.
  with pytest.raises(UnsuitableMesh, match='2xv5e:2x2: data=1 does not divide into slices=2'):
    plan(dataclasses.replace(case, mesh=MeshConfig(1, -1, 1)))
  with pytest.raises(UsageError, match='the compiler knows no slice v5e:3x3'):
    topologies.devices(topology('2xv5e:3x3'))


@pytest.mark.parametrize(('stage', 'pool'), [('merge', 'host'), ('evaluate', 'scan')])
def test_a_pool_elsewhere_takes_less_memory(stage, pool):
  pytest.importorskip('libtpu')
  case = Case('270m', stage, V5E_4, 4, 128, pool=pool)
  near, found = plan(dataclasses.replace(case, pool='device')), plan(case)
  # Of what comes from the host there is never more than the embeddings, and some layers; of what is
  # merged in the scan, a layer.
  layers = SIZES['270m'].num_params - SIZES['270m'].vocab_size * SIZES['270m'].embed_dim
  assert found.fits and near.total - found.total > 0.9 * 2 * layers / 4


def test_what_does_not_fit_is_a_plan_with_figures():
  pytest.importorskip('libtpu')
  # Two copies of 4B fit one v6e; their difference does not fit beside them.
  found = plan(Case('4b', 'extract', topology('v6e:1x1')))
  difference = 2 * SIZES['4b'].num_params
  assert not found.fits and found.arguments < found.limit < found.total
  assert difference <= found.temporaries < 1.05 * difference
  large = plan(Case('27b', 'train', topology('v5e:1x1'), 8, 64))
  assert not large.fits and large.compile_s is None and large.arguments > 300 * GIB
  # With the gradient, what would fit by the arguments alone does not.
  slim = plan(Case('27b', 'train', topology('v5p:2x2x1'), 64, 4096))
  assert slim.arguments < slim.limit < slim.total and slim.compile_s is None and not slim.fits
  assert slim.temporaries == pytest.approx(slim.arguments / 3, rel=1e-3)
