"""Several processes train as one does: `main` is what each of them runs."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import together

from optimer_jax.checkpoints import store
from optimer_jax.errors import Preempted, UsageError
from optimer_jax.gemma3 import Gemma3Config, Model, init_leaves
from optimer_jax.parallel.processes import alone, in_turn, once, primary, whole_rows
from optimer_jax.parallel.sharding import MeshConfig, make_mesh
from optimer_jax.parallel.startup import join
from optimer_jax.training.train import TrainConfig, train

# Without clipping or decay, and with one key-value head, which `tensor` cannot split.
SMALL = Gemma3Config(2, 32, 64, 4, 1, 16, window=6, query_scalar=16, vocab_size=300)
CONFIG = TrainConfig(
  steps=12, batch=8, learning_rate=1e-2, warmup=2, evaluate_every=1, save_every=100
)
ONE, TWO = (1, 1, (1, 1, 1)), (2, 4, (2, 2, 2))  # processes, devices of each, mesh


def main(
  directory: str, mesh: str, stop_at: str, save_each_of: str = '0', arrays: str = ''
) -> None:
  """Trains; the last process sends itself SIGTERM in the evaluation at step `stop_at`.

  With `save_each_of`, for so many steps, each of which is saved, without evaluation.
  """
  from test_training import dataset

  join()
  directory, looks, config = Path(directory), [], CONFIG
  if steps := int(save_each_of):
    config = dataclasses.replace(CONFIG, steps=steps, save_every=1)

  def evaluate(params):
    looks.append(params)
    if len(looks) == int(stop_at) and jax.process_index() == jax.process_count() - 1:
      os.kill(os.getpid(), signal.SIGTERM)
    if int(stop_at):
      time.sleep(0.3)  # What one process is told needs a moment to reach the others.
    return {'looks': len(looks)}

  try:
    leaves = train(
      config,
      Model(SMALL),
      lambda: init_leaves(SMALL, 0).items(),
      dataset(SMALL.vocab_size),
      directory / 'run',
      name='random',
      identity={'base': 'a'},
      mesh=MeshConfig(*map(int, mesh.split(','))),
      spent={},
      evaluate=None if steps else evaluate,
      arrays=arrays,
    )
  except Preempted as error:
    print(error)
    sys.exit(75)
  store.save(directory / 'cpt', 'cpt', SMALL, leaves, arrays=arrays and f'{arrays}/cpt')
  assert store.read_manifest(directory / 'cpt').leaves.keys() == leaves.keys()


def trained(directory: Path, how: tuple, stop_at: int = 0) -> list[int]:
  """The exit codes."""
  processes, devices, mesh = how
  directory.mkdir(exist_ok=True)
  arguments = [__file__, directory, ','.join(map(str, mesh)), stop_at]
  return together.finish(
    together.start(arguments, directory, processes, devices), directory, expected=75 * bool(stop_at)
  )


def losses(directory: Path) -> list[float]:
  rows = [json.loads(line) for line in (directory / 'run/metrics.jsonl').read_text().splitlines()]
  rows = [row for row in rows if 'loss' in row]
  assert [row['step'] for row in rows] == list(range(1, CONFIG.steps + 1))
  return [row['loss'] for row in rows]


def together_main() -> None:
  """What `processes` does between two of them."""
  join()
  assert once(lambda: {'from': jax.process_index()}) == {'from': 0}
  ran = []
  nested = alone(lambda: once(lambda: ran.append('inner') or 'result'))()
  assert (nested, ran) == (('result', ['inner']) if primary() else (None, []))
  assert in_turn(lambda: ran.append('turn')) is None and ran[-1] == 'turn'
  for kind in (UsageError, ValueError):

    def wrong(kind=kind):
      raise kind('what is wrong')

    try:
      once(wrong)
      raise AssertionError('no error')
    except Exception as error:
      assert 'what is wrong' in str(error) and (primary() or kind.__name__ in repr(error))
  mesh = make_mesh(MeshConfig(data=8))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  values = np.arange(24, dtype=np.float32).reshape(8, 3)
  array = jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
  assert not array.is_fully_addressable
  assert np.array_equal(whole_rows(array, 3, 7), values[3:7])


def test_processes_agree(tmp_path):
  assert together.finish(together.start([__file__], tmp_path, 2, 4), tmp_path) == [0, 0]


if __name__ == '__main__':
  main(*sys.argv[1:]) if sys.argv[1:] else together_main()
