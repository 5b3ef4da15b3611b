"""Prompts: templates filled from an example, worked examples in front, and their tokens.

A template is text with {name} where the example's value under that name goes; {name:strip} leaves
out the white space around it, and a brace itself is written {{ or }}. A list of texts is written
one a line. Nothing in a value is taken for a template.
"""

import dataclasses
import hashlib
import string
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from optimer_jax.data.sources import nearest
from optimer_jax.data.tokenizer import Tokenizer
from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation.engine import Engine
from optimer_jax.evaluation.examples import Example
from optimer_jax.evaluation.scoring import Continuation


@dataclasses.dataclass(frozen=True)
class Template:
  """A template, read once. UsageError if it is malformed; `setting` names it in messages."""

  text: str
  setting: str

  def __post_init__(self):
    _ = self.names

  @property
  def names(self) -> tuple[str, ...]:
    """The names that it takes values from."""
    return tuple(name for _, name, _ in self._parts() if name is not None)

  def fill(self, values: Mapping[str, object], where: str) -> str:
    """The text for one example; UserError if a value is missing or is no text."""
    written = []
    for literal, name, form in self._parts():
      written.append(literal)
      if name is not None:
        if name not in values:
          raise UserError(
            f'{where} has no key "{name}", which {self.setting} asks for{nearest(name, values)}'
          )
        text = text_of(values[name], f'{where}, key "{name}",')
        written.append(text.strip() if form == 'strip' else text)
    return ''.join(written)

  def _parts(self) -> list[tuple[str, str | None, str]]:
    if not isinstance(self.text, str):
      raise UsageError(f'{self.setting} is {self.text!r}, not a text')
    try:
      parts = list(string.Formatter().parse(self.text))
    except ValueError as error:
      raise UsageError(
        f'{self.setting} is malformed ({error}): write {{name}}, and {{{{ or }}}} for a brace'
      ) from None
    for _, name, form, conversion in parts:
      if name is not None and (not name.strip() or form not in ('', 'strip') or conversion):
        shown = f'{name}{f"!{conversion}" if conversion else ""}{f":{form}" if form else ""}'
        raise UsageError(
          f'{self.setting} has {{{shown}}}: write {{name}} or {{name:strip}}, and {{{{ or }}}} for '
          'a brace'
        )
    return [(literal, name, form) for literal, name, form, _ in parts]


def text_of(value: object, where: str) -> str:
  """A value as it stands in a prompt; UserError if it is no text, number or list of texts."""
  if isinstance(value, str):
    return value
  if isinstance(value, int | float) and not isinstance(value, bool):
    return str(value)
  if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
    return '\n'.join(value)
  if value is None:
    raise UserError(f'{where} is empty: name another key in the template, or mend the row')
  raise UserError(f'{where} is a {type(value).__name__}, not text: name a key of text')


def templates(task, *names: str) -> list[Template]:
  """The templates in these fields of a task."""
  return [Template(getattr(task, name), f'{type(task).__name__}.{name}') for name in names]


def joined(task, example: Example, shots: Iterable[str], prompt: str) -> str:
  """The task's instruction, if any, worked examples and the example's own prompt.

  In an instruction {subject} has spaces for underscores.
  """
  (instruction,) = templates(task, 'instruction')
  values = dict(example.values)
  if example.subject is not None:
    values['subject'] = example.subject.replace('_', ' ')
  first = [instruction.fill(values, example.where)] if task.instruction else []
  return task.separator.join([*first, *shots, prompt])


def continuations(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
  """Tokens of (context, continuation) texts, cut apart as lm-evaluation-harness does.

  White space at a context's end goes to the continuation. Both together are encoded, and what is
  longer than the context's own tokens is the target: where a piece crosses the boundary the
  context keeps its own tokens. A target has at least the last token.

  Returns:
    (context int32[n], BOS first; target int32[m >= 1]) of each pair. Equal contexts are one array.
  """
  bos = np.array([tokenizer.bos], np.int32)
  split = []
  for context, continuation in pairs:
    kept = context.rstrip()
    split.append((kept, context + continuation))
  contexts = {text: None for text, _ in split}
  for text, ids in zip(contexts, tokenizer.encode(contexts), strict=True):
    contexts[text] = np.concatenate([bos, ids])
  found = []
  for (context, _), whole in zip(split, tokenizer.encode(w for _, w in split), strict=True):
    before = contexts[context]
    if len(whole) >= len(before):
      found.append(Continuation(before, whole[len(before) - 1 :]))
    else:
      found.append(Continuation(np.concatenate([bos, whole[:-1]]), whole[-1:]))
  return found


def digest(engine: Engine, *parts) -> str:
  """A digest, hex[:32], of all that a score depends on: `parts`, the tokenizer, the context."""
  found = hashlib.sha256()

  def add(part) -> None:
    if isinstance(part, np.ndarray):
      found.update(f'{part.dtype}{part.shape}'.encode())
      found.update(part.tobytes())
    elif isinstance(part, list | tuple):
      found.update(f'({len(part)}'.encode())
      for each in part:
        add(each)
    else:
      text = repr(part).encode()
      found.update(f'{len(text)}:'.encode() + text)

  add((engine.tokenizer.digest, engine.context, *parts))
  return found.hexdigest()[:32]
