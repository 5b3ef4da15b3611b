"""Where a pool's vectors and candidate go, by what the devices have room for.

device  base, vectors and candidate in the devices' memory: the fastest
scan    no candidate: a layer's parameters are merged when the forward pass comes to it; it reads
        K + 1 models for each batch in place of one
host    vectors in pinned memory of the host, from where each candidate has them brought layer by
        layer: K models over the bus for each candidate
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from optimer_jax.checkpoints.names import EMBEDDING
from optimer_jax.checkpoints.quantized import SCALE
from optimer_jax.checkpoints.store import Manifest
from optimer_jax.errors import UsageError
from optimer_jax.gemma3 import Model
from optimer_jax.gemma3.placement import leaf_axes
from optimer_jax.parallel.processes import once
from optimer_jax.parallel.sharding import spec
from optimer_jax.progress import say

PLACES = ('device', 'scan', 'host')  # in the order in which they are tried
FAR = 'pinned_host'  # memory of the host that devices read by themselves
SHARE = 0.8  # of a device's memory: the rest is for activations, caches and programs


def choose_place(
  wanted: str,
  possible: Sequence[str],
  manifests: Mapping[str, Manifest],
  model: Model,
  mesh: Mesh | None,
) -> str:
  """One of `PLACES`: the one that is wanted, or for 'auto' the first that there is room for.

  Args:
    wanted: one of `PLACES`, or 'auto'.
    possible: those of `PLACES` that what is to be done can have; the first always.
    manifests: of the base, as 'base', and the vectors.
    model: how to compute.
    mesh: devices; default: the first.

  Raises:
    UsageError: there is no such place, or it is not possible.
  """
  if wanted not in ('auto', *possible):
    problem = 'is not for this search' if wanted in PLACES else 'is no place for a pool'
    raise UsageError(f"Run.pool = {wanted!r} {problem}: choose 'auto' or {', '.join(possible)}")
  memory = once(_memory)
  if memory is None:
    return 'device' if wanted == 'auto' else wanted
  sizes, room = needed(manifests, model, mesh), SHARE * memory
  fitting = [place for place in possible if sizes[place] <= room]
  found = wanted if wanted != 'auto' else (*fitting, possible[-1])[0]
  why = 'as Run.pool says' if wanted != 'auto' else 'the first that fits'
  if wanted == 'auto' and not fitting:
    why = 'though none fits'
  every = ', '.join(f'{place} {size / 1e9:.2f}' for place, size in sizes.items())
  say(f'pool: {found}, {why} (GB of the {room / 1e9:.2f} that a device has for it: {every})')
  return found


def far(vector: dict) -> dict:
  """The shardings of a vector's arrays with the large ones in the host's memory.

  Norm scales, and those of int8 values, are next to nothing, and no shape for a TPU to slice there.
  """
  return jax.tree.map_with_path(
    lambda path, a: a.sharding if 'scale' in str(path[-1]) else a.sharding.with_memory_kind(FAR),
    vector,
  )


def needed(manifests: Mapping[str, Manifest], model: Model, mesh: Mesh | None) -> dict[str, float]:
  """Bytes of base, vectors and candidate on each device, by place."""
  axes = leaf_axes(model)

  def size(manifest: Manifest, only: str = '') -> float:
    total = 0
    for name, entry in manifest.leaves.items():
      if name.startswith(only):
        shape = tuple(entry['shape'])
        if mesh:
          own = spec(axes[name.removesuffix(SCALE)], shape, mesh)
          shape = NamedSharding(mesh, own).shard_shape(shape)
        total += math.prod(shape) * np.dtype(entry['dtype']).itemsize
    return total

  base = size(manifests['base'])
  vectors = [manifest for name, manifest in manifests.items() if name != 'base']
  every = sum(map(size, vectors))
  top = size(manifests['base'], EMBEDDING)
  near = sum(size(manifest, EMBEDDING) for manifest in vectors)  # it comes as a whole
  return {'device': 2 * base + every, 'scan': base + every + top, 'host': 2 * base + near}


def _memory() -> int | None:
  """Bytes of a device's memory; None where it is not known, as on CPU."""
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
