"""One table from logical axes to mesh axes, and what follows from it.

Mesh axes: `data` (batch only), `fsdp` (batch, and parameters split to save memory), `tensor`
(heads and mlp split to share work, and between them the length to save memory).
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optimer_jax.errors import UserError

MESH_AXES = ('data', 'fsdp', 'tensor')

RULES = {
  'batch': ('data', 'fsdp'),
  'length': None,
  'residual_length': 'tensor',  # where tokens are not looked at together: see gemma3.layers
  'embed': 'fsdp',
  'vocab': 'tensor',
  'mlp': 'tensor',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_dim': None,
  'layers': None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; at most one is -1: all that are left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
  """Arranges the devices of all processes as `config` says.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.data, config.fsdp, config.tensor]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices) or min(sizes) < 1:
    asked = ', '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, sizes, strict=True))
    raise UserError(
      f'a mesh of {asked} does not fit {len(devices)} devices: the sizes must multiply to it, '
      'and at most one may be -1'
    )
  return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """The partition of an array with these logical axes; None is an axis to keep whole.

  An axis that its mesh axes do not divide stays whole (one key-value head cannot be split), and a
  mesh axis is used once, by the first logical axis that asks for it.
  """
  used, out = set(), []
  for axis, size in zip(axes, shape, strict=True):
    wanted = (RULES[axis] if axis else None) or ()
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    ways = math.prod(mesh.shape[a] for a in wanted)
    if used.isdisjoint(wanted) and size % ways == 0 and ways > 1:
      used.update(wanted)
      out.append(wanted)
    else:
      out.append(None)
  return PartitionSpec(*out)


def shardings(axes: dict, abstract: dict, mesh: Mesh) -> dict:
  """A tree of `NamedSharding` for a tree of logical axes and one of shapes."""
  return jax.tree.map(
    lambda a, names: NamedSharding(mesh, spec(names, a.shape, mesh)), abstract, axes
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows [B, …] split over the data and fsdp axes."""
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': of the mesh that `jax.set_mesh` named, else of this process.

  The two differ where a program is compiled for TPUs without having one.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Holds an intermediate to its logical axes on the mesh that `jax.set_mesh` named, if any."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))
