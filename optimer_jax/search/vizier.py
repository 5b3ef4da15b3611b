"""OSS Vizier's GP bandit as the sampler of a study: fast, repeatable, kept in an SQLite file.

Vizier as it comes compiles two programs anew for every suggestion. Here it does not: one
acquisition optimizer serves every designer of the same number of parameters (its static fields hash
by identity), and the observations are padded so that the shapes stay the same through an ordinary
study. The GP's hyperparameters are fitted in one program too: Vizier's own way goes to SciPy and
back some 400 times, and SciPy's many threads wait for one another where the cores are busy.
Evaluations (75,000), restarts (4) and steps of the fit (50) are Vizier's own.

The GP runs in float64 inside `jax.enable_x64`, which is part of the key of every compiled
function: code outside keeps its precision and its compiled programs.

A suggestion depends on the study's seed and on the completed trials, and on nothing else.
"""

import contextlib
import dataclasses
import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import sqlalchemy
from jax.flatten_util import ravel_pytree
from vizier import algorithms as vza
from vizier import pythia
from vizier._src.algorithms.designers import gp_bandit
from vizier._src.algorithms.designers.gp import acquisitions
from vizier._src.jax import types
from vizier._src.service import custom_errors, pythia_service, vizier_client, vizier_service
from vizier.service import clients
from vizier.service import pyvizier as vz
from vizier.utils import json_utils

from optimer_jax.progress import say
from optimer_jax.search.descent import descend

# The bounds of each parameter: the merge weights by data set, and what else is searched.
Space = Mapping[str, tuple[float, float]]
# ({parameter: value}, objective to be minimised, or None where the candidate was infeasible)
Observation = tuple[Mapping[str, float], float | None]

_CLIENT = 'worker-0'  # A stable id: after a kill it gets its unfinished trial back.
_UCB = 1.8  # Vizier's own weight of the standard deviation.
_PADDING = 20
_FIT_STEPS = 50
_ABORTED = 10  # google.rpc.Code


class VizierSampler:
  """The GP bandit behind Vizier's embedded service, with its study in the SQLite file `path`.

  `observed` holds the ledger's trials in order. A file that is missing, damaged or says anything
  else is written again from them. One process may hold the file.
  """

  def __init__(
    self,
    path: Path | str,
    space: Space,
    seed: int,
    observed: Sequence[Observation] = (),
  ):
    self._names, self._seed = list(space), seed
    self._problem = problem_of(space)
    path = Path(path).absolute()
    existed = path.exists()
    try:
      self._open(path)
      agrees = _observations(self._trials()) == [(dict(x), y) for x, y in observed]
    except Exception:  # Whatever is wrong with the file, the ledger replaces it.
      agrees = False
    if agrees:
      return
    if existed:
      say(f'{path.name} does not agree with the ledger: writing it again')
    for file in (path, Path(f'{path}-journal')):
      file.unlink(missing_ok=True)
    self._open(path)
    for point, objective in observed:
      self.observe(point, objective)

  def suggest(self, n: int) -> list[dict[str, float]]:
    """The next n candidates; asked again before they are observed, the same ones."""
    with jax.enable_x64(True):
      trials = self._study.suggest(count=n, client_id=_CLIENT)
    return [{name: trial.parameters[name] for name in self._names} for trial in trials]

  def observe(self, point: Mapping[str, float], objective: float | None) -> None:
    """Completes the suggested trial that has these values, or else adds a completed trial.

    Args:
      point: value by parameter, inside the bounds.
      objective: to be minimised; None records the candidate as infeasible.
    """
    number = 1 + len(_observations(self._trials()))
    done = trial_of(number, point, objective)
    for trial in self._trials():
      if trial.status == vz.TrialStatus.ACTIVE:
        client = self._study.get_trial(trial.id)
        if trial.parameters.as_dict() == dict(point):
          client.complete(done.final_measurement, infeasible_reason=done.infeasibility_reason)
          return
        client.delete()  # It was suggested before this trial was known.
    # Through the data store: the client can add no infeasible trial.
    proto = vz.TrialConverter.to_proto(done)
    proto.name = f'{self._study.resource_name}/trials/{number}'
    self._servicer.datastore.create_trial(proto)

  def _trials(self) -> list[vz.Trial]:
    return list(self._study.trials().get())

  def _open(self, path: Path) -> None:
    """Opens or creates the study.

    Raises:
      ValueError: the file holds a study of another search space.
    """
    self._servicer = open_service(path)
    with _precision_kept():
      self._servicer.default_pythia_service = pythia_service.PythiaServicer(
        self._servicer,
        policy_factory=lambda problem, algorithm, supporter, name: _Policy(
          self._problem, self._seed, supporter
        ),
      )
    config = vz.StudyConfig.from_problem(self._problem)
    config.algorithm = 'GAUSSIAN_PROCESS_BANDIT'
    # An explicit servicer, and not Vizier's global one, so that a process can hold several studies.
    proto = vizier_service.study_pb2.Study(display_name='study', study_spec=config.to_proto())
    study = self._servicer.CreateStudy(
      vizier_service.vizier_service_pb2.CreateStudyRequest(parent='owners/optimer', study=proto)
    )
    if study.study_spec != config.to_proto():  # Vizier itself would ignore ours in silence.
      raise ValueError(f'{path} holds a study of another search space')
    self._study = clients.Study(vizier_client.VizierClient(study.name, _CLIENT, self._servicer))
    end_operations(self._servicer, study.name)


def open_service(path: Path) -> vizier_service.VizierServicer:
  """Vizier's service on the SQLite file `path`."""
  with _precision_kept():
    return vizier_service.VizierServicer(
      database_url=sqlalchemy.URL.create('sqlite', database=str(path))
    )


@contextlib.contextmanager
def _precision_kept() -> Iterator[None]:
  """Vizier's services switch float64 on for the whole process."""
  before = jax.config.jax_enable_x64
  try:
    yield
  finally:
    jax.config.update('jax_enable_x64', before)


def end_operations(service: vizier_service.VizierServicer, study_name: str) -> None:
  """Ends what a process killed inside `suggest` left open: its client would wait for ever."""
  store = service.datastore
  table = store._suggestion_operations_table
  with store._lock:
    clients_seen = store._connection.execute(sqlalchemy.select(table.c.client_id).distinct()).all()
  for (client,) in clients_seen:
    try:
      left = store.list_suggestion_operations(study_name, client, lambda op: not op.done)
    except custom_errors.NotFoundError:  # The client of another study.
      continue
    for operation in left:
      operation.error.code = _ABORTED
      operation.error.message = 'the process was killed'
      operation.done = True
      store.update_suggestion_operation(operation)


def suggestion(
  space: Space,
  seed: int,
  observed: Sequence[Observation],
  pending: Sequence[Mapping[str, float]] = (),
) -> dict[str, float]:
  """The next candidate while others are being evaluated; without any, what the sampler suggests.

  A pending candidate is taken to have been observed as predicted: that leaves the GP's mean and
  takes away its uncertainty there (GP-BUCB, Desautels, Krause and Burdick 2014). None is suggested
  again.
  """
  problem, known = problem_of(space), list(observed)
  with jax.enable_x64(True):
    if pending:
      known += zip(pending, _predicted(problem, seed, observed, pending), strict=True)
    (found,) = _designer(problem, seed, known, ucb=_UCB).suggest(1)
    read = lambda: {name: found.parameters.get_value(name) for name in space}
    while any(_same(point := read(), other) for other in pending):
      known.append((point, None))
      blank = [(point, None) for point, _ in known]  # Nothing to learn from: quasi-random.
      (found,) = _designer(problem, seed, blank, ucb=_UCB).suggest(1)
  return read()


def _same(point: Mapping[str, float], other: Mapping[str, float]) -> bool:
  return all(math.isclose(x, other[name], abs_tol=1e-9) for name, x in point.items())


def _predicted(problem, seed, observed, pending) -> list[float | None]:
  """The posterior median of the objective at each pending point; None while there is no GP."""
  if len({y for _, y in observed if y is not None}) < 2:
    return [None] * len(pending)
  designer = _designer(problem, seed, observed, ucb=_UCB)
  gp = designer._update_gp(designer._trials_to_data(designer._trials))
  trials = [trial_of(number, point, None) for number, point in enumerate(pending, 1)]
  means = _means(gp, designer._converter.to_features(trials))[: len(pending)]
  return (-designer._output_warper.unwarp(np.asarray(means)[:, None])[:, 0]).tolist()


@equinox.filter_jit
def _means(gp, features):
  filled = types.ModelInput(
    features.continuous.replace_fill_value(0.0), features.categorical.replace_fill_value(0)
  )
  return gp.predict_with_aux(filled)[0].mean()


def surrogate_optimum(
  space: Space, seed: int, observed: Sequence[Observation]
) -> tuple[dict[str, float], float]:
  """The minimiser of the GP's posterior mean over the box, and the objective predicted there.

  Vizier's own acquisition optimizer looks for it, with the standard deviation's weight set to
  zero and within the trust region about the observed trials. At least one observation must have
  an objective.

  Returns:
    The value of each parameter, and the posterior median of the objective (the GP's mean carried
    back through Vizier's monotone output warping).
  """
  finite = [(y, point) for point, y in observed if y is not None]
  if len({y for y, _ in finite}) < 2:  # A GP learns nothing from one value.
    return dict(finite[0][1]), finite[0][0]
  with jax.enable_x64(True):
    designer = _designer(problem_of(space), seed, observed, ucb=0.0)
    (best,) = designer.suggest(1)
    # With a weight of zero the acquisition is the posterior mean itself, warped and negated.
    found = json.loads(
      best.metadata.ns('devinfo')['acquisition_optimization'], cls=json_utils.NumpyDecoder
    )['acquisition']
    predicted = -float(designer._output_warper.unwarp(np.reshape(found, (1, 1))).item())
  return {name: best.parameters.get_value(name) for name in space}, predicted


@dataclasses.dataclass
class _Policy:
  """What the service asks for suggestions; it keeps no state."""

  problem: vz.ProblemStatement
  seed: int
  supporter: pythia.PolicySupporter

  def suggest(self, request: pythia.SuggestRequest) -> pythia.SuggestDecision:
    observed = _observations(self.supporter.GetTrials(status_matches=vz.TrialStatus.COMPLETED))
    designer = _designer(self.problem, self.seed, observed, ucb=_UCB)
    return pythia.SuggestDecision(designer.suggest(request.count), metadata=vz.MetadataDelta())


def problem_of(space: Space) -> vz.ProblemStatement:
  """Floats sorted by name: the order of `space` must not change a suggestion."""
  problem = vz.ProblemStatement()
  for name in sorted(space):
    problem.search_space.root.add_float_param(name, *space[name])
  problem.metric_information.append(
    vz.MetricInformation('objective', goal=vz.ObjectiveMetricGoal.MINIMIZE)
  )
  return problem


def _designer(
  problem: vz.ProblemStatement, seed: int, observed: Sequence[Observation], ucb: float
) -> gp_bandit.VizierGPBandit:
  """A designer that knows `observed`; needs float64.

  An infeasible candidate counts as no better than the worst of the others. (Vizier's own output
  warping would flatten a few finite values among infeasible ones to one.) Until there are two
  different values to learn from, the suggestions are quasi-random.
  """
  values = {y for _, y in observed if y is not None}
  worst, learnable = max(values, default=0.0), len(values) >= 2
  coefficient = jnp.asarray(ucb)  # An array, so that another value is not another program.
  designer = gp_bandit.VizierGPBandit(
    problem,
    rng=jax.random.fold_in(jax.random.PRNGKey(seed), len(observed)),
    num_seed_trials=1 if learnable else len(observed) + 1,
    padding_schedule=_Padding(),
    acquisition_optimizer_factory=_acquisition_optimizer,
    ard_optimizer=_fit,
    scoring_function_factory=acquisitions.bayesian_scoring_function_factory(
      lambda data: acquisitions.UCB(coefficient)
    ),
  )
  trials = [
    trial_of(number, point, worst if y is None else y)
    for number, (point, y) in enumerate(observed, 1)
  ]
  designer.update(vza.CompletedTrials(trials), vza.ActiveTrials())
  return designer


_optimizers = {}


def _acquisition_optimizer(converter):
  """Vizier's optimizer, one for each number of parameters: it knows nothing else of the space."""
  size = len(converter.output_specs.continuous)
  if size not in _optimizers:
    _optimizers[size] = gp_bandit.default_acquisition_optimizer_factory(converter)
  return _optimizers[size]


def _fit(initial, loss, rng, *, constraints, best_n):
  """Vizier's `Optimizer` of hyperparameters, all of which are positive and bounded."""
  first = jax.tree.map(lambda x: x[0], initial)
  lower, upper = (
    ravel_pytree(jax.tree.map(lambda bound, x: jnp.full(x.shape, bound, x.dtype), bounds, first))[0]
    for bounds in constraints.bounds
  )
  return _fit_all(loss, initial, lower, upper, best_n), {}


@equinox.filter_jit
def _fit_all(loss, initial, lower, upper, best_n):
  restore = ravel_pytree(jax.tree.map(lambda x: x[0], initial))[1]
  lower, upper = jnp.log(lower), jnp.log(upper)
  flat = jax.vmap(lambda params: ravel_pytree(params)[0])(initial)
  found, losses = descend(
    lambda logs: loss(restore(jnp.exp(logs)))[0],
    jnp.clip(jnp.log(flat), lower, upper),
    lower,
    upper,
    _FIT_STEPS,
  )
  return jax.vmap(restore)(jnp.exp(found[jnp.argsort(losses)[:best_n]]))


class _Padding:
  """Pads rows to the next multiple of 20 above their number.

  Vizier's own schedule compiles anew at 10 rows (a full block counts as unpadded) and at 11, and
  for every number of rows the small programs that do the padding.
  """

  def pad_features(self, array: np.ndarray) -> types.PaddedArray:
    rows = len(array)
    fill = -1 if np.issubdtype(array.dtype, np.integer) else np.nan
    spare = (rows // _PADDING + 1) * _PADDING - rows if rows else 0
    padded = np.concatenate([array, np.full((spare, *array.shape[1:]), fill, array.dtype)])
    mask = np.broadcast_to((np.arange(rows + spare) < rows)[:, None], padded.shape)
    return types.PaddedArray(padded, fill, np.array(array.shape), mask)

  pad_labels = pad_features


def trial_of(number: int, point: Mapping[str, float], objective: float | None) -> vz.Trial:
  # Vizier sorts by creation time: number the seconds, so that the clock has no part in it.
  created = datetime.datetime.fromtimestamp(number, datetime.UTC)
  trial = vz.Trial(id=number, parameters=dict(point), creation_time=created)
  if objective is None:
    reason = 'a task has no finite score'
    return trial.complete(vz.Measurement(), infeasibility_reason=reason)
  return trial.complete(vz.Measurement({'objective': objective}))


def _observations(trials: Sequence[vz.Trial]) -> list[Observation]:
  """The completed trials, in the order of their numbers."""
  return [
    (
      trial.parameters.as_dict(),
      None if trial.infeasible else trial.final_measurement.metrics['objective'].value,
    )
    for trial in sorted(trials, key=lambda trial: trial.id)
    if trial.status == vz.TrialStatus.COMPLETED
  ]
