"""From named leaves on the host to parameters on the devices, one leaf at a time."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from optimer_jax.gemma3.config import PERIOD
from optimer_jax.gemma3.layout import to_leaves
from optimer_jax.gemma3.transformer import Model, logical_axes
from optimer_jax.parallel.sharding import spec


def leaf_axes(model: Model) -> dict[str, tuple[str, ...]]:
  """The logical axes of every named leaf."""
  return to_leaves(model.config, logical_axes(Model(model.config)))


def place_leaves(model: Model, leaves: Iterable[tuple[str, Any]], mesh: Mesh | None) -> dict:
  """Named leaves as parameters in the model's layout, where the sharding table wants them.

  The host needs room for one leaf. Layers that are stacked are written into their stack as they
  come, in the devices' memory. Every process calls this with all leaves, and gives its own devices
  what they hold of them.

  Args:
    model: whose layout it is.
    leaves: name and values, one after another: numpy arrays, or trees of arrays with as many axes,
      such as int8 values and their scales. They must not change afterwards.
    mesh: default: the first device.
  """
  axes, tree = leaf_axes(model), {}
  for name, leaf in leaves:
    keys, index = _seat(model, name)
    *path, last = keys
    node = functools.reduce(lambda at, key: at.setdefault(key, {}), path, tree)
    if not index:
      node[last] = jax.tree.map(lambda a, own=axes[name]: put(a, _sharding(own, a, mesh)), leaf)
      continue
    if last not in node:
      sizes = _sizes(model, keys)
      node[last] = jax.tree.map(lambda a, n=sizes, own=axes[name]: _empty(a, n, own, mesh), leaf)
    node[last] = jax.tree.map(
      lambda stack, a, i=index, own=axes[name]: _insert(stack, put(a, _sharding(own, a, mesh)), i),
      node[last],
      leaf,
    )
  return tree


def put(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
  """An array that every process has, on the devices of all of them."""
  return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def everywhere(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
  """The whole of an array on every device of the mesh; default: on the first device."""
  return put(array, NamedSharding(mesh, PartitionSpec()) if mesh else _first())


def _first() -> jax.sharding.Sharding:
  return SingleDeviceSharding(jax.devices()[0])


def _sharding(axes: tuple[str, ...], array, mesh: Mesh | None) -> jax.sharding.Sharding:
  return NamedSharding(mesh, spec(axes, array.shape, mesh)) if mesh else _first()


def _seat(model: Model, name: str) -> tuple[tuple, tuple[int, ...]]:
  """Where the model's tree has a leaf: its keys, and its place in a stack of layers."""
  keys = tuple(int(key) if key.isdigit() else key for key in name.split('.'))
  if not model.scan or keys[0] != 'layers':
    return keys, ()
  (group, j), rest = divmod(keys[1], PERIOD), keys[2:]
  if group == model.config.num_groups:
    return ('tail', *rest), (j,)
  if j == PERIOD - 1:
    return ('groups', 'global', *rest), (group,)
  return ('groups', 'local', *rest), (group, j)


def _sizes(model: Model, keys: tuple) -> tuple[int, ...]:
  """The leading axes of a stack."""
  if keys[0] == 'tail':
    return (model.config.num_tail,)
  groups = model.config.num_groups
  return (groups, PERIOD - 1) if keys[1] == 'local' else (groups,)


def _empty(array, sizes: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh | None) -> jax.Array:
  shape, axes = (*sizes, *array.shape), ('layers',) * len(sizes) + axes
  whole = jax.ShapeDtypeStruct(shape, array.dtype)
  return jnp.zeros(shape, array.dtype, device=_sharding(axes, whole, mesh))


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: jax.Array, leaf: jax.Array, index: tuple) -> jax.Array:
  return stack.at[index].set(leaf)
