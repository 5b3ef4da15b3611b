"""The tiny pipeline, killed with SIGKILL at random moments, ends where an unbroken run ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time

from optimer_jax.checkpoints import store
from optimer_jax.files import read_json, read_jsonl

KILLS = 10


def command(directory, cache):
  return [
    *(sys.executable, '-m', 'optimer_jax', 'pipeline', '--gin_file=runs/quickstart_tiny.gin'),
    f"--gin.DIRECTORY='{directory}'",
    f"--gin.Run.cache='{cache}'",
    '--gin.STEPS=24',
    '--gin.TRIALS=5',
    '--gin.TrainConfig.save_every=4',
  ]


def outcome(directory):
  """Everything that must not depend on kills."""
  trials = read_jsonl(directory / 'studies' / 'default' / 'trials.jsonl')
  parts = ['base', 'merged/optimer']
  for name in ('north', 'east', 'south', 'west'):
    parts += [f'cpt/{name}', f'vectors/{name}']
  return {
    'fingerprints': {part: store.read_manifest(directory / part).fingerprint for part in parts},
    'trials': [(t['trial'], t['sampler'], t['weights'], t['objective']) for t in trials],
    'test': read_json(directory / 'evaluations' / 'exported.json')['scores'],
    'geometry': read_json(directory / 'vectors' / 'geometry.json'),
    'steps': {
      name: [
        row['loss'] for row in read_jsonl(directory / f'cpt/{name}/metrics.jsonl') if 'loss' in row
      ]
      for name in ('north', 'east', 'south', 'west')
    },
  }


def test_killed_at_random_moments(tmp_path):
  whole, broken, cache = tmp_path / 'whole', tmp_path / 'broken', tmp_path / 'cache'
  began = time.monotonic()
  subprocess.run(command(whole, cache), check=True)
  length = time.monotonic() - began
  rng = random.Random(os.urandom(8))
  kills = []
  while True:
    with open(tmp_path / 'log', 'a') as log:
      process = subprocess.Popen(command(broken, cache), stderr=log)
    if len(kills) < KILLS:
      # Half the run at most, so that there is something left to kill.
      wait = rng.uniform(3, max(6, length / 2))
      try:
        process.wait(wait)
      except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills.append(round(wait, 2))
        continue
    else:
      process.wait()
    assert process.returncode == 0, (kills, (tmp_path / 'log').read_text()[-3000:])
    break
  print('killed after', kills, 's')
  assert kills
  assert json.dumps(outcome(whole)) == json.dumps(outcome(broken)), kills
  left = [path for path in broken.rglob('*tmp*') if path.is_dir()]
  assert not left, left
