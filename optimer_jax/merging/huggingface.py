"""Hugging Face checkpoints to a merged Hugging Face checkpoint, as a mergekit file describes it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from optimer_jax.checkpoints.base import TEXT_VOCABULARY, open_source
from optimer_jax.checkpoints.huggingface import write_huggingface
from optimer_jax.checkpoints.leaves import blocks_of
from optimer_jax.checkpoints.names import EMBEDDING, Source, Tensor, external_name
from optimer_jax.errors import UserError
from optimer_jax.files import atomic_directory, write_json, write_text
from optimer_jax.merging import methods
from optimer_jax.merging.mergekit_yaml import MergekitMerge, numbers_for
from optimer_jax.merging.streamed import difference, merge_streamed
from optimer_jax.parallel.startup import on_host
from optimer_jax.progress import say


def merge_checkpoints(merge: MergekitMerge, out: Path | str, cache: Path, seed: int = 0) -> dict:
  """Merges as `mergekit-yaml` does, in float32 whatever the file's dtype says, rounding once.

  The files are read and written by rows, so models may be larger than memory. The text tower is
  merged; a vision tower, its projector and the embedding rows beyond the text vocabulary are the
  base's (the first model's, without a base), as are config.json and the tokenizer. `digests.json`
  in the result has the digest of every tensor.

  Args:
    merge: from `read_mergekit`.
    out: the directory to write; an earlier merge there is replaced.
    cache: where downloaded or unpacked models are kept.
    seed: of random masks.

  Returns:
    What digests.json holds.

  Raises:
    UserError: a model is missing, damaged or of another architecture than the first; a number
      that the method does not take; `out` is something else than an earlier merge; the disk is
      full.
  """
  _check_out(Path(out), [*merge.models, *([merge.base] if merge.base else [])])
  models = [open_source(name, cache) for name in merge.models]
  base = open_source(merge.base, cache) if merge.base else models[0]
  for model in models:
    if model.config != base.config:
      raise UserError(f'{model.name} has another architecture than {base.name}: {model.config}')
  names = {leaf: base.prefix + external_name(leaf, 0) for leaf in base.stored}
  shapes = {leaf: tensor.shape for leaf, tensor in base.stored.items()}
  dtypes = {leaf: merge.out_dtype or tensor.dtype for leaf, tensor in base.stored.items()}
  root, vectors = _pool(merge, base, models)

  def merged(leaves: dict[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    plan = lambda leaf: _plan(merge, names[leaf], base.config.num_layers)
    splits = dict.fromkeys(leaves, 0)  # tensors are read as others store them
    stop = 0  # of the embedding's rows so far
    for leaf, block in merge_streamed(plan, leaves, vectors, dtypes, splits, seed):
      if leaf == EMBEDDING:
        start, stop = stop, stop + len(block)
        if stop > TEXT_VOCABULARY:
          first = max(start, TEXT_VOCABULARY)
          rest = base.stored[EMBEDDING].read(first, stop).astype(block.dtype)
          block = np.concatenate([block[: first - start], rest])
      yield leaf, block

  def rows() -> Iterator[tuple[str, np.ndarray]]:
    for leaf, block in merged(root):
      yield names[leaf], block
    if base.head:  # spelt out in the source, though it is the embedding
      for _, block in merged({EMBEDDING: root[EMBEDDING]}):
        yield base.head, block
    yield from blocks_of(base.untouched)

  tensors = {names[leaf]: (shapes[leaf], dtypes[leaf]) for leaf in names}
  if base.head:
    tensors[base.head] = tensors[names[EMBEDDING]]
  tensors |= {name: (tensor.shape, tensor.dtype) for name, tensor in base.untouched.items()}
  if base.untouched:
    say(f'{len(base.untouched)} tensors of vision tower and projector are those of {base.name}')
  config_json = dict(base.config_json)
  if merge.out_dtype:
    config_json |= {'dtype': merge.out_dtype, 'torch_dtype': merge.out_dtype}
  with atomic_directory(out) as new, on_host():
    digests = write_huggingface(new, config_json, tensors, rows())
    if base.write_tokenizer:
      base.write_tokenizer(new)
    shutil.copy(merge.file, new / 'mergekit_config.yml')
    write_json(new / 'digests.json', digests)
    write_text(new / 'README.md', _model_card(merge, base))
  return digests


def _check_out(out: Path, inputs: list[str]) -> None:
  if out.exists() and not (out / 'mergekit_config.yml').exists():
    raise UserError(f'{out} exists and is no earlier merge: give another directory')
  for name in inputs:
    if Path(name).resolve().is_relative_to(out.resolve()):
      raise UserError(f'{out} would replace {name}, which is merged: give another directory')


def _pool(
  merge: MergekitMerge, base: Source, models: list[Source]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
  """theta_0 and the vectors; without a base, the models themselves above zero."""
  if merge.base:
    vectors = [
      {leaf: difference(model.stored[leaf], root) for leaf, root in base.stored.items()}
      for model in models
    ]
    return base.stored, vectors
  zeros = {leaf: _zeros(tensor.shape) for leaf, tensor in base.stored.items()}
  return zeros, [model.stored for model in models]


def _zeros(shape: tuple[int, ...]) -> Tensor:
  def read(start: int = 0, stop: int | None = None) -> np.ndarray:
    start, stop, _ = slice(start, stop).indices(shape[0])
    return np.zeros((stop - start, *shape[1:]), np.float32)

  return Tensor(shape, 'float32', read)


def _plan(merge: MergekitMerge, name: str, num_layers: int) -> tuple[methods.Kind, methods.Numbers]:
  found = numbers_for(merge, name, num_layers)
  normalize = found.get('normalize', found.get('normalize_weights'))
  kind = methods.Kind(merge.method, normalize, found.get('rescale'))
  weights = found.get('weight', (1.0,) * len(merge.models))
  given = {key: found[key] for key in ('density', 'gamma', 'epsilon', 't') if key in found}
  if 'select_topk' in found:
    given['density'] = found['select_topk']
  return kind, methods.numbers(weights, **given, scale=found.get('lambda', 1.0))


def _model_card(merge: MergekitMerge, base: Source) -> str:
  models = ''.join(f'- {model}\n' for model in merge.models)
  return f"""---
license: gemma
library_name: transformers
pipeline_tag: text-generation
---
# A Gemma 3 model merged with optimer_jax

Merged by {merge.method}, as mergekit_config.yml says. The files of the original models were
modified.

{models}
- config and tokenizer: {base.name}

Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.
By using this model you agree to them and to the Gemma Prohibited Use Policy named there.
"""
