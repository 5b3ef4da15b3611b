"""What each stage runs on the devices, with shapes and shardings in place of arrays.

Shape letters: B rows of a batch, T tokens of a row, K vectors.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optimer_jax.errors import UsageError
from optimer_jax.evaluation import scoring
from optimer_jax.gemma3 import SIZES, Model, abstract_params, logical_axes
from optimer_jax.merging.candidates import TOP
from optimer_jax.merging.weighted_sum import Unmerged, weighted_sum
from optimer_jax.parallel.sharding import MeshConfig, batch_sharding, shardings
from optimer_jax.planning.topologies import Topology
from optimer_jax.training.state import abstract_state
from optimer_jax.training.train import TrainConfig, optimizer, train_step
from optimer_jax.vectors.room import FAR, PLACES, far


class UnsuitableMesh(UsageError):
  """The mesh does not fit the slice, or does not divide the rows."""


STAGES = ('train', 'extract', 'merge', 'evaluate')
TRAINING = TrainConfig()


@dataclasses.dataclass(frozen=True)
class Case:
  """One question: does this fit, and how fast is it at best?

  Attributes:
    size: of `gemma3.SIZES`.
    stage: of `STAGES`.
    topology: the slice, or slices.
    batch, length: B rows of T tokens, over the whole slice, of train and evaluate.
    mesh: devices along each axis; default: `default_mesh`. How many slices there are is the
      topology's to say.
    vectors: K, of merge and evaluate.
    pool: where they are, of `vectors.room.PLACES`; a candidate is merged in 'evaluate' for 'scan'.
    training: of train; its batch is the one above.
    dtype: of activations, and of the base, vectors and candidate of a search.
    remat: what layers keep for their gradient, as in `gemma3.Model`.

  Raises:
    UsageError: an unknown size or stage, numbers below 1, a batch that A does not divide.
  """

  size: str
  stage: str
  topology: Topology
  batch: int = 64
  length: int = 4096
  mesh: MeshConfig | None = None
  vectors: int = 5
  pool: str = 'device'
  training: TrainConfig = TRAINING
  dtype: str = 'bfloat16'
  remat: str = 'layer'

  def __post_init__(self):
    known = {'size': SIZES, 'stage': STAGES, 'pool': PLACES}
    for what, names in known.items():
      if (name := getattr(self, what)) not in names:
        raise UsageError(f'{name!r} is no {what}; known are {", ".join(names)}')
    if min(self.batch, self.length, self.vectors) < 1:
      raise UsageError('batch, length and vectors must be 1 or more')
    if self.batch % self.pieces:
      raise UsageError(f'batch {self.batch} does not divide into {self.pieces} pieces')

  @property
  def model(self) -> Model:
    return Model(SIZES[self.size], self.dtype, scan=True, remat=self.remat)

  @property
  def computes(self) -> bool:
    """Whether rows of tokens go through the model."""
    return self.stage in ('train', 'evaluate')

  @property
  def pieces(self) -> int:
    """A: how many pieces of the batch are computed one after the other."""
    return self.training.accumulate if self.stage == 'train' else 1


def default_mesh(case: Case) -> MeshConfig:
  """In each slice, parameters split over all devices, and its rows over as many as they can be.

  What is left of the devices shares the work on a row (`tensor`).
  """
  slices = case.topology.slices
  count = case.topology.devices // slices
  fsdp = math.gcd(count, case.batch // case.pieces // slices) if case.computes else count
  return MeshConfig(data=slices, fsdp=fsdp, tensor=count // fsdp, slices=slices)


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function, what it is called with, and what else lies in the devices' memory.

  Attributes:
    function, arguments: of the call.
    beside: what else is there before a step.
    made: arrays that a step must hold beside all of it, whatever the compiler does.
  """

  function: Any
  arguments: tuple
  beside: tuple = ()
  made: Any = ()

  @property
  def bytes_before(self) -> int:
    """On each device, of all that is there before a step."""
    return _bytes((self.arguments, self.beside))

  @property
  def bytes_made(self) -> int:
    """On each device, of `made`."""
    return _bytes(self.made)


def _bytes(tree) -> int:
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
    if isinstance(a, jax.ShapeDtypeStruct) and a.sharding.memory_kind != FAR
  )


def program(case: Case, mesh: Mesh) -> Program:
  """What the stage of a case runs on a mesh.

  Raises:
    UnsuitableMesh: it does not divide the rows.
  """
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if case.computes and case.batch // case.pieces % ways:
    raise UnsuitableMesh(
      f'{case.batch // case.pieces} rows cannot be split over data={mesh.shape["data"]} x '
      f'fsdp={mesh.shape["fsdp"]} devices: change batch, accumulate or the mesh'
    )
  return {'train': _train, 'extract': _extract, 'merge': _merge, 'evaluate': _evaluate}[case.stage](
    case, mesh
  )


def _train(case: Case, mesh: Mesh) -> Program:
  config = dataclasses.replace(case.training, batch=case.batch)
  rows = _rows(case, mesh, ('tokens', 'positions', 'segment_ids'))
  state = abstract_state(optimizer(config), case.model, mesh)
  # The norm of the whole gradient, by which it is clipped, is known before the first update.
  return Program(train_step, (case.model, config, state, rows), made=state['params'])


@jax.jit
def difference(trained: dict, base: dict) -> dict:
  """tau = theta - theta_0 in float32, rounded to bfloat16, of parameters on the devices."""
  return jax.tree.map(lambda a, b: (a - b).astype(jnp.bfloat16), trained, base)


def _extract(case: Case, mesh: Mesh) -> Program:
  params = _params(case.model, 'float32', mesh)
  return Program(difference, (params, params))


def _merge(case: Case, mesh: Mesh) -> Program:
  params, vectors = _params(case.model, case.dtype, mesh), _vectors(case, mesh)
  weights = _whole((case.vectors,), jnp.float32, mesh)
  if case.pool != 'scan':
    return Program(weighted_sum, (params, params, vectors, weights))
  top = lambda tree: {key: tree[key] for key in TOP}
  own = (top(params), top(params), tuple(map(top, vectors)), weights)
  layers = lambda tree: {key: tree[key] for key in tree.keys() - {*TOP}}
  return Program(weighted_sum, own, beside=(layers(params), *map(layers, vectors)))


def _evaluate(case: Case, mesh: Mesh) -> Program:
  """One batch of requests to a candidate, with the pool that it was merged from at hand."""
  params, vectors = _params(case.model, case.dtype, mesh), _vectors(case, mesh)
  beside, candidate = (params, *vectors), params
  if case.pool == 'scan':

    def unmerged(base, axes, *own):
      stack = base.shape[: axes.count('layers')]
      return Unmerged(_whole((*stack, len(own)), jnp.float32, mesh), base, own)

    candidate = jax.tree.map(unmerged, params, logical_axes(case.model), *vectors)
    candidate |= {key: params[key] for key in TOP}
    beside = tuple({key: tree[key] for key in TOP} for tree in beside)
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  chunk = scoring.logit_slots(case.batch // ways, case.model.config.vocab_size)
  pieces = _whole((), jnp.int32, mesh)
  rows = (_rows(case, mesh, scoring.ARRAYS) | {'branch_ids': None}).values()  # plain documents
  return Program(
    scoring.score_batch,
    (case.model, chunk, candidate, None, pieces, *rows),
    beside=beside,
  )


def _vectors(case: Case, mesh: Mesh) -> tuple[dict, ...]:
  vector = _params(case.model, case.dtype, mesh)
  if case.pool == 'host':
    vector = jax.tree.map(
      lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
      vector,
      far(vector),
    )
  return (vector,) * case.vectors


def _params(model: Model, dtype: str, mesh: Mesh) -> dict:
  abstract = abstract_params(model, jnp.dtype(dtype))
  places = shardings(logical_axes(model), abstract, mesh)
  place = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
  return jax.tree.map(place, abstract, places)


def _rows(case: Case, mesh: Mesh, names: tuple[str, ...]) -> Mapping[str, jax.ShapeDtypeStruct]:
  """int32 [B, T] of each name."""
  shape, place = (case.batch, case.length), batch_sharding(mesh)
  return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for name in names}


def _whole(shape: tuple[int, ...], dtype, mesh: Mesh) -> jax.ShapeDtypeStruct:
  where = NamedSharding(mesh, PartitionSpec())
  return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
