"""Hugging Face's layout: config.json, safetensors files and tokenizer files; in and out."""

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from optimer_jax.checkpoints.leaves import row_blocks
from optimer_jax.checkpoints.names import (
  EMBEDDING,
  Source,
  Tensor,
  checked,
  external_name,
)
from optimer_jax.errors import UserError
from optimer_jax.files import read_json, write_json
from optimer_jax.gemma3.config import from_hf
from optimer_jax.gemma3.layout import leaf_shapes

# Prefixes of the text tower: text-only files, hub files of 4B and up, transformers in memory.
PREFIXES = ('model.language_model.', 'language_model.model.', 'model.')
TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'generation_config.json',
  'preprocessor_config.json',
  'processor_config.json',
)


def open_huggingface(path: Path, name: str | None = None) -> Source:
  """Opens a directory with config.json and safetensors files.

  Raises:
    UserError: a tensor is missing, left over or misshapen, or a file is damaged; it is named.
  """
  name = name or str(path)
  config_json = read_json(path / 'config.json')
  config = from_hf(config_json, f'{name}/config.json')
  found = {}
  for file in _shards(path):
    found |= read_safetensors(file)
  prefix = next((p for p in PREFIXES if f'{p}embed_tokens.weight' in found), None)
  if prefix is None:
    raise UserError(f'{name} has no tensor …embed_tokens.weight: it is not a Gemma 3 checkpoint')
  shapes = leaf_shapes(config)
  leaves, stored = {}, {}
  for leaf, shape in shapes.items():
    key = prefix + external_name(leaf, 0)
    stored[leaf] = found.pop(key, None)
    leaves[leaf] = checked(stored[leaf], leaf, shape, key, name)
  untouched, head = {}, None
  for key in list(found):
    if re.match(r'(model\.)?(vision_tower|multi_modal_projector)\.', key):
      untouched[key] = found.pop(key)
    elif re.fullmatch(r'(model\.|language_model\.)?lm_head\.weight', key):
      tensor = found.pop(key)
      blocks = row_blocks(tensor.shape)
      embedding = stored[EMBEDDING]
      if tensor.shape != embedding.shape or not all(
        np.array_equal(tensor.read(*block), embedding.read(*block)) for block in blocks
      ):
        raise UserError(f'{name}: {key} differs from the embedding, but Gemma 3 ties them')
      head = key
  if found:
    extra = ', '.join(sorted(found)[:3])
    raise UserError(f'{name} has tensors that a Gemma 3 checkpoint lacks: {extra}')

  def write_tokenizer(directory: Path) -> None:
    for file in TOKENIZER_FILES:
      if (path / file).exists():
        (directory / file).write_bytes((path / file).read_bytes())

  return Source(name, config, config_json, leaves, stored, prefix, head, untouched, write_tokenizer)


def _shards(path: Path) -> list[Path]:
  index = path / 'model.safetensors.index.json'
  if index.exists():
    try:
      files = sorted({path / file for file in read_json(index)['weight_map'].values()})
    except (TypeError, KeyError):
      raise UserError(f'{index} has no weight_map: copy it again') from None
  else:
    files = sorted(path.glob('*.safetensors'))
  if not files:
    raise UserError(f'{path} has no .safetensors files: only those can be read')
  for file in files:
    if not file.exists():
      raise UserError(f'{file} is missing: {index.name} names it, so copy it again')
  return files


_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}


def read_safetensors(file: Path) -> dict[str, Tensor]:
  """The tensors of one file; their values are read when they are asked for.

  Raises:
    UserError: the file is damaged, or holds a dtype that no Gemma 3 checkpoint has.
  """
  try:
    with safe_open(file, 'np') as opened:
      parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
      shapes = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in parts.items()}
  except (SafetensorError, OSError) as error:
    raise UserError(f'{file} is damaged or cut off ({error}): copy it again') from error

  def read(key, start=0, stop=None):
    with safe_open(file, 'np') as opened:
      return opened.get_slice(key)[start:stop]

  out = {}
  for key, (shape, dtype) in shapes.items():
    if dtype not in _DTYPES:
      raise UserError(f'{file}: {key} is {dtype}, but only F32, BF16 and F16 can be read')
    out[key] = Tensor(shape, _DTYPES[dtype], functools.partial(read, key))
  return out


def download(name: str) -> Path:
  """Fetches a model of the hub, or finds it in the hub's own cache."""
  from huggingface_hub import snapshot_download

  try:
    patterns = ['*.safetensors', '*.safetensors.index.json', 'config.json', *TOKENIZER_FILES]
    return Path(snapshot_download(name, allow_patterns=patterns))
  except Exception as error:  # the hub's client has many errors: offline, gated, unknown …
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split('. ')[0]
    raise UserError(
      f'{name} is neither a directory nor a model that the hub gave ({reason}): check the name, '
      "accept Gemma's terms there and log in with `hf auth login`"
    ) from error


SHARD_BYTES = 5_000_000_000


def write_huggingface(
  path: Path,
  config_json: dict,
  tensors: Mapping[str, tuple[tuple[int, ...], str]],
  rows: Iterable[tuple[str, np.ndarray]],
) -> dict[str, str]:
  """Writes config.json and safetensors files of at most 5 GB each, as the rows come.

  Args:
    path: an existing directory.
    config_json: what config.json shall hold.
    tensors: Hugging Face name to [out, in] shape and dtype.
    rows: the tensors in that order, whole or in consecutive blocks of rows, of any float dtype.

  Returns:
    The digest of each tensor's values, by name.
  """
  sizes = {name: _size(*tensor) for name, tensor in tensors.items()}
  shards, room = [], 0
  for name, size in sizes.items():
    if size > room:
      shards.append([])
      room = SHARD_BYTES
    shards[-1].append(name)
    room -= size
  rows, files, digests = iter(rows), {}, {}
  for i, names in enumerate(shards, 1):
    file = f'model-{i:05}-of-{len(shards):05}.safetensors'
    file = file if len(shards) > 1 else 'model.safetensors'
    digests |= write_safetensors(path / file, {name: tensors[name] for name in names}, rows)
    files |= dict.fromkeys(names, file)
  if len(shards) > 1:
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': files}
    write_json(path / 'model.safetensors.index.json', index)
  write_json(path / 'config.json', config_json)
  return digests


def write_safetensors(
  file: Path,
  tensors: Mapping[str, tuple[tuple[int, ...], str]],
  rows: Iterable[tuple[str, np.ndarray]],
) -> dict[str, str]:
  """Writes one file as `write_huggingface` does.

  The safetensors library writes whole files from memory; the format is a header and the tensors'
  bytes one after another, which are written here as they come.
  """
  dtypes = {dtype: code for code, dtype in _DTYPES.items()}
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, (shape, dtype) in tensors.items():
    begin, end = end, end + _size(shape, dtype)
    header[name] = {'dtype': dtypes[dtype], 'shape': shape, 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # so that the tensors lie on eight bytes
  rows, digests = iter(rows), {}
  with open(file, 'wb') as out:
    out.write(len(text).to_bytes(8, 'little') + text)
    for name, (shape, dtype) in tensors.items():
      hashed, left = hashlib.blake2b(digest_size=16), _size(shape, dtype)
      while left:
        given, block = next(rows)
        data = np.ascontiguousarray(block.astype(dtype, copy=False)).reshape(-1).view(np.uint8)
        if given != name or data.nbytes > left:
          raise ValueError(f'{data.nbytes} bytes of {given} came where {left} of {name} are left')
        out.write(data)
        hashed.update(data)
        left -= data.nbytes
      digests[name] = hashed.hexdigest()
  return digests


def _size(shape: tuple[int, ...], dtype: str) -> int:
  return np.dtype(dtype).itemsize * math.prod(shape)
