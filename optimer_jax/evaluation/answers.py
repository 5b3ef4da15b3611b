"""Kinds of task where the model writes: an answer to be found in the text, or a program.

As in `tasks`, `prepare` does once what does not depend on the candidate.
"""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation import sandbox
from optimer_jax.evaluation.engine import Engine, Prepared
from optimer_jax.evaluation.examples import Example
from optimer_jax.evaluation.generation import Generation as Written
from optimer_jax.evaluation.generation import Prompt, Sampling, generate_texts
from optimer_jax.evaluation.prompts import digest, joined, templates, text_of
from optimer_jax.evaluation.scores import WHOLE, Part, Score, places
from optimer_jax.evaluation.splits import Drawn, Splits, draw
from optimer_jax.parallel.processes import once


@dataclasses.dataclass(frozen=True)
class Generation:
  """Whether the answer found in what the model writes is the right one; accuracy.

  Attributes:
    name: the task's.
    data: the examples.
    prompt: template.
    target: the key of the right answer.
    target_extract: pattern that finds the answer in the value of `target`; '': all of it.
    extract: pattern that finds the answer in what was written (its first group that matched, or
      all of the match); '': all of it. No match is a wrong answer.
    take: the 'first' or the 'last' match.
    number: compare as numbers: '$1,000.00' is '1000'.
    ignore_case: compare without case.
    stops: texts at which an answer ends; they are no part of it.
    max_new: tokens of an answer at most.
    shot: template of a worked example; needed where there are shots.
    instruction: template in front of all; {subject} has spaces for underscores.
    shots: worked examples, of the example's own subject where there are subjects.
    separator: between instruction, shots and prompt.
    sampling: how tokens are chosen; greedily unless it says otherwise.
  """

  name: str
  data: Splits
  prompt: str
  target: str = 'answer'
  target_extract: str = ''
  extract: str = ''
  take: str = 'first'
  number: bool = False
  ignore_case: bool = False
  stops: tuple[str, ...] = ('\n\n',)
  max_new: int = 256
  shot: str = ''
  instruction: str = ''
  shots: int = 0
  separator: str = '\n\n'
  sampling: Sampling = dataclasses.field(default_factory=Sampling)

  def __post_init__(self):
    if self.take not in ('first', 'last'):
      raise UsageError(f'Generation.take is {self.take!r}: it is first or last')
    templates(self, 'prompt', 'shot', 'instruction')
    _check(self)
    for name in ('extract', 'target_extract'):
      try:
        re.compile(getattr(self, name))
      except re.error as error:
        raise UsageError(f'Generation.{name} is no regular expression ({error})') from None

  def prepare(self, engine: Engine, split: str) -> Prepared:
    """UserError for examples that share splits, lack a key, or whose target has no answer."""
    drawn, prompts = _prompts(self, engine, split)
    targets = [self._answer_of(example) for example in drawn.examples]

    def score(params: dict, part: Part = WHOLE) -> Score:
      own = places(len(prompts), part)
      written = generate_texts(engine, params, prompts, self.sampling, own)
      right = [self.is_right(g.text, targets[i]) for i, g in zip(own, written, strict=True)]
      return _accuracy(right, [prompts[i] for i in own], written)

    compared = (self.extract, self.take, self.number, self.ignore_case)
    found = digest(
      engine, 'generation', prompts, targets, compared, dataclasses.astuple(self.sampling)
    )
    return Prepared(self.name, found, len(prompts), score)

  def is_right(self, text: str, target: str) -> bool:
    """Whether what the model wrote holds `target`."""
    found = extracted(self.extract, text, self.take)
    if found is None:
      return False
    plain = normalised(found, self.number, self.ignore_case)
    return plain == normalised(target, self.number, self.ignore_case)

  def _answer_of(self, example: Example) -> str:
    value = text_of(example.value(self.target), f'{example.where}, key "{self.target}",')
    found = extracted(self.target_extract, value)
    if found is None or not found.strip():
      raise UserError(
        f'{example.where}, key "{self.target}", holds no answer: set Generation.target or '
        'target_extract'
      )
    return found


@dataclasses.dataclass(frozen=True)
class CodeGeneration:
  """Whether the program that the model completes passes its tests (pass@1); accuracy.

  The programs run as `sandbox.run_tests` says: processes of their own, with a limit of time and
  memory and without a network. Still it is code that nobody has read.

  Attributes:
    name: the task's.
    data: the examples.
    prompt: template.
    program: template of the program to run, with {completion} and the example's keys.
    stops: texts at which a completion ends; they are no part of it.
    max_new: tokens of a completion at most.
    seconds, memory_mb: limits of one program.
    allow_execution: has to be True for anything to run.
    shot: template of a worked example; needed where there are shots.
    instruction, shots, separator, sampling: as in `Generation`.
  """

  name: str
  data: Splits
  prompt: str
  program: str
  stops: tuple[str, ...] = ()
  max_new: int = 512
  seconds: float = 10.0
  memory_mb: int = 1024
  allow_execution: bool = False
  shot: str = ''
  instruction: str = ''
  shots: int = 0
  separator: str = '\n\n'
  sampling: Sampling = dataclasses.field(default_factory=Sampling)

  def __post_init__(self):
    templates(self, 'prompt', 'program', 'shot', 'instruction')
    _check(self)
    if self.allow_execution is not True:
      raise UsageError(
        f'{self.name} runs programs that the model writes, in processes of their own of at most '
        f'{self.seconds:g} s and {self.memory_mb} MB without a network: set '
        'CodeGeneration.allow_execution = True if that is wanted'
      )

  def prepare(self, engine: Engine, split: str) -> Prepared:
    """UserError for examples that share splits or lack a key."""
    (template,) = templates(self, 'program')
    drawn, prompts = _prompts(self, engine, split)

    def program(example: Example, completion: str) -> str:
      return template.fill({**example.values, 'completion': completion}, example.where)

    tests = [program(example, '') for example in drawn.examples]

    def score(params: dict, part: Part = WHOLE) -> Score:
      own = places(len(prompts), part)
      written = generate_texts(engine, params, prompts, self.sampling, own)
      programs = [program(drawn.examples[i], g.text) for i, g in zip(own, written, strict=True)]
      with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        right = once(lambda: list(pool.map(self._passes, programs)))
      return _accuracy(right, [prompts[i] for i in own], written)

    limits = (self.program, self.seconds, self.memory_mb)
    found = digest(engine, 'code', prompts, tests, limits, dataclasses.astuple(self.sampling))
    return Prepared(self.name, found, len(prompts), score)

  def _passes(self, program: str) -> bool:
    return sandbox.run_tests(program, self.seconds, self.memory_mb).passed


def _prompts(
  task: Generation | CodeGeneration, engine: Engine, split: str
) -> tuple[Drawn, list[Prompt]]:
  """The examples and, for each, the tokens of its prompt with instruction and shots."""
  prompt, shot = templates(task, 'prompt', 'shot')

  def content(example: Example) -> str:
    return prompt.fill(example.values, example.where)

  drawn = draw(task.data, split, task.shots, content)
  texts = [
    joined(
      task,
      example,
      [shot.fill(each.values, each.where) for each in drawn.shots_for(example)],
      content(example),
    )
    for example in drawn.examples
  ]
  bos = np.array([engine.tokenizer.bos], np.int32)
  tokens = [np.concatenate([bos, ids]) for ids in engine.tokenizer.encode(texts)]
  return drawn, [Prompt(each, task.max_new, tuple(task.stops)) for each in tokens]


def _accuracy(
  right: Sequence[bool], prompts: Sequence[Prompt], written: Sequence[Written]
) -> Score:
  return Score(
    np.array(right, np.float64),
    np.ones(len(right)),
    'accuracy',
    truncated=sum(each.truncated for each in written),
    tokens=sum(len(p.tokens) + len(g.tokens) for p, g in zip(prompts, written, strict=True)),
  )


def _check(task: Generation | CodeGeneration) -> None:
  kind = type(task).__name__
  if task.shots and not task.shot:
    raise UsageError(f'{kind}.shots is {task.shots}: give {kind}.shot, how one is written')
  if isinstance(task.stops, str) or not all(isinstance(s, str) and s for s in task.stops):
    raise UsageError(f"{kind}.stops is {task.stops!r}: give a tuple of texts, as in ('\\n\\n',)")


def extracted(pattern: str, text: str, take: str = 'first') -> str | None:
  """What the first or last match of `pattern` holds: its first group that matched, or all of it.

  '' as the pattern is the whole text. None if there is no match.
  """
  if not pattern:
    return text
  matches = list(re.finditer(pattern, text))
  if not matches:
    return None
  match = matches[0 if take == 'first' else -1]
  return next((group for group in match.groups() if group is not None), match[0])


def normalised(answer: str, number: bool = False, ignore_case: bool = False) -> str:
  """An answer in the form in which answers are compared.

  Args:
    answer: as it was extracted.
    number: read it as a number: '$1,000.00.' is '1000', full-width digits are digits. What is no
      number stays text.
    ignore_case: fold case.
  """
  answer = answer.strip()
  if ignore_case:
    answer = answer.casefold()
  if not number:
    return answer
  plain = unicodedata.normalize('NFKC', answer).translate(str.maketrans('', '', ',$ '))
  found = re.fullmatch(r'([+-]?)([0-9]*)\.?([0-9]*)\.?', plain)
  if not found or not found[2] + found[3]:
    return answer
  whole, part = found[2].lstrip('0') or '0', found[3].rstrip('0')
  value = f'{whole}.{part}' if part else whole
  return f'-{value}' if found[1] == '-' and value != '0' else value
