"""LoRA adapters of PEFT as vectors, and vectors as LoRA adapters (Hu et al., arXiv 2106.09685).

  ADAPTER/adapter_config.json         r, lora_alpha, which modules …
  ADAPTER/adapter_model.safetensors   lora_A [r, in] and lora_B [out, r] of each module
  ADAPTER/reconstruction.json         of exported ones: how much of the vector the rank kept

A module's change is s B A, [out, in] as PyTorch stores it; a leaf seen as a matrix is [in, out], so
its change is (s B A).T. For the embedding the tokens are `in`: lora_embedding_A [r, V] and
lora_embedding_B [D, r].
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from optimer_jax.checkpoints.huggingface import PREFIXES, read_safetensors
from optimer_jax.checkpoints.leaves import row_blocks
from optimer_jax.checkpoints.names import EMBEDDING, Tensor, checked, external_name, torch_shape
from optimer_jax.errors import UsageError, UserError
from optimer_jax.files import atomic_directory, read_json, write_json
from optimer_jax.gemma3.config import Gemma3Config
from optimer_jax.gemma3.layout import leaf_shapes
from optimer_jax.progress import progress
from optimer_jax.vectors.geometry import module_of
from optimer_jax.vectors.low_rank import factorize, float_blocks, sum_of_squares

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
INSTEAD = 'merge it into its base and take the difference of the two checkpoints'

# Settings under which an adapter is not, or not only, s B A added to the base that it names.
_OTHER_METHODS = (
  'use_dora use_qalora use_bdlora lora_bias alora_invocation_tokens trainable_token_indices '
  'layer_replication target_parameters kasa_config monteclora_config arrow_config megatron_config'
).split()
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ …) begin by changing the base.
_PLAIN_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal')
_KEY = re.compile(
  r'base_model\.model\.(?P<module>.+?)\.'
  r'(?P<part>(base_layer\.)?weight|lora_[AB]\.weight|lora_embedding_[AB])'
)


def open_adapter(
  path: Path | str, config: Gemma3Config, base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
  """Opens an adapter as the vector that it stands for: float32, zeros where it changes nothing.

  What PEFT's `merge_and_unload` adds to the base: so LoRA on the embedding alone changes the tied
  lm_head too. (That merge adds the factors of a tied pair twice; here they count once, as in the
  model that was trained.) A leaf's factors are all that is held, so leaves can be read by rows.

  Args:
    path: a directory with adapter_config.json and adapter_model.safetensors.
    config: the base's.
    base: the base's leaves, which are subtracted from modules that an adapter holds whole.

  Raises:
    UserError: a file is missing or damaged; it is not plain LoRA on the text tower of `config`; it
      changes embedding and lm_head differently; or, when a leaf is read, it is not finite.
  """
  path, shapes = Path(path), leaf_shapes(config)
  scale_of = _scales(read_json(path / CONFIG), path / CONFIG)
  if not (path / TENSORS).exists():
    raise UserError(f'{path / TENSORS} is missing: save the adapter with safe_serialization=True')
  modules = _grouped(read_safetensors(path / TENSORS), path)
  prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in modules)), PREFIXES[-1])
  head_name = next((name for name in modules if name.endswith('lm_head')), 'lm_head')
  head = modules.pop(head_name, {})
  embedding = modules.get(_module(prefix, EMBEDDING), {}).copy()
  out = {}
  for leaf, shape in shapes.items():
    module = _module(prefix, leaf)
    parts = modules.pop(module, {})
    whole = parts.pop('weight', None) or parts.pop('base_layer.weight', None)
    if whole:
      whole = _checked_whole(whole, leaf, shape, module, path)
    names = _factor_names(leaf) if len(shape) > 1 else ()
    for part in parts:
      if part not in names:
        raise UserError(f'{path} has a tensor {module}.{part} that plain LoRA lacks')
    factors = None
    if parts:
      rank, scale = scale_of(module)
      pair = [parts.get(name) for name in names]
      factors = _factors(pair, leaf, shape, rank, scale, module, path)
    out[leaf] = _delta(shape, factors, whole, base[leaf], f'{path}: {module}')
  if modules:
    raise UserError(f'{path} changes {next(iter(modules))}, which the text tower of its base lacks')
  if head or 'weight' in embedding:
    same_scale = scale_of(head_name) == scale_of(_module(prefix, EMBEDDING))
    if not _tied(head, embedding, base[EMBEDDING], same_scale):
      raise UserError(
        f'{path} changes the embedding and lm_head differently, but Gemma 3 ties them: train it '
        'again with ensure_weight_tying=True'
      )
  return out


def _scales(config: object, where: Path) -> Callable[[str], tuple[int, float]]:
  """Checks adapter_config.json; module name -> its rank and the factor s of its change."""
  if not isinstance(config, dict) or config.get('peft_type') != 'LORA':
    kind = config.get('peft_type') if isinstance(config, dict) else config
    raise UserError(f'{where}: peft_type is {kind!r}, but only LORA can be read: {INSTEAD}')
  for key in _OTHER_METHODS:
    if config.get(key):
      raise UserError(f'{where}: {key} is set, but only plain LoRA can be read: {INSTEAD}')
  start = config.get('init_lora_weights')
  if start not in _PLAIN_STARTS:
    raise UserError(f'{where}: init_lora_weights {start!r} changes the base itself: {INSTEAD}')

  def setting(patterns: str, default: str, module: str) -> float:
    # PEFT takes the first pattern that matches the end of the module's name.
    for pattern, value in (config.get(patterns) or {}).items():
      if re.fullmatch(rf'(.*\.)?({pattern})', module):
        return value
    return config[default]

  def scale_of(module: str) -> tuple[int, float]:
    try:
      rank = setting('rank_pattern', 'r', module)
      scale = setting('alpha_pattern', 'lora_alpha', module) / (
        math.sqrt(rank) if config.get('use_rslora') else rank
      )
      if not math.isfinite(scale):
        raise ValueError(f'lora_alpha / r is {scale}')
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, re.error) as error:
      raise UserError(
        f'{where}: r, lora_alpha or their patterns make no sense for {module} ({error}): '
        'save the adapter again'
      ) from None
    return rank, scale

  return scale_of


def _grouped(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
  """module -> part -> tensor; what cannot be a part of plain LoRA on the text tower is refused."""
  modules = defaultdict(dict)
  for key, tensor in tensors.items():
    if 'lora_magnitude_vector' in key:
      raise UserError(f'{path} has {key}: it is DoRA, but only plain LoRA can be read: {INSTEAD}')
    if re.search(r'\b(vision_tower|vision_model|multi_modal_projector)\b', key):
      raise UserError(
        f'{path} has {key}, but only the text tower can change: train it again with '
        "exclude_modules='.*(vision_tower|multi_modal_projector).*'"
      )
    if key.endswith('.bias'):
      raise UserError(f"{path} has {key}, but Gemma 3 has no biases: train it with bias='none'")
    match = _KEY.fullmatch(key)
    if not match:
      raise UserError(f'{path} has a tensor {key} that plain LoRA on Gemma 3 lacks')
    modules[match['module']][match['part']] = tensor
  if not modules:
    raise UserError(f'{path / TENSORS} has no tensors: save the adapter again')
  return dict(modules)


def _module(prefix: str, leaf: str) -> str:
  return prefix + external_name(leaf, 0).removesuffix('.weight')


def _factor_names(leaf: str) -> tuple[str, str]:
  if leaf == EMBEDDING:
    return 'lora_embedding_A', 'lora_embedding_B'
  return 'lora_A.weight', 'lora_B.weight'


def _sides(leaf: str, shape: tuple[int, ...]) -> tuple[int, int]:
  """The leaf as a matrix: in, out."""
  out = shape[1] if leaf == EMBEDDING else torch_shape(leaf, shape)[0]
  return math.prod(shape) // out, out


def _checked_whole(tensor: Tensor, leaf: str, shape: tuple, module: str, path: Path) -> Tensor:
  if tensor.shape != torch_shape(leaf, shape):
    raise UserError(
      f'{path}: {module} has shape {list(tensor.shape)}, but its base has '
      f'{list(torch_shape(leaf, shape))}: open it with the base that it was trained from'
    )
  return checked(tensor, leaf, shape, module, str(path))


def _factors(
  pair: list[Tensor | None],
  leaf: str,
  shape: tuple[int, ...],
  rank: int,
  scale: float,
  module: str,
  path: Path,
) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
  """Checks a module's factors; the result reads them: A.T [in, r] and s B.T [r, out]."""
  into, out = _sides(leaf, shape)
  for tensor, name, expected in zip(pair, 'AB', ((rank, into), (out, rank)), strict=True):
    if tensor is None:
      raise UserError(f'{path} has no lora_{name} of {module}: save the adapter again')
    if tensor.shape != expected:
      raise UserError(
        f'{path}: lora_{name} of {module} has shape {list(tensor.shape)}, but its rank and its '
        f'base say {list(expected)}: open it with the base that it was trained from'
      )

  def read() -> tuple[np.ndarray, np.ndarray]:
    a, b = (tensor.read().astype(np.float32) for tensor in pair)
    return a.T, b.T * np.float32(scale)

  return read


def _delta(
  shape: tuple[int, ...], factors: Callable | None, whole: Tensor | None, base: Tensor, what: str
) -> Tensor:
  held = None  # factors are read once for all rows, let go with the last

  def read(start: int = 0, stop: int | None = None) -> np.ndarray:
    nonlocal held
    start, stop, _ = slice(start, stop).indices(shape[0])
    if not factors and not whole:
      return np.zeros((stop - start, *shape[1:]), np.float32)
    total = np.float32(0)
    if factors:
      a, b = held or factors()
      held = None if stop == shape[0] else (a, b)
      each = len(a) // shape[0]  # rows of the matrix in one row of the leaf: H of o_proj, or 1
      total = (a[start * each : stop * each] @ b).reshape(-1, *shape[1:])
    if whole:
      before, after = (t.read(start, stop).astype(np.float32) for t in (base, whole))
      total = total + (after - before)
    if not np.isfinite(total).all():
      raise UserError(f'{what} has values that are not finite: train it again')
    return total

  return Tensor(shape, 'float32', read)


def _tied(
  head: Mapping[str, Tensor], embedding: Mapping[str, Tensor], base: Tensor, same_scale: bool
) -> bool:
  """Whether lm_head holds what the embedding holds; its factors are the embedding's, swapped."""
  whole = embedding.get('weight') or embedding.get('base_layer.weight') or base
  a, b, *wholes = (
    head.get(part) for part in ('lora_A.weight', 'lora_B.weight', 'weight', 'base_layer.weight')
  )
  if a or b:
    swapped = [embedding.get(part) for part in ('lora_embedding_B', 'lora_embedding_A')]
    if not same_scale or None in (a, b, *swapped):
      return False
    pairs = zip((a, b), swapped, strict=True)
    if not all(np.array_equal(x.read(), y.read().T) for x, y in pairs):
      return False
  if 'weight' in embedding and not any(wholes):
    return False
  return all(
    given.shape == whole.shape
    and all(
      np.array_equal(given.read(*rows), whole.read(*rows)) for rows in row_blocks(whole.shape)
    )
    for given in wholes
    if given
  )


def export_lora(
  leaves: Mapping[str, Tensor],
  out: Path | str,
  rank: int,
  base_name: str,
  prefix: str,
  include_embedding: bool = False,
) -> dict:
  """Writes a vector or a merged delta as a LoRA adapter that `peft` loads.

  Every attention and MLP projection gets float32 factors of one rank with lora_alpha = rank, so
  that the change is B A. One leaf and the factors so far are in memory.

  Args:
    leaves: the deltas, all of them: what gets no factors counts as an error.
    out: the adapter's directory, replaced if it exists.
    rank: r.
    base_name: the base's name on the hub or its directory, for adapter_config.json.
    prefix: of the base's tensor names, one of `PREFIXES`. A multimodal one is written as
      transformers names it in memory, where adapters are applied.
    include_embedding: factors for the embedding and, as Gemma 3 ties it, the same for lm_head.

  Returns:
    What reconstruction.json holds: `error`, the norm of everything lost relative to the vector's;
    `error_of_adapted`, the same of the leaves that have factors; `modules` and `leaves`, name ->
    {norm, error}, with an error of 1 for what was left out; `left_out`, module -> share of the
    squared norm.

  Raises:
    UserError: a value that is not finite; the leaf is named. The disk is full.
    UsageError: a rank below 1, or another prefix.
  """
  if rank < 1:
    raise UsageError(f'a LoRA has a rank of 1 or more, not {rank}')
  if prefix not in PREFIXES:
    raise UsageError(f'the prefix of tensor names is one of {", ".join(PREFIXES)}, not {prefix!r}')
  prefix = prefix if prefix == 'model.' else 'model.language_model.'
  tensors, entries = {}, {}
  with atomic_directory(out) as new:
    for leaf, tensor in progress(leaves.items(), len(leaves), 'export', 'leaves'):
      if leaf.endswith('_proj') or (leaf == EMBEDDING and include_embedding):
        matrix = tensor.read().reshape(_sides(leaf, tensor.shape))
        norm = _norm(leaf, (block for _, block in float_blocks(matrix)))
        a, b, error = factorize(matrix, rank)
        for name, factor in zip(_factor_names(leaf), (a, b), strict=True):
          tensors[f'base_model.model.{_module(prefix, leaf)}.{name}'] = factor
        if leaf == EMBEDDING:
          tensors['base_model.model.lm_head.lora_A.weight'] = np.ascontiguousarray(b.T)
          tensors['base_model.model.lm_head.lora_B.weight'] = np.ascontiguousarray(a.T)
      else:
        norm = _norm(leaf, (tensor.read(*rows) for rows in row_blocks(tensor.shape)))
        error = 1.0 if norm else 0.0
      entries[leaf] = {'norm': norm, 'error': error}
    save_file(tensors, new / TENSORS, metadata={'format': 'pt'})
    write_json(new / CONFIG, _adapter_config(rank, base_name, prefix, include_embedding))
    report = {'base': base_name, 'rank': rank, **_reconstruction(entries, include_embedding)}
    write_json(new / 'reconstruction.json', report)
  return report


def _norm(leaf: str, blocks: Iterator[np.ndarray]) -> float:
  norm = math.sqrt(sum(sum_of_squares(block) for block in blocks))
  if not math.isfinite(norm):
    raise UserError(f'{leaf} has values that are not finite: they have no LoRA')
  return norm


def _adapter_config(rank: int, base_name: str, prefix: str, include_embedding: bool) -> dict:
  names = [f'{part}_proj' for part in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')]
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_name,
    'r': rank,
    'lora_alpha': rank,
    'lora_dropout': 0.0,
    'target_modules': names + (['embed_tokens'] if include_embedding else []),
    # The vision tower has modules of the same names.
    'exclude_modules': None if prefix == 'model.' else r'.*(vision_tower|multi_modal_projector).*',
    'ensure_weight_tying': include_embedding,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'modules_to_save': None,
    'use_dora': False,
    'use_rslora': False,
  }


def _reconstruction(entries: Mapping[str, Mapping], include_embedding: bool) -> dict:
  def joined(leaves) -> dict:
    squares = sum(entries[leaf]['norm'] ** 2 for leaf in leaves)
    lost = sum((entries[leaf]['norm'] * entries[leaf]['error']) ** 2 for leaf in leaves)
    return {'norm': math.sqrt(squares), 'error': math.sqrt(lost / squares) if squares else 0.0}

  modules = defaultdict(list)
  for leaf in entries:
    modules[module_of(leaf)].append(leaf)
  out = {'norms'} if include_embedding else {'norms', 'embedding'}
  whole = joined(entries)
  adapted = joined([leaf for leaf in entries if module_of(leaf) not in out])
  return {
    'error': whole['error'],
    'error_of_adapted': adapted['error'],
    'left_out': {
      module: (joined(modules[module])['norm'] / whole['norm']) ** 2 if whole['norm'] else 0.0
      for module in modules
      if module in out
    },
    'modules': {module: joined(leaves) for module, leaves in modules.items()},
    'leaves': dict(entries),
  }
