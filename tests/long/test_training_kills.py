"""Training killed with SIGKILL at ten random moments ends, bit for bit, where an unbroken run ends.

A state is saved after every step, so that most kills fall into a save.
"""

import os
import random
import time

import numpy as np
import pytest
import together

from optimer_jax.checkpoints import store
from optimer_jax.files import read_jsonl
from tests import test_processes

KILLS, STEPS = 10, 60
ONE, TWO = (1, 1, (1, 1, 1)), (2, 2, (2, 1, 2))


def start(directory, how, steps=STEPS, arrays=''):
  processes, devices, mesh = how
  arguments = [test_processes.__file__, directory, ','.join(map(str, mesh)), 0, steps, arrays]
  return together.start(arguments, directory, processes, devices)


def outcome(directory):
  rows = read_jsonl(directory / 'run' / 'metrics.jsonl')
  return store.load(directory / 'cpt')[1], [row['loss'] for row in rows if 'loss' in row]


@pytest.mark.parametrize('how', [ONE, TWO], ids=['one process', 'two processes'])
def test_ten_kills(tmp_path, how):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  for directory in (whole, broken):
    directory.mkdir()
  assert set(together.finish(start(whole, how), whole)) == {0}
  rng, killed_at, saving = random.Random(os.urandom(8)), [], 0
  metrics = broken / 'run' / 'metrics.jsonl'
  while len(killed_at) < KILLS:
    target = len(read_jsonl(metrics)) + rng.randint(1, 5)
    started = start(broken, how)
    while len(read_jsonl(metrics)) < target and started[0].poll() is None:
      time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3))
    assert started[0].poll() is None, f'it was done before kill {len(killed_at) + 1}'
    rng.choice(started).kill()
    killed_at.append(len(read_jsonl(metrics)))
    saving += any('tmp' in path.name for path in (broken / 'run' / 'state').iterdir())
    time.sleep(rng.uniform(0, 0.5))
    for process in started:  # As a cluster does with what is left of a job.
      process.kill()
      process.wait()
  print('killed after steps', killed_at, f'and {saving} times in a save')
  assert set(together.finish(start(broken, how), broken)) == {0}
  (expected, losses), (found, found_losses) = outcome(whole), outcome(broken)
  assert found_losses == losses and len(losses) == STEPS
  for name, leaf in expected.items():
    assert np.array_equal(leaf, found[name]), name
