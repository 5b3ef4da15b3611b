"""What a mergekit file sets a parameter to, and the number that a tensor gets from it."""

import difflib
import math
import re
from collections.abc import Iterable

from optimer_jax.errors import UsageError

Number = float | bool
# What a parameter was set to: (filter, anchors) pairs, of which the first whose filter is a part of
# the tensor's name counts. Anchors are spread evenly over the layers; a scalar is a single one.
Setting = tuple[tuple[str, tuple[Number, ...]], ...]
Settings = dict[str, tuple[Setting, ...]]  # by parameter, those that go first come first

_TRUE, _FALSE = ('1', 'on', 't', 'true', 'y', 'yes'), ('0', 'off', 'f', 'false', 'n', 'no')


def look_up(settings: Iterable[Setting], name: str, num_layers: int) -> Number | None:
  """The number that the first setting with something to say about a tensor gives it.

  Of a setting the first pair counts whose filter is a part of `name`; a pair without anchors, like
  a setting of which no filter matches, leaves it to the next setting. Anchors are interpolated at
  t = layer / (num_layers - 1), or 1 for a single layer; tensors outside the layers, the final norm
  too, are at t = 0. Bools are not interpolated: the anchor before t counts.

  Returns:
    None where no setting has anything to say.
  """
  layer = re.search(r'\blayers\.(\d+)\.', name)
  t = 0.0 if layer is None else int(layer[1]) / (num_layers - 1) if num_layers > 1 else 1.0
  for setting in settings:
    anchors = next((anchors for part, anchors in setting if part in name), ())
    if anchors:
      return _at(anchors, t)
  return None


def _at(anchors: tuple[Number, ...], t: float) -> Number:
  place = t * (len(anchors) - 1)
  low = int(place)
  if isinstance(anchors[0], bool):
    return anchors[low]
  high = min(low + 1, len(anchors) - 1)
  rest = place - low
  return (1 - rest) * anchors[low] + rest * anchors[high]


def read_setting(value: object, is_bool: bool, where: str) -> Setting:
  """A scalar, a list of anchors, a {filter, value} or a list of those; `where` names it.

  Raises:
    UsageError: it is none of these, or a value is no finite number, or no bool where that is due.
  """
  items = value if isinstance(value, list) else [value]
  if not any(isinstance(item, dict) for item in items):
    return (('', tuple(_number(item, is_bool, where) for item in items)),)
  setting = []
  for item in items:
    check_keys(item, ('filter', 'value'), 'key', where)
    part = item.get('filter')
    if part is not None and not isinstance(part, str):
      raise UsageError(f'{where} has the filter {part}: put it in quotes')
    anchors = item.get('value')
    anchors = anchors if isinstance(anchors, list) else [anchors]
    part = '' if part in (None, '*') else part  # '' is a part of every name
    setting.append((part, tuple(_number(anchor, is_bool, where) for anchor in anchors)))
  return tuple(setting)


def _number(value: object, is_bool: bool, where: str) -> Number:
  if is_bool:
    text = str(int(value) if value in (0, 1) else value).lower()
    if text in _TRUE + _FALSE:
      return text in _TRUE
    raise UsageError(f'{where} must be true or false, but is {value}')
  try:
    number = float(value)  # YAML takes 1e-3, without a point, for text
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not math.isfinite(number):
    raise UsageError(f'{where} must be a number, but is {value}')
  return number


def check_keys(content: object, known: Iterable[str], what: str, where: str) -> None:
  if not isinstance(content, dict):
    raise UsageError(f'{where} must hold keys and values, but is {content}')
  for key in content:
    if key not in known:
      hint = nearest(str(key), known)
      raise UsageError(f'{where}: the {what} {key} is not supported{hint}')


def nearest(name: str, known: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, known, 1, 0.6)
  return f'; did you mean {close[0]}?' if close else f'; supported are {", ".join(known) or "none"}'
