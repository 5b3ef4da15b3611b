"""Three workers and their server, each of them killed with SIGKILL at random moments."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from test_together import check_killed

from optimer_jax.files import read_json, read_jsonl
from optimer_jax.search.serve import serving
from optimer_jax.search.study import StudyConfig

RUNS, WORKERS, TRIALS, KILLS = 10, 3, 12, 3
SECONDS, LEASE = 1.0, 3.0  # Of an evaluation; without a sign of life.

PROCESS = textwrap.dedent("""
  import os, sys, time
  sys.path.insert(0, sys.argv[1])
  import jax
  jax.config.update('jax_compilation_cache_dir', sys.argv[3])
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  from pathlib import Path
  from test_study import NAMES, PARAMETERS, TASKS, Evaluate
  from optimer_jax.files import append_jsonl
  from optimer_jax.search import serve, workers
  from optimer_jax.search.study import Study, StudyConfig
  directory, role = Path(sys.argv[2]), sys.argv[4]
  config = StudyConfig(trials=int(sys.argv[5]))
  (directory / f'{role}.ready').write_text(str(os.getpid()))
  if role == 'server':
    serve.serve(directory, config, '127.0.0.1', None, lease=float(sys.argv[7]))
    sys.exit()
  study = Study(config, PARAMETERS, dict.fromkeys(TASKS, 'data'), 'pool')
  def evaluate(point, **asked):
    append_jsonl(directory / f'{role}.asked', {'at': time.time(), 'point': dict(point)})
    time.sleep(float(sys.argv[6]))
    return Evaluate()(point, **asked)
  while not (directory / 'server.json').exists():
    time.sleep(0.1)
  workers.work(directory, study, evaluate, (), role, beat=0.5)
""")


SLICE = textwrap.dedent("""
  import json, sys
  sys.path.insert(0, sys.argv[1])
  import jax
  jax.distributed.initialize(f'127.0.0.1:{sys.argv[4]}', 2, int(sys.argv[3]))
  from pathlib import Path
  from test_study import PARAMETERS, TASKS, Evaluate
  from optimer_jax.errors import UserError
  from optimer_jax.search.study import Study, StudyConfig
  from optimer_jax.search.together import led
  from optimer_jax.search.workers import work
  study = Study(StudyConfig(trials=5), PARAMETERS, dict.fromkeys(TASKS, 'data'), 'pool')
  # Only process 0 reads and writes files.
  directory, evaluate = Path(sys.argv[2]) / ('' if sys.argv[3] == '0' else 'nowhere'), Evaluate()
  best = led(lambda evaluate: work(directory, study, evaluate, (), 'slice'), evaluate)
  def fail(evaluate):
    raise UserError('as process 0 says')
  try:
    led(fail, evaluate)
  except UserError as error:
    print(json.dumps([evaluate.points, best['weights'], evaluate.examples, str(error)]))
""")


def test_the_processes_of_a_slice_evaluate_together(tmp_path):
  with serving(tmp_path, StudyConfig(trials=5)):
    arguments = [sys.executable, '-c', SLICE, str(Path(__file__).parents[1]), str(tmp_path)]
    with socket.socket() as found:
      found.bind(('127.0.0.1', 0))
      port = str(found.getsockname()[1])
    processes = [
      subprocess.Popen([*arguments, str(i), port], stdout=subprocess.PIPE, text=True)
      for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]
  assert said[0] == said[1]
  points, weights, _, error = json.loads(said[0])
  assert len(points) == len(read_jsonl(tmp_path / 'trials.jsonl')) == 5
  assert weights == read_json(tmp_path / 'best.json')['weights']
  assert error == 'as process 0 says' and not (tmp_path / 'nowhere').exists()


@pytest.mark.parametrize('killed', [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_nothing_is_lost(tmp_path, killed):
  check_killed(tmp_path, killed)


def start(directory: Path, cache: Path, role: str) -> subprocess.Popen:
  arguments = [str(directory), str(cache), role, str(TRIALS), str(SECONDS), str(LEASE)]
  with open(directory / f'{role}.log', 'a') as log:
    here = str(Path(__file__).parents[1])
    return subprocess.Popen([sys.executable, '-c', PROCESS, here, *arguments], stderr=log)


def broken(directory: Path, cache: Path, rng: random.Random) -> dict:
  """One study in which every process is killed at least once; what came of it."""
  directory.mkdir()
  roles = ['server', *(f'worker-{i}' for i in range(WORKERS))]
  path, began = directory / 'trials.jsonl', time.monotonic()
  running = {role: start(directory, cache, role) for role in roles}
  killed, back = dict.fromkeys(roles, 0), {}
  doom = {}  # When each is killed, from when it has loaded what it needs.
  while any(role in back or running[role].poll() is None for role in roles[1:]):
    assert time.monotonic() - began < 600, logs(directory)
    time.sleep(0.05)
    now, late = time.monotonic(), len(read_jsonl(path)) >= TRIALS - 3
    for role in roles:
      if role in back:
        if back[role] <= now:
          running[role] = start(directory, cache, role)
          del back[role]
        continue
      ready = directory / f'{role}.ready'
      if role not in doom and ready.exists() and ready.read_text() == str(running[role].pid):
        doom[role] = now + rng.uniform(0.0, 8.0)
      due = now >= doom.get(role, math.inf) or (late and not killed[role])
      if due and killed[role] < KILLS and running[role].poll() is None:
        running[role].kill()
        running[role].wait()
        killed[role] += 1
        doom.pop(role, None)
        # Half of the workers come back at once, and half when others have taken their trials.
        away = role != 'server' and rng.random() < 0.5
        back[role] = now + (2 * LEASE if away else 0.0)
  for role in roles[1:]:
    assert running[role].returncode == 0, (role, logs(directory))
  seconds = time.monotonic() - began
  if 'server' in back:
    running['server'] = start(directory, cache, 'server')
  running['server'].send_signal(signal.SIGTERM)
  running['server'].wait(60)

  rows, best = read_jsonl(path), read_json(directory / 'best.json')
  numbers = [row['trial'] for row in rows]
  text = path.read_text().splitlines()
  assert len(text) - len(rows) <= sum(killed.values())  # Torn lines, if any.
  asked = [row['point'] for role in roles[1:] for row in read_jsonl(directory / f'{role}.asked')]
  unknown = [row for row in rows if row['weights'] not in asked and row['seconds'] > 0]
  # What is suggested again is not evaluated again, and says so.
  points = [str(row['weights']) for row in rows if row['seconds'] > 0]
  return {
    'kills': sum(killed.values()),
    'killed': killed,
    'trials': len(rows),
    'lost': len(set(range(1, TRIALS + 1)) - set(numbers)),
    'twice': len(numbers) - len(set(numbers)) + len(points) - len(set(points)),
    'in_order': numbers == list(range(1, TRIALS + 1)),
    'never_evaluated': len(unknown),
    'evaluations': len(asked),
    'last': rows[-1]['sampler'],
    'counted': best['evaluations'],
    'seconds': round(seconds, 1),
  }


def logs(directory: Path) -> str:
  return '\n'.join(f'{path.name}: {path.read_text()[-2000:]}' for path in directory.glob('*.log'))


def test_ten_studies_of_killed_workers_and_servers(tmp_path):
  seed = int(os.environ.get('SEED', np.random.SeedSequence().generate_state(1)[0]))
  rng = random.Random(seed)
  runs = [broken(tmp_path / f'run-{i}', tmp_path / 'cache', rng) for i in range(RUNS)]
  total = lambda key: sum(run[key] for run in runs)
  figures = {
    'seed': seed,
    'runs': RUNS,
    'trials_asked_for': RUNS * TRIALS,
    'trials': total('trials'),
    'lost': total('lost'),
    'twice': total('twice'),
    'evaluations': total('evaluations'),
    'kills': total('kills'),
    'kills_of_servers': sum(run['killed']['server'] for run in runs),
    'seconds': [run['seconds'] for run in runs],
  }
  print(json.dumps(figures))
  for run in runs:
    assert run['in_order'] and run['trials'] == run['counted'] == TRIALS, run
    assert not run['lost'] and not run['twice'] and not run['never_evaluated'], run
    assert run['last'] == 'surrogate' and min(run['killed'].values()) >= 1, run
