"""The tiny pipeline with its arrays in a bucket, killed in the middle of writes, and two processes.

All ends, bit for bit, where it ends with the arrays beside the manifests.
"""

import json
import os
import re
import signal
import subprocess

import gcs
import pytest
import test_kills
import test_training_kills
import together

from optimer_jax.checkpoints import store
from optimer_jax.files import read_jsonl

STEPS = 8
# The process is killed when it writes the so-manieth object whose name begins so.
KILLS = [
  *[('base/', 1), ('base/', 12), ('training/north/state/4/', 1), ('training/north/state/4/', 9)],
  *[('training/north/state/8/commit_success.txt', 1), ('snapshots/north/', 9), ('cpt/north/', 40)],
  *[('training/west/state/4/state/', 7), ('vectors/east/', 20), ('merged/optimer/', 20)],
]


@pytest.fixture(scope='module')
def bucket():
  with gcs.served() as found:
    yield found


def kill_at(bucket: gcs.Bucket, prefix: str, number: int, pids: list[int]) -> list[str]:
  """Kills one of `pids` with SIGKILL when it writes that object; what was written till then."""
  seen = []

  def look(name):
    if name.startswith(prefix):
      seen.append(name)
      if len(seen) == number:
        os.kill(pids[-1], signal.SIGKILL)

  bucket.tell(look)
  return seen


def test_the_tiny_pipeline(tmp_path, bucket):
  command = lambda name: [
    *test_kills.command(tmp_path / name, tmp_path / 'cache'),
    *(f'--gin.STEPS={STEPS}', '--gin.TRIALS=3', '--gin.TrainConfig.keep_every=4'),
  ]
  subprocess.run(command('local'), check=True)
  there = [*command('there'), f"--gin.Run.arrays='{bucket.url}/runs'"]
  for prefix, number in KILLS:
    process = subprocess.Popen(there)
    seen = kill_at(bucket, f'runs/{prefix}', number, [process.pid])
    assert process.wait() == -signal.SIGKILL, (prefix, len(seen))
  bucket.tell(lambda name: None)
  subprocess.run(there, check=True)
  expected, found = (test_kills.outcome(tmp_path / name) for name in ('local', 'there'))
  assert json.dumps(found) == json.dumps(expected)
  # The bucket has what the manifests name and nothing else; the run has no arrays.
  manifests = [*(tmp_path / 'there').glob('*/**/manifest.json')]
  named = {store.read_manifest(path.parent).arrays for path in manifests}
  folders = {re.sub('/[^/]*$', '', re.sub('/state/.*', '/state', x)) for x in bucket.names()}
  assert {f'{bucket.url}/{x}'.removesuffix('/state') for x in folders} == named
  assert len(named) == len(manifests) > 12
  assert not [*(tmp_path / 'there').rglob('leaves'), *(tmp_path / 'there').rglob('state')]


def test_two_processes(tmp_path, bucket):
  """Each saves its own shards; one of them is killed in a save, and the other ends with it."""
  local, there, arrays = tmp_path / 'local', tmp_path / 'there', f'{bucket.url}/two'
  for directory in (local, there):
    directory.mkdir()
  start = lambda directory, *more: test_training_kills.start(
    directory, test_training_kills.TWO, 12, *more
  )
  assert together.finish(start(local), local) == [0, 0]
  for prefix, number in [('state/3/', 3), ('state/7/', 9)]:
    started = start(there, arrays)
    seen = kill_at(bucket, f'two/{prefix}', number, [process.pid for process in started])
    assert started[1].wait(240) == -signal.SIGKILL
    started[0].kill()
    started[0].wait()
    assert not [x for x in bucket.names(f'two/{prefix}') if x.endswith('commit_success.txt')], seen
  shards = kill_at(bucket, 'two/state/', -1, [])
  assert together.finish(start(there, arrays), there) == [0, 0]
  print(len(shards), 'objects in the states')
  for process in range(2):
    assert any(f'ocdbt.process_{process}/' in name for name in shards)
  (expected, losses), (found, found_losses) = map(test_training_kills.outcome, (local, there))
  assert found_losses == losses and len(losses) == 12
  assert {name: leaf.tobytes() for name, leaf in found.items()} == {
    name: leaf.tobytes() for name, leaf in expected.items()
  }
  assert 'resumed at step 6' in (there / '0.log').read_text()
  assert len(read_jsonl(there / 'run' / 'metrics.jsonl')) == 12
