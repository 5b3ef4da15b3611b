"""The evaluation engine beside transformers on torch.

    python -m benchmarks.evaluate [--model tiny] [--texts DIR] [--examples N] [--shots K]

One model on both sides, float32, as many threads, the same tokens. Multiple choice: the likelihoods
of a question's options after K worked examples, the same for all questions. Generation: greedy
answers to prompts of that form, until a stop. The texts are paragraphs of the quickstart's domains
and how they go on; with --texts, jcommonsenseqa_valid.jsonl (choice), gsm8k_test.jsonl and
mgsm_ja.jsonl (generation) of that directory. N questions, and N prompts of each generation task.

The peer does what a careful user of transformers does: sdpa attention, inference mode, requests
sorted by length, batches padded on the left, logits only where a batch's targets are
(`logits_to_keep`; lm-evaluation-harness computes all of them, which is slower), a KV cache, and a
stopping criterion for each row. Of several batch sizes the fastest in a trial is taken. It does not
share prefixes between rows, as neither transformers nor lm-evaluation-harness do by themselves.

Each round is another candidate (all parameters times a factor), on both sides in turns. Rates are
medians over rounds of tokens a second: of score, those of all requests, context and continuation,
as one reads them that shares nothing; of generation, those written up to the stop. Tokenising,
planning and compiling are not in them. What is compiled after the first candidate is counted.
Prints as the last line one JSON object. With 64 examples it takes 16 minutes on two cores, most of
them the peer's. Needs the extras test and gemma270m and, without --texts, what the recipes need.
"""

import argparse
import bisect
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Before torch is imported: threads that wait for each other by spinning make it many times slower
# when anything else runs.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import print_found
from benchmarks.parity import DOMAINS, REAL
from optimer_jax.checkpoints.base import export, import_base, open_source, read_leaves
from optimer_jax.data.datasets import Dataset, from_recipe, synthetic
from optimer_jax.data.sources import default_cache
from optimer_jax.data.synthetic import LANGUAGES
from optimer_jax.data.tokenizer import Tokenizer, write_tiny_tokenizer
from optimer_jax.errors import UserError
from optimer_jax.evaluation.engine import Engine
from optimer_jax.evaluation.generation import Prompt, generate_texts
from optimer_jax.evaluation.prompts import continuations
from optimer_jax.evaluation.scoring import Continuation, log_likelihoods, plan
from optimer_jax.files import read_jsonl
from optimer_jax.gemma3 import Model, from_leaves

MAX_NEW = 128
SCORE_ROWS, GENERATE_ROWS = (1, 4, 16), (16, 32)  # what the peer's batches may have
FACTOR = 1.01  # from candidate to candidate: answers change, and stay answers


class Question(NamedTuple):
  text: str
  choices: list[str]
  label: int


class Task(NamedTuple):
  """Prompts with their right answers, and where an answer ends."""

  name: str
  examples: list[tuple[str, str]]
  stops: tuple[str, ...]


class Work(NamedTuple):
  """What both sides are given: tokens."""

  requests: list[Continuation]
  choices: list[int]  # of each question
  prompts: dict[str, list[Prompt]]  # of each generation task

  @property
  def tokens(self) -> int:
    return sum(len(context) + len(target) - 1 for context, target in self.requests)


# Texts.


def given_texts(directory: Path, count: int) -> tuple[list[Question], list[Task]]:
  """The first rows of the sets in `directory`; UserError if one is missing."""

  def read(name: str) -> list[dict]:
    path = directory / f'{name}.jsonl'
    if not path.is_file():
      raise UserError(f'{path} is missing: give --texts the directory of the sets')
    return read_jsonl(path)[:count]

  questions = [
    Question(f'質問：{row["question"]}\n回答：', row['choices'], row['label'])
    for row in read('jcommonsenseqa_valid')
  ]
  gsm8k = [(f'Question: {row["question"]}\nAnswer: ', row['answer']) for row in read('gsm8k_test')]
  mgsm = [(f'問題：{row["question"]}\n答え：', row['target']) for row in read('mgsm_ja')]
  return questions, [
    Task('gsm8k', gsm8k, ('\n\n', 'Question:')),
    Task('mgsm_ja', mgsm, ('\n\n', '問題：')),
  ]


def made_texts(datasets: list[Dataset], count: int) -> tuple[list[Question], list[Task]]:
  """How paragraphs go on, among other paragraphs' ways: of all domains in turn."""
  paragraphs = zip(*(_paragraphs(dataset) for dataset in datasets), strict=False)
  taken = [*itertools.islice(itertools.chain.from_iterable(paragraphs), count)]
  if len(taken) < count:
    raise UserError(f'the texts have {len(taken)} paragraphs, not {count}: lower --examples')
  cuts = [(text[: len(text) // 3], text[len(text) // 3 :]) for text in taken]
  ends = [end[: 8 + 8 * (i % 6)] for i, (_, end) in enumerate(cuts)]
  questions = [
    Question(start, [ends[(i + shift) % count] for shift in (1, 0, 2, 3)], 1)
    for i, (start, _) in enumerate(cuts)
  ]
  return questions, [Task('paragraphs', cuts, ('\n\n',))]


def _paragraphs(dataset: Dataset) -> Iterator[str]:
  """Long ones of all documents, mixed."""
  texts = [part for d in dataset.test.documents() for part in re.split(r'\n\s*\n', d.text)]
  found = dict.fromkeys(text[:400] for text in texts if len(text) >= 160)
  return iter(sorted(found, key=lambda text: zlib.crc32(text.encode())))


def prepare(tokenizer: Tokenizer, questions: list[Question], tasks: list[Task], shots: int) -> Work:
  """Puts the first `shots` examples, solved, in front of each other one."""
  solved = [q.text + q.choices[q.label] + '\n\n' for q in questions[:shots]]
  asked = questions[shots:]
  pairs = [(''.join(solved) + q.text, choice) for q in asked for choice in q.choices]
  prompts = {}
  for task in tasks:
    head = ''.join(f'{prompt}{answer}\n\n' for prompt, answer in task.examples[:shots])
    texts = [head + prompt for prompt, _ in task.examples[shots:]]
    prompts[task.name] = [
      Prompt(np.append(tokenizer.bos, ids).astype(np.int32), MAX_NEW, task.stops)
      for ids in tokenizer.encode(texts)
    ]
  return Work(continuations(tokenizer, pairs), [len(q.choices) for q in asked], prompts)


# The peer.


def peer_score(model, requests: list[Continuation], rows: int) -> np.ndarray:
  """Negative log likelihoods, float64 [R], `rows` requests at a time."""
  import torch

  order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
  nats = np.zeros(len(requests))
  for now in _batches(order, rows):
    inputs = _left_padded([np.concatenate(requests[i])[:-1] for i in now])
    positions = (inputs['attention_mask'].cumsum(1) - 1).clamp(min=0)
    keep = max(len(requests[i].target) for i in now)
    with torch.inference_mode():
      logits = model(**inputs, position_ids=positions, logits_to_keep=keep, use_cache=False).logits
      for i, row in zip(now, logits, strict=True):
        target = torch.tensor(requests[i].target, dtype=torch.long)
        row = row[-len(target) :]
        found = row.logsumexp(-1) - row.gather(1, target[:, None])[:, 0]
        nats[i] = found.double().sum().item()
  return nats


def peer_generate(
  model, tokenizer: Tokenizer, prompts: list[Prompt], rows: int
) -> list[np.ndarray]:
  """The tokens written after each prompt, `rows` prompts at a time, with padding after the end."""
  import torch

  order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens))
  stops = prompts[0].stops
  # A stop may be written in more pieces than it has, and begin in the middle of one.
  tail = max(len(ids) for ids in tokenizer.encode(stops)) + 2
  written = [None] * len(prompts)
  for now in _batches(order, rows):
    inputs = _left_padded([prompts[i].tokens for i in now])
    width = inputs['input_ids'].shape[1]

    def stopped(ids, scores, width=width, **_):
      texts = [tokenizer.decode(row[width:][-tail:].numpy()) for row in ids]
      return torch.tensor([any(stop in text for stop in stops) for text in texts])

    with torch.inference_mode():
      out = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=MAX_NEW,
        eos_token_id=tokenizer.eos,
        pad_token_id=0,
        stopping_criteria=[stopped],
      )
    for i, row in zip(now, out, strict=True):
      written[i] = row[width:].numpy()
  return written


def _left_padded(texts: list[np.ndarray]) -> dict:
  import torch

  width = max(map(len, texts))
  tokens = torch.zeros((len(texts), width), dtype=torch.long)
  mask = torch.zeros_like(tokens)
  for row, text in enumerate(texts):
    tokens[row, width - len(text) :] = torch.from_numpy(text)
    mask[row, width - len(text) :] = 1
  return {'input_ids': tokens, 'attention_mask': mask}


def _batches(order: list[int], rows: int) -> Iterator[list[int]]:
  return (order[start : start + rows] for start in range(0, len(order), rows))


def answer(tokenizer: Tokenizer, prompt: Prompt, tokens: np.ndarray) -> tuple[str, int]:
  """An answer's text before the stop, and its tokens with the stop, whichever side wrote it."""
  ends = np.flatnonzero(tokens == tokenizer.eos)
  tokens = tokens[: ends[0] + 1] if len(ends) else tokens

  def place(count: int) -> int:
    text = tokenizer.decode(tokens[:count])
    return min((at for stop in prompt.stops if (at := text.find(stop)) >= 0), default=-1)

  count = bisect.bisect_left(range(len(tokens)), True, key=lambda n: place(n) >= 0)
  at, text = place(count), tokenizer.decode(tokens[:count])
  return text if at < 0 else text[:at], count


# Measuring.


class Compilations:
  """Counts the programs that XLA is asked for from now on, and the seconds that they take."""

  def __init__(self):
    self.count, self.seconds = 0, 0.0
    jax.monitoring.register_event_duration_secs_listener(self._heard)

  def _heard(self, event: str, seconds: float, **_) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
      self.count += 1
      self.seconds += seconds


def timed(call: Callable) -> tuple[object, float]:
  """What `call()` returns, and how many seconds it took."""
  began = time.perf_counter()
  found = call()
  return found, time.perf_counter() - began


def quickest(name: str, run: Callable, sizes: tuple[int, ...]) -> int:
  """The size with which `run` takes least time."""
  seconds = {size: timed(lambda size=size: run(size))[1] for size in sizes}
  best = min(seconds, key=seconds.get)
  tried = ', '.join(f'{size}: {value:.1f} s' for size, value in seconds.items())
  print(f"the peer's rows, {name}: {best} ({tried})", flush=True)
  return best


def read_model(name: str) -> tuple:
  """Both sides' model and the tokenizer: (ours, its parameters, theirs, tokenizer).

  Both have the same weights: transformers reads our float32 export of them.
  """
  import torch
  from transformers import Gemma3ForCausalLM

  tiny = name == 'tiny'
  source = open_source('random:tiny:0' if tiny else REAL, default_cache())
  with tempfile.TemporaryDirectory() as place:
    place = Path(place)
    if tiny:
      texts = (d.text for name in LANGUAGES for d in synthetic(name).train.documents())
      write_tiny_tokenizer(place / 'tokenizer', texts, source.config.vocab_size)
    else:
      source.write_tokenizer(place / 'tokenizer')
    import_base(source, place / 'base', place / 'tokenizer')
    export(place / 'base', place / 'base', place / 'hf', 'float32')
    theirs = Gemma3ForCausalLM.from_pretrained(
      place / 'hf', dtype=torch.float32, attn_implementation='sdpa'
    ).eval()
    _, leaves = read_leaves(open_source(str(place / 'hf'), place), None)
    tokenizer = Tokenizer.load(place / 'hf')
  model = Model(source.config)
  return model, jax.tree.map(jnp.asarray, from_leaves(model, leaves)), theirs, tokenizer


def same_choices(work: Work, ours: np.ndarray, theirs: np.ndarray) -> int:
  """Of how many questions both sides find the same option likeliest."""
  cuts = np.cumsum(work.choices)[:-1]
  sides = zip(np.split(ours, cuts), np.split(theirs, cuts), strict=True)
  return sum(int(a.argmin() == b.argmin()) for a, b in sides)


def compare(
  model: Model, params: dict, theirs, tokenizer: Tokenizer, work: Work, rounds: int
) -> dict[str, float]:
  """Runs both sides in turns, prints what each round found, and returns the last line."""
  import torch

  engine, compiled = Engine(model, tokenizer), Compilations()
  planned, seconds = timed(lambda: plan(work.requests, engine.context, engine.batch_tokens))
  print(
    f'score: {len(work.choices)} questions, {len(work.requests)} requests, {work.tokens} tokens; '
    f'shared, {planned.tokens} in {planned.slots} slots (planned in {seconds:.2f} s)'
  )
  for name, prompts in work.prompts.items():
    sizes = sorted(len(prompt.tokens) for prompt in prompts)
    print(f'generate, {name}: {len(prompts)} prompts of {sizes[0]} to {sizes[-1]} tokens')

  def score() -> np.ndarray:
    return log_likelihoods(model, params, planned).nats

  def generate() -> list[np.ndarray]:
    found = (generate_texts(engine, params, prompts) for prompts in work.prompts.values())
    return [generation.tokens for each in found for generation in each]

  def generate_theirs(rows: int, step: int = 1) -> list[np.ndarray]:
    found = (peer_generate(theirs, tokenizer, each[::step], rows) for each in work.prompts.values())
    return [tokens for each in found for tokens in each]

  _, seconds = timed(lambda: (score(), generate()))
  print(
    f'first candidate: {seconds:.1f} s, of which compiling {compiled.count} programs '
    f'{compiled.seconds:.1f} s',
    flush=True,
  )
  # A part of the requests and prompts, of all lengths.
  some = work.requests[:: max(len(work.requests) // 64, 1)]
  score_rows = quickest('score', lambda rows: peer_score(theirs, some, rows), SCORE_ROWS)
  most = max(map(len, work.prompts.values()))
  fitting = tuple(sorted({min(rows, most) for rows in GENERATE_ROWS}))
  step = max(1, most // max(GENERATE_ROWS))
  generate_rows = quickest('generate', lambda rows: generate_theirs(rows, step), fitting)

  prompts = [prompt for each in work.prompts.values() for prompt in each]
  runs = {
    'score': score,
    'peer_score': lambda: peer_score(theirs, work.requests, score_rows),
    'generate': generate,
    'peer_generate': lambda: generate_theirs(generate_rows),
  }
  rates, recompiled = {name: [] for name in runs}, []
  for number in range(rounds):
    params = jax.block_until_ready(jax.tree.map(lambda a: a * FACTOR, params))
    with torch.no_grad():
      for parameter in theirs.parameters():
        parameter *= FACTOR
    before, found = compiled.count, {}
    for name, run in runs.items():
      found[name], seconds = timed(run)
      count = work.tokens
      if 'generate' in name:
        pairs = zip(prompts, found[name], strict=True)
        found[name], counts = zip(*(answer(tokenizer, *pair) for pair in pairs), strict=True)
        count = sum(counts)
      rates[name].append(count / seconds)
    recompiled.append(compiled.count - before)
    nats, peer_nats = found['score'], found['peer_score']
    texts = zip(found['generate'], found['peer_generate'], strict=True)
    print(
      f'round {number + 1}: '
      + ', '.join(f'{name} {each[-1]:.1f}' for name, each in rates.items())
      + f' tokens/s; the same: {same_choices(work, nats, peer_nats)}/{len(work.choices)} choices '
      f'(max abs {np.abs(nats - peer_nats).max():.1e} nats), '
      f'{sum(a == b for a, b in texts)}/{len(prompts)} answers; {recompiled[-1]} programs compiled',
      flush=True,
    )
  median = {name: statistics.median(each) for name, each in rates.items()}
  return {
    'score_tokens_per_s': median['score'],
    'peer_score_tokens_per_s': median['peer_score'],
    'score_ratio': median['score'] / median['peer_score'],
    'generate_tokens_per_s': median['generate'],
    'peer_generate_tokens_per_s': median['peer_generate'],
    'generate_ratio': median['generate'] / median['peer_generate'],
    'recompiles_per_candidate': max(recompiled),
  }


def main(arguments: list[str]) -> int:
  """Prints the table and the JSON object; returns the exit status."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.evaluate')
  parser.add_argument('--model', choices=('270m', 'tiny'), default='270m')
  parser.add_argument('--texts', type=Path, metavar='DIR')
  parser.add_argument('--examples', type=int, default=64, metavar='N')
  parser.add_argument('--shots', type=int, default=4, metavar='K')
  parser.add_argument('--rounds', type=int, default=2, metavar='R')
  options = parser.parse_args(arguments)
  return print_found(lambda: measure(options))


def measure(options: argparse.Namespace) -> dict[str, float]:
  """Reads texts and model, prints the table, and returns the last line."""
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  count = options.examples + options.shots
  if options.texts:
    questions, tasks = given_texts(options.texts, count)
  elif options.model == 'tiny':
    questions, tasks = made_texts([synthetic(name) for name in LANGUAGES], count)
  else:
    questions, tasks = made_texts([from_recipe(name) for name in DOMAINS], count)
  model, params, theirs, tokenizer = read_model(options.model)
  work = prepare(tokenizer, questions, tasks, options.shots)
  return compare(model, params, theirs, tokenizer, work, options.rounds)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
