"""Launchers that can run here, from end to end: XManager, and a pod's command as GKE starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.description import jobs, read
from launch.manifests import manifests
from optimer_jax.files import read_json, read_jsonl

ROOT = Path(__file__).parents[2]
TINY = """
name: tiny
gin_files: [runs/quickstart_tiny.gin]
bindings:
  - STEPS = 12
  - TRIALS = 6
  - TrainConfig.warmup = 2
  - TrainConfig.evaluate_every = 12
  - "Run.expect = 'two  blanks, \\"quotes\\", $HOME, `ls`'"
image: registry/optimer:1
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
  """Of a person who never launched anything: XManager keeps its database at home."""
  (folder / 'home').mkdir(exist_ok=True)
  kept = {k: v for k, v in os.environ.items() if k not in ('JAX_PLATFORMS', 'XLA_FLAGS')}
  return {**kept, 'HOME': str(folder / 'home'), 'OPTIMER_CACHE': str(folder / 'cache'), **more}


def xmanager(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
  script = ROOT / 'launch' / 'xm_launch.py'
  return subprocess.run(
    [str(Path(sys.executable).parent / 'xmanager'), 'launch', str(script), '--', *arguments],
    cwd=folder,
    env=environment(folder),
    text=True,
    capture_output=True,
    timeout=1500,
  )


def test_xmanager_runs_the_tiny_pipeline_and_fails_with_a_unit(tmp_path):
  run = tmp_path / 'run'
  path = tmp_path / 'tiny.yaml'
  text = f'{TINY}directory: {run}\nstages: {{search: {{workers: 2}}}}\n'

  path.write_text(f'{text}datasets: [north]\n'.replace('STEPS = 12', 'BATCH = no'))
  done = xmanager(tmp_path, '--description=tiny.yaml')
  assert done.returncode != 0 and not run.exists()

  # A unit that fails ends the experiment, and the next stage is not begun.
  begun = run / 'training' / 'east' / 'run.json'
  begun.parent.mkdir(parents=True)
  begun.write_text('{"dataset": "another"}')
  path.write_text(text)
  done = xmanager(tmp_path, '--description=tiny.yaml', '--at_once=2', '--stage=import')
  assert done.returncode == 0, done.stderr[-2000:]
  done = xmanager(tmp_path, '--description=tiny.yaml', '--at_once=2')
  assert done.returncode == 1
  assert 'xm_launch: a work unit failed' in done.stderr
  assert not (run / 'vectors').exists()

  begun.unlink()
  done = xmanager(tmp_path, '--description=tiny.yaml', '--at_once=2')
  assert done.returncode == 0, done.stderr[-2000:]
  assert sorted(each.name for each in (run / 'cpt').iterdir()) == ['east', 'north', 'south', 'west']
  rows = read_jsonl(run / 'studies' / 'default' / 'trials.jsonl')
  assert [row['trial'] for row in rows] == [1, 2, 3, 4, 5, 6]
  assert set(read_json(run / 'studies' / 'default' / 'best.json')['weights']) == {
    *('north', 'east', 'south', 'west')
  }
  assert (run / 'report' / 'index.html').exists() and (run / 'export' / 'optimer').exists()
  # Quotes, blanks and dollars arrived as they are.
  assert 'two  blanks, \\"quotes\\", $HOME, `ls`' in json.dumps((run / 'operative.gin').read_text())


def test_a_pods_command_on_two_hosts_is_stopped_and_goes_on(tmp_path):
  """As GKE starts the hosts of a slice, though on CPU: there is no TPU here."""
  path = tmp_path / 'tiny.yaml'
  mount = str(tmp_path / 'runs')
  more = f'directory: {mount}/tiny\nstages: {{train: {{topology: "v5e:2x4"}}}}\n'
  text = TINY.replace('STEPS = 12', 'STEPS = 40') + more + f'gke: {{mount: {mount}}}\n'
  path.write_text(f'{text}datasets: [north]\n')
  found = read(path)
  job_set = manifests(found, jobs(found, ['train'])[0][0])[0]
  (replicated,) = job_set['spec']['replicatedJobs']
  spec = replicated['template']['spec']
  hosts = spec['completions']
  (container,) = spec['template']['spec']['containers']
  container = yaml.safe_load(yaml.safe_dump(container))
  own = {each['name']: each['value'] for each in container['env']}
  (saved,) = [r['onExitCodes']['values'] for r in spec['podFailurePolicy']['rules'][1:]]

  def start(port: int) -> list[subprocess.Popen]:
    bin_folder = Path(sys.executable).parent
    return [
      subprocess.Popen(
        [part.replace('$$(', '$(') for part in container['command']],
        env=environment(
          tmp_path,
          **own,
          PATH=f'{bin_folder}:{os.environ["PATH"]}',
          TPU_WORKER_HOSTNAMES=','.join(['localhost'] * hosts),
          TPU_WORKER_ID=str(number),
          JAX_COORDINATOR_PORT=str(port),
          XLA_FLAGS='--xla_force_host_platform_device_count=4',
        ),
        stderr=subprocess.PIPE,
        text=True,
      )
      for number in range(hosts)
    ]

  metrics = Path(mount) / 'tiny' / 'training' / 'north' / 'metrics.jsonl'

  def steps() -> list[int]:
    return [row['step'] for row in read_jsonl(metrics) if 'loss' in row]

  assert hosts == 2
  processes = start(8476)
  began = time.monotonic()
  while len(steps()) < 5:
    assert all(process.poll() is None for process in processes), [
      process.communicate()[1][-2000:] for process in processes
    ]
    assert time.monotonic() - began < 600
    time.sleep(0.1)
  for process in processes:
    process.send_signal(signal.SIGTERM)
  said = [process.communicate()[1] for process in processes]
  assert [process.returncode for process in processes] == saved * hosts, said
  reached = max(steps())
  assert reached < 40

  processes = start(8477)
  said = [process.communicate(timeout=1200)[1] for process in processes]
  assert [process.returncode for process in processes] == [0] * hosts, said
  # No step twice, none left out: it went on where it was stopped.
  assert steps() == [*range(1, 41)]
  facts = read_json(Path(mount) / 'tiny' / 'cpt' / 'north' / 'manifest.json')['facts']
  assert facts['settings']['steps'] == 40


@pytest.mark.parametrize('arguments', [['launch.gke'], ['launch.tpu_vm']])
def test_help_says_how(arguments):
  done = subprocess.run(
    [sys.executable, '-m', *arguments, '--help'], cwd=ROOT, text=True, capture_output=True
  )
  assert done.returncode == 0 and f'python -m {arguments[0]} launch/runs' in done.stdout
