"""Which part of a model's parameters each device of a mesh holds; nothing is compiled."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from optimer_jax.errors import UsageError
from optimer_jax.gemma3 import SIZES, Gemma3Config, Model, leaf_shapes, logical_axes, to_leaves
from optimer_jax.parallel.sharding import MESH_AXES, MeshConfig, axis_sizes, explain
from optimer_jax.planning.topologies import Topology

MIB = 2**20
MASTER = 4  # bytes of a float32 master


class Placement(NamedTuple):
  """A kind of parameter: the leaves that differ in their layer only.

  Attributes:
    name: with * for the layer.
    count: how many leaves there are of it.
    axes, shape: logical axes of a leaf, and their sizes.
    spec: the mesh axes that split each.
    whole: why logical axes are whole that the table would split.
    elements: that each device holds, of all of its leaves.
  """

  name: str
  count: int
  axes: tuple[str | None, ...]
  shape: tuple[int, ...]
  spec: PartitionSpec
  whole: tuple[str, ...]
  elements: int


def placements(config: Gemma3Config, mesh: AbstractMesh) -> list[Placement]:
  """A row for each kind of parameter, in the model's order."""
  axes = to_leaves(config, logical_axes(Model(config)))
  found = {}
  for leaf, shape in leaf_shapes(config).items():
    name = re.sub(r'\.\d+\.', '.*.', leaf)
    spec, whole = explain(axes[leaf], shape, mesh)
    count = found[name].count + 1 if name in found else 1
    elements = count * math.prod(NamedSharding(mesh, spec).shard_shape(shape))
    found[name] = Placement(name, count, axes[leaf], shape, spec, whole, elements)
  return list(found.values())


def print_placements(size: str, config: MeshConfig, slices: Sequence[Topology]) -> None:
  """Prints how a mesh splits the parameters of a size, as float32, on each of the topologies.

  None is needed where the mesh says all of its sizes.

  Raises:
    UsageError: an unknown size, or a mesh without devices; UserError: it does not fit them.
  """
  if size not in SIZES:
    raise UsageError(f'{size!r} is no size; known are {", ".join(SIZES)}')
  cases = [(dataclasses.replace(config, slices=t.slices), t.devices, t.name) for t in slices]
  if not cases:
    count = config.data * config.fsdp * config.tensor
    if -1 in (config.data, config.fsdp, config.tensor):
      raise UsageError('a size of -1 is what a slice leaves: name one, as in --topology=v5e:16x16')
    cases = [(config, count, f'{count} devices')]
  for each, count, name in cases:
    mesh = AbstractMesh(axis_sizes(each, count), MESH_AXES)
    print(f'{size} on {name}: {" x ".join(f"{axis}={n}" for axis, n in mesh.shape.items())}')
    _print_rows(placements(SIZES[size], mesh))


def _print_rows(rows: list[Placement]) -> None:
  axes = ['  '.join(map(_axis, row.axes, row.shape, row.spec)) for row in rows]
  names, wide = max(len(row.name) for row in rows), max(map(len, axes))
  print(
    f'{"parameter":{names}}{"leaves":>8}  {"axes/split over":{wide}}{"MiB a device":>14}  whole'
  )
  for row, text in zip(rows, axes, strict=True):
    held = f'{row.elements * MASTER / MIB:14.3f}  {"; ".join(row.whole)}'
    print(f'{row.name:{names}}{row.count:8}  {text:{wide}}{held}'.rstrip())
  held = sum(row.elements for row in rows)
  every = sum(row.count * math.prod(row.shape) for row in rows)
  print(
    f'a device holds {held * MASTER / MIB:,.1f} of {every * MASTER / MIB:,.1f} MiB (float32): '
    f'{held / every:.2%}'
  )


def _axis(axis: str | None, size: int, ways: str | tuple[str, ...] | None) -> str:
  """As in `embed 640/fsdp`."""
  ways = (ways,) if isinstance(ways, str) else ways or ()
  return f'{axis} {size}' + ''.join(f'/{way}' for way in ways)
