"""Several processes that lead one study together, on losses whose minimum is known."""

import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from test_study import PARAMETERS, TASKS, Evaluate, ledger
from test_study import run as run_alone
from together import finish, start

from optimer_jax.errors import UsageError
from optimer_jax.parallel.processes import primary
from optimer_jax.parallel.sharding import MeshConfig, make_mesh
from optimer_jax.parallel.startup import join
from optimer_jax.search.loop import run_study
from optimer_jax.search.study import Study, StudyConfig
from optimer_jax.search.together import led

SOBOL = {'sampler': 'sobol', 'trials': 20}


def main(place: str, slow: str = '0') -> None:
  """A study whose candidates all processes compute something for, as those of a slice do."""
  place = Path(place)
  if float(slow):  # As `join`, but that a dead process is noticed sooner.
    number, count = (int(os.environ[f'JAX_{key}']) for key in ('PROCESS_ID', 'NUM_PROCESSES'))
    address = os.environ['JAX_COORDINATOR_ADDRESS']
    jax.distributed.initialize(address, count, number, heartbeat_timeout_seconds=5)
  else:
    join()
  mesh, evaluate = make_mesh(MeshConfig()), Evaluate()
  total = jax.jit(jnp.sum, out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))
  split = jax.sharding.NamedSharding(mesh, jax.P('data'))

  def slowly(point, gradients=False, stop=None):
    time.sleep(float(slow))
    ones = jax.make_array_from_callback((8,), split, lambda at: np.ones(8, np.float32)[at])
    assert total(ones) == 8
    if not primary() and stop:  # What the others have seen must not matter.
      return evaluate(point, gradients, lambda scores, done: stop(None, done))
    return evaluate(point, gradients, stop)

  def lead(evaluate):
    config = StudyConfig(name='study', **SOBOL)
    study = Study(config, PARAMETERS, dict.fromkeys(TASKS, 'data'), 'pool')
    return run_study(place / 'study', study, evaluate)

  best = led(lead, slowly)
  try:
    led(lambda _: Study(StudyConfig(sampler='sobel'), {}, {}, ''), slowly)
  except UsageError as error:
    found = [evaluate.points, evaluate.examples, best, str(error)]
    (place / f'{jax.process_index()}.json').write_text(json.dumps(found))


def test_process_0_decides_and_all_evaluate(tmp_path):
  assert finish(start([__file__, tmp_path], tmp_path, 2, 4), tmp_path) == [0, 0]
  first, other = (json.loads((tmp_path / f'{i}.json').read_text()) for i in range(2))
  assert first == other
  points, examples, best, error = first
  alone, evaluate = tmp_path / 'alone', Evaluate()
  assert best['weights'] == run_alone(alone, evaluate, name='study', **SOBOL)['weights']
  assert ledger(tmp_path / 'study') == ledger(alone)
  assert any('parts' in row for row in ledger(alone))
  assert points == evaluate.points and examples == evaluate.examples
  assert "did you mean 'sobol'" in error


def check_killed(tmp_path, killed: int) -> None:
  """The other process ends by itself, and the same command goes on."""
  path = tmp_path / 'study' / 'trials.jsonl'
  running = start([__file__, tmp_path, '0.2'], tmp_path, 2, 4)
  while not path.exists() or len(path.read_text().splitlines()) < 4:
    assert all(process.poll() is None for process in running)
    time.sleep(0.05)
  running[killed].kill()
  assert running[1 - killed].wait(120) != 0
  before = path.read_text().splitlines()
  assert finish(start([__file__, tmp_path], tmp_path, 2, 4), tmp_path) == [0, 0]
  assert path.read_text().splitlines()[: len(before)] == before
  run_alone(tmp_path / 'alone', name='study', **SOBOL)
  assert ledger(tmp_path / 'study') == ledger(tmp_path / 'alone')


if __name__ == '__main__':
  main(*sys.argv[1:])
