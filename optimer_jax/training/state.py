"""A run's state: parameters and optimizer, placed on a mesh, saved and restored.

No process ever holds the whole: each reads and writes the shards of its own devices. A state saved
on one mesh, by one number of processes, is restored on any other.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from optimer_jax.checkpoints.leaves import orbax_context
from optimer_jax.checkpoints.places import absolute, prove, reachable
from optimer_jax.errors import UserError
from optimer_jax.files import no_room
from optimer_jax.gemma3 import Model, abstract_params, logical_axes
from optimer_jax.gemma3.placement import place_leaves
from optimer_jax.parallel.processes import once
from optimer_jax.parallel.sharding import constrain, shardings

Leaves = Iterable[tuple[str, np.ndarray]]  # name and values, one after another


def abstract_state(optimizer: optax.GradientTransformation, model: Model, mesh: Mesh) -> dict:
  """`params` and `optimizer`, as `jax.ShapeDtypeStruct`s placed on the mesh.

  Moments are placed as the parameters that they belong to, counters everywhere.
  """
  params = abstract_params(model)
  placement = shardings(logical_axes(model), params, mesh)
  everywhere, structure = NamedSharding(mesh, PartitionSpec()), jax.tree.structure(placement)

  def is_params(node):
    return jax.tree.structure(node) == structure

  def put(node):
    target = placement if is_params(node) else jax.tree.map(lambda _: everywhere, node)
    return jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), node, target
    )

  state = jax.eval_shape(lambda p: {'params': p, 'optimizer': optimizer.init(p)}, params)
  return jax.tree.map(put, state, is_leaf=is_params)


def placed(optimizer: optax.GradientTransformation, model: Model, state: dict) -> dict:
  """Holds a state that is computed to where it was: else the next step is another program."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return state
  place = jax.tree.map(lambda a: a.sharding, abstract_state(optimizer, model, mesh))
  return jax.tree.map(jax.lax.with_sharding_constraint, state, place)


def first_state(
  optimizer: optax.GradientTransformation, model: Model, mesh: Mesh, base: Leaves
) -> dict:
  """The base's parameters as float32 masters, and an optimizer that has seen nothing."""
  place = jax.tree.map(lambda a: a.sharding, abstract_state(optimizer, model, mesh))
  placed = place_leaves(model, base, mesh)
  # Copies, one by one: the state is donated to the first step, and these may be another's memory.
  leaves, structure = jax.tree.flatten(placed)
  del placed
  for number, where in enumerate(jax.tree.leaves(place['params'])):
    leaves[number] = _copy(leaves[number], where)
  params = jax.tree.unflatten(structure, leaves)
  init = jax.jit(optimizer.init, out_shardings=place['optimizer'])
  return {'params': params, 'optimizer': init(params)}


@functools.partial(jax.jit, static_argnums=1)
def _copy(array: jax.Array, where: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(jnp.array(array, jnp.float32, copy=True), where)


@contextlib.contextmanager
def saved(place: Path | str, keep_every: int) -> Iterator[ocp.training.Checkpointer]:
  """The states in a directory or gs://…: the last one, and those of every `keep_every` steps.

  On leaving, also by an error, it waits for a save that is under way.

  Several processes come here together.

  Raises:
    UserError: the bucket cannot be used.
  """
  policies = ocp.training.preservation_policies
  kept = [policies.LatestN(1), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
  with orbax_context():
    once(lambda: prove(str(place).rpartition('/')[0]))  # Not among the steps.
    with reachable(place):
      saves = ocp.training.Checkpointer(
        absolute(place),
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
      )
    try:
      yield saves
    finally:
      with reachable(place):
        saves.close()


def save(saves: ocp.training.Checkpointer, identity: Mapping, step: int, state: dict) -> None:
  """Saves in the background, on accelerators; the values' checksums go with them.

  So does the run's identity: two runs may have been given one place.

  On CPU a save reads the state's own memory, which the next step could then not reuse: a second
  state would be held for as long as the save takes.
  """
  facts = {'checksums': checksums(state), 'identity': dict(identity)}
  with no_room(saves.directory), reachable(saves.directory):
    saves.save_async(step, state, custom_metadata=facts)
    if jax.default_backend() == 'cpu':
      saves.wait()


def restore(
  saves: ocp.training.Checkpointer, abstract: dict, identity: Mapping
) -> tuple[dict, int]:
  """The last state, placed as `abstract` says, and its step.

  Raises:
    UserError: it is damaged, or of another run.
  """
  step, directory = saves.latest.step, saves.directory
  advice = f'delete {directory.parent} to train again'
  try:
    facts = saves.metadata(step).custom_metadata
    check_identity(directory, facts.get('identity', identity), identity)
    state = saves.load(step, abstract)
    expected = facts['checksums']
  except UserError:
    raise
  except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
    raise UserError(
      f'{directory} cannot be read at step {step} ({type(error).__name__}): {advice}'
    ) from error
  if checksums(state) != expected:
    raise UserError(f'{directory} is damaged at step {step}: {advice}')
  return state, step


def check_identity(place: Path | str, old: Mapping, new: Mapping) -> None:
  """UserError if what was begun in a place depends on other settings."""
  changed = sorted(key for key in {**old, **new} if old.get(key) != new.get(key))
  if changed:
    key = changed[0]
    raise UserError(
      f'{place} was begun with {key} = {old.get(key)}, not {new.get(key)}: '
      'give the same settings, or delete it to start again'
    )


def checksums(state: dict) -> dict[str, int]:
  """A number for each array that any flipped bit changes, the same on every mesh.

  Its words times odd numbers that depend on their places, summed modulo 2^32: computed where the
  shards are, as integers add up to the same in any order.
  """
  found = jax.device_get(_checksums(state))
  return {jax.tree_util.keystr(path): int(x) for path, x in jax.tree.leaves_with_path(found)}


@jax.jit
def _checksums(state):
  def of(array):
    bits = jax.lax.bitcast_convert_type(array, f'uint{8 * array.dtype.itemsize}')
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
      place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    words = bits.astype(jnp.uint32) * (place * np.uint32(0x9E3779B1) * 2 + 1)
    return constrain(words.sum(dtype=jnp.uint32), ())

  return jax.tree.map(of, state)
