"""tau = theta - theta_0, leaf by leaf in float32 (arXiv 2603.28858, section 3)."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from optimer_jax.checkpoints import base as bases
from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.leaves import row_blocks
from optimer_jax.checkpoints.names import EMBEDDING, Tensor
from optimer_jax.checkpoints.quantized import (
  SCALE,
  Quantized,
  channel_axes,
  channel_scale,
  quantize_rows,
  scale_shape,
)
from optimer_jax.data.sources import default_cache
from optimer_jax.errors import UserError
from optimer_jax.vectors.lora import open_adapter
from optimer_jax.vectors.low_rank import sum_of_squares

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'int8': np.int8}


def extract(
  base: Path | str,
  model: Path | str,
  out: Path | str,
  name: str,
  dtype: str = 'float32',
  cache: Path | None = None,
  arrays: str = '',
) -> store.Manifest:
  """Writes the distribution vector of a model; a few blocks of rows are in memory at a time.

  Args:
    base: the base artifact.
    model: a CPT or merged model of that base; or a directory with a PEFT LoRA adapter; or a model
      of others, as `checkpoints.base.open_source` takes it: a fine-tune of the same base in
      Hugging Face's layout, say. Of its vocabulary, the rows that the base has are taken.
    out: the vector artifact to write.
    name: what the vector is called: the data set's name.
    dtype: float32; bfloat16 at half the size; int8 with a scale for each channel at a quarter. The
      rounding error is recorded relative to the vector's norm.
    cache: where a downloaded or unpacked model is kept.
    arrays: of `store.save`.

  Raises:
    UserError: another base or architecture, another dtype name, a value that is not finite, a
      damaged leaf; it is named.
  """
  if dtype not in DTYPES:
    raise UserError(f'vectors are stored as {", ".join(DTYPES)}, not {dtype!r}')
  base_manifest, base_leaves = store.open_leaves(base, 'base')
  deltas, parents, facts = _deltas(base, base_manifest, base_leaves, model, cache)
  facts |= {'dataset': name, 'dtype': dtype, 'origin': origin(model)}
  facts |= {'norm': 0.0, 'rounding_error': 0.0}
  shapes = {leaf: tensor.shape for leaf, tensor in base_leaves.items()}
  if dtype == 'int8':
    shapes |= {x + SCALE: scale_shape(x, shapes[x]) for x in base_leaves if channel_axes(x)}

  def rows() -> Iterator[tuple[str, np.ndarray]]:
    squares = errors = 0.0
    for leaf, tensor in deltas.items():
      to_int8 = dtype == 'int8' and channel_axes(leaf)
      compress = _as_int8 if to_int8 else functools.partial(_as_float, dtype=dtype)
      for stored, exact, restored in compress(leaf, tensor):
        squares += sum_of_squares(exact)
        errors += sum_of_squares(exact - restored)
        yield stored
    facts['norm'] = squares**0.5
    facts['rounding_error'] = (errors / squares) ** 0.5 if squares else 0.0

  return store.save(
    out,
    'vector',
    base_manifest.model,
    rows(),
    shapes=shapes,
    parents={'base': base_manifest.fingerprint, **parents},
    facts=facts,
    arrays=arrays,
  )


def origin(model: Path | str) -> str:
  """What tells whether a model is still the one that a vector was taken of.

  An artifact's fingerprint; of other files and directories a digest of names, sizes and times; else
  the name itself.
  """
  path = Path(model)
  if (path / 'manifest.json').exists():
    return store.read_manifest(path).fingerprint
  if not path.exists():
    return str(model)
  files = [path] if path.is_file() else sorted(f for f in path.rglob('*') if f.is_file())
  lines = [f'{f.relative_to(path)} {f.stat().st_size} {f.stat().st_mtime_ns}' for f in files]
  return hashlib.blake2b('\n'.join(lines).encode(), digest_size=16).hexdigest()


def check_parent(manifest: store.Manifest, fingerprint: str, path, base) -> None:
  """Refuses an artifact that was made from another base."""
  parent = manifest.parents.get('base', manifest.fingerprint)
  if parent != fingerprint:
    raise UserError(
      f'{path} was made from the base {parent[:8]}, but {base} is {fingerprint[:8]}: '
      'use the base that it was trained from'
    )


def _deltas(
  base: Path | str,
  base_manifest: store.Manifest,
  base_leaves: Mapping[str, Tensor],
  model: Path | str,
  cache: Path | None,
) -> tuple[dict[str, Tensor], dict[str, str], dict]:
  """A model minus the base, as float32 leaves to be read; its parents; what is known of it."""
  if (Path(model) / 'adapter_config.json').exists():
    kept = bases.kept_vocabulary(base)
    full = bases.with_full_vocabulary(base, base_leaves)
    vocabulary = full[EMBEDDING].shape[0]
    config = dataclasses.replace(base_manifest.model, vocab_size=vocabulary)
    adapter = open_adapter(Path(model), config, full)
    if kept is not None:
      adapter[EMBEDDING] = bases.take_rows(adapter[EMBEDDING], kept)
    return {x: _finite(x, t, model) for x, t in adapter.items()}, {}, {'source': str(model)}
  if (Path(model) / 'manifest.json').exists():
    manifest, leaves = store.open_leaves(model, ('cpt', 'base', 'merged'))
    check_parent(manifest, base_manifest.fingerprint, model, base)
    parents, facts = {'model': manifest.fingerprint}, {'tokens': manifest.facts.get('tokens')}
  else:
    source = bases.open_source(str(model), cache or default_cache())
    config, leaves = bases.with_vocabulary(source, bases.kept_vocabulary(base))
    if config != base_manifest.model:
      raise UserError(f'{model} has another architecture than {base}: {config}')
    parents, facts = {}, {'source': source.name}

  def delta(leaf: str) -> Tensor:
    def read(start: int = 0, stop: int | None = None) -> np.ndarray:
      theirs = leaves[leaf].read(start, stop).astype(np.float32)
      return theirs - base_leaves[leaf].read(start, stop).astype(np.float32)

    return _finite(leaf, Tensor(leaves[leaf].shape, 'float32', read), model)

  return {leaf: delta(leaf) for leaf in base_leaves}, parents, facts


def _finite(leaf: str, tensor: Tensor, model: Path | str) -> Tensor:
  def read(start: int = 0, stop: int | None = None) -> np.ndarray:
    rows = tensor.read(start, stop)
    if not np.isfinite(rows).all():
      raise UserError(f'{model}: {leaf} has values that are not finite: train it again')
    return rows

  return tensor._replace(read=read)


def _as_float(leaf: str, tensor: Tensor, dtype: str) -> Iterator[tuple]:
  """((name, rows to store), exact rows, the rows as they come back) for each block."""
  for block in row_blocks(tensor.shape):
    exact = tensor.read(*block)
    stored = exact.astype(np.float32 if dtype == 'int8' else DTYPES[dtype])
    yield (leaf, stored), exact, stored.astype(np.float32)


def _as_int8(leaf: str, tensor: Tensor) -> Iterator[tuple]:
  read = functools.lru_cache(1)(tensor.read)  # a leaf of one block is read once
  blocks = [*row_blocks(tensor.shape)]
  own = 0 in channel_axes(leaf)  # each row has its scale, or all share them
  scales = [] if own else [channel_scale(leaf, (read(*block) for block in blocks))]
  for block in blocks:
    exact = read(*block)
    if own:
      scales.append(channel_scale(leaf, [exact]))
    stored = quantize_rows(leaf, exact, scales[-1])
    yield (leaf, stored), exact, Quantized(stored, scales[-1]).dequantize()
  nothing = np.zeros(0, np.float32)
  yield (leaf + SCALE, np.concatenate(scales)), nothing, nothing
