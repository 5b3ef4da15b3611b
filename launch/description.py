"""A run as every launcher takes it: what is started, on which slices, in which order.

A description is a YAML file, such as launch/runs/paper_27b.yaml:

    name: paper-27b                  # of what is submitted
    gin_files: [runs/paper_27b.gin]
    bindings: ["TRIALS = 30"]        # more gin; may be left out, like everything below
    directory: /runs/paper-27b       # RUN on the machines; default: as gin has it
    arrays: gs://bucket/paper-27b    # where RUN's parameters and states are; default: in RUN
    model: 27b                       # of `optimer plan`; without it, nothing is checked
    image: registry/optimer:1
    spot: true
    datasets: [ja, zh]               # one training job each; default: all of the run, where its
                                     # text can be read by who launches it
    studies: {worst: ["Objective.kind = 'worst'"]}  # one search each; default: the run's
    stages:
      train: {topology: v5e:16x16}   # 2xv5e:16x16 are two slices
      search: {topology: v5e:8x8, workers: 4}
      extract: {cpus: 16, memory_gib: 64}
    gke: {...}                       # see `manifests.Cluster`
    tpu_vm: {...}                    # see `tpu_vm.Site`

`jobs` turns it into `Job`s: one command line each, run on every host of its slices.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from optimer_jax.configs import check_types, nearest, read_run
from optimer_jax.errors import UsageError
from optimer_jax.planning.topologies import Topology, sold
from optimer_jax.run import Run

# In the order in which they are run; jobs of one stage run side by side.
STAGES = ('import', 'train', 'extract', 'search', 'merge', 'export', 'evaluate', 'report')
SERVE = 'serve'
PORT = 8765  # of `optimer serve`, where machines call it by name


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a stage runs on.

  Attributes:
    topology: the slices; None for a machine without a TPU.
    workers: of a search; several have a server (`optimer serve`), one has none.
    cpus, memory_gib: of a machine without a TPU.
  """

  topology: Topology | None = None
  workers: int = 1
  cpus: int = 8
  memory_gib: int = 32


@dataclasses.dataclass(frozen=True)
class Description:
  """See the module's docstring; `gke` and `tpu_vm` are read by these launchers."""

  name: str
  gin_files: tuple[str, ...]
  bindings: tuple[str, ...] = ()
  directory: str = ''
  arrays: str = ''
  model: str = ''
  image: str = ''
  spot: bool = False
  datasets: tuple[str, ...] = ()
  studies: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  stages: Mapping[str, Stage] = dataclasses.field(default_factory=dict)
  gke: Mapping = dataclasses.field(default_factory=dict)
  tpu_vm: Mapping = dataclasses.field(default_factory=dict)

  @property
  def gin(self) -> tuple[str, ...]:
    """All bindings, those of the description's own fields last."""
    own = {'Run.directory': self.directory, 'Run.arrays': self.arrays}
    return (*self.bindings, *(f'{key} = {value!r}' for key, value in own.items() if value))

  def stage(self, name: str) -> Stage:
    return self.stages.get(name, Stage())


@dataclasses.dataclass(frozen=True)
class Job:
  """One command on all hosts of some slices, or on one machine without a TPU.

  Attributes:
    name: short, and of one job of the description only.
    stage: of `STAGES`, or SERVE, which runs until the workers of its study are done.
    command: the process's arguments.
    on: what it runs on.
    study: '' for that of gin.
  """

  name: str
  stage: str
  command: tuple[str, ...]
  on: Stage
  study: str = ''


def read(path: Path | str) -> Description:
  """Reads a description.

  Raises:
    UsageError: it is missing or malformed; the name that is wrong, and the nearest that is known.
  """
  try:
    raw = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UsageError(f'there is no description {path}: see launch/runs for examples') from None
  except yaml.YAMLError as error:
    raise UsageError(f'{path} is no YAML: {" ".join(str(error).split())}') from None
  if not isinstance(raw, dict):
    raise UsageError(f'{path} must have keys and values, as in name: mine')
  raw = {**raw, 'stages': {**(raw.get('stages') or {})}}
  for name, stage in raw['stages'].items():
    check_names([name], STAGES, f'{path}: stage')
    stage = made(Stage, stage or {}, f'{path}: stages: {name}')
    topology = sold(str(stage.topology)) if stage.topology else None
    raw['stages'][name] = dataclasses.replace(stage, topology=topology)
  for key in ('gin_files', 'bindings', 'datasets'):
    raw[key] = _strings(raw.get(key) or (), f'{path}: {key}')
  studies = raw.get('studies') or {}
  if not isinstance(studies, dict):
    raise UsageError(f'{path}: studies must have a name and a list of bindings each')
  raw['studies'] = {
    name: _strings(each or (), f'{path}: studies: {name}') for name, each in studies.items()
  }
  found = made(Description, raw, str(path))
  if not re.fullmatch(r'[a-z]([a-z0-9-]{0,30}[a-z0-9])?', found.name):
    raise UsageError(
      f'{path}: the name {found.name!r} must have small letters, digits and - only, at most 32, '
      'and begin with a letter'
    )
  if not found.gin_files:
    raise UsageError(f'{path}: gin_files must name a run, as in [runs/folder.gin]')
  return found


def made(kind: type, values: object, where: str):
  """A dataclass of these values.

  Raises:
    UsageError: a name is unknown, missing, or its value of another type.
  """
  if not isinstance(values, Mapping):
    raise UsageError(f'{where}: write names and values, as in {{topology: v5e:16x16}}')
  fields = {field.name: field for field in dataclasses.fields(kind)}
  check_names(values, fields, where)
  for name, field in fields.items():
    required = field.default is field.default_factory is dataclasses.MISSING
    if required and name not in values:
      raise UsageError(f'{where}: {name} must be given')
  found = kind(**values)
  try:
    check_types(found)
  except UsageError as error:
    raise UsageError(f'{where}: {error}') from None
  for name, value in values.items():
    if fields[name].type is int and value < 1:
      raise UsageError(f'{where}: {name} is {value}, but must be 1 or more')
  return found


def check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
  """UsageError if a name is unknown, with the nearest one."""
  known = list(known)
  for name in names:
    if name not in known:
      raise UsageError(f'{where}: {name!r} is unknown{nearest(str(name), known)}')


def _strings(values: object, where: str) -> tuple[str, ...]:
  if isinstance(values, str) or not all(isinstance(value, str) for value in values):
    raise UsageError(f"{where} must be a list of strings, as in ['TRIALS = 30']")
  return tuple(values)


def run_of(description: Description, study: str = '') -> Run:
  """The run that gin describes, as one of the description's studies sees it.

  Where the data sets' text is on other machines, a run without data sets: the description has
  their names.
  """
  bindings = [*description.gin, *_of(description, study)]
  try:
    return read_run(description.gin_files, bindings)
  except UsageError:
    if not description.datasets:
      raise
    return read_run(description.gin_files, [*bindings, 'Run.datasets = ()'])


def _of(description: Description, study: str) -> list[str]:
  """The bindings of one of its studies; none for that of gin."""
  return [*description.studies[study], f'StudyConfig.name = {study!r}'] if study else []


def jobs(description: Description, stages: Sequence[str] = STAGES) -> list[list[Job]]:
  """The jobs of these stages: lists whose members may run side by side, in the order to run them.

  A server stands in the list of its workers, before them.

  Raises:
    UsageError: a name in the description is unknown, or gin cannot be read.
  """
  check_names(stages, STAGES, 'stage')
  run = run_of(description)
  if run.names:
    check_names(description.datasets, run.names, f'{description.name}: datasets')
  datasets = description.datasets or run.names
  studies = [*description.studies] or ['']
  for study in description.studies:
    run_of(description, study)

  def job(stage: str, of: str = '', arguments: Sequence[str] = (), study: str = '') -> Job:
    return Job(
      name=name_of(stage, of),
      stage=stage,
      command=_command(description, stage, arguments, study),
      on=Stage() if stage == SERVE else description.stage(stage),
      study=study,
    )

  def searches(study: str) -> list[Job]:
    workers = description.stage('search').workers
    if workers == 1:
      return [job('search', study, study=study)]
    names = [f'worker-{number}' for number in range(1, workers + 1)]
    return [
      job(SERVE, study, study=study),
      *(job('search', f'{study}-{n}' if study else n, [f'--worker={n}'], study) for n in names),
    ]

  def of_stage(stage: str) -> list[Job]:
    if stage == 'train':
      return [job(stage, name, [f'--dataset={name}']) for name in datasets]
    if stage == 'search':
      return [each for study in studies for each in searches(study)]
    if stage in ('merge', 'export'):
      return [job(stage, s, [f'--name={s}'] if s else (), s) for s in studies]
    if stage == 'evaluate' and description.studies:
      cpt = [f'cpt-{name}' for name in datasets]
      models = ['base', *cpt, 'average', *(f'merged/{study}' for study in studies)]
      return [job(stage, '', [f'--model={model}' for model in models])]
    return [job(stage)]

  found = [of_stage(stage) for stage in STAGES if stage in stages]
  names = [job.name for step in found for job in step]
  if twice := [name for name in names if names.count(name) > 1]:
    raise UsageError(f'{description.name}: two jobs would be called {twice[0]}: rename one')
  return found


def addressed(job: Job, server: str) -> tuple[str, ...]:
  """The job's command, with where the server listens, or its workers find it: `server`, a name."""
  if job.stage == SERVE:
    return (*job.command, '--host=0.0.0.0', f'--port={PORT}')
  if job.stage == 'search' and job.on.workers > 1:
    return (*job.command, f'--server={server}:{PORT}')
  return job.command


def check_shared(description: Description, mount: str) -> None:
  """UsageError without an image, or if RUN is not in the directory that machines share."""
  if not description.image:
    raise UsageError(f'{description.name}: image must be given: see launch/README.md')
  if not f'{description.directory}/'.startswith(f'{mount}/'):
    raise UsageError(
      f'{description.name}: directory is {description.directory!r}, but must be in what the '
      f'machines share, as in {mount}/{description.name}'
    )


def name_of(stage: str, of: str = '') -> str:
  """A job's name; `of` is the data set, study or worker."""
  return label(f'{stage}-{of}' if of else stage)


def label(name: str) -> str:
  """The name with small letters, digits and - only."""
  return re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')


def _command(
  description: Description, stage: str, arguments: Sequence[str], study: str
) -> tuple[str, ...]:
  return (
    'optimer',
    stage,
    *(f'--gin_file={file}' for file in description.gin_files),
    *(f'--gin_bindings={binding}' for binding in (*description.gin, *_of(description, study))),
    *arguments,
  )
