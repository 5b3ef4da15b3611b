"""One table from logical axes to mesh axes, and what follows from it.

Mesh axes: `data` (batch only), `fsdp` (batch, and parameters split to save memory), `tensor`
(heads and mlp split to share work, and between them the length to save memory). What goes between
TPU slices, over a slower network than inside them, is `data`: a step's gradients, once.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optimer_jax.errors import UserError

MESH_AXES = ('data', 'fsdp', 'tensor')

RULES = {
  'batch': ('data', 'fsdp'),
  'length': (),
  'residual_length': ('tensor',),  # where tokens are not looked at together: see gemma3.layers
  'embed': ('fsdp',),
  'vocab': ('tensor',),
  'mlp': ('tensor',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'head_dim': (),
  'layers': (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis, in all slices together; at most one is -1: all that are left.

  `slices` is the number of TPU slices. Each has as many of the devices along `data`, and `fsdp` and
  `tensor` stay inside it.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  slices: int = 1


def axis_sizes(config: MeshConfig, count: int) -> tuple[int, int, int]:
  """Devices along each of `MESH_AXES`, of `count` in all.

  Raises:
    UserError: they do not multiply to `count`, or `data` does not divide into the slices.
  """
  sizes = [config.data, config.fsdp, config.tensor]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if math.prod(sizes) != count or min(sizes) < 1:
    asked = ', '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, sizes, strict=True))
    raise UserError(
      f'a mesh of {asked} does not fit {count} devices: the sizes must multiply to it, '
      'and at most one may be -1'
    )
  if config.slices < 1 or sizes[0] % config.slices:
    raise UserError(
      f'data={sizes[0]} does not divide into slices={config.slices}: only data goes between '
      'slices, so it must be a multiple of them'
    )
  return tuple(sizes)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
  """Arranges the devices of all processes as `config` says.

  On TPUs, neighbours along an axis are neighbours in their slice, as far as can be. Elsewhere the
  order is that of `jax.devices()`, and slices are equal parts of it.

  Raises:
    UserError: as in `axis_sizes`, or the devices are of another number of slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = axis_sizes(config, len(devices))
  if devices[0].platform != 'tpu':
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)
  # The devices of one slice need not say which it is.
  attached = len({getattr(device, 'slice_index', 0) for device in devices})
  if attached != config.slices:
    raise UserError(
      f'the mesh is for slices={config.slices}, and the slices of the devices are {attached}: '
      f'set MeshConfig.slices = {attached}'
    )
  split = {'devices': devices, 'allow_split_physical_axes': True}
  if attached == 1:
    return Mesh(mesh_utils.create_device_mesh(sizes, **split), MESH_AXES)
  inside = sizes[0] // attached, *sizes[1:]
  return Mesh(mesh_utils.create_hybrid_device_mesh(inside, (attached, 1, 1), **split), MESH_AXES)


def explain(
  axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh
) -> tuple[PartitionSpec, tuple[str, ...]]:
  """The partition of an array with these logical axes, and why each axis is whole that is.

  An axis that its mesh axes do not divide stays whole (one key-value head cannot be split), and a
  mesh axis is used once, by the first logical axis that asks for it. None is an axis to keep whole;
  for it, and for those of which the table or the mesh asks nothing, there is no reason to give.

  Raises:
    UserError: an axis is not in the table.
  """
  used, out, whole = {}, [], []
  for axis, size in zip(axes, shape, strict=True):
    if axis is not None and axis not in RULES:
      raise UserError(f'{axis!r} is no logical axis: known are {", ".join(RULES)}')
    wanted = RULES[axis] if axis else ()
    ways = math.prod(mesh.shape[a] for a in wanted)
    out.append(None)
    if ways == 1:
      continue
    if taken := [a for a in wanted if a in used]:
      whole.append(f'{axis}: {taken[0]} splits {used[taken[0]]} already')
    elif size % ways:
      how = ' x '.join(f'{a} {mesh.shape[a]}' for a in wanted)
      whole.append(f'{axis} {size} is not divisible by {how}')
    else:
      used.update(dict.fromkeys(wanted, axis))
      out[-1] = wanted
  return PartitionSpec(*out), tuple(whole)


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """The partition of an array with these logical axes: see `explain`."""
  return explain(axes, shape, mesh)[0]


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
