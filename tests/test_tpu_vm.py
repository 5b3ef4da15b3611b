"""A description on TPU virtual machines; gcloud's part is played by a program: none is at hand."""

import json
import shlex

import pytest

from launch import tpu_vm
from launch.description import jobs, read
from optimer_jax.planning.topologies import known, topology

TEXT = """
name: mine
gin_files: [runs/quickstart_tiny.gin]
bindings: ["Run.expect = 'two  blanks, \\"quotes\\", $HOME and `ls`'"]
directory: /runs/mine
image: registry/optimer:1
spot: true
datasets: [north, east]
stages: {train: {topology: "v5e:4x4"}, search: {workers: 2}}
tpu_vm: {zone: z, project: p, nfs: "10.0.0.2:/runs", helper: cpu, hub_secret: hub}
"""

# Keeps the queued resources in a folder. What they and the commands on them do next, and in turn,
# stands in `script`: {resource: [states …]} and {'ssh': [exit codes …]}.
GCLOUD = """import json, pathlib, sys
here, arguments = pathlib.Path(__file__).parent, sys.argv[1:]
with open(here / 'calls', 'a') as calls:
  print(json.dumps(arguments), file=calls)
script = json.loads((here / 'script').read_text())
def turn(key, default):
  if not script.get(key):
    return default
  now = script[key].pop(0)
  (here / 'script').write_text(json.dumps(script))
  return now
names = ('create', 'delete', 'list', 'ssh')
verb = next(each for each in arguments if each in names)
name = arguments[arguments.index(verb) + 1]
if verb == 'create':
  (here / f'qr-{name}').touch()
elif verb == 'delete':
  (here / f'qr-{name}').unlink()
elif verb == 'list':
  name = name.removeprefix('--filter=name~/').removesuffix('$')
  if (here / f'qr-{name}').exists():
    print(turn(name, 'ACTIVE'))
else:
  sys.exit(turn(f'ssh {name}', 0))
"""


@pytest.fixture
def found(tmp_path_factory):
  path = tmp_path_factory.mktemp('description') / 'mine.yaml'
  path.write_text(TEXT)
  return read(path)


@pytest.fixture
def cloud(stand_in):
  folder = stand_in('gcloud', GCLOUD)

  def begin(**script):
    (folder / 'script').write_text(json.dumps(script))
    return folder

  return begin


def calls(folder, verb):
  found = map(json.loads, (folder / 'calls').read_text().splitlines())
  return [each for each in found if verb in each]


def train(found, only='train-north'):
  (step,) = jobs(found, ['train'])
  step = [job for job in step if job.name == only]
  tpu_vm.run_step(found, tpu_vm.site_of(found), step, lambda: None)


def test_every_slice_has_a_type():
  for one in known():
    kind, _, size = one.accelerator_type.rpartition('-')
    chips = int(size) / (2 if one.kind in ('v4', 'v5p') else 1)
    assert chips == one.chips and kind in ('v4', 'v5litepod', 'v5p', 'v6e')
  assert topology('2xv5e:16x16').accelerator_type == 'v5litepod-256'
  assert topology('v5p:4x4x4').accelerator_type == 'v5p-128'


def test_bindings_come_through_three_shells(found):
  """gcloud hands the command to a shell, which hands it to docker."""
  (job, _), site = jobs(found, ['train'])[0], tpu_vm.site_of(found)
  (remote,) = [each for each in tpu_vm.run(found, site, job) if each.startswith('--command=')]
  docker = remote.rpartition(' && ')[2]
  assert shlex.split(docker)[-len(job.command) + 1 :] == [*job.command[1:]]
  assert '$HOME' in job.command[3]


def test_a_job_asks_for_its_machines_runs_and_gives_them_back(found, cloud):
  folder = cloud(**{'mine-train-north': ['ACCEPTED', 'PROVISIONING']})
  train(found)
  (create,) = calls(folder, 'create')
  assert create[3:] == [
    *('create', 'mine-train-north', '--node-id=mine-train-north'),
    *('--accelerator-type=v5litepod-16', '--runtime-version=v2-alpha-tpuv5-lite', '--spot'),
    *('--project=p', '--zone=z', '--quiet'),
  ]
  assert len(calls(folder, 'ssh')) == len(calls(folder, 'delete')) == 1
  assert not [*folder.glob('qr-*')]


def test_machines_that_are_taken_away_are_asked_for_again(found, cloud):
  # Taken away while the job runs; the second is stopped, and saves its state; the third ends.
  states = ['ACTIVE', 'SUSPENDED', 'SUSPENDED', 'ACTIVE', 'ACTIVE', 'ACTIVE']
  folder = cloud(**{'mine-train-north': states, 'ssh mine-train-north': [255, 75, 0]})
  train(found)
  assert [len(calls(folder, verb)) for verb in ('create', 'ssh', 'delete')] == [2, 3, 2]


def test_a_job_that_fails_on_its_machines_is_given_up(found, cloud, refused):
  folder = cloud(**{'ssh mine-train-north': [1] * 9})
  refused(lambda: train(found), 'train-north failed 4 times')
  assert len(calls(folder, 'ssh')) == 4
  assert [*folder.glob('qr-*')]  # to look at


def test_the_server_is_there_while_its_workers_are(found, cloud):
  folder = cloud()
  (step,) = jobs(found, ['search'])
  tpu_vm.run_step(found, tpu_vm.site_of(found), step, lambda: None)
  commands = [next(p for p in each if p.startswith('--command')) for each in calls(folder, 'ssh')]
  assert 'serve' in commands[0] and '--detach' in commands[0]
  workers = [shlex.split(each)[-2:] for each in commands[1:-1]]
  assert sorted(workers) == [[f'--worker=worker-{n}', '--server=cpu:8765'] for n in (1, 2)]
  assert commands[-1] == '--command=sudo docker stop mine-serve'


def test_the_command_prints_what_it_would_run(tmp_path, monkeypatch, capsys):
  (tmp_path / 'mine.yaml').write_text(TEXT)
  monkeypatch.setenv('PATH', '')
  path = str(tmp_path / 'mine.yaml')
  tpu_vm.main([path, '--dry-run', '--stage=train'])
  lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
  assert [next(v for v in ('create', 'ssh', 'delete') if v in line) for line in lines] == [
    *('create', 'ssh', 'delete'),
    *('create', 'ssh', 'delete'),
  ]
  with pytest.raises(SystemExit) as ended:
    tpu_vm.main([path, '--stage=train'])
  assert ended.value.code == 1
  assert 'launch.tpu_vm: gcloud is not installed' in capsys.readouterr().err
