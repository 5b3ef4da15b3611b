"""Reads a mergekit YAML file, so that a merge described for mergekit can be made here.

Which number a tensor gets is settled as in mergekit 0.1.5 (`mergekit-yaml`). What has no meaning
here, and what mergekit would pass over in silence (a misspelt key, a parameter that the method does
not have), is refused by name.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from optimer_jax.errors import UsageError, UserError
from optimer_jax.merging.mergekit_settings import (
  Number,
  Setting,
  Settings,
  check_keys,
  look_up,
  nearest,
  read_setting,
)


@dataclass(frozen=True)
class MergekitMerge:
  """A merge as a mergekit file describes it. Paths and hub names stand as in the file.

  Attributes:
    file: the file, for messages.
    method: a key of METHODS.
    base: theta_0, or None. For linear it only lends its config and tokenizer.
    models: the K merged models in the order of every per-model list. The base is one of them for
      linear only.
    dtype: of the arithmetic; None: that of the files.
    out_dtype: of the result; None: that of the files.
    layers: the number of layers that `slices` names; None: not said.
    per_model: K times the settings of weight, density, gamma and epsilon.
    shared: the settings of the others: normalize, rescale, lambda, t, select_topk …
  """

  file: str
  method: str
  base: str | None
  models: tuple[str, ...]
  dtype: str | None
  out_dtype: str | None
  layers: int | None
  per_model: tuple[Settings, ...]
  shared: Settings


class Method(NamedTuple):
  """What mergekit knows of a method: its parameters with their defaults (None: must be given)."""

  per_model: dict[str, float | None]
  shared: dict[str, Number | None]
  base: bool | None = True  # needed (True), possible (None), or no more than one of the models
  others: tuple[int, float] = (1, math.inf)  # how many models besides the base


def _deltas(normalize: bool, rescale: bool, **per_model: float) -> Method:
  shared = {'normalize': normalize, 'rescale': rescale, 'lambda': 1.0}
  return Method({'weight': None, 'density': 1.0} | per_model, shared)


METHODS = {
  'linear': Method({'weight': None}, {'normalize': True}, base=False),
  'task_arithmetic': Method({'weight': None}, {'normalize': False, 'lambda': 1.0}),
  'ties': _deltas(True, False),
  'dare_linear': _deltas(False, True),
  'dare_ties': _deltas(False, True),
  'della': _deltas(True, True, epsilon=0.15),
  'della_linear': _deltas(False, True, epsilon=0.15),
  'breadcrumbs': _deltas(False, False, gamma=0.01),
  'breadcrumbs_ties': _deltas(False, False, gamma=0.01),
  'model_stock': Method({}, {}, others=(2, math.inf)),
  'sce': Method({}, {'select_topk': 1.0}),
  'slerp': Method({}, {'t': None}, others=(1, 1)),
  'multislerp': Method({'weight': None}, {'normalize_weights': True, 'eps': 1e-8}, base=None),
}
# Parameters that mergekit has, but that change nothing: int8_mask is about memory, and task
# arithmetic drops no entries.
_IDLE = {
  'task_arithmetic': {'density': 1.0, 'rescale': False},
  'model_stock': {'filter_wise': False},
}
_FRACTIONS = ('density', 'gamma', 'epsilon', 'select_topk')
_DTYPES = ('float32', 'bfloat16', 'float16')
_KEYS = (
  *('merge_method', 'models', 'slices', 'base_model', 'parameters', 'dtype', 'out_dtype'),
  *('tokenizer_source', 'tokenizer', 'chat_template'),
)


def numbers_for(
  merge: MergekitMerge, name: str, num_layers: int
) -> dict[str, Number | tuple[float, ...]]:
  """The numbers with which one tensor is merged.

  A list of L anchors is interpolated at t = layer / (num_layers - 1), t = 1 for a single layer;
  tensors outside the layers, the final norm too, have t = 0: the first anchor. A parameter is
  looked up in the model's (or source's) own parameters, the slice's, the file's; where no filter
  matches, the next of them has its say, and last the default.

  Args:
    merge: what `read_mergekit` gave.
    name: the tensor's name in a Hugging Face file, which filters are compared with.
    num_layers: of the stack that the tensor belongs to.

  Returns:
    Every parameter of the method: of `weight`, `density`, `gamma`, `epsilon` K floats; of `lambda`,
    `t`, `select_topk`, `eps` a float; of `normalize`, `rescale`, `normalize_weights` a bool.

  Raises:
    UsageError: the filters leave this tensor without a number that it needs, or `slices` names
      another number of layers.
  """
  if merge.layers not in (None, num_layers):
    raise UsageError(
      f'{merge.file}: layer_range ends at {merge.layers}, but the models have {num_layers} layers: '
      'a merge of some of the layers is not supported'
    )
  method = METHODS[merge.method]

  def number(parameter: str, settings: Settings, default: Number | None, whose: str) -> Number:
    found = look_up(settings[parameter], name, num_layers)
    if found is None and default is None:
      raise UsageError(
        f'{merge.file}: {parameter}{whose} has no value for {name}: add one without a filter'
      )
    return default if found is None else found

  numbers = {}
  for parameter, default in method.per_model.items():
    numbers[parameter] = tuple(
      number(parameter, settings, default, f' of {model}')
      for model, settings in zip(merge.models, merge.per_model, strict=True)
    )
  for parameter, default in method.shared.items():
    numbers[parameter] = number(parameter, merge.shared, default, '')
  return numbers


def read_mergekit(file: str | Path) -> MergekitMerge:
  """Reads a mergekit YAML file; no model is opened.

  `models` and a `slices` of one slice that starts at layer 0 of every source mean the same, except
  that mergekit adds an unlisted base to `models` only. A method that starts from the base takes no
  numbers for it, listed or not; linear needs a weight for it.

  Raises:
    UserError: the file is missing, or is not text or not YAML.
    UsageError: a key, method, parameter or value is unknown or not supported; it is named.
  """
  file = str(file)
  content = _load(file)
  check_keys(content, _KEYS, 'key', file)
  method = content.get('merge_method')
  if method == 'passthrough':
    raise UsageError(
      f'{file}: merge_method passthrough stacks layers instead of merging them (frankenmerging), '
      'which is not supported'
    )
  if not isinstance(method, str) or method not in METHODS:
    hint = nearest(str(method), METHODS)
    raise UsageError(f'{file}: merge_method {method} is not supported{hint}')
  rule = METHODS[method]
  base = content.get('base_model')
  base = None if base is None else _model(base, f'{file}: base_model')
  _check_tokenizer(content, base, file)
  shared = [_parameters(content, method, f'{file}: ')]
  if bool(content.get('models')) == bool(content.get('slices')):
    raise UsageError(f'{file}: give the models under `models`, or else under `slices`')
  if content.get('models'):
    layers = None
    inputs = _inputs(content['models'], method, f'{file}: models')
    if base and base not in inputs:
      inputs[base] = {}
  else:
    part, layers, inputs = _slice(content['slices'], base, method, file)
    shared.insert(0, part)
  if rule.base is not False:
    _check_base(method, base, inputs, file)
  models = tuple(model for model in inputs if model != base or rule.base is False)

  def settings(own: list[dict[str, Setting]], defaults: dict, whose: str) -> Settings:
    out = {}
    for name, default in defaults.items():
      out[name] = tuple(each[name] for each in own + shared if name in each)
      if not out[name] and default is None:
        raise UsageError(f'{file}: {method} needs the parameter {name}{whose}: give it')
    return out

  dtype = _dtype(content, 'dtype', file)
  return MergekitMerge(
    file=file,
    method=method,
    base=base,
    models=models,
    dtype=dtype,
    out_dtype=_dtype(content, 'out_dtype', file) or dtype,
    layers=layers,
    per_model=tuple(settings([inputs[m]], rule.per_model, f' for {m}') for m in models),
    shared=settings([], rule.shared, ''),
  )


def _load(file: str) -> dict:
  try:
    documents = list(yaml.safe_load_all(Path(file).read_text(encoding='utf-8')))
  except FileNotFoundError:
    raise UserError(f'{file} is missing: check the path') from None
  except OSError as error:
    raise UserError(f'{file} cannot be read ({error.strerror}): check the path') from None
  except UnicodeDecodeError:
    raise UserError(f'{file} is not UTF-8: is it a mergekit YAML file?') from None
  except (yaml.YAMLError, ValueError) as error:  # a ValueError for a date that there is not
    mark = getattr(error, 'problem_mark', None)
    reason = getattr(error, 'problem', None) or str(error).splitlines()[0]
    line = f':{mark.line + 1}' if mark else ''
    raise UserError(f'{file}{line} is not YAML ({reason}): mend that line') from None
  if len(documents) > 1:
    raise UsageError(
      f'{file} holds {len(documents)} documents (mergekit-multi), which is not supported: give one '
      'merge a file, and run them in turn'
    )
  if not documents or not isinstance(documents[0], dict):
    raise UsageError(f'{file} is not a mergekit file: it needs the keys merge_method and models')
  return documents[0]


def _slice(
  value: object, base: str | None, method: str, file: str
) -> tuple[dict[str, Setting], int, dict[str, dict[str, Setting]]]:
  """The parameters of the only slice, the number of its layers, and its sources."""
  if not isinstance(value, list) or len(value) != 1:
    raise UsageError(
      f'{file}: slices stacks parts of models (frankenmerging), which is not supported: give one '
      'slice with all the layers'
    )
  where = f'{file}: slices[0]'
  check_keys(value[0], ('sources', 'base_model', 'parameters'), 'key', where)
  if value[0].get('base_model') not in (None, base):
    raise UsageError(f'{where}.base_model is not the base_model of the file: give that one alone')
  sources = value[0].get('sources')
  inputs = _inputs(sources, method, f'{where}.sources', 'layer_range')
  for i, source in enumerate(sources):
    span = source.get('layer_range')
    whole = isinstance(span, list) and len(span) == 2 and all(type(s) is int for s in span)
    if not whole or span[0] != 0 or span[1] < 1 or span != sources[0]['layer_range']:
      raise UsageError(
        f'{where}.sources[{i}].layer_range is {span}: only [0, the number of layers], the same for '
        'every source, is supported'
      )
  return _parameters(value[0], method, f'{where}.'), sources[0]['layer_range'][1], inputs


def _inputs(value: object, method: str, where: str, *more: str) -> dict[str, dict[str, Setting]]:
  if not isinstance(value, list) or not value:
    raise UsageError(f'{where} must be a list of models')
  inputs = {}
  for i, each in enumerate(value):
    check_keys(each, ('model', 'parameters', *more), 'key', f'{where}[{i}]')
    model = _model(each.get('model'), f'{where}[{i}].model')
    if model in inputs:
      raise UsageError(f'{where}[{i}].model is {model} again: list each model once')
    inputs[model] = _parameters(each, method, f'{where}[{i}].')
    for name in inputs[model]:
      if name in METHODS[method].shared:
        raise UsageError(
          f'{where}[{i}].parameters.{name} is one for all models: give it in parameters of the file'
        )
  return inputs


def _check_base(method: str, base: str | None, inputs: dict, file: str) -> None:
  if METHODS[method].base and base is None:
    raise UsageError(f'{file}: {method} needs base_model: give it')
  if base and base not in inputs:
    raise UsageError(f'{file}: base_model {base} is not among the sources of the slice: add it')
  count = len(inputs) - (base is not None)
  least, most = METHODS[method].others
  if not least <= count <= most:
    wanted = f'{least}' if least == most else f'at least {least}'
    raise UsageError(f'{file}: {method} merges {wanted} besides its base, but models has {count}')


def _check_tokenizer(content: dict, base: str | None, file: str) -> None:
  """Only the base's tokenizer, as it is, can be kept."""
  sources = {'tokenizer_source': content.get('tokenizer_source')}
  if content.get('tokenizer') is not None:
    check_keys(content['tokenizer'], ('source',), 'key', f'{file}: tokenizer')
    sources['tokenizer.source'] = content['tokenizer'].get('source', 'union')  # mergekit's default
  for key, value in sources.items():
    if value not in (None, 'base', base):
      raise UsageError(f'{file}: {key} {value} is not supported: only base is')
  if content.get('chat_template') is not None:
    raise UsageError(f"{file}: chat_template is not supported: the base's is kept, so leave it out")


def _model(value: object, where: str) -> str:
  if not isinstance(value, str) or not value:
    raise UsageError(f'{where} must be a path or a name of the hub, but is {value}')
  if '+' in value or '@' in value:
    kind = 'adds a LoRA' if '+' in value else 'names a revision'
    raise UsageError(f'{where} {value} {kind}, which is not supported: give a whole model')
  return value


def _parameters(section: dict, method: str, where: str) -> dict[str, Setting]:
  """The settings in the `parameters` of a model, a slice or the file."""
  rule = METHODS[method]
  known = {'int8_mask': False} | _IDLE.get(method, {}) | rule.per_model | rule.shared
  content = section.get('parameters')
  content = {} if content is None else content
  check_keys(content, known, f'{method} parameter', f'{where}parameters')
  settings = {}
  for name, value in content.items():
    place = f'{where}parameters.{name}'
    settings[name] = read_setting(value, isinstance(known[name], bool), place)
    numbers = [number for _, anchors in settings[name] for number in anchors]
    if name in _FRACTIONS and not all(0 <= number <= 1 for number in numbers):
      raise UsageError(f'{place} must be from 0 to 1, but is {value}')
    if name == 'filter_wise' and any(numbers):
      raise UsageError(f'{place} is not supported: only false is')
  return settings


def _dtype(content: dict, key: str, file: str) -> str | None:
  value = content.get(key)
  name = None if value is None else str(value).removeprefix('torch.')
  if name not in (None, *_DTYPES):
    raise UsageError(f'{file}: {key} {value} is not supported{nearest(name, _DTYPES)}')
  return name
