"""A description, the jobs that it becomes, and their manifests: valid for every slice."""

import copy
import dataclasses
import functools
import itertools
import json
import os
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from launch import description as descriptions
from launch import fit, gke
from launch import manifests as made
from launch.description import STAGES, Stage, jobs, read
from optimer_jax.planning.plan import Plan
from optimer_jax.planning.topologies import known, sold

ROOT = Path(__file__).parents[1]
SCHEMAS = ROOT.parent / 'shared' / 'schemas'  # of JobSet and Kueue, as they are published
GOLDEN = ROOT / 'tests' / 'golden' / 'launch'
TINY = """
name: mine
gin_files: [runs/quickstart_tiny.gin]
directory: /runs/mine
image: registry/optimer:1
"""


@pytest.fixture
def write(tmp_path_factory):
  """Writes a description of the tiny run, with more lines, and reads it."""
  path = tmp_path_factory.mktemp('description') / 'mine.yaml'

  def write(more='', text=TINY):
    path.write_text(text + more)
    return read(path)

  return write


def objects(found, stages=STAGES):
  return [o for step in jobs(found, stages) for job in step for o in made.manifests(found, job)]


def strictly(schema):
  """The schema of a custom resource, with everything that it does not name refused."""
  if isinstance(schema, list):
    return [strictly(each) for each in schema]
  if not isinstance(schema, dict):
    return schema
  if schema.get('x-kubernetes-int-or-string'):
    return {'type': ['integer', 'string']}
  new = {
    key: {name: strictly(each) for name, each in value.items()}
    if key == 'properties'
    else strictly(value)
    for key, value in schema.items()
  }
  if 'properties' in new and not schema.get('x-kubernetes-preserve-unknown-fields'):
    new.setdefault('additionalProperties', False)
  return new


def custom_schemas():
  """By version and kind, with the metadata that every object may have."""
  found = {}
  for path in SCHEMAS.glob('*.yaml'):
    crd = yaml.safe_load(path.read_text())['spec']
    for version in crd['versions']:
      schema = strictly(version['schema']['openAPIV3Schema'])
      names = {'type': 'object', 'additionalProperties': {'type': 'string'}}
      schema['properties']['metadata'] = {
        'type': 'object',
        'additionalProperties': False,
        'properties': {
          'name': {'type': 'string', 'pattern': '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'},
          'namespace': {'type': 'string'},
          'labels': names,
          'annotations': names,
        },
      }
      kind = f'{crd["group"]}/{version["name"]}', crd['names']['kind']
      found[kind] = jsonschema.Draft202012Validator(schema)
  return found


CUSTOM = custom_schemas()


def check(found):
  """Holds an object to its schema; those of custom resources where they are."""
  kind = found['apiVersion'], found['kind']
  if '.x-k8s.io/' not in kind[0]:
    kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)
  elif CUSTOM:
    CUSTOM[kind].validate(found)
  if found['kind'] == 'JobSet':  # Their schema has no more than the shape of a Job.
    for each in found['spec']['replicatedJobs']:
      check({'apiVersion': 'batch/v1', 'kind': 'Job', **each['template']})


def test_the_schemas_of_custom_resources_are_there():
  if not CUSTOM:
    pytest.skip(f'JobSets and Kueue are not held to their schemas: {SCHEMAS} is not there')
  assert {kind for _, kind in CUSTOM} == {
    'JobSet',
    'ClusterQueue',
    'LocalQueue',
    'ResourceFlavor',
  }


def test_every_slice_has_a_valid_manifest(write, refused):
  found = write('spot: true\ngke: {queue: q, hub_secret: h}\n')
  ((train, *_),) = jobs(found, ['train'])
  for one, slices in itertools.product(known(), (1, 2)):
    on = Stage(dataclasses.replace(one, slices=slices))
    job = dataclasses.replace(train, on=on)
    if slices > 1 and one.hosts == 1:
      refused(lambda job=job: made.manifests(found, job), 'GKE joins slices of several hosts only')
      continue
    (job_set,) = made.manifests(found, job)
    check(job_set)
    (replicated,) = job_set['spec']['replicatedJobs']
    assert replicated['replicas'] == slices
    spec = replicated['template']['spec']
    assert spec['parallelism'] == spec['completions'] == one.hosts
    pod = spec['template']['spec']
    chips = pod['containers'][0]['resources']['limits']['google.com/tpu']
    assert one.hosts * chips == one.chips
    shape = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
    assert [*map(int, shape.split('x'))] == [*one.sides]


FULL = """
arrays: gs://bucket/mine
spot: true
studies: {mean: [], worst: ["Objective.kind = 'worst'"]}
stages:
  train: {topology: 2xv5e:16x16}
  search: {topology: v6e:8x8, workers: 3}
  evaluate: {topology: v5p:2x2x2}
  extract: {cpus: 16, memory_gib: 100}
gke:
  {queue: team, namespace: research, hub_secret: hub, google_service_account: me@project.iam}
"""


def test_a_whole_run_is_valid_and_in_order(write):
  found = write(FULL)
  every = objects(found)
  for each in [*every, *made.setup(found)]:
    check(each)
  names = [f'{each["kind"]} {each["metadata"]["name"].removeprefix("mine-")}' for each in every]
  searches = [
    *('Deployment serve-mean', 'Service serve-mean', 'NetworkPolicy serve-mean'),
    *(f'JobSet search-mean-worker-{number}' for number in (1, 2, 3)),
  ]
  assert names == [
    'Job import',
    *(f'JobSet train-{name}' for name in ('north', 'east', 'south', 'west')),
    'Job extract',
    *searches,
    *(name.replace('mean', 'worst') for name in searches),
    *(f'Job {stage}-{study}' for stage in ('merge', 'export') for study in ('mean', 'worst')),
    'JobSet evaluate',
    'Job report',
  ]
  by_name = {each['kind'] + each['metadata']['name']: each for each in every}
  deployment = by_name['Deploymentmine-serve-worst']['spec']
  assert (deployment['replicas'], deployment['strategy']) == (1, {'type': 'Recreate'})
  # Only the workers of this study, which call it by its name, may speak to it.
  policy = by_name['NetworkPolicymine-serve-worst']['spec']
  (allowed,) = policy['ingress'][0]['from']
  job_set = by_name['JobSetmine-search-worst-worker-2']
  pod = job_set['spec']['replicatedJobs'][0]['template']['spec']['template']
  assert allowed['podSelector']['matchLabels'].items() <= pod['metadata']['labels'].items()
  other = by_name['JobSetmine-search-mean-worker-2']['metadata']['labels']
  assert not allowed['podSelector']['matchLabels'].items() <= other.items()
  assert policy['podSelector']['matchLabels'] == deployment['selector']['matchLabels']
  server = deployment['template']['spec']['containers'][0]
  command = pod['spec']['containers'][0]['command']
  assert f'--server=mine-serve-worst:{server["ports"][0]["containerPort"]}' in command
  assert f'--port={server["ports"][0]["containerPort"]}' in server['command']
  assert [part for part in command if 'worst' in part] == [
    "--gin_bindings=Objective.kind = 'worst'",
    "--gin_bindings=StudyConfig.name = 'worst'",
    '--server=mine-serve-worst:8765',
  ]


def paths(value, path=()):
  """Of all keys in a manifest that is made of lists and dictionaries."""
  if not isinstance(value, dict | list):
    return
  for key, each in value.items() if isinstance(value, dict) else enumerate(value):
    if isinstance(key, str):
      yield (*path, key)
    yield from paths(each, (*path, key))


# What stands below these is anyone's to name.
FREE = ('labels', 'annotations', 'matchLabels', 'nodeSelector', 'limits', 'requests', 'nodeLabels')


def test_a_typo_anywhere_is_caught(write):
  found = write(FULL)
  one_of_each = {each['kind']: each for each in [*objects(found), *made.setup(found)]}
  if not CUSTOM:
    one_of_each = {k: v for k, v in one_of_each.items() if '.x-k8s.io/' not in v['apiVersion']}
  missed = []
  for good in one_of_each.values():
    for *path, key in paths(good):
      free = any(each in FREE for each in path) or (
        good['kind'] == 'Service' and 'selector' in path
      )
      if key in ('apiVersion', 'kind') or free:
        continue
      bad = copy.deepcopy(good)
      parent = functools.reduce(lambda at, each: at[each], path, bad)
      parent[f'{key}x'] = parent.pop(key)
      try:
        check(bad)
        missed.append((good['kind'], *path, key))
      except (kubernetes_validate.ValidationError, jsonschema.ValidationError):
        continue
  assert not missed


CASES = {
  'v5e_two_slices': 'stages: {train: {topology: "2xv5e:16x16"}}\ngke: {queue: team}\n',
  'v6e_one_host': 'spot: true\nstages: {train: {topology: "v6e:2x2"}}\n',
  'v5p_search': 'stages: {search: {topology: "v5p:2x2x2", workers: 2}}\n',
  'setup': 'stages: {train: {topology: "v5p:4x4x4"}}\ngke: {queue: team, namespace: lab}\n',
}


@pytest.mark.parametrize('case', CASES)
def test_manifests_are_those_that_were_looked_at(case, write):
  found = write(CASES[case])
  if case == 'setup':
    text = made.as_yaml(made.setup(found))
  else:
    stage = 'search' if case == 'v5p_search' else 'train'
    first = {each['kind']: each for each in reversed(objects(found, [stage]))}
    text = made.as_yaml(first[kind] for kind in sorted(first))
  path = GOLDEN / f'{case}.yaml'
  if os.environ.get('OPTIMER_WRITE_GOLDEN'):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  assert text == path.read_text()


@pytest.mark.parametrize(
  ('name', 'nearest'),
  [
    ('v5e:3x3', 'v5e:2x4 or v5e:4x4'),
    ('v5litepod-256', 'v5e:16x16'),
    ('v5p-128', 'v5p:4x4x4'),
    ('v5p:4x4', 'v5p:2x2x4'),
    ('v6e:32x32', 'v6e:16x16'),
    ('v7:4x4', 'the nearest are v'),
    ('1xv5e:2x2', 'v5e:2x2'),
    ('tpu', 'the nearest are v'),
  ],
)
def test_slices_that_are_not_sold(name, nearest, refused):
  refused(lambda: sold(name), f'there is no slice {name!r}: the nearest are', nearest)


@pytest.mark.parametrize(
  ('more', 'sentence'),
  [
    ('stagse: {}\n', "'stagse' is unknown; did you mean stages?"),
    ('stages: {trian: {}}\n', "stage: 'trian' is unknown; did you mean train?"),
    ('stages: {train: {topolgy: v5e:2x2}}\n', "'topolgy' is unknown; did you mean topology?"),
    ('stages: {train: v5e:2x2}\n', 'stages: train: write names and values'),
    ('stages: {search: {workers: two}}\n', "workers is 'two', but must be int"),
    ('stages: {search: {workers: 0}}\n', 'workers is 0, but must be 1 or more'),
    ('stages: {train: {topology: v5e:3x3}}\n', "there is no slice 'v5e:3x3'"),
    ('datasets: [norht]\n', "'norht' is unknown; did you mean north?"),
    ('datasets: north\n', 'datasets must be a list of strings'),
    ('bindings: ["TRIALS = "]\n', 'TRIALS'),
    ('studies: [worst]\n', 'studies must have a name and a list of bindings each'),
    ('studies: {a: ["Objective.knid = \'worst\'"]}\n', "Objective has no parameter 'knid'"),
    ('studies: {a: [], A: []}\n', 'two jobs would be called'),
    ('gke: {naemspace: x}\n', "gke: 'naemspace' is unknown; did you mean namespace?"),
    ('gke: {mount: /elsewhere}\n', 'but must be in what the machines share, as in /elsewhere'),
    (f'studies: {{{"x" * 50}: []}}\n', 'names of jobs may have 46 letters'),
    ('spot: [', 'is no YAML'),
  ],
)
def test_descriptions_that_are_wrong(more, sentence, write, refused):
  refused(lambda: objects(write(more)), sentence)


@pytest.mark.parametrize(
  ('text', 'sentence'),
  [
    ('gin_files: [runs/quickstart_tiny.gin]\n', 'name must be given'),
    ('name: mine\n', 'gin_files must name a run'),
    ('name: Mine\ngin_files: [a.gin]\n', "the name 'Mine' must have small letters"),
    ('name: mine\ngin_files: runs/x.gin\n', 'gin_files must be a list of strings'),
    ('name: mine\ngin_files: [runs/quickstart_tny.gin]\n', 'did you mean runs/quickstart_tiny.gin'),
    ('[]', 'must have keys and values'),
    ('name: mine\ngin_files: [runs/quickstart_tiny.gin]\n', 'image must be given'),
  ],
)
def test_descriptions_that_say_too_little(text, sentence, write, refused):
  refused(lambda: objects(write(text=text)), sentence)


def test_bindings_come_through_yaml_and_the_cluster_as_they_are(write):
  nasty = 'Run.expect = \'two  blanks, "quotes", $HOME, $(HOME), `ls`, %, \\\\, ü\''
  found = write(f'bindings: [{yaml.safe_dump(nasty, width=10**6).strip()}]\n')
  text = made.as_yaml(objects(found, ['report']))
  (job,) = yaml.safe_load_all(text)
  command = job['spec']['template']['spec']['containers'][0]['command']
  # Kubernetes makes $( of $$(, and else would put a variable in its place.
  expanded = [re.sub(r'\$\$\(', '$(', part) for part in command]
  assert f'--gin_bindings={nasty}' in expanded
  assert not any(re.search(r'(?<!\$)\$\(', part) for part in command)
  assert descriptions.run_of(found).expect.startswith('two  blanks, "quotes", $HOME, $(HOME)')


def plan_of(case, gib):
  limit = case.topology.chip.limit_gib * 2**30
  return Plan(case, {}, gib * 2**30, 0.0, 1.0, limit, work=None, bound=None)


def test_what_does_not_fit_is_refused_unless_forced(write, refused, monkeypatch):
  found = write(
    'model: 27b\nstages: {train: {topology: "v5e:4x4"}, evaluate: {topology: "v5e:8x8"}}\n'
  )
  asked = [job for step in jobs(found) for job in step]
  assert [(case.stage, case.topology.name) for case in fit.cases(found, asked)] == [
    ('train', 'v5e:4x4'),
    ('evaluate', 'v5e:8x8'),
  ]
  monkeypatch.setattr(fit, 'line', lambda plan: plan.case.topology.name)
  seen = []

  def compile(case):
    seen.append(case.topology.name)
    return plan_of(case, 20.0 if case.stage == 'train' else 1.0)

  refused(
    lambda: fit.check_fits(found, asked, compile=compile),
    'train of 27b does not fit v5e:4x4: it needs 20.00 GiB of the 15.75 GiB of a chip',
    '--force',
  )
  assert seen == ['v5e:4x4']
  fit.check_fits(found, asked, force=True, compile=compile)
  assert seen == ['v5e:4x4', 'v5e:4x4', 'v5e:8x8']
  assert fit.cases(write('stages: {train: {topology: "v5e:4x4"}}\n'), asked) == []


KUBECTL = '''"""A cluster in a folder: what is applied, and ends as the file `ends` says."""
import json, os, pathlib, sys, yaml
here = pathlib.Path(__file__).parent
verb, *rest = sys.argv[1:]
with open(here / 'calls', 'a') as calls:
  print(' '.join([verb, *rest[:2]]), file=calls)
name = lambda kind, name: here / f'{kind.lower()}-{name}.json'
if verb == 'apply':
  for each in yaml.safe_load_all(sys.stdin):
    path = name(each['kind'], each['metadata']['name'])
    if path.exists() and each['kind'] in ('Job', 'JobSet'):
      sys.exit('field is immutable')
    path.write_text(json.dumps(each))
elif verb == 'delete':
  name(*rest[:2]).unlink(missing_ok=True)
elif verb == 'get' and name(*rest[:2]).exists():
  found = json.loads(name(*rest[:2]).read_text())
  ends = json.loads((here / 'ends').read_text())
  if end := ends.get(rest[1], ends.get('*')):
    found['status'] = {'conditions': [{'type': end, 'status': 'True'}]}
  print(json.dumps(found))
'''


@pytest.fixture
def cluster(stand_in):
  """kubectl's part played by a program that keeps objects as files: no cluster is at hand."""
  folder = stand_in('kubectl', KUBECTL)

  def ends(**how):
    (folder / 'calls').unlink(missing_ok=True)
    how = {name.replace('_', '-'): end for name, end in how.items()}
    (folder / 'ends').write_text(json.dumps(how))
    return folder

  return ends


def calls(folder, verb):
  path = folder / 'calls'
  found = path.read_text().splitlines() if path.exists() else []
  return [line for line in found if line.startswith(verb)]


def submit(found, only=None):
  for step in jobs(found, ['train', 'search']):
    names = [job.name for job in step]
    if only is None or only in names:
      gke.run_step(found, step, only, lambda: None)


def test_a_cluster_runs_stages_in_order_and_again_only_what_is_not_done(cluster, write, refused):
  found = write('stages: {search: {workers: 2}}\n')
  folder = cluster(**{'*': 'Complete', 'mine_train_east': 'Failed'})
  refused(lambda: submit(found), 'train-east: failed; see kubectl logs')
  there = {path.name for path in folder.glob('*.json')}
  assert 'job-mine-train-west.json' in there
  assert not any('search' in name for name in there)  # The next stage had to wait.

  folder = cluster(**{'*': 'Complete'})
  (folder / 'job-mine-train-east.json').write_text('{"metadata": {}}')  # of another description
  submit(found)
  assert calls(folder, 'delete job') == ['delete job mine-train-east']
  assert len(calls(folder, 'apply')) == 1 + 1 + 2  # east, the server, the workers
  # The server's objects go when all workers are done.
  assert [line.split()[1] for line in calls(folder, 'delete')][1:] == [
    'deployment',
    'service',
    'networkpolicy',
  ]
  folder = cluster(**{'*': 'Complete'})
  submit(found)
  assert not calls(folder, 'apply')


def test_one_worker_keeps_the_server_for_the_others(cluster, write):
  found = write('stages: {search: {workers: 2}}\n')
  folder = cluster(mine_search_worker_1='Complete')
  submit(found, 'search-worker-1')
  assert (folder / 'deployment-mine-serve.json').exists()
  assert not (folder / 'job-mine-search-worker-2.json').exists()
  folder = cluster(mine_search_worker_1='Complete', mine_search_worker_2='Complete')
  submit(found, 'search-worker-2')
  assert not (folder / 'deployment-mine-serve.json').exists()


def test_the_command_prints_what_it_would_submit(tmp_path, monkeypatch, capsys):
  path = str(tmp_path / 'mine.yaml')
  Path(path).write_text(TINY)
  monkeypatch.setenv('PATH', '')
  gke.main([path, '--dry-run', '--stage=train', '--job=train-north'])
  assert yaml.safe_load(capsys.readouterr().out)['metadata']['name'] == 'mine-train-north'
  for arguments, code, sentence in [
    (['--stage=train'], 1, 'launch.gke: kubectl is not installed: install it, or print'),
    (['--job=train-nort'], 2, "--job: 'train-nort' is unknown; did you mean train-north?"),
  ]:
    with pytest.raises(SystemExit) as ended:
      gke.main([path, *arguments])
    assert ended.value.code == code
    assert sentence in capsys.readouterr().err
