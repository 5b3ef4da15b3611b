"""A vector pool: the vectors of one base, held together for merging, or opened to be read."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.names import Tensor
from optimer_jax.checkpoints.quantized import SCALE, Quantized, channel_axes
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import Model
from optimer_jax.gemma3.placement import place_leaves
from optimer_jax.vectors.extract import check_parent
from optimer_jax.vectors.room import PLACES, choose_place, far


@dataclasses.dataclass(frozen=True)
class Pool:
  """Base and vectors as parameter trees of one structure; leaves of vectors may be `Quantized`."""

  names: tuple[str, ...]
  model: Model
  base: dict
  vectors: tuple[dict, ...]
  fingerprint: str  # of the base and all vectors
  manifests: Mapping[str, store.Manifest]  # by name, and the base's as 'base'
  mesh: Mesh | None = None  # that they are split over; None: one device
  place: str = 'device'  # of the vectors and candidates: one of `room.PLACES`


@dataclasses.dataclass(frozen=True)
class OpenPool:
  """Base and vectors on disk, leaves to be read by rows; those of vectors are float32."""

  base: Mapping[str, Tensor]
  vectors: Mapping[str, Mapping[str, Tensor]]
  manifests: Mapping[str, store.Manifest]


def load_pool(
  base: Path | str,
  vectors: Mapping[str, Path | str],
  model: Model,
  mesh: Mesh | None = None,
  place: str = 'device',
  possible: Sequence[str] = PLACES,
) -> Pool:
  """Reads and checks a pool. Vectors stay in the form in which they are stored.

  The host has one leaf at a time.

  Args:
    base: the base artifact.
    vectors: data set name to vector artifact.
    model: how to compute; its config is checked against the base's.
    mesh: devices, of all processes, to split base and vectors over; default: one.
    place, possible: as `choose_place` takes them.

  Raises:
    UserError: a vector of another base or architecture, a value that is not finite, or a damaged
      leaf; it is named.
  """
  manifests = _manifests(base, vectors)
  if manifests['base'].model != model.config:
    raise UserError(f'{base} has another architecture than the run: {manifests["base"].model}')
  place = choose_place(place, possible, manifests, model, mesh)

  def vector(path: Path | str) -> dict:
    tree = place_leaves(model, _stored(path), mesh)
    if place != 'host':
      return tree
    return jax.device_put(tree, far(tree))

  return Pool(
    names=tuple(vectors),
    model=model,
    base=place_leaves(model, _stored(base), mesh),
    vectors=tuple(map(vector, vectors.values())),
    fingerprint=pool_fingerprint(manifests),
    manifests=manifests,
    mesh=mesh,
    place=place,
  )


def open_pool(base: Path | str, vectors: Mapping[str, Path | str]) -> OpenPool:
  """Opens a pool of any size, checked as `load_pool` checks it: values, as they are read."""
  return OpenPool(
    manifests=_manifests(base, vectors),
    base=store.open_leaves(base, 'base')[1],
    vectors={name: open_vector(path) for name, path in vectors.items()},
  )


def open_vector(path: Path | str) -> dict[str, Tensor]:
  """A stored vector's leaves, float32 whatever they are stored as.

  Raises:
    UserError: it is damaged, or when a leaf is read, its values are not finite.
  """
  _, tensors = store.open_leaves(path, 'vector')

  def exact(name: str, tensor: Tensor) -> Tensor:
    scale = None
    if name + SCALE in tensors:
      scale = tensors[name + SCALE].read()

    def read(start: int = 0, stop: int | None = None) -> np.ndarray:
      rows = tensor.read(start, stop)
      if scale is not None:
        own = 0 in channel_axes(name)
        rows = Quantized(rows, scale[start:stop] if own else scale).dequantize()
      _check_finite(rows, name, path)
      return rows.astype(np.float32, copy=False)

    return Tensor(tensor.shape, 'float32', read)

  return {name: exact(name, t) for name, t in tensors.items() if not name.endswith(SCALE)}


def pool_fingerprint(manifests: Mapping[str, store.Manifest]) -> str:
  """A digest of the base and the named vectors."""
  text = '\n'.join(f'{name} {m.fingerprint}' for name, m in sorted(manifests.items()))
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _manifests(base: Path | str, vectors: Mapping[str, Path | str]) -> dict[str, store.Manifest]:
  """Of the base, as 'base', and the vectors, which must be of that base."""
  found = {'base': store.read_manifest(base, 'base')}
  for name, path in vectors.items():
    found[name] = store.read_manifest(path, 'vector')
    check_parent(found[name], found['base'].fingerprint, path, base)
    if found[name].model != found['base'].model:
      raise UserError(f'{path} has another architecture than {base}: {found[name].model}')
  return found


def _stored(path: Path | str) -> Iterator[tuple[str, np.ndarray | Quantized]]:
  """The leaves as they are stored, those of int8 with their scales."""
  _, tensors = store.open_leaves(path)
  for name, tensor in tensors.items():
    if name.endswith(SCALE):
      continue
    value, scale = tensor.read(), tensors.get(name + SCALE)
    _check_finite(value, name, path)
    if scale:
      scale = scale.read()
      _check_finite(scale, name + SCALE, path)
    yield name, value if scale is None else Quantized(value, scale)


def _check_finite(rows: np.ndarray, name: str, path: Path | str) -> None:
  if rows.dtype != np.int8 and not np.isfinite(rows).all():
    raise UserError(f'{path}: {name} has values that are not finite: make the vector again')
