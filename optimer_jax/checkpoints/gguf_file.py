"""GGUF files, as llama.cpp and the packages around it carry them."""

from pathlib import Path

import numpy as np

from optimer_jax.checkpoints.names import Source, Tensor, checked, external_name
from optimer_jax.data.tokenizer import write_gguf_tokenizer
from optimer_jax.errors import UserError
from optimer_jax.gemma3.config import Gemma3Config, to_hf
from optimer_jax.gemma3.layout import leaf_shapes


def open_gguf(path: Path, name: str | None = None) -> Source:
  """Opens a GGUF file; quantised tensors are dequantised to float32 as they are read.

  Raises:
    UserError: the file is damaged or not Gemma 3, or a tensor is missing or misshapen.
  """
  try:
    import gguf
  except ImportError:
    raise UserError(
      "reading a GGUF file needs the package gguf: pip install 'optimer_jax[gemma270m]'"
    ) from None
  name = name or str(path)
  if not path.exists():
    raise UserError(f'{path} is missing: check the path')
  try:
    reader = gguf.GGUFReader(path)
    fields = {
      key: field.contents()
      for key, field in reader.fields.items()
      if len(field.data) == 1 and key != 'tokenizer.ggml.tokens'
    }
  except Exception as error:  # the reader raises whatever numpy raises on a short file
    raise UserError(f'{path} is not a whole GGUF file ({error}): copy it again') from error
  if fields.get('general.architecture') != 'gemma3':
    raise UserError(f'{path} holds {fields.get("general.architecture")!r}, not gemma3')

  def get(key, default=None):
    value = fields.get(f'gemma3.{key}', default)
    if value is None:
      raise UserError(f'{path}: the field gemma3.{key} is missing')
    return value

  tensors = {t.name: t for t in reader.tensors}
  heads, head_dim = get('attention.head_count'), get('attention.key_length')
  layers, width = get('block_count'), get('embedding_length')
  if 'tokenizer.ggml.tokens' not in reader.fields:
    raise UserError(f'{path}: the field tokenizer.ggml.tokens is missing')
  config = Gemma3Config(
    num_layers=layers,
    embed_dim=width,
    mlp_dim=get('feed_forward_length'),
    num_heads=heads,
    num_kv_heads=get('attention.head_count_kv'),
    head_dim=head_dim,
    window=get('attention.sliding_window'),
    # GGUF does not carry it: 27B, alone with 62 layers, scales by D / N, the others by H.
    query_scalar=float(width / heads if layers == 62 else head_dim),
    rope_scale=float(get('rope.scaling.factor', 1.0)),
    vocab_size=len(reader.fields['tokenizer.ggml.tokens'].data),
    global_theta=float(get('rope.freq_base', 1e6)),
    norm_eps=float(f'{get("attention.layer_norm_rms_epsilon"):.4g}'),
  )

  def lazy(tensor):
    shape = tuple(int(n) for n in reversed(tensor.shape))

    def read(start=0, stop=None):
      values = gguf.quants.dequantize(tensor.data[start:stop], tensor.tensor_type)
      values = np.ascontiguousarray(values, np.float32).reshape(-1, *shape[1:])
      # GGUF stores norm weights as 1 + w.
      return values - 1 if tensor.name.endswith('norm.weight') else values

    return Tensor(shape, 'float32', read)

  leaves, stored = {}, {}
  for leaf, shape in leaf_shapes(config).items():
    key = external_name(leaf, 1)
    tensor = tensors.pop(key, None)
    stored[leaf] = tensor and lazy(tensor)
    leaves[leaf] = checked(stored[leaf], leaf, shape, key, name)
  if tensors:
    raise UserError(f'{path} has tensors that Gemma 3 lacks: {", ".join(sorted(tensors)[:3])}')
  return Source(
    name,
    config,
    to_hf(config, 'float32'),
    leaves,
    stored,
    'model.',
    None,
    {},
    lambda directory: write_gguf_tokenizer(path, directory),
    notes=(f'weights dequantised from {path.name}: not the original bfloat16 weights',),
  )
