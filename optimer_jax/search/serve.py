"""The server of a study that many workers evaluate: Vizier's service over gRPC.

Vizier keeps the study's trials in RUN/studies/NAME/study.db and hands them out; what it hands out
is decided here: the seeds, then the GP's suggestions with what others are evaluating taken into
account, and, once all of these are completed, the optimum of what was learnt.

- A trial carries what was measured (its row of the ledger) as metadata, written once and before it
  is completed, and it is completed once: nothing counts twice, whoever else evaluated it.
- Workers give signs of life while they evaluate. The trial of one that has given none for the
  length of a lease goes back to those that can be asked for. The clock is the server's alone.
- The ledger is the truth: a database that is missing, damaged or says anything else is written
  again from it.
"""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path

import grpc
import jax
from vizier._src.service import study_pb2, vizier_service_pb2, vizier_service_pb2_grpc
from vizier.service import pyvizier as vz

from optimer_jax.errors import UsageError, UserError
from optimer_jax.files import read_json, read_jsonl, write_json
from optimer_jax.progress import say
from optimer_jax.search import simplexes, vizier
from optimer_jax.search.answer import feasible, recommended
from optimer_jax.search.ledger import point_of
from optimer_jax.search.loop import finished, held, seeds_left
from optimer_jax.search.samplers import Observation
from optimer_jax.search.study import Study, StudyConfig

OWNER, STUDY = 'owners/optimer', 'workers'
OPTIONS = (('grpc.max_receive_message_length', -1), ('grpc.max_send_message_length', -1))
LEASE_S = 30.0  # Without a sign of life for so long, a worker counts as dead.
_CALLS = 256  # At once: workers that wait for a suggestion must not keep others from being heard.
_REQUESTED, _ACTIVE = study_pb2.Trial.State.REQUESTED, study_pb2.Trial.State.ACTIVE


def serve(
  directory: Path | str,
  config: StudyConfig,
  host: str,
  port: int | None,
  lease: float = LEASE_S,
) -> None:
  """Serves the study until SIGINT or SIGTERM; arguments and errors as those of `serving`."""
  jax.config.update('jax_platforms', 'cpu')  # Accelerators of this machine are for its workers.
  over = threading.Event()
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: over.set())
  with serving(directory, config, host, port, lease) as address:
    say(f'study {config.name} is served at {address}: start workers with --worker NAME')
    over.wait()


@contextlib.contextmanager
def serving(
  directory: Path | str,
  config: StudyConfig,
  host: str = '127.0.0.1',
  port: int | None = None,
  lease: float = LEASE_S,
) -> Iterator[str]:
  """Serves a study inside the block and yields HOST:PORT, which server.json keeps too.

  Args:
    directory: of the study.
    config: what the workers must have too.
    host: name or address under which the workers reach this machine.
    port: default: that of the last time, or else any.
    lease: seconds.

  Raises:
    UsageError: the sampler is not Vizier.
    UserError: the port is taken, the directory is in use or was begun with another configuration.
  """
  directory = Path(directory)
  check_sampler(config)
  if port is None:
    with contextlib.suppress(UserError):
      port = int(read_json(directory / 'server.json')['address'].rpartition(':')[2])
  with held(directory):
    service = Service(directory, config, lease)
    # Two servers of one port would each get some of the calls.
    options = (*OPTIONS, ('grpc.so_reuseport', 0))
    server = grpc.server(futures.ThreadPoolExecutor(_CALLS), options=options)
    vizier_service_pb2_grpc.add_VizierServiceServicer_to_server(service, server)
    try:
      port = server.add_insecure_port(f'{host}:{port or 0}')
    except RuntimeError:
      raise UserError(f'{host}:{port} cannot be listened to: free it, or give --port') from None
    server.start()
    address, ended = f'{host}:{port}', threading.Event()
    write_json(directory / 'server.json', {'address': address})
    watch = threading.Thread(target=_watch, args=(service, lease / 4, ended), daemon=True)
    watch.start()
    try:
      yield address
    finally:
      ended.set()
      watch.join()
      server.stop(grace=2.0).wait()


def check_sampler(config: StudyConfig) -> None:
  """UsageError if many workers cannot evaluate such a study."""
  if config.sampler != 'vizier':
    raise UsageError(
      f'study {config.name}: many workers need the sampler vizier, not {config.sampler}'
    )


def describe(study: Study) -> dict:
  """All that makes the study what it is, as JSON has it."""
  found = {
    'the vector pool': study.pool,
    'the weights': {vector: list(names) for vector, names in study.parameters.items()},
    'the tasks': dict(study.tasks),
    'trials': study.config.trials,
    **study.search,
  }
  return json.loads(json.dumps(found))


def _study_of(config: StudyConfig, described: Mapping) -> Study:
  pool, method = described['the vector pool'], described['merge method']
  return Study(config, described['the weights'], described['the tasks'], pool, method)


def _differences(there: Mapping, here: Mapping) -> list[str]:
  keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
  return [f'{key} {there.get(key)}, not {here.get(key)}' for key in keys]


def rows_of(trials: Sequence[study_pb2.Trial]) -> list[dict]:
  """The rows of the completed trials, still without their objective, in the order of their ids."""
  done = [trial for trial in trials if not is_open(trial)]
  return [note(trial, 'row') for trial in sorted(done, key=lambda trial: int(trial.id))]


def is_open(trial: study_pb2.Trial) -> bool:
  return trial.state in (_REQUESTED, _ACTIVE, study_pb2.Trial.State.STOPPING)


def note(trial: study_pb2.Trial, key: str) -> object:
  """What a trial's metadata say under `key`; None if nothing."""
  return next((json.loads(each.value) for each in trial.metadata if each.key == key), None)


def point_of_trial(trial: study_pb2.Trial) -> dict[str, float]:
  return {each.parameter_id: each.value.number_value for each in trial.parameters}


def _new(point: Mapping[str, float], notes: Mapping) -> study_pb2.Trial:
  return _proto(vz.Trial(parameters=dict(point)), notes)


def _proto(trial: vz.Trial, notes: Mapping) -> study_pb2.Trial:
  proto = vz.TrialConverter.to_proto(trial)
  for key, value in notes.items():
    proto.metadata.add(key=key, value=json.dumps(value))
  return proto


def _holds(trial: study_pb2.Trial, row: Mapping) -> bool:
  """Whether it is completed and has this row, of which the ledger has the objective besides."""
  there = note(trial, 'row') or {}
  return not is_open(trial) and all(there.get(key) == row[key] for key in ('weights', 'scores'))


def _free(trial: study_pb2.Trial, worker: str) -> bool:
  """Whether the worker may have the trial."""
  return trial.state == _REQUESTED or (trial.state == _ACTIVE and trial.client_id == worker)


def _watch(service: 'Service', pause: float, ended: threading.Event) -> None:
  while not ended.wait(pause):
    service.reclaim()


class Service:
  """Vizier's gRPC service for one study; what is not defined here is Vizier's own.

  `_asking` is held while a suggestion is made, `_writing` while a trial is looked at and changed.
  """

  def __init__(self, directory: Path, config: StudyConfig, lease: float):
    self._directory, self._config, self._lease = directory, config, lease
    self._asking, self._writing = threading.Lock(), threading.Lock()
    self._name = f'{OWNER}/studies/{STUDY}'
    self._began, self._heard = time.monotonic(), {}
    self._study = None
    try:
      self._vizier = vizier.open_service(self._path)
      there = self._find()
    except Exception:  # Whatever is wrong with the file, the ledger replaces it.
      self._remove()
      self._vizier, there = vizier.open_service(self._path), None
    if there is not None:
      self._resume(there)

  def __getattr__(self, name):
    return getattr(self._vizier, name)

  @property
  def _path(self) -> Path:
    return (self._directory / 'study.db').absolute()

  def _remove(self) -> None:
    for file in (self._path, Path(f'{self._path}-journal')):
      file.unlink(missing_ok=True)

  def _find(self) -> study_pb2.Study | None:
    """The study, if the file has it."""
    try:
      return self._vizier.datastore.load_study(self._name)
    except KeyError:  # Vizier's NotFoundError is one.
      return None

  def _resume(self, found: study_pb2.Study) -> None:
    """Goes on with a study that was served before, now with as many trials as are asked for."""
    (described,) = [json.loads(each.value) for each in found.study_spec.metadata]
    self._study = _study_of(self._config, described)
    here = describe(self._study)
    if differ := _differences({**described, 'trials': here['trials']}, here):
      self._study = None
      raise UserError(
        f'{self._path} was begun with {differ[0]}: give the study another name, or go back to what '
        'it was begun with'
      )
    found.study_spec.metadata[0].value = json.dumps(here)
    self._vizier.datastore.update_study(found)
    vizier.end_operations(self._vizier, self._name)
    self._agree(found)

  def _agree(self, found: study_pb2.Study) -> None:
    """Writes the database again if it does not hold every trial of the ledger."""
    rows = {str(row['trial']): row for row in read_jsonl(self._directory / 'trials.jsonl')}
    trials = {trial.id: trial for trial in self._vizier.datastore.list_trials(self._name)}
    if all(number in trials and _holds(trials[number], row) for number, row in rows.items()):
      return
    if trials:
      say(f'{self._path.name} does not agree with the ledger: writing it again')
      self._remove()
      self._vizier = vizier.open_service(self._path)
      self._vizier.datastore.create_study(found)
    examples = {row['trial']: row for row in read_jsonl(self._directory / 'examples.jsonl')}
    for number, row in rows.items():
      trial = vizier.trial_of(row['trial'], point_of(row), row['objective'])
      kept = examples.get(row['trial'], {}).get('per_example')
      proto = _proto(trial, {'kind': row['sampler'], 'row': row, 'examples': kept})
      proto.name = f'{self._name}/trials/{number}'
      self._vizier.datastore.create_trial(proto)

  def CreateStudy(self, request, context):
    """Begins or joins the study; INVALID_ARGUMENT says what the caller's configuration has else."""
    (asked,) = [json.loads(each.value) for each in request.study.study_spec.metadata]
    with self._asking, self._writing:
      try:
        there = describe(self._study or _study_of(self._config, asked))
      except UserError as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
      if differ := _differences(there, asked):
        context.abort(
          grpc.StatusCode.INVALID_ARGUMENT,
          f'study {self._config.name} is served with {differ[0]}: give the study another name, or '
          'start server and workers with one configuration',
        )
      found = self._vizier.CreateStudy(request)
      if self._study is None:
        self._agree(found)
        self._study = _study_of(self._config, asked)
    return found

  def SuggestTrials(self, request, context):
    """The caller's open trial, or one that nobody evaluates, or a new one.

    FAILED_PRECONDITION: there is nothing to do now, but there may be when others are done.
    INVALID_ARGUMENT: the study cannot go on, and why.
    """
    request.suggestion_count = 1
    with self._asking:
      if self._study is None:
        context.abort(grpc.StatusCode.NOT_FOUND, 'no worker has begun the study')
      trials = self._vizier.datastore.list_trials(self._name)
      new = None
      if not any(_free(trial, request.client_id) for trial in trials):
        try:
          new = self._next(trials)
        except UserError as error:
          context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if new is None:
          context.abort(grpc.StatusCode.FAILED_PRECONDITION, 'nothing to evaluate now')
      with self._writing:
        if new is not None:
          asked = vizier_service_pb2.CreateTrialRequest(parent=self._name, trial=new)
          self._vizier.CreateTrial(asked)
        self._heard[request.client_id] = time.monotonic()
        return self._vizier.SuggestTrials(request)

  def _next(self, trials: Sequence[study_pb2.Trial]) -> study_pb2.Trial | None:
    """What comes after these trials, for anyone; None if nothing does, or not yet."""
    study, rows = self._study, rows_of(trials)
    prior = read_jsonl(self._directory / 'prior.jsonl')
    every = [*prior, *rows]
    pending = [point_of_trial(trial) for trial in trials if is_open(trial)]
    seeds = seeds_left(study, prior)
    if finished(study, rows) and not pending:
      return None
    number, last = len(trials) + 1, max(study.config.trials, len(seeds) + 1)
    if number <= len(seeds):
      return _new(seeds[number - 1], {'kind': 'seed'})
    if len(rows) >= len(seeds):
      feasible(study, every)  # With nothing to stand on, stop here.
    if number < last:
      return _new(next_point(study, every, pending), {'kind': 'vizier'})
    if pending:
      return None
    found = recommended(study, every)
    predicted = {'predicted': found.predicted, 'predicted_stderr': found.stderr}
    return _new(found.point, {'kind': 'surrogate', 'predicted': predicted})

  def UpdateMetadata(self, request, context):
    """Notes of trials, each written once (ALREADY_EXISTS); one of the study is a sign of life."""
    with self._writing:
      for update in request.delta:
        if not update.HasField('trial_id'):
          self._heard[update.metadatum.key] = time.monotonic()
          return vizier_service_pb2.UpdateMetadataResponse()
        name = f'{self._name}/trials/{update.trial_id}'
        if note(self._trial(name, context), update.metadatum.key) is not None:
          context.abort(grpc.StatusCode.ALREADY_EXISTS, f'{name} has been evaluated')
      return self._vizier.UpdateMetadata(request)

  def CompleteTrial(self, request, context):
    """Completes an open trial that has its row; FAILED_PRECONDITION for any other."""
    with self._writing:  # Vizier itself says no over gRPC, and completes it all the same.
      trial = self._trial(request.name, context)
      if trial.state != _ACTIVE or note(trial, 'row') is None:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, f'{request.name} is not to be completed')
      return self._vizier.CompleteTrial(request)

  def _trial(self, name: str, context) -> study_pb2.Trial:
    try:
      return self._vizier.datastore.get_trial(name)
    except KeyError:
      context.abort(grpc.StatusCode.NOT_FOUND, f'there is no {name}')

  def reclaim(self) -> None:
    """Frees the trials of workers that have given no sign of life for the length of a lease."""
    if self._study is None:
      return
    with self._writing:
      for trial in self._vizier.datastore.list_trials(self._name):
        silent = time.monotonic() - self._heard.get(trial.client_id, self._began)
        if trial.state == _ACTIVE and silent > self._lease:
          say(
            f'study {self._config.name}: {trial.client_id} has not been heard of for '
            f'{silent:.0f} s: trial {trial.id} is free for another worker'
          )
          trial.state, trial.client_id = _REQUESTED, ''
          self._vizier.datastore.update_trial(trial)


def next_point(study: Study, rows: Sequence[Mapping], pending: Sequence[Mapping]) -> dict:
  """The GP's next candidate, while the pending ones are being evaluated."""
  objective, space, names = study.objective(rows), study.space, sorted(study.space)
  if objective is None:  # What it is measured by is being evaluated.
    observed = [Observation(point_of(row), None) for row in rows]
  else:
    observed = study.observations(rows, objective)
  others = [Observation(point, None) for point in pending]
  if study.config.simplex:
    space = simplexes.sticks(names)
    observed, others = (simplexes.on_sticks(names, each) for each in (observed, others))
  point = vizier.suggestion(
    space,
    study.config.seed,
    [(dict(trial.point), trial.objective) for trial in observed],
    [dict(trial.point) for trial in others],
  )
  return simplexes.from_sticks(names, point) if study.config.simplex else point
