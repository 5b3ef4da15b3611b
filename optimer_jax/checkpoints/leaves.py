"""Leaves on disk or in a bucket in Orbax's format, written and read by blocks of rows.

Orbax saves and loads whole arrays; a leaf of a 27B model is 5.6 GB in float32. Here Orbax writes
the checkpoint's frame and TensorStore, in which Orbax keeps its arrays, the rows. Orbax loads the
result as it loads its own.
"""

import concurrent.futures
import hashlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from optimer_jax.checkpoints.names import Tensor
from optimer_jax.checkpoints.places import absolute, in_bucket, prove, reachable, reason, url
from optimer_jax.errors import UserError

# Elements: 16 MB in float32. The C library gives larger pieces back to the system, and taking
# fresh pages for each costs more than the merge.
BLOCK = 2**22
_COMMIT = 2**27  # bytes that wait in memory for a commit, which costs milliseconds


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
  """Start and stop of consecutive rows of at most `BLOCK` elements, or one row."""
  rows = _rows(shape)
  for start in range(0, shape[0], rows):
    yield start, min(start + rows, shape[0])


def blocks_of(leaves: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
  """Every leaf's rows, block by block."""
  for name, tensor in leaves.items():
    for start, stop in row_blocks(tensor.shape):
      yield name, tensor.read(start, stop)


def digest(array: np.ndarray) -> str:
  """BLAKE2b of the values in C order, 128 bits, as hex."""
  data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def orbax_context() -> ocp.Context:
  """Orbax without compression, which cost three times the speed and saved 8%."""
  context = ocp.Context()
  context.array.saving.use_compression = False
  return context


def write_leaves(
  place: Path | str, shapes: Mapping[str, tuple[int, ...]], rows: Iterable[tuple[str, np.ndarray]]
) -> dict[str, dict]:
  """Writes a checkpoint.

  Args:
    place: the checkpoint's directory or gs://…, where nothing may be.
    shapes: every leaf's shape.
    rows: each leaf's name and values, whole or in consecutive blocks as `row_blocks` cuts them.

  Returns:
    name -> {shape, dtype, digest}.

  Raises:
    UserError: the disk is full, or the bucket cannot be written.
  """
  prove(place)
  with reachable(place):
    (write_frame if jax.process_count() == 1 else _write_frame_alone)(place, shapes)
  entries, hashes, written = {}, {}, dict.fromkeys(shapes, 0)
  with _Commits(place) as commits, concurrent.futures.ThreadPoolExecutor(1) as hashing:
    for name, block in rows:
      block = np.ascontiguousarray(block)
      shape, start = shapes[name], written[name]
      if not entries and not in_bucket(place):
        _check_room(Path(place), sum(map(math.prod, shapes.values())) * block.dtype.itemsize)
      if name not in entries:
        entries[name] = {'shape': list(shape), 'dtype': block.dtype.name}
        hashes[name] = hashlib.blake2b(digest_size=16)
      if block.shape[1:] != shape[1:] or block.dtype.name != entries[name]['dtype']:
        raise ValueError(f'{name}: {block.dtype} {block.shape} does not continue {entries[name]}')
      # Rows are hashed while TensorStore takes its copy; one thread keeps their order.
      hashed = hashing.submit(hashes[name].update, block.reshape(-1).view(np.uint8))
      written[name] = stop = start + len(block)
      new_dtype = block.dtype.name if start == 0 else None
      with reachable(place):
        array = _open(place, name, commits.transaction(block.nbytes), shape, new_dtype)
        array[start:stop].write(block).result()
      hashed.result()
  for name, shape in shapes.items():
    if written[name] != shape[0]:
      raise ValueError(f'{name}: {written[name]} rows of {shape[0]} were written')
    entries[name]['digest'] = hashes[name].hexdigest()
  return {name: entries[name] for name in shapes}


def write_frame(place: Path | str, names: Iterable[str]) -> None:
  """Orbax's checkpoint of arrays with these names, which are not yet what they should be."""
  with orbax_context():
    ocp.save(absolute(place), {name: np.zeros(1, np.int8) for name in names})


def _write_frame_alone(place: Path | str, names: Iterable[str]) -> None:
  """In a process of its own: Orbax would wait for the other processes, which do not come here."""
  code = (
    'import sys; from optimer_jax.checkpoints.leaves import write_frame; '
    'write_frame(sys.argv[1], sys.stdin.read().split())'
  )
  env = {key: value for key, value in os.environ.items() if key != 'JAX_COORDINATOR_ADDRESS'}
  done = subprocess.run(
    [sys.executable, '-c', code, str(place)],
    env={**env, 'JAX_PLATFORMS': 'cpu'},
    input='\n'.join(names),
    text=True,
    capture_output=True,
  )
  if done.returncode:
    raise RuntimeError(done.stderr.strip().splitlines()[-1])


class _Commits:
  """Commits what was written every `_COMMIT` bytes, and the rest when the block is left.

  Also when it is left by an error: TensorStore breaks down when a transaction is dropped with
  writes in it. What was written is deleted with the unfinished artifact.
  """

  def __init__(self, place: Path | str):
    self._place = place

  def __enter__(self) -> '_Commits':
    self._open, self._waiting = ts.Transaction(), 0
    return self

  def __exit__(self, *error) -> None:
    with reachable(self._place):
      self._open.commit_async().result()

  def transaction(self, size: int) -> ts.Transaction:
    """The transaction to write `size` bytes in."""
    if self._waiting >= _COMMIT:
      self._open.commit_async().result()
      self._open, self._waiting = ts.Transaction(), 0
    self._waiting += size
    return self._open


def open_leaves(
  place: Path | str, entries: Mapping[str, Mapping], artifact: Path
) -> dict[str, Tensor]:
  """Opens a checkpoint; its values are read when they are asked for.

  A leaf that is read from its first row to its last, at once or block by block, is checked
  against its digest when the last row is read. (Rows that are looked at out of turn do not count.)

  Args:
    place: the checkpoint's directory, or gs://….
    entries: from `write_leaves`.
    artifact: named in errors, which reading raises as UserError: a damaged or missing file.
  """

  def tensor(name: str, entry: Mapping) -> Tensor:
    shape, expected = tuple(entry['shape']), entry['digest']
    opened, seen, hashed = None, 0, hashlib.blake2b(digest_size=16)

    def read(start: int = 0, stop: int | None = None) -> np.ndarray:
      nonlocal opened, seen
      stop = shape[0] if stop is None else stop
      try:
        opened = opened or _open(place, name)
        rows = opened[start:stop].read().result()
      except (ValueError, OSError) as error:  # TensorStore's errors for a damaged file
        advice = 'check that you may read the bucket, or ' if in_bucket(place) else ''
        raise UserError(
          f'{place}: {name} cannot be read ({reason(error)}): {advice}write the artifact again'
        ) from error
      if start <= seen < stop:
        hashed.update(rows[seen - start :].reshape(-1).view(np.uint8))
        seen = stop
        if seen == shape[0] and hashed.hexdigest() != expected:
          raise UserError(f'{artifact}: the values of {name} are damaged; write the artifact again')
      return rows

    return Tensor(shape, entry['dtype'], read)

  return {name: tensor(name, entry) for name, entry in entries.items()}


def _rows(shape: tuple[int, ...]) -> int:
  return max(1, BLOCK // math.prod(shape[1:]))


# No cache of values, as every byte is read once; files are synced together when an artifact is
# complete. Of a bucket the index is kept: else it were fetched again for each leaf.
_CONTEXT = ts.Context(
  {
    'cache_pool': {'total_bytes_limit': 0},
    'cache_pool#index': {'total_bytes_limit': 2**26},
    'file_io_sync': False,
  }
)


def _open(
  place: Path | str,
  name: str,
  transaction: ts.Transaction | None = None,
  shape: tuple[int, ...] = (),
  new_dtype: str | None = None,
) -> ts.TensorStore:
  """The array of a leaf; with `new_dtype`, made anew in the place of the frame's."""
  base = f'{url(place)}state/'
  kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
  if in_bucket(place):
    kvstore['cache_pool'] = 'cache_pool#index'
  spec = {'driver': 'zarr3', 'kvstore': kvstore}
  if transaction:
    spec['store_data_equal_to_fill_value'] = True  # Orbax takes chunks left out for lost ones
  if new_dtype:
    chunk = [min(_rows(shape), shape[0]), *shape[1:]]
    spec['metadata'] = {
      'shape': shape,
      'data_type': new_dtype,
      'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': chunk}},
      'codecs': [{'name': 'bytes', 'configuration': {'endian': 'little'}}],
    }
  new = {'create': True, 'delete_existing': True} if new_dtype else {'open': True}
  return ts.open(spec, context=_CONTEXT, transaction=transaction, **new).result()


def _check_room(path: Path, size: int) -> None:
  free = shutil.disk_usage(path).free
  if free < 1.05 * size:
    raise UserError(
      f'no room on the disk for {path.parent}: it needs {size / 1e9:.2f} GB and '
      f'{free / 1e9:.2f} GB are free; free some space and start again'
    )
