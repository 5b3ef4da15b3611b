"""The sizes of Gemma 3's text tower, and how Hugging Face's config.json writes them.

Source: the config.json of google/gemma-3-{270m,1b,4b,12b,27b}-pt.
"""

import dataclasses

from optimer_jax.errors import UserError

# Five local layers, then a global one, cut off at num_layers.
PERIOD = 6


@dataclasses.dataclass(frozen=True)
class Gemma3Config:
  """One text tower. Letters of the shape comments in brackets."""

  num_layers: int  # L
  embed_dim: int  # D
  mlp_dim: int  # F
  num_heads: int  # N
  num_kv_heads: int  # K; N / K = G query heads share one key-value head
  head_dim: int  # H
  window: int  # a local layer's query at q sees the keys k with q - window < k <= q
  query_scalar: float = 256.0  # attention logits are scaled by query_scalar ** -0.5
  rope_scale: float = 1.0  # positions of global layers are divided by this
  vocab_size: int = 262_144  # V
  local_theta: float = 10_000.0
  global_theta: float = 1_000_000.0
  norm_eps: float = 1e-6

  @property
  def num_groups(self) -> int:
    """Whole periods of five local layers and one global."""
    return self.num_layers // PERIOD

  @property
  def num_tail(self) -> int:
    """Layers after the last whole period; all are local."""
    return self.num_layers % PERIOD

  def is_global(self, layer: int) -> bool:
    return layer % PERIOD == PERIOD - 1

  @property
  def num_params(self) -> int:
    d, h = self.embed_dim, self.head_dim
    attention = 2 * d * h * (self.num_heads + self.num_kv_heads) + 2 * h
    layer = attention + 3 * d * self.mlp_dim + 4 * d
    return self.vocab_size * d + self.num_layers * layer + d

  def flops_per_token(self, length: int) -> float:
    """Forward floating-point operations for one token of a row of `length` tokens.

    Two per multiply-add of every matrix product, the logits included, and of the attention that
    the causal and sliding masks leave. Training costs three times this (backward is two forwards).
    """
    matmul = self.num_params - self.num_layers * (4 * self.embed_dim + 2 * self.head_dim)
    seen = 0.0
    for layer in range(self.num_layers):
      span = length if self.is_global(layer) else min(length, self.window)
      # Mean number of visible keys over the row's queries.
      seen += (span * (span + 1) / 2 + (length - span) * span) / length
    return 2 * (matmul - self.embed_dim) + 4 * seen * self.num_heads * self.head_dim


SIZES = {
  '270m': Gemma3Config(18, 640, 2048, 4, 1, 256, window=512),
  '1b': Gemma3Config(26, 1152, 6912, 4, 1, 256, window=512),
  '4b': Gemma3Config(34, 2560, 10240, 8, 4, 256, window=1024, rope_scale=8.0),
  '12b': Gemma3Config(48, 3840, 15360, 16, 8, 256, window=1024, rope_scale=8.0),
  '27b': Gemma3Config(
    62, 5376, 21504, 32, 16, 128, window=1024, query_scalar=168.0, rope_scale=8.0
  ),
  # Not a Gemma: the same architecture, small enough to try the whole path in minutes.
  'tiny': Gemma3Config(8, 96, 256, 4, 2, 32, window=64, query_scalar=32.0, vocab_size=1024),
}


def from_hf(config: dict, where: str) -> Gemma3Config:
  """Reads a config.json of Gemma 3: text only or multimodal, of transformers 4 or 5.

  Args:
    config: the parsed file.
    where: its name, for errors.

  Raises:
    UserError: it is not Gemma 3, a field is missing, or a setting is one that this port lacks.
  """
  text = config.get('text_config', config)
  if text.get('model_type', config.get('model_type')) not in ('gemma3', 'gemma3_text'):
    raise UserError(
      f'{where}: model_type is {config.get("model_type")!r}, but only gemma3 and gemma3_text '
      'can be read'
    )
  # A multimodal config.json of the hub leaves out what equals transformers' defaults.
  defaults = {
    'vocab_size': 262_208,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 256,
    'sliding_window': 4096,
    'query_pre_attn_scalar': 256,
    'rms_norm_eps': 1e-6,
  }

  def get(key):
    value = text.get(key, defaults.get(key))
    if value is None:
      raise UserError(f'{where}: {key} is missing: copy the config.json of the original model')
    if not isinstance(value, int | float) or value <= 0:
      raise UserError(f'{where}: {key} is {value!r}, not a positive number')
    return value

  for key, expected in {
    'attention_bias': False,
    'attn_logit_softcapping': None,
    'final_logit_softcapping': None,
    'hidden_activation': 'gelu_pytorch_tanh',
    'tie_word_embeddings': True,
    'use_bidirectional_attention': False,
  }.items():
    if text.get(key, expected) != expected:
      raise UserError(f'{where}: {key} is {text[key]!r}, but only {expected!r} is supported')
  layers = get('num_hidden_layers')
  kinds = [
    'full_attention' if i % PERIOD == PERIOD - 1 else 'sliding_attention' for i in range(layers)
  ]
  pattern = text.get('sliding_window_pattern', PERIOD)
  if (text.get('layer_types') or kinds) != kinds or pattern != PERIOD:
    raise UserError(f'{where}: layer_types is not five sliding layers to one full layer')

  # transformers 5 nests what transformers 4 spells out.
  parameters = text.get('rope_parameters') or {}
  local = parameters.get('sliding_attention') or {}
  full = (parameters.get('full_attention') or {}) | (text.get('rope_scaling') or {})
  local_type, full_type = (
    rope.get('rope_type', rope.get('type', 'default')) for rope in (local, full)
  )
  if local_type != 'default' or full_type not in ('default', 'linear'):
    raise UserError(
      f'{where}: rope types {local_type!r} of sliding_attention and {full_type!r} of '
      "full_attention are not supported; Gemma 3 has 'default', and 'default' or 'linear'"
    )
  return Gemma3Config(
    num_layers=layers,
    embed_dim=get('hidden_size'),
    mlp_dim=get('intermediate_size'),
    num_heads=get('num_attention_heads'),
    num_kv_heads=get('num_key_value_heads'),
    head_dim=get('head_dim'),
    window=get('sliding_window'),
    query_scalar=float(get('query_pre_attn_scalar')),
    rope_scale=float(full['factor']) if full_type == 'linear' else 1.0,
    vocab_size=get('vocab_size'),
    local_theta=float(local.get('rope_theta', text.get('rope_local_base_freq', 10_000))),
    global_theta=float(full.get('rope_theta', text.get('rope_theta', 1_000_000))),
    norm_eps=float(get('rms_norm_eps')),
  )


def to_hf(config: Gemma3Config, dtype: str) -> dict:
  """Writes the config.json of a text-only model, for sources that have none (GGUF, random).

  Both transformers 4 and 5 read it.
  """
  full = {'rope_theta': config.global_theta, 'rope_type': 'default'}
  if config.rope_scale != 1.0:
    full |= {'rope_type': 'linear', 'factor': config.rope_scale}
  return {
    'architectures': ['Gemma3ForCausalLM'],
    'model_type': 'gemma3_text',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'attn_logit_softcapping': None,
    'bos_token_id': 2,
    'eos_token_id': 1,
    'final_logit_softcapping': None,
    'head_dim': config.head_dim,
    'hidden_activation': 'gelu_pytorch_tanh',
    'hidden_size': config.embed_dim,
    'initializer_range': 0.02,
    'intermediate_size': config.mlp_dim,
    'layer_types': [
      'full_attention' if config.is_global(i) else 'sliding_attention'
      for i in range(config.num_layers)
    ],
    'max_position_embeddings': 32_768 if config.rope_scale == 1.0 else 131_072,
    'num_attention_heads': config.num_heads,
    'num_hidden_layers': config.num_layers,
    'num_key_value_heads': config.num_kv_heads,
    'pad_token_id': 0,
    'query_pre_attn_scalar': _whole(config.query_scalar),
    'rms_norm_eps': config.norm_eps,
    'rope_local_base_freq': config.local_theta,
    'rope_parameters': {
      'sliding_attention': {'rope_theta': config.local_theta, 'rope_type': 'default'},
      'full_attention': full,
    },
    'rope_scaling': {'rope_type': 'linear', 'factor': config.rope_scale}
    if config.rope_scale != 1.0
    else None,
    'rope_theta': config.global_theta,
    'sliding_window': config.window,
    'tie_word_embeddings': True,
    'torch_dtype': dtype,
    'dtype': dtype,
    'use_cache': True,
    'vocab_size': config.vocab_size,
  }


def _whole(value: float) -> int | float:
  return int(value) if value == int(value) else value
