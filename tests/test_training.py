"""Training: what a step computes, and that nothing but time is lost by an interruption."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time

import grain
import jax
import numpy as np
import optax
import pytest

from optimer_jax.errors import UserError
from optimer_jax.gemma3 import (
  Model,
  abstract_params,
  from_leaves,
  init_leaves,
  logical_axes,
  to_leaves,
  token_nats,
)
from optimer_jax.parallel.sharding import MeshConfig, batch_sharding, make_mesh, shardings
from optimer_jax.training import train as training
from optimer_jax.training.train import TrainConfig, finish, optimizer, schedule, train, train_step

CONFIG = TrainConfig(
  steps=12,
  batch=4,
  learning_rate=1e-2,
  warmup=2,
  evaluate_every=4,
  save_every=3,
  weight_decay=0.01,
)
LENGTH = 16
UNOPTIMISED = {'xla_backend_optimization_level': 0}  # compiles twice as fast


class Random:
  """Random rows, some with two documents and padding: a source for `grain.MapDataset`."""

  def __init__(self, vocabulary: int, count: int = 64):
    self.vocabulary, self.count = vocabulary, count

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    rng = np.random.default_rng(i)
    cut, end = sorted(rng.integers(3, LENGTH + 1, 2))
    segments = np.where(np.arange(LENGTH) < cut, 1, 2) * (np.arange(LENGTH) < end)
    positions = np.where(np.arange(LENGTH) < cut, np.arange(LENGTH), np.arange(LENGTH) - cut)
    # A tenth of the vocabulary, so that there is something to learn in twelve steps.
    tokens = rng.integers(4, self.vocabulary // 10, LENGTH)
    return {
      'tokens': tokens.astype(np.int32),
      'segment_ids': segments.astype(np.int32),
      'positions': positions.astype(np.int32),
    }


def dataset(vocabulary: int, seed: int = 0) -> grain.MapDataset:
  return grain.MapDataset.source(Random(vocabulary)).shuffle(seed=seed).repeat()


def run(
  model, directory, config=CONFIG, evaluate=None, identity=None, leaves=None, arrays='', spent=None
):
  return train(
    config,
    model,
    lambda: (leaves or init_leaves(model.config, 0)).items(),
    dataset(model.config.vocab_size),
    directory,
    name='random',
    identity=identity or {'base': 'a'},
    mesh=MeshConfig(data=1),
    spent={} if spent is None else spent,
    evaluate=evaluate,
    arrays=arrays,
  )


class Stop(Exception):
  pass


def stopped(model, directory, config=CONFIG):
  """The leaves at the first evaluation, where the run ends: at step 4, after the save at 3."""
  found = {}

  def stop(params):
    found.update(jax.tree.map(np.asarray, to_leaves(model.config, params)))
    raise Stop

  with pytest.raises(Stop):
    run(model, directory, config, stop)
  return found


def first_step(model):
  """A mesh, a state and a batch, placed as `run` places them: its program is used again."""
  mesh = make_mesh(MeshConfig(data=1))
  placement = shardings(logical_axes(model), abstract_params(model), mesh)
  params = jax.device_put(from_leaves(model, init_leaves(model.config, 0)), placement)
  with jax.set_mesh(mesh):
    state = {'params': params, 'optimizer': jax.jit(optimizer(CONFIG).init)(params)}
  rows = [Random(model.config.vocab_size)[i] for i in range(4)]
  batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
  return mesh, state, jax.device_put(batch, batch_sharding(mesh))


def same(a, b):
  return all(np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in a)


@pytest.fixture(scope='module')
def unbroken(small, tmp_path_factory):
  directory = tmp_path_factory.mktemp('unbroken')
  spent = {}
  leaves = run(Model(small), directory, spent=spent)
  return {name: np.asarray(leaf) for name, leaf in leaves.items()}, spent, directory


def test_loss_falls_and_metrics_are_written(small, unbroken):
  _, spent, directory = unbroken
  rows = [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == list(range(1, CONFIG.steps + 1))
  assert rows[-1]['loss'] < rows[0]['loss']
  assert set(rows[0]) >= {'loss', 'tokens_per_s', 'grad_norm', 'update_norm', 'learning_rate'}
  assert rows[0]['learning_rate'] == 0 and rows[2]['learning_rate'] == pytest.approx(1e-2)
  assert list(directory.glob('events.out.tfevents.*'))
  slots = CONFIG.steps * 4 * LENGTH
  assert spent['flops'] == 3 * small.flops_per_token(LENGTH) * slots
  assert 0 < spent['tokens'] < slots


def test_step_is_adamw_on_the_mean_loss(small):
  model = Model(small)
  mesh, state, batch = first_step(model)

  def loss(params):
    nats, mask = token_nats(
      model, params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    return nats.sum() / mask.sum()

  @functools.partial(jax.jit, compiler_options=UNOPTIMISED)
  def by_the_book(params):
    value, grads = jax.value_and_grad(loss)(params)
    clipped, _ = optax.clip_by_global_norm(CONFIG.clip).update(grads, optax.EmptyState())
    adamw = optax.adamw(
      schedule(CONFIG), b1=CONFIG.b1, b2=CONFIG.b2, weight_decay=CONFIG.weight_decay
    )
    updates, _ = adamw.update(clipped, adamw.init(params), params)
    return value, optax.tree.norm(grads), optax.apply_updates(params, updates)

  value, norm, expected = by_the_book(state['params'])
  with jax.set_mesh(mesh):
    state, metrics = train_step(model, CONFIG, state, batch)
  assert metrics['loss'] == pytest.approx(float(value), rel=1e-6)
  assert metrics['grad_norm'] == pytest.approx(float(norm), rel=1e-5)
  for a, b in zip(jax.tree.leaves(state['params']), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize('pieces', [2])
def test_accumulation_changes_nothing(small, pieces, tmp_path):
  """Rows hold different numbers of targets, so means of means would differ."""
  whole = stopped(Model(small), tmp_path / 'whole')
  config = dataclasses.replace(CONFIG, accumulate=pieces)
  parts = stopped(Model(small), tmp_path / 'parts', config)
  # AdamW divides by the gradient's size: noise of a tiny gradient moves a whole step.
  for name, leaf in whole.items():
    assert np.quantile(np.abs(leaf - parts[name]), 0.99) < 1e-6, name


def test_a_step_brings_nothing_but_its_batch_to_the_device(small, tmp_path, monkeypatch):
  """Whatever else is computed there waits in the queue behind the step that runs."""
  transfers, batch_of = jax.transfer_guard_host_to_device, training.batch_of

  def allowed(*args):
    with transfers('allow'):
      return batch_of(*args)

  monkeypatch.setattr(training, 'batch_of', allowed)
  with contextlib.ExitStack() as from_step_4_to_8:

    def evaluate(params):
      if jax.config.jax_transfer_guard_host_to_device == 'disallow':
        raise Stop
      from_step_4_to_8.enter_context(transfers('disallow'))
      return {}

    with pytest.raises(Stop):
      run(Model(small), tmp_path, evaluate=evaluate)


def test_resume_is_bitwise(small, unbroken, tmp_path):
  """Interrupted in its evaluation at step 8, after the save at step 6."""

  def interrupt(params):
    if interrupt.seen == 1:
      raise Stop
    interrupt.seen += 1
    return {}

  interrupt.seen = 0
  with pytest.raises(Stop):
    run(Model(small), tmp_path, evaluate=interrupt, spent=(first := {}))
  leaves = run(Model(small), tmp_path, spent=(second := {}))
  a_step = unbroken[1]['flops'] / CONFIG.steps
  assert (first['flops'], second['flops']) == (8 * a_step, 6 * a_step)
  assert same(unbroken[0], leaves)
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows if 'loss' in row] == list(range(1, CONFIG.steps + 1))
  # A finished run gives its result again without a step.
  leaves = run(Model(small), tmp_path, spent=(third := {}))
  assert third == {'flops': 0, 'tokens': 0} and same(unbroken[0], leaves)


def test_kill_9_and_resume_is_bitwise(small, unbroken, tmp_path):
  code = f"""
import sys
sys.modules['torch'] = None  # tensorboardX would import it, for longer than the training takes
from pathlib import Path
from optimer_jax.gemma3 import Gemma3Config
from tests.test_training import *
small = Gemma3Config(**{dataclasses.asdict(small)})
leaves = run(Model(small), Path({str(tmp_path)!r}) / 'run')
np.savez({str(tmp_path / 'out.npz')!r}, **leaves)
"""
  metrics = tmp_path / 'run' / 'metrics.jsonl'
  kills = 0
  for target in (2, 7):
    process = subprocess.Popen([sys.executable, '-c', code])
    while process.poll() is None:
      if metrics.exists() and metrics.read_text().count('\n') >= target:
        os.kill(process.pid, signal.SIGKILL)
        kills += 1
        break
      time.sleep(0.002)
    process.wait()
  assert kills >= 1
  subprocess.run([sys.executable, '-c', code], check=True)
  assert same(unbroken[0], np.load(tmp_path / 'out.npz'))


def test_other_settings_are_refused(small, unbroken):
  directory = unbroken[2]
  with pytest.raises(UserError, match=r'begun with learning_rate = 0\.01, not 0\.02'):
    run(Model(small), directory, dataclasses.replace(CONFIG, learning_rate=2e-2))
  with pytest.raises(UserError, match='begun with base = a, not b'):
    run(Model(small), directory, identity={'base': 'b'})


def test_damaged_state_is_named(small, tmp_path):
  stopped(Model(small), tmp_path)
  files = [f for f in (tmp_path / 'state').rglob('d/*') if f.stat().st_size > 10_000]
  largest = max(files, key=lambda f: f.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  with pytest.raises(UserError, match=r'state (is damaged|cannot be read) at step 3'):
    run(Model(small), tmp_path)
  finish(tmp_path, CONFIG)
  assert not (tmp_path / 'state').exists()


def test_not_finite_stops_with_step_and_batch(small, tmp_path):
  leaves = init_leaves(small, 0)
  leaves['final_norm.scale'][0] = np.nan
  with pytest.raises(UserError, match=r'the loss is nan .* at step 1 \(batch 0 of seed 0\)'):
    run(Model(small), tmp_path, leaves=leaves)


def test_pieces_and_meshes_that_do_not_divide(small, tmp_path):
  with pytest.raises(UserError, match='batch 4 does not divide into 3 pieces'):
    run(Model(small), tmp_path, dataclasses.replace(CONFIG, accumulate=3))
  assert not list(tmp_path.iterdir())


def test_layouts_train_alike(small, unbroken, tmp_path):
  leaves = run(Model(small, scan=True), tmp_path)
  for name, leaf in unbroken[0].items():
    difference = np.abs(np.asarray(leaf) - np.asarray(leaves[name]))
    assert np.quantile(difference, 0.99) < 1e-4, name


def test_nothing_is_compiled_twice(small, compiled):
  """The first step's program serves the next ones: the state comes out as it went in."""
  model = Model(small)
  mesh, state, batch = first_step(model)
  with jax.set_mesh(mesh):
    state, _ = train_step(model, CONFIG, state, batch)
    compiled.clear()
    for _ in range(3):
      state, _ = train_step(model, CONFIG, state, batch)
  assert not compiled
  assert set(to_leaves(small, state['params'])) == set(init_leaves(small, 0))
