"""Artifacts: a directory of named leaves in Orbax's format under a manifest with digests.

  ARTIFACT/manifest.json   what it is, where it came from, a digest of every leaf
  ARTIFACT/leaves/         Orbax: one array a leaf, uncompressed
  ARTIFACT/…               a base also keeps config.json, tokenizer files, untouched tensors

The leaves may be elsewhere, on another disk or in a bucket: the manifest says where. Then each
writer takes a new place, so that a manifest and its leaves belong together at any moment.

Orbax notices a truncated file but not a flipped bit; the digests notice both.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from optimer_jax import __version__
from optimer_jax.checkpoints.leaves import open_leaves as open_rows
from optimer_jax.checkpoints.leaves import row_blocks, write_leaves
from optimer_jax.checkpoints.names import Tensor
from optimer_jax.checkpoints.places import absolute, delete, in_bucket
from optimer_jax.checkpoints.quantized import SCALE, scale_shape
from optimer_jax.errors import UserError
from optimer_jax.files import atomic_directory, no_room, read_json, sync_directory, write_json
from optimer_jax.gemma3.config import Gemma3Config
from optimer_jax.gemma3.layout import leaf_shapes
from optimer_jax.parallel.processes import meet, primary, whole_rows
from optimer_jax.progress import say

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What stands in manifest.json."""

  kind: str  # base, cpt, vector, merged
  model: Gemma3Config
  leaves: dict[str, dict]  # name -> {shape, dtype, digest}
  fingerprint: str
  parents: dict[str, str]  # role -> fingerprint
  facts: dict  # tokens seen, seed, norms, weights …: what the kind has to say
  files: dict[str, str]  # the other files of the artifact -> digest
  versions: dict[str, str]
  written: str
  format: int = FORMAT
  arrays: str = ''  # where the leaves are, if not beside the manifest


def fingerprint(leaves: Mapping[str, dict]) -> str:
  """A digest of the parameters themselves: names, shapes, dtypes and values."""
  lines = sorted(f'{name} {a["shape"]} {a["dtype"]} {a["digest"]}' for name, a in leaves.items())
  return hashlib.blake2b('\n'.join(lines).encode(), digest_size=16).hexdigest()


def seal(raw: Mapping) -> str:
  """A digest of a manifest's whole content, which notices a changed window or parent."""
  return hashlib.blake2b(json.dumps(raw, sort_keys=True).encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
  """The versions that a result depends on."""
  names = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'google-vizier')
  return {'optimer_jax': __version__} | {name: importlib.metadata.version(name) for name in names}


def save(
  path: Path | str,
  kind: str,
  model: Gemma3Config,
  leaves: Mapping[str, np.ndarray | jax.Array] | Iterable[tuple[str, np.ndarray]],
  *,
  shapes: Mapping[str, tuple[int, ...]] | None = None,
  parents: Mapping[str, str] | None = None,
  facts: Mapping | None = None,
  add_files: Callable[[Path], None] | None = None,
  arrays: str = '',
) -> Manifest:
  """Writes an artifact; a reader sees the old one or the new one.

  Leaves that are spread over several processes are given by all of them, and written by process 0.

  Args:
    path: the artifact's directory, replaced if it exists.
    kind: base, cpt, vector or merged.
    model: the architecture.
    leaves: every leaf by name; or names and values as they come, a leaf whole or in consecutive
      blocks of rows (`leaves.row_blocks`), so that an artifact may be larger than memory.
    shapes: of leaves that come in blocks, where they are not the model's own.
    parents: role to fingerprint of the artifacts that it was made from.
    facts: JSON values to keep in the manifest, read after the last leaf.
    add_files: called with the directory before it takes its place.
    arrays: a folder or gs://… in which the leaves get a folder of their own; what the artifact had
      there before is deleted afterwards. Default: beside the manifest.

  Raises:
    UserError: the disk is full, or the bucket cannot be written.
  """
  path = Path(path)
  shapes = shapes or leaf_shapes(model)
  together = False
  if isinstance(leaves, Mapping):
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    together = not all(getattr(leaf, 'is_fully_addressable', True) for leaf in leaves.values())
    leaves = _gathered(leaves) if together else leaves.items()
  if together and not primary():
    for _ in leaves:
      pass
    meet()
    return read_manifest(path, kind)
  place = f'{absolute(arrays)}/{_owner(path)}-{uuid.uuid4().hex[:8]}' if arrays else ''
  with atomic_directory(path, functools.partial(_forget_arrays, path)) as new:
    if place:
      write_json(new / 'manifest.json', {'arrays': place})  # By it, a killed writer's are found.
    with no_room(place or path):
      entries = write_leaves(place or new / 'leaves', shapes, leaves)
      if place and not in_bucket(place):
        sync_directory(Path(place))
    if add_files:
      add_files(new)
    manifest = Manifest(
      kind=kind,
      model=model,
      leaves=entries,
      fingerprint=fingerprint(entries),
      parents=dict(parents or {}),
      facts=dict(facts or {}),
      files={name: _file_digest(new / name) for name in _files(new)},
      versions=versions(),
      written=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      arrays=place,
    )
    raw = dataclasses.asdict(manifest)
    write_json(new / 'manifest.json', {**raw, 'seal': seal(raw)})
  if together:
    meet()
  return manifest


def _files(directory: Path) -> list[str]:
  return sorted(f.name for f in directory.iterdir() if f.is_file() and f.name != 'manifest.json')


def _owner(path: Path) -> str:
  """What marks the places of an artifact's leaves as its own, not those of a copy."""
  return hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()


def _forget_arrays(path: Path, directory: Path) -> None:
  """Deletes the leaves that a directory, which once was `path` or was to be, has elsewhere."""
  try:
    place = json.loads((directory / 'manifest.json').read_text(encoding='utf-8'))['arrays']
    if place.rpartition('/')[-1].startswith(_owner(path)):
      delete(place)
  except (OSError, ValueError, LookupError, AttributeError, TypeError):
    pass  # It has none, or was not to be read.
  except UserError as error:
    say(f'{place} is left over, and can be deleted: {error}')


def _gathered(leaves: Mapping[str, jax.Array]) -> Iterator[tuple[str, np.ndarray]]:
  """The leaves' rows, block by block, in every process."""
  for name, leaf in leaves.items():
    for start, stop in row_blocks(leaf.shape):
      yield name, whole_rows(leaf, start, stop)


def read_manifest(path: Path | str, kind: str | tuple[str, ...] | None = None) -> Manifest:
  """Reads ARTIFACT/manifest.json.

  Raises:
    UserError: it is missing, damaged, of another format, or of another kind than asked for.
  """
  path = Path(path)
  raw = read_json(path / 'manifest.json')
  try:
    if raw['format'] != FORMAT:
      raise UserError(
        f'{path}/manifest.json has format {raw["format"]}, but this version reads {FORMAT}: '
        'write the artifact again'
      )
    given = raw.pop('seal')
    manifest = Manifest(**{**raw, 'model': Gemma3Config(**raw['model'])})
    if given != seal(raw) or fingerprint(manifest.leaves) != manifest.fingerprint:
      raise UserError(f'{path}/manifest.json is damaged: write the artifact again')
  except (AttributeError, TypeError, KeyError) as error:
    raise UserError(
      f'{path}/manifest.json cannot be read ({error}): it was written by another version'
    ) from None
  kinds = (kind,) if isinstance(kind, str) else kind
  if kinds and manifest.kind not in kinds:
    raise UserError(f'{path} is a {manifest.kind}, but a {" or ".join(kinds)} is needed here')
  return manifest


def sound_file(path: Path | str, name: str) -> Path | None:
  """A file that an artifact keeps beside its leaves; None if it has no such file.

  Raises:
    UserError: the file is missing or damaged.
  """
  file, expected = Path(path) / name, read_manifest(path).files.get(name)
  if expected is None:
    return None
  if not file.exists():
    raise UserError(f'{file} is missing: write the artifact again')
  if _file_digest(file) != expected:
    raise UserError(f'{file} is damaged: write the artifact again')
  return file


def _file_digest(file: Path) -> str:
  with open(file, 'rb') as opened:
    return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def open_leaves(
  path: Path | str, kind: str | tuple[str, ...] | None = None
) -> tuple[Manifest, dict[str, Tensor]]:
  """Opens an artifact whose leaves are read when they are asked for (`leaves.open_leaves`).

  Raises:
    UserError: something is missing or misshapen; the leaf or file is named.
  """
  path = Path(path)
  manifest = read_manifest(path, kind)
  expected = _stored_shapes(manifest)
  for name, shape in expected.items():
    if name not in manifest.leaves:
      raise UserError(f'{path} has no leaf {name}: write the artifact again')
    if tuple(manifest.leaves[name]['shape']) != shape:
      raise UserError(f'{path}: {name} has shape {manifest.leaves[name]["shape"]}, not {shape}')
  for name in manifest.leaves:
    if name not in expected:
      raise UserError(f'{path} has a leaf {name} that its model lacks: write the artifact again')
  entries = {name: manifest.leaves[name] for name in expected}
  return manifest, open_rows(manifest.arrays or path / 'leaves', entries, path)


def _stored_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
  shapes = leaf_shapes(manifest.model)
  for name, shape in [*shapes.items()]:
    if manifest.leaves.get(name, {}).get('dtype') == 'int8':
      shapes[name + SCALE] = scale_shape(name, shape)
  return shapes


def values(leaves: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
  """Every leaf's name and values, read when it is its turn."""
  return ((name, tensor.read()) for name, tensor in leaves.items())


def load(
  path: Path | str, kind: str | tuple[str, ...] | None = None
) -> tuple[Manifest, dict[str, np.ndarray]]:
  """Reads an artifact and checks every leaf against its digest.

  Args:
    path: the artifact's directory.
    kind: what it must be, if that matters.

  Raises:
    UserError: something is missing, misshapen or damaged; the leaf or file is named.
  """
  manifest, tensors = open_leaves(path, kind)
  return manifest, dict(values(tensors))
