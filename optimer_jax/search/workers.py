"""One of many workers on a study that `serve` serves.

    ask -> evaluate -> write the row to the trial's notes -> complete the trial -> ledger -> ask …

Whatever is killed between two of these steps is made good by whoever comes next: a worker that
comes back under its name gets its unfinished trial again, the server frees the trial of one that
stays away, and a trial that has its row is only completed. Rows go from the server into the ledger
in the order of the trials and as far as these are complete, under a lock and by whichever worker
is there; so the ledger has no gaps, and nothing twice.

Of several processes (the hosts of a slice) that are one worker, process 0 does this: see
`together`.
"""

import contextlib
import fcntl
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import grpc
import numpy as np
from vizier._src.service import study_pb2, vizier_service_pb2, vizier_service_pb2_grpc
from vizier.service import pyvizier as vz

from optimer_jax.errors import UsageError, UserError
from optimer_jax.files import append_jsonl, read_json, read_jsonl, write_json
from optimer_jax.progress import say
from optimer_jax.search import serve
from optimer_jax.search.answer import best_of, first_answer
from optimer_jax.search.ledger import append_trial, begin_with, make_row, read_ledger
from optimer_jax.search.loop import finished, known_result, line
from optimer_jax.search.objectives import losses_of
from optimer_jax.search.racing import cannot_win, estimated, rival_of
from optimer_jax.search.study import Study
from optimer_jax.search.vizier import problem_of

PATIENCE_S = 300.0  # For a server that does not answer.
BEAT_S = 5.0
_CALL_S = 120.0
_PAUSES = (0.2, 5.0)  # First and longest.
_RECONNECT = (('grpc.initial_reconnect_backoff_ms', 200), ('grpc.max_reconnect_backoff_ms', 2000))
_DOWN = (
  grpc.StatusCode.UNAVAILABLE,
  grpc.StatusCode.DEADLINE_EXCEEDED,
  grpc.StatusCode.CANCELLED,
)
_NAME = f'{serve.OWNER}/studies/{serve.STUDY}'


def work(
  directory: Path | str,
  study: Study,
  evaluate: Callable[..., Mapping],
  others: Sequence[Path],
  worker: str,
  address: str | None = None,
  patience: float = PATIENCE_S,
  beat: float = BEAT_S,
) -> dict:
  """Works on the study until it is finished, and returns the content of best.json.

  A finished study returns at once, with or without a server.

  Args:
    directory: of the study, the same for all workers and the server; holds what that of
      `run_study` holds.
    study: what is searched, and how.
    evaluate: as that of `run_study`.
    others: ledgers of other studies.
    worker: the worker's name; it stays the same when the worker comes back.
    address: HOST:PORT; default: as server.json in the directory has it.
    patience: seconds that the server may be away.
    beat: seconds between two signs of life; must be well below the server's lease.

  Raises:
    UsageError: the sampler is not Vizier, or the name is none.
    UserError: the server is away, or serves or the directory holds a study of something else, or
      every candidate is infeasible.
  """
  serve.check_sampler(study.config)
  if not re.fullmatch(r'[\w.-]+', worker):
    raise UsageError(f'--worker {worker!r}: a name has letters, digits and _ . - only')
  desk = _Desk(Path(directory), study, worker, address, patience)
  desk.join(others)
  with desk.alive(beat):
    while task := desk.next_task():
      asked = {'stop': desk.hopeless} if task['race'] else {}
      desk.hand_in(task, evaluate(dict(task['point']), **asked))
  return desk.answer()


class _Desk:
  """Where a worker's papers are: its line to the server, the trials so far, the ledger."""

  def __init__(
    self, directory: Path, study: Study, worker: str, address: str | None, patience: float
  ):
    self._directory, self._study, self._worker = directory, study, worker
    self._given, self._patience = address, patience
    self._address = self._stub = self._first = self._rival = self._objective = None
    self._prior, self._trials, self._over = [], [], False
    self._began, self._before = time.monotonic(), None

  def join(self, others: Sequence[Path]) -> None:
    """Begins the study or finds it; UserError if that on the server is another one."""
    self._directory.mkdir(parents=True, exist_ok=True)
    with _locked(self._directory):
      rows = read_ledger(self._directory / 'trials.jsonl', self._study)
      self._prior = begin_with(self._directory / 'prior.jsonl', rows, others, self._study)
    self._first = first_answer(self._study, self._prior)
    self._over = finished(self._study, rows)
    if not self._over:
      self._begin()

  def _begin(self) -> None:
    config = vz.StudyConfig.from_problem(problem_of(self._study.space))
    config.metadata['study'] = json.dumps(serve.describe(self._study))
    proto = study_pb2.Study(display_name=serve.STUDY, study_spec=config.to_proto())
    request = vizier_service_pb2.CreateStudyRequest(parent=serve.OWNER, study=proto)
    self._call('CreateStudy', request)

  @contextlib.contextmanager
  def alive(self, beat: float) -> Iterator[None]:
    """Gives a sign of life every `beat` seconds inside the block."""
    ended = threading.Event()
    request = vizier_service_pb2.UpdateMetadataRequest(name=_NAME)
    request.delta.add().metadatum.key = self._worker

    def beats():
      while not ended.wait(beat):
        with contextlib.suppress(grpc.RpcError):
          self._stub.UpdateMetadata(request, timeout=beat)

    if self._stub is not None:  # There is one only while there is work.
      threading.Thread(target=beats, daemon=True).start()
    try:
      yield
    finally:
      ended.set()

  def next_task(self) -> dict | None:
    """A trial to evaluate; None when the study is finished. Waits while others have them all."""
    pause, longest = _PAUSES
    while not self._over:
      rows = self._record()
      if finished(self._study, rows):
        break
      trial = self._ask()
      if trial is None:
        time.sleep(pause)
        pause = min(1.5 * pause, longest)
        continue
      if row := serve.note(trial, 'row'):  # Its worker was killed just before the end.
        self._complete(row)
        continue
      point = serve.point_of_trial(trial)
      task = {
        'trial': int(trial.id),
        'kind': serve.note(trial, 'kind'),
        'point': {name: point[name] for name in self._study.space},
        'predicted': serve.note(trial, 'predicted') or {},
        'race': False,
      }
      every = [*self._prior, *serve.rows_of(self._trials)]
      if result := known_result(every, task['point']):
        self.hand_in(task, result)
        continue
      if task['kind'] == 'vizier' and self._study.config.parts > 1:
        task['race'] = self._has_rival(every)
      return task
    return None

  def _has_rival(self, every: Sequence[Mapping]) -> bool:
    """Finds with whom a candidate is compared on the way."""
    self._rival, self._objective = None, self._study.objective(every)
    if self._objective is not None:
      done = [trial for trial in self._trials if not serve.is_open(trial)]
      kept = {int(trial.id): serve.note(trial, 'examples') for trial in done}
      kept = {number: examples for number, examples in kept.items() if examples}
      self._rival = rival_of(self._study, serve.rows_of(done), self._objective, kept)
    return self._rival is not None

  def hopeless(self, scores: Mapping, done: int) -> bool:
    """Whether the candidate cannot win any more, by its scores on the parts done."""
    return bool(cannot_win(self._study, self._objective, self._rival, scores, done))

  def hand_in(self, task: Mapping, result: Mapping) -> None:
    """Writes the result to the trial, and completes it, unless another worker has."""
    if set(result['scores']) != set(self._study.tasks):
      raise ValueError(f'scored {sorted(result["scores"])}, not {sorted(self._study.tasks)}')
    if 'parts' in result:
      result = estimated(self._study, self._rival, result)
    row = make_row(task['trial'], task['kind'], task['point'], result, self._study)
    row |= task['predicted']
    request = vizier_service_pb2.UpdateMetadataRequest(name=_NAME)
    for key, value in {'row': row, 'examples': result.get('per_example')}.items():
      update = request.delta.add(trial_id=str(task['trial']))
      update.metadatum.key, update.metadatum.value = key, json.dumps(value)
    try:
      self._call('UpdateMetadata', request)
    except grpc.RpcError as error:
      if error.code() not in (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.NOT_FOUND):
        raise
      # By another worker; or by this one, and the answer was lost: then it is asked for again.
      return
    self._complete(row)

  def _complete(self, row: Mapping) -> None:
    rows = [*self._prior, *serve.rows_of(self._trials), row]
    objective = self._study.objective(rows)
    request = vizier_service_pb2.CompleteTrialRequest(name=f'{_NAME}/trials/{row["trial"]}')
    if np.isnan(losses_of(row['scores'], self._study.tasks)).any():
      request.trial_infeasible = True
      request.infeasible_reason = 'a task has no finite score'
    else:  # While what the objective is measured by is being evaluated, it has no value.
      value = math.nan if objective is None else self._study.value(row, objective)
      request.final_measurement.metrics.add(metric_id='objective', value=value)
    try:
      self._call('CompleteTrial', request)
    except grpc.RpcError as error:
      if error.code() not in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND):
        raise
      return  # Another worker was faster.
    last = max(self._study.config.trials, row['trial'])
    done = len(rows) - len(self._prior)
    pace = (time.monotonic() - self._began) / max(done - (self._before or 0), 1)
    left = pace * max(last - done, 0)
    say(f'{self._worker}: {line(self._study, row, rows, objective, last, left)}')

  def _record(self) -> list[dict]:
    """Brings the ledger as far as the trials are complete without a gap; returns its rows."""
    listed = self._call('ListTrials', vizier_service_pb2.ListTrialsRequest(parent=_NAME))
    self._trials = list(listed.trials)
    done = {int(trial.id): trial for trial in self._trials if not serve.is_open(trial)}
    if self._before is None:
      self._before = len(done)
    with _locked(self._directory):
      path = self._directory / 'trials.jsonl'
      rows = read_ledger(path, self._study)
      while trial := done.get(len(rows) + 1):
        row = serve.note(trial, 'row')
        objective = self._study.objective([*self._prior, *rows, row])
        row['objective'] = None if objective is None else self._study.value(row, objective)
        if examples := serve.note(trial, 'examples'):
          kept = {'trial': row['trial'], 'per_example': examples}
          append_jsonl(self._directory / 'examples.jsonl', kept)
        append_trial(path, row)
        rows.append(row)
    return rows

  def answer(self) -> dict:
    with _locked(self._directory):
      rows = read_ledger(self._directory / 'trials.jsonl', self._study)
      kept = read_jsonl(self._directory / 'examples.jsonl')
      examples = {row['trial']: row['per_example'] for row in kept}
      best = best_of(self._study, self._prior, rows, examples, self._first)
      write_json(self._directory / 'best.json', best)
    return best

  def _ask(self) -> study_pb2.Trial | None:
    """A trial for this worker; None if there is none now."""
    request = vizier_service_pb2.SuggestTrialsRequest(
      parent=_NAME, suggestion_count=1, client_id=self._worker
    )
    try:
      operation = self._call('SuggestTrials', request)
    except grpc.RpcError as error:
      if error.code() == grpc.StatusCode.NOT_FOUND:  # The server lost its database.
        self._begin()
      elif error.code() != grpc.StatusCode.FAILED_PRECONDITION:
        raise
      return None
    if not operation.done:
      raise UserError(
        f'the server left a suggestion for {self._worker} open: start the server again'
      )
    found = vizier_service_pb2.SuggestTrialsResponse.FromString(operation.response.value)
    return found.trials[0]

  def _call(self, method: str, request):
    """Calls the server, again and again while it is away; UserError if it stays away."""
    pause, longest = _PAUSES
    since = None
    while True:
      self._connect()
      try:
        return getattr(self._stub, method)(request, timeout=_CALL_S)
      except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
          raise UserError(error.details()) from None
        if error.code() not in _DOWN:
          raise
      now = time.monotonic()
      if since is None:
        since = now
        say(f'{self._worker}: the server at {self._address} does not answer: trying again')
      elif now - since > self._patience:
        raise UserError(
          f'the server at {self._address} has not answered for {now - since:.0f} s: start it again '
          'with optimer serve, and then this worker'
        )
      time.sleep(pause)
      pause = min(2 * pause, longest)

  def _connect(self) -> None:
    address, path = self._given, self._directory / 'server.json'
    if address is None and not path.exists():
      raise UserError(
        f'{path} is missing: start optimer serve with the same gin file, or say where it listens '
        'with --server'
      )
    address = address or read_json(path)['address']
    if address != self._address:
      channel = grpc.insecure_channel(address, options=(*serve.OPTIONS, *_RECONNECT))
      self._address, self._stub = address, vizier_service_pb2_grpc.VizierServiceStub(channel)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
  """Lets one worker at a time at the files; the kernel lets go when one dies."""
  with open(directory / 'trials.lock', 'a') as file:
    with contextlib.suppress(OSError):  # A file system without locks.
      fcntl.flock(file, fcntl.LOCK_EX)
    yield
