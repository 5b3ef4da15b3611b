"""Kinds of task that a model's likelihoods decide: bits per byte, and multiple choice.

A task is configured once and prepared once: `prepare` reads the examples, writes and tokenises the
prompts and plans the batches. What it returns scores any number of candidates.
"""

import dataclasses
import functools
import re
import string
from collections.abc import Sequence

import numpy as np

from optimer_jax.data.datasets import Source
from optimer_jax.data.rows import window_rows
from optimer_jax.data.sources import default_cache
from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation.engine import Engine, Prepared
from optimer_jax.evaluation.examples import Example
from optimer_jax.evaluation.prompts import Template, continuations, digest, joined, templates
from optimer_jax.evaluation.scores import WHOLE, Part, Score, places
from optimer_jax.evaluation.scoring import (
  Continuation,
  Plan,
  gradient_plan,
  likelihood_gradient,
  log_likelihoods,
  plan,
)
from optimer_jax.evaluation.splits import Splits, draw
from optimer_jax.merging.weighted_sum import ALL, Groups

LETTERS = string.ascii_uppercase


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
  """Bits per byte of held-out text: comparable across tokenizers, lower is better.

  Attributes:
    name: the task's.
    dev, test: sources of text (`data.sources`) that share no document.
    length: tokens of a row, T: one window of one document.
    rows: at most, from as many of a source's documents as possible.
    seed: of the choice of rows.
  """

  name: str
  dev: Source
  test: Source
  length: int = 1024
  rows: int = 64
  seed: int = 0

  def prepare(self, engine: Engine, split: str) -> Prepared:
    """UserError if dev and test share a document, or a source is missing, damaged or empty."""
    if self.length > engine.context:
      raise UsageError(
        f'{self.name}: rows of {self.length} tokens are longer than the context of '
        f'{engine.context}: lower the length or raise EvalConfig.context'
      )
    if split not in ('dev', 'test'):
      raise UsageError(f'there is no split {split!r}: there are dev and test')
    seen = {document.text.strip(): document.source for document in self.dev.documents()}
    shared = [d.source for d in self.test.documents() if d.text.strip() in seen]
    if shared:
      raise UserError(
        f'{self.name}: dev ({self.dev}) and test ({self.test}) share {len(shared)} documents, the '
        f'first at {shared[0]}: give texts that share none'
      )
    rows = window_rows(
      getattr(self, split),
      engine.tokenizer,
      self.length,
      self.rows,
      self.seed,
      (engine.cache or default_cache()) / 'rows',
    )
    lengths = rows.segment_ids.sum(1)
    requests = [
      Continuation(tokens[:1], tokens[1:length])
      for tokens, length in zip(np.asarray(rows.tokens), lengths, strict=True)
    ]
    sizing = engine.context, engine.batch_tokens, engine.shards
    sizes = np.asarray(rows.bytes, np.float64)

    @functools.cache
    def planned(part: Part) -> tuple[np.ndarray, Plan]:
      own = places(len(requests), part)
      return own, plan([requests[i] for i in own], *sizing)

    def scored(nats: np.ndarray, part: Part = WHOLE) -> Score:
      own, made = planned(part)
      return Score(nats / np.log(2), sizes[own], 'bits/byte', made.truncated, made.tokens)

    def score(params: dict, part: Part = WHOLE) -> Score:
      _, made = planned(part)
      return scored(log_likelihoods(engine.model, params, made, engine.mesh).nats, part)

    @functools.cache
    def backward() -> Plan:
      return gradient_plan(engine.model, requests, *sizing)

    def gradient(
      params: dict, vectors: Sequence[dict], groups: Groups = ALL
    ) -> tuple[Score, np.ndarray]:
      factors = np.full(len(sizes), 1 / np.log(2) / sizes.sum())
      nats, found = likelihood_gradient(
        engine.model, params, vectors, backward(), factors, groups, engine.mesh
      )
      return scored(nats), found

    planned(WHOLE)  # errors come now
    found = digest(engine, 'bits', requests, sizes)
    return Prepared(self.name, found, len(requests), score, gradient)


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
  """Which of several continuations of a prompt is the likeliest; accuracy.

  Attributes:
    name: the task's.
    data: the examples.
    prompt: template. Besides an example's own keys there are {A}, {B}, …, the text of each option,
      and {choices}, one line for each: 'A. …'.
    options: the key of the list of options (or of {'text': [...], 'label': [...]}), or the keys of
      each.
    choice: template of the continuation, with {text} and {letter} of the option.
    label: the key of the right option.
    label_is: what stands there: 'index'; 'letter', or the set's own label for it; or its 'text'.
    first: the index of the first option, 0 or 1.
    score: 'sum' of the log likelihood of the continuation; 'length': that by UTF-8 byte of the
      continuation without its outer white space (acc_bytes in lm-evaluation-harness; its acc_norm
      takes characters, which is the same for ASCII); 'calibrated': less the log likelihood of the
      same continuation after `calibration` (PMI_DC, Holtzman et al. 2021, arXiv 2104.08315).
    calibration: a prompt that says nothing of the question.
    instruction: template in front of all; {subject} has spaces for underscores.
    shots: worked examples, of the example's own subject where there are subjects.
    separator: between instruction, shots and prompt.
  """

  name: str
  data: Splits
  prompt: str
  options: str | tuple[str, ...] = 'choices'
  choice: str = ' {text}'
  label: str = 'label'
  label_is: str = 'index'
  first: int = 0
  score: str = 'sum'
  calibration: str = 'Answer:'
  instruction: str = ''
  shots: int = 0
  separator: str = '\n\n'

  def __post_init__(self):
    known = {'label_is': ('index', 'letter', 'text'), 'score': ('sum', 'length', 'calibrated')}
    for name, values in known.items():
      if getattr(self, name) not in values:
        raise UsageError(
          f'MultipleChoice.{name} is {getattr(self, name)!r}: it is one of {", ".join(values)}'
        )
    templates(self, 'prompt', 'choice', 'instruction')

  def prepare(self, engine: Engine, split: str) -> Prepared:
    """UserError for examples that share splits, lack a key, or whose label is out of range."""
    prompt, choice = templates(self, 'prompt', 'choice')
    drawn = draw(self.data, split, self.shots, self._content)
    pairs, counts, right = [], [], []
    for example in drawn.examples:
      shots = [self._solved(shot) for shot in drawn.shots_for(example)]
      question = prompt.fill(self._values(example), example.where)
      context = joined(self, example, shots, question)
      texts = [choice.fill(values, example.where) for values in self._each(example)]
      if not all(text.strip() for text in texts):
        raise UserError(f'{example.where} has an empty option: mend the row')
      pairs += [(context, text) for text in texts]
      counts.append(len(texts))
      right.append(self._right(example))
    sizes = np.array([len(text.strip().encode()) for _, text in pairs])
    right, starts = np.array(right), np.cumsum(counts) - counts
    asked = continuations(engine.tokenizer, pairs)
    unasked = []
    if self.score == 'calibrated':
      unasked = continuations(engine.tokenizer, [(self.calibration, text) for _, text in pairs])
    cut = np.array([len(context) + len(target) > engine.context for context, target in asked])
    truncated = np.logical_or.reduceat(cut, starts)
    owner = np.repeat(np.arange(len(counts)), counts)

    @functools.cache
    def planned(part: Part) -> tuple[np.ndarray, np.ndarray, Plan]:
      """The examples, their options, and the plan of these."""
      own = places(len(right), part)
      options = np.flatnonzero(np.isin(owner, own))
      requests = [each[i] for each in (asked, unasked) if each for i in options]
      return own, options, plan(requests, engine.context, engine.batch_tokens, engine.shards)

    def score(params: dict, part: Part = WHOLE) -> Score:
      own, options, made = planned(part)
      nats = log_likelihoods(engine.model, params, made, engine.mesh).nats
      compared = nats[: len(options)]
      if self.score == 'length':
        compared = compared / sizes[options]
      elif self.score == 'calibrated':
        compared = compared - nats[len(options) :]
      each = np.split(compared, np.flatnonzero(np.diff(owner[options])) + 1)
      values = (np.array([np.argmin(e) for e in each]) == right[own]).astype(np.float64)
      # A model whose numbers are not finite chooses nothing, and is not to be taken for wrong.
      values[[np.isnan(e).any() for e in each]] = np.nan
      return Score(values, np.ones(len(own)), 'accuracy', int(truncated[own].sum()), made.tokens)

    planned(WHOLE)  # errors come now
    found = digest(engine, 'choice', self.score, asked, unasked, counts, sizes, right)
    return Prepared(self.name, found, len(right), score)

  def _options(self, example: Example) -> tuple[list[str], list[str]]:
    """The options' texts, and the set's own labels for them (or A, B, …)."""
    if isinstance(self.options, str):
      found = example.value(self.options)
    else:
      found = [example.value(key) for key in self.options]
    labels = None
    if isinstance(found, dict) and {'text', 'label'} <= found.keys():
      found, labels = found['text'], [str(label) for label in found['label']]
    if not isinstance(found, list | tuple) or len(found) < 2 or len(found) > len(LETTERS):
      raise UserError(
        f'{example.where}, key "{self.options}", is not a list of 2 to {len(LETTERS)} options: set '
        'MultipleChoice.options'
      )
    if not all(isinstance(text, str | int | float) for text in found):
      raise UserError(f'{example.where} has an option that is no text: mend the row')
    return [str(text) for text in found], labels or [*LETTERS[: len(found)]]

  def _values(self, example: Example) -> dict:
    texts, _ = self._options(example)
    lettered = dict(zip(LETTERS, texts, strict=False))
    lines = '\n'.join(f'{letter}. {text}' for letter, text in lettered.items())
    return {**example.values, **lettered, 'choices': lines}

  def _each(self, example: Example) -> list[dict]:
    """What the template of the continuation takes, for each option."""
    values = self._values(example)
    texts = self._options(example)[0]
    return [{**values, 'letter': LETTERS[i], 'text': text} for i, text in enumerate(texts)]

  def _solved(self, example: Example) -> str:
    prompt, choice = templates(self, 'prompt', 'choice')
    values = self._each(example)[self._right(example)]
    return prompt.fill(values, example.where) + choice.fill(values, example.where)

  def _right(self, example: Example) -> int:
    """The right option's index from 0."""
    texts, labels = self._options(example)
    given = example.value(self.label)
    if self.label_is == 'index':
      digits = isinstance(given, int | str) and re.fullmatch('-?[0-9]+', str(given).strip())
      index = int(given) - self.first if digits else -1
      known = f'{self.first} to {len(texts) - 1 + self.first}'
    else:
      among = texts if self.label_is == 'text' else labels
      among, given_plain = [each.strip() for each in among], str(given).strip()
      index = among.index(given_plain) if given_plain in among else -1
      known = ', '.join(among)
    if not 0 <= index < len(texts):
      raise UserError(
        f'{example.where}, key "{self.label}", is {given!r}, not one of {known}: mend the row, or '
        'set MultipleChoice.label_is (index, letter, text) or first'
      )
    return index

  def _content(self, example: Example) -> str:
    """What the prompt shows of the example; its options in any order."""
    texts, _ = self._options(example)
    keys = {self.options} if isinstance(self.options, str) else {*self.options}
    (prompt,) = templates(self, 'prompt')
    names = [n for n in prompt.names if n not in keys | {*LETTERS[: len(texts)], 'choices'}]
    values = Template(' '.join(f'{{{name}}}' for name in names), prompt.setting)
    return '\n'.join([values.fill(example.values, example.where), *sorted(texts)])
