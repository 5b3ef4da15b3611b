"""How others name and shape the leaves, and how a checkpoint to import is described.

A tensor is read, transposed and handed on one at a time, an embedding by rows, so that a model may
be larger than memory.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from optimer_jax.errors import UserError
from optimer_jax.gemma3.config import Gemma3Config

EMBEDDING = 'embedder.embedding'

_LAYER = {
  'attn.q_proj': ('self_attn.q_proj', 'blk.{}.attn_q'),
  'attn.k_proj': ('self_attn.k_proj', 'blk.{}.attn_k'),
  'attn.v_proj': ('self_attn.v_proj', 'blk.{}.attn_v'),
  'attn.o_proj': ('self_attn.o_proj', 'blk.{}.attn_output'),
  'attn.q_norm.scale': ('self_attn.q_norm', 'blk.{}.attn_q_norm'),
  'attn.k_norm.scale': ('self_attn.k_norm', 'blk.{}.attn_k_norm'),
  'mlp.gate_proj': ('mlp.gate_proj', 'blk.{}.ffn_gate'),
  'mlp.up_proj': ('mlp.up_proj', 'blk.{}.ffn_up'),
  'mlp.down_proj': ('mlp.down_proj', 'blk.{}.ffn_down'),
  'pre_attn_norm.scale': ('input_layernorm', 'blk.{}.attn_norm'),
  'post_attn_norm.scale': ('post_attention_layernorm', 'blk.{}.post_attention_norm'),
  'pre_mlp_norm.scale': ('pre_feedforward_layernorm', 'blk.{}.ffn_norm'),
  'post_mlp_norm.scale': ('post_feedforward_layernorm', 'blk.{}.post_ffw_norm'),
}
_TOP = {
  EMBEDDING: ('embed_tokens', 'token_embd'),
  'final_norm.scale': ('norm', 'output_norm'),
}


class Tensor(NamedTuple):
  """An array that is read when it is asked for: `read()`, or `read(start, stop)` for some rows."""

  shape: tuple[int, ...]
  dtype: str
  read: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
  """A model to import."""

  name: str
  config: Gemma3Config  # with the source's full vocabulary
  config_json: dict  # as the source has it, or as written for a source that has none
  leaves: dict[str, Tensor]  # in this project's shapes
  stored: dict[str, Tensor]  # the same by leaf in the source's own [out, in] shapes
  prefix: str  # of the text tower's names in an export
  head: str | None  # the name of a tied lm_head that the source spells out
  untouched: dict[str, Tensor]  # tensors that pass through: vision tower, projector
  write_tokenizer: Callable[[Path], None] | None  # puts tokenizer.json … into a directory
  notes: tuple[str, ...] = ()


def external_name(leaf: str, column: int) -> str:
  """The name of a leaf in a Hugging Face (0) or GGUF (1) file, without prefix."""
  if leaf in _TOP:
    return _TOP[leaf][column] + '.weight'
  _, layer, rest = leaf.split('.', 2)
  if column == 0:
    return f'layers.{layer}.{_LAYER[rest][0]}.weight'
  return _LAYER[rest][1].format(layer) + '.weight'


def contracted_axes(leaf: str) -> int:
  """How many leading axes of a leaf are those that others store last, as in [out, in]."""
  if leaf.endswith('o_proj'):  # N H D
    return 2
  return 1 if leaf.endswith('_proj') else 0  # D N H, D K H, D F, F D; V D; D


def torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The [out, in] shape in which others store a leaf of `shape`."""
  split = contracted_axes(leaf)
  return (math.prod(shape[split:]), math.prod(shape[:split])) if split else shape


def from_torch(leaf: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """[out, in] to this project's shape: transposed and split, never rescaled."""
  if leaf.endswith('_proj'):
    return np.ascontiguousarray(array.T).reshape(shape)
  return array


def to_torch(leaf: str, array: np.ndarray) -> np.ndarray:
  """The inverse of `from_torch`."""
  if leaf.endswith('_proj'):
    columns = torch_shape(leaf, array.shape)[0]
    return np.ascontiguousarray(array.reshape(-1, columns).T)
  return array


def by_rows(whole: Callable[[], np.ndarray]) -> Callable[..., np.ndarray]:
  """`Tensor.read` of what can only be had whole: made for all rows, let go with the last."""
  held = None

  def read(start: int = 0, stop: int | None = None) -> np.ndarray:
    nonlocal held
    array = whole() if held is None else held
    held = None if stop in (None, len(array)) else array
    return array[start:stop]

  return read


def checked(tensor: Tensor | None, leaf: str, shape: tuple, key: str, where: str) -> Tensor:
  """The external tensor `key` as a leaf; a UserError names it if it is missing or misshapen."""
  if tensor is None:
    raise UserError(f'{where} has no tensor {key}: the checkpoint is not complete')
  if tensor.shape != torch_shape(leaf, shape):
    raise UserError(
      f'{where}: {key} has shape {list(tensor.shape)}, '
      f'but its config.json says {list(torch_shape(leaf, shape))}'
    )
  if not leaf.endswith('_proj'):
    return Tensor(shape, tensor.dtype, tensor.read)
  whole = lambda: from_torch(leaf, tensor.read(), shape)
  return Tensor(shape, tensor.dtype, by_rows(whole))
