"""A vector pool: the vectors of one base, held together for merging."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax

from optimer_jax.checkpoints import store
from optimer_jax.errors import UserError
from optimer_jax.gemma3 import Model, from_leaves, leaf_shapes
from optimer_jax.vectors.extract import check_parent


@dataclasses.dataclass(frozen=True)
class Pool:
  """Base and vectors as parameter trees of one structure."""

  names: tuple[str, ...]
  model: Model
  base: dict
  vectors: tuple[dict, ...]
  fingerprint: str  # of the base and all vectors
  manifests: Mapping[str, store.Manifest]  # by name, and the base's as 'base'


def load_pool(base: Path | str, vectors: Mapping[str, Path | str], model: Model) -> Pool:
  """Reads and checks a pool.

  Args:
    base: the base artifact.
    vectors: data set name to vector artifact.
    model: how to compute; its config is checked against the base's.

  Raises:
    UserError: a vector of another base or architecture, or a damaged leaf; it is named.
  """
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placed = dict.fromkeys(leaf_shapes(model.config), device)
  base_manifest = store.read_manifest(base, 'base')
  if base_manifest.model != model.config:
    raise UserError(f'{base} has another architecture than the run: {base_manifest.model}')
  trees, manifests = [], {'base': base_manifest}
  root = from_leaves(model, store.load(base, 'base', shardings=placed)[1])
  for name, path in vectors.items():
    manifest, leaves = store.load(path, 'vector', shardings=placed)
    check_parent(manifest, base_manifest.fingerprint, path, base)
    manifests[name] = manifest
    trees.append(from_leaves(model, leaves))
  return Pool(
    names=tuple(vectors),
    model=model,
    base=root,
    vectors=tuple(trees),
    fingerprint=pool_fingerprint(manifests),
    manifests=manifests,
  )


def pool_fingerprint(manifests: Mapping[str, store.Manifest]) -> str:
  """A digest of the base and the named vectors."""
  text = '\n'.join(f'{name} {m.fingerprint}' for name, m in sorted(manifests.items()))
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
