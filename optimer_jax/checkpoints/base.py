"""Importing a base model, and giving artifacts back in Hugging Face's layout.

A base directory holds, beside its leaves: `config.json` and the tokenizer's files as the source
has them, `vocabulary.npy` (which rows of the full embedding the leaves hold, where not all) and
`untouched.safetensors` (the other rows, a vision tower, a projector), so that an export gives
back every tensor of the source.

A trimmed vocabulary keeps the rows of chosen tokens only. It makes a small model several times
faster to train, and its losses comparable only among models of the same vocabulary.
"""

import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.gguf_file import open_gguf
from optimer_jax.checkpoints.huggingface import (
  TOKENIZER_FILES,
  download,
  open_huggingface,
  read_safetensors,
  write_huggingface,
  write_safetensors,
)
from optimer_jax.checkpoints.leaves import blocks_of, row_blocks
from optimer_jax.checkpoints.names import (
  EMBEDDING,
  Source,
  Tensor,
  by_rows,
  contracted_axes,
  external_name,
  to_torch,
  torch_shape,
)
from optimer_jax.errors import UserError
from optimer_jax.files import atomic_directory, read_json, write_text
from optimer_jax.gemma3.config import SIZES, Gemma3Config, to_hf
from optimer_jax.gemma3.layout import init_leaves, leaf_shapes

OTHER_ROWS = 'other_embedding_rows'
# Multimodal checkpoints carry 64 rows more than the text vocabulary, which divides by 256.
TEXT_VOCABULARY = 262_144


def open_source(name: str, cache: Path) -> Source:
  """Opens a model by name.

  Args:
    name: a directory or hub id in Hugging Face's layout, a .gguf file, `package:NAME` (a Python
      package that carries a GGUF), or `random:SIZE:SEED` (random weights; SIZE from
      `gemma3.SIZES`).
    cache: where unpacked files are kept.

  Raises:
    UserError: it cannot be found or read, or is not a Gemma 3 text tower; the tensor is named.
  """
  if name.startswith('package:'):
    return open_gguf(_package_gguf(name.removeprefix('package:'), cache), name)
  if name.startswith('random:'):
    return _random(name)
  if name.endswith('.gguf'):
    return open_gguf(Path(name), name)
  path = Path(name)
  if path.exists():
    return open_huggingface(path, name)
  if name.startswith(('.', '/', '~')) or name.count('/') > 1:  # no hub id looks so
    raise UserError(f'{name} is missing: give a directory, a .gguf file or the id of a hub model')
  return open_huggingface(download(name), name)


def read_leaves(source: Source, kept: np.ndarray | None) -> tuple[Gemma3Config, dict]:
  """Reads a whole source into memory.

  Args:
    source: what to read.
    kept: int [V'], ascending ids whose embedding rows to keep; None keeps them all.

  Returns:
    The config with the kept vocabulary, and the leaves.
  """
  config, leaves = with_vocabulary(source, kept)
  return config, {name: tensor.read() for name, tensor in leaves.items()}


def with_vocabulary(
  source: Source, kept: np.ndarray | None
) -> tuple[Gemma3Config, dict[str, Tensor]]:
  """A source's config and leaves as they are with the embedding rows `kept` only."""
  if kept is None:
    return source.config, source.leaves
  config = dataclasses.replace(source.config, vocab_size=len(kept))
  return config, source.leaves | {EMBEDDING: take_rows(source.leaves[EMBEDDING], kept)}


def take_rows(full: Tensor, ids: np.ndarray) -> Tensor:
  """The rows `ids`, ascending, of a tensor; of it, one block at a time is in memory."""

  def read(start: int = 0, stop: int | None = None) -> np.ndarray:
    wanted = ids[start:stop]
    parts = [np.empty((0, *full.shape[1:]), full.dtype)]
    for begin, end in row_blocks(full.shape):
      here = wanted[np.searchsorted(wanted, begin) : np.searchsorted(wanted, end)]
      if len(here):
        parts.append(full.read(here[0], here[-1] + 1)[here - here[0]])
    return np.concatenate(parts)

  return Tensor((len(ids), *full.shape[1:]), full.dtype, read)


def import_base(
  source: Source,
  path: Path | str,
  tokenizer: Path,
  kept: np.ndarray | None = None,
  settings: Mapping | None = None,
  arrays: str = '',
) -> store.Manifest:
  """Writes a source as a base artifact.

  Args:
    source: from `open_source`.
    path: the artifact's directory.
    tokenizer: a directory with the tokenizer's files, which are copied.
    kept: ascending ids of a trimmed vocabulary; None keeps all that the tokenizer knows.
    settings: what was asked for, kept in the manifest.
    arrays: of `store.save`.

  Raises:
    UserError: a tensor cannot be read, or the disk is full.
  """
  if kept is not None and len(kept) == source.config.vocab_size:
    kept = None
  trimmed = kept is not None
  if not trimmed and source.config.vocab_size > TEXT_VOCABULARY:
    kept = np.arange(TEXT_VOCABULARY, dtype=np.int32)
  config, leaves = with_vocabulary(source, kept)

  def add_files(new: Path) -> None:
    for file in tokenizer.iterdir():
      shutil.copy(file, new / file.name)
    write_text(new / 'config.json', json.dumps(source.config_json, indent=2) + '\n')
    untouched = dict(source.untouched)
    if kept is not None:
      np.save(new / 'vocabulary.npy', kept.astype(np.int32))
      full = source.leaves[EMBEDDING]
      others = np.setdiff1d(np.arange(full.shape[0]), kept)
      untouched[OTHER_ROWS] = take_rows(full, others)
    if untouched:
      shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in untouched.items()}
      write_safetensors(new / 'untouched.safetensors', shapes, blocks_of(untouched))

  notes = list(source.notes)
  if trimmed:
    notes.append(
      f'vocabulary trimmed to {len(kept)} of {source.config.vocab_size} tokens; '
      'losses compare only with models of the same vocabulary'
    )
  facts = {
    'source': source.name,
    'prefix': source.prefix,
    'head': source.head,
    'full_vocabulary': source.config.vocab_size,
    'notes': notes,
    'settings': dict(settings or {}),
  }
  shapes = {name: tensor.shape for name, tensor in leaves.items()}
  rows = blocks_of(leaves)
  return store.save(
    path,
    'base',
    config,
    rows,
    shapes=shapes,
    facts=facts,
    add_files=add_files,
    arrays=arrays,
  )


def kept_vocabulary(base: Path | str) -> np.ndarray | None:
  """The ids whose rows the base holds, ascending int32 [V]; None if it holds them all."""
  path = store.sound_file(base, 'vocabulary.npy')
  return None if path is None else np.load(path)


def export(
  artifact: Path | str, base: Path | str, out: Path | str, dtype: str | None = None
) -> None:
  """Writes a base, CPT model or merged model as a Hugging Face checkpoint.

  Its tensors, their names and config.json are those of the base's source; the vocabulary is the
  full one again, rows that were not kept being the base's own.

  Args:
    artifact: what to export.
    base: the base that it was made from.
    out: the directory to write.
    dtype: float32, bfloat16 or float16; default: that of the base, tensor by tensor.

  Raises:
    UserError: the artifact is of another base, or damaged, or the disk is full.
  """
  base = Path(base)
  base_manifest = store.read_manifest(base, 'base')
  manifest, leaves = store.open_leaves(artifact, ('base', 'cpt', 'merged'))
  parent = manifest.parents.get('base', manifest.fingerprint)
  if parent != base_manifest.fingerprint:
    raise UserError(
      f'{artifact} was made from the base {parent[:8]}, but {base} is '
      f'{base_manifest.fingerprint[:8]}: give the base that it was made from'
    )
  config_json = read_json(store.sound_file(base, 'config.json'))
  if dtype:
    config_json |= {'dtype': dtype, 'torch_dtype': dtype}
  facts, leaves = base_manifest.facts, with_full_vocabulary(base, leaves)
  untouched = _untouched(base)
  untouched.pop(OTHER_ROWS, None)
  tensors = {
    facts['prefix'] + external_name(leaf, 0): Tensor(
      torch_shape(leaf, tensor.shape),
      dtype or base_manifest.leaves[leaf]['dtype'],
      by_rows(lambda x=leaf, t=tensor: to_torch(x, t.read()))
      if contracted_axes(leaf)
      else tensor.read,
    )
    for leaf, tensor in leaves.items()
  }
  if facts['head']:
    tensors[facts['head']] = tensors[facts['prefix'] + external_name(EMBEDDING, 0)]
  tensors |= untouched
  with atomic_directory(out) as new:
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_huggingface(new, config_json, shapes, blocks_of(tensors))
    for file in TOKENIZER_FILES:
      if sound := store.sound_file(base, file):
        shutil.copy(sound, new / file)
    write_text(new / 'README.md', _model_card(manifest, base_manifest, dtype))


def with_full_vocabulary(base: Path | str, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """Leaves of the base, or made from it, with the rows of the embedding that it did not keep."""
  kept = kept_vocabulary(base)
  if kept is None:
    return dict(leaves)
  others = _untouched(Path(base))[OTHER_ROWS]
  return {**leaves, EMBEDDING: _full_embedding(leaves[EMBEDDING], others, kept)}


def _full_embedding(embedding: Tensor, others: Tensor, kept: np.ndarray) -> Tensor:
  """The embedding with the rows that were not kept put back in their places."""
  total = embedding.shape[0] + others.shape[0]
  is_kept = np.zeros(total + 1, bool)
  is_kept[kept] = True
  before = np.concatenate([[0], np.cumsum(is_kept)])  # how many kept rows precede each row

  def read(start: int = 0, stop: int | None = None) -> np.ndarray:
    stop = total if stop is None else stop
    ours, theirs = (
      slice(before[start], before[stop]),
      slice(start - before[start], stop - before[stop]),
    )
    mine = is_kept[start:stop]
    # Rows that were not trained keep the base's values, in the wider dtype of the two.
    rows = np.empty(
      (stop - start, *embedding.shape[1:]), np.promote_types(embedding.dtype, others.dtype)
    )
    rows[mine] = embedding.read(ours.start, ours.stop)
    rows[~mine] = others.read(theirs.start, theirs.stop)
    return rows

  return Tensor((total, *embedding.shape[1:]), embedding.dtype, read)


def _untouched(base: Path) -> dict[str, Tensor]:
  path = store.sound_file(base, 'untouched.safetensors')
  return {} if path is None else read_safetensors(path)


def _model_card(manifest: store.Manifest, base: store.Manifest, dtype: str | None) -> str:
  source, notes = base.facts['source'], ''.join(f'- {note}\n' for note in base.facts['notes'])
  made = {
    'base': 'The base model itself, imported and written again.',
    'cpt': f'The base model after continual pre-training on {manifest.facts.get("dataset")}.',
    'merged': 'The base model plus a weighted sum of distribution vectors, one for each data '
    'set, each the difference that continual pre-training on it made.',
  }[manifest.kind]
  weights = ''.join(
    f'| {name} | {weight:.4f} |\n' for name, weight in manifest.facts.get('weights', {}).items()
  )
  table = f'\n| data set | weight |\n|---|---|\n{weights}' if weights else ''
  return f"""---
license: gemma
library_name: transformers
pipeline_tag: text-generation
---
# A Gemma 3 model made with optimer_jax

{made} The files of the original model were modified.
{table}
- base: {source} (fingerprint {base.fingerprint})
- this model: fingerprint {manifest.fingerprint}, written in {dtype or 'the dtype of the base'}
{notes}
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.
By using this model you agree to them and to the Gemma Prohibited Use Policy named there.
"""


def _random(name: str) -> Source:
  _, size, *seed = name.split(':')
  if size not in SIZES:
    raise UserError(f'{name}: {size!r} is no size; the sizes are {", ".join(SIZES)}')
  config = SIZES[size]
  values = init_leaves(config, int(seed[0]) if seed else 0)
  leaves = {
    leaf: Tensor(shape, 'float32', lambda start=0, stop=None, leaf=leaf: values[leaf][start:stop])
    for leaf, shape in leaf_shapes(config).items()
  }

  return Source(
    name,
    config,
    to_hf(config, 'float32'),
    leaves,
    leaves,
    'model.',
    None,
    {},
    None,
    notes=('random weights: nothing was learnt before continual pre-training',),
  )


def _package_gguf(package: str, cache: Path) -> Path:
  path = cache / f'{package}.gguf'
  if path.exists():
    return path
  try:
    module = importlib.import_module(package)
  except ImportError:
    raise UserError(
      f"the package {package} is not installed: pip install 'optimer_jax[gemma270m]'"
    ) from None
  cache.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix(f'.{os.getpid()}.part')
  module.assemble(str(part))
  part.replace(path)
  return path
