"""lm-evaluation-harness over our engine: any of its tasks as an objective or a final test.

Needs lm-eval (the extra `lm_eval`), which is imported only when something here is called. A task
file that names local data (`dataset_path: json`) needs no network; others fetch theirs from the
hub.

The tokens are those that lm-eval's own Hugging Face model makes for Gemma 3, so that its figures
are ours. Every text begins with BOS. A document of a rolling task has one more BOS before it, and
its first one is scored like the rest. What exceeds the context loses its first tokens, BOS
included, and is counted. Control pieces that a text spells out are text here, not so there.
"""

import functools
import hashlib
import itertools
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import jax
import numpy as np

from optimer_jax.data.tokenizer import NAMES, Tokenizer
from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation.engine import Engine, Prepared
from optimer_jax.evaluation.generation import Prompt, Sampling, generate_texts
from optimer_jax.evaluation.scores import WHOLE, Part, Score, places
from optimer_jax.evaluation.scoring import Continuation, log_likelihoods, plan

SPLITS = ('dev', 'test')
# Metrics whose per-example value is (log likelihood, size): one loss in three units.
ROLLING = ('word_perplexity', 'byte_perplexity', 'bits_per_byte')
# lm-eval's own defaults.
SEED = 1234
MAX_NEW = 256


@dataclass(frozen=True)
class HarnessTask:
  """An lm-eval task, or a group of them, whose documents are divided into dev and test.

  A document belongs to the half that a hash of its content says, so that the halves share none.
  Documents of the other half are never shown as worked examples. Undivided, all documents are
  test, and the score is the one that lm-eval's own command line prints.

  Attributes:
    name: what the score is called.
    task: lm-eval's name of the task or group.
    metric: 'acc', 'acc_norm', 'exact_match', 'bits_per_byte', …; where a task has several filters,
      'exact_match,flexible-extract'. None is the task's first. A mean over examples is an
      'accuracy'; every metric of a rolling task gives 'bits/byte'.
    include: a directory of task files, searched before lm-eval's own.
    limit: at most so many documents of each task, the first ones of the half.
    shots: worked examples in front of each prompt; None is what the task says.
    divide: whether some of the documents are dev.
  """

  name: str
  task: str
  metric: str | None = None
  include: str | None = None
  limit: int | None = None
  shots: int | None = None
  divide: bool = True

  def prepare(self, engine: Engine, split: str) -> Prepared:
    """Reads the documents and writes the prompts once, for any number of candidates.

    Raises:
      UsageError: an unknown task, metric or split.
      UserError: lm-eval is missing, the task's file or data are wrong, or the half is empty.
    """
    if split not in SPLITS:
      raise UsageError(f'there is no split {split!r}: there are dev and test')
    if split == 'dev' and not self.divide:
      raise UsageError(f'{self.name} is not divided and has no dev: set HarnessTask.divide = True')
    manager = _manager([self.task], self.include)
    with _explained(self.task):
      # What lm-eval seeds before it loads tasks: some draw while they read their data.
      random.seed(0)
      np.random.seed(SEED)
      tasks = manager.load([self.task])['tasks'].values()
      tasks = [task for task in tasks if _build(task, split, self)]
    if not tasks:
      raise UserError(f'{self.task} has no document for {split}: give a larger set')
    metric, filter_name = _metric(self.metric, tasks)
    instances = [instance for task in tasks for instance in task.instances]
    documents = [(task, requests) for task in tasks for requests in _by_document(task)]
    model = language_model(engine)

    def score(params: dict, part: Part = WHOLE) -> Score:
      model.params, model.tokens, model.truncated = params, 0, 0
      own = [documents[i] for i in places(len(documents), part)]
      _respond(model, instances, {id(each) for _, requests in own for each in requests})
      pairs = []
      for task, group in itertools.groupby(own, lambda each: each[0]):
        group = [requests for _, requests in group]
        for each in task._filters:
          each.apply([*itertools.chain.from_iterable(group)])
        for requests in group:
          answers = [request.filtered_resps[filter_name] for request in requests]
          found = task.process_results(requests[0].doc, answers)
          pairs.append(_measure(self.name, metric, found, requests[0]))
      values, sizes = np.array(pairs, np.float64).T
      unit = 'bits/byte' if metric in ROLLING else 'accuracy'
      return Score(values, sizes, unit, model.truncated, model.tokens)

    settings = [metric, filter_name, engine.context, engine.tokenizer.digest]
    return Prepared(self.name, _digest(tasks, settings), len(documents), score)


def language_model(engine: Engine, params: dict | None = None):
  """lm-eval's `LM` over `engine`, for `lm_eval.simple_evaluate(model=…)`.

  What is returned has the attributes `params`, the candidate, which may be set between calls
  (requests seen before are not tokenised or planned again, and nothing compiles again), and the
  counts of `tokens` processed and requests `truncated` so far.

  Raises:
    UserError: lm-eval is missing.
  """
  return _language_model_class()(engine, params)


@functools.cache
def _language_model_class() -> type:
  _lm_eval()
  from lm_eval.api.model import LM

  class LanguageModel(LM):
    """Responds to all requests, or in their order to those at the places `chosen`."""

    def __init__(self, engine: Engine, params: dict | None):
      super().__init__()
      self.engine, self.params = engine, params
      self.tokens = self.truncated = 0
      self._made = {}

    def loglikelihood(self, requests: list, chosen=None, **_) -> list[tuple[float, bool]]:
      found, _ = self._score(_continuations, requests, chosen)
      return list(zip((-found.nats).tolist(), found.greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list, chosen=None, **_) -> list[float]:
      found, counts = self._score(_windows, requests, chosen)
      starts = np.cumsum([0, *counts[:-1]])
      return (-np.add.reduceat(found.nats, starts)).tolist()

    def generate_until(self, requests: list, chosen=None, **_) -> list[str]:
      chosen, texts = range(len(requests)) if chosen is None else chosen, {}
      wanted = {*chosen}
      # All are given, as a draw depends on a prompt's place among all.
      for sampling, (numbers, prompts, truncated) in self._once(_prompts, requests).items():
        own = [i for i, number in enumerate(numbers) if number in wanted]
        found = generate_texts(self.engine, self.params, prompts, sampling, own)
        for i, generation in zip(own, found, strict=True):
          self.truncated += truncated[i]
          self.tokens += len(prompts[i].tokens) + len(generation.tokens)
          texts[numbers[i]] = generation.text
      return [texts[i] for i in chosen]

    def _score(self, split: Callable, requests: list, chosen: Sequence[int] | None):
      requests = requests if chosen is None else [requests[i] for i in chosen]
      planned, counts, truncated = self._once(split, requests)
      self.tokens += planned.tokens
      self.truncated += truncated
      return log_likelihoods(self.engine.model, self.params, planned, self.engine.mesh), counts

    def _once(self, make: Callable, requests: list):
      arguments = [request.args for request in requests]
      key = make, hashlib.sha256(json.dumps(arguments).encode()).digest()
      if key not in self._made:
        self._made[key] = make(self.engine, arguments)
      return self._made[key]

  return LanguageModel


# Requests to tokens.


def _continuations(engine: Engine, pairs: list[tuple[str, str]]):
  """The plan of contexts and what follows them, None, and how many contexts were cut.

  The target is what the tokens of the joined text have more than those of the context alone. The
  model sees at most engine.context tokens.
  """
  tokenizer, most = engine.tokenizer, engine.context
  # Spaces at a context's end go to the continuation: words begin with them.
  heads = [head.rstrip() for head, _ in pairs]
  unique = [*dict.fromkeys(heads)]
  encoded = dict(zip(unique, _encode(tokenizer, unique), strict=True))
  wholes = _encode(tokenizer, [head + tail for head, tail in pairs])
  out, truncated = [], 0
  for (head, tail), stripped, whole in zip(pairs, heads, wholes, strict=True):
    context = encoded[stripped]
    target = whole[len(context) :]
    if not 0 < len(target) <= most:
      raise UserError(
        f'{tail[:40]!r} after {head[-40:]!r} has {len(target)} tokens of its own: it needs at '
        f'least one, and at most the context of {most}'
      )
    kept = context[max(0, len(context) + len(target) - most - 1) :]
    truncated += len(kept) < len(context)
    out.append(Continuation(kept, target))
  return _plan(engine, out), None, truncated


def _windows(engine: Engine, texts: list[tuple[str]]):
  """The plan of windows that predict each token of each text once, how many each has, and 0."""
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

  out, counts = [], []
  for tokens in _encode(engine.tokenizer, [text for (text,) in texts]):
    windows = get_rolling_token_windows(
      tokens.tolist(), engine.tokenizer.bos, engine.context, context_len=1
    )
    windows = [Continuation(*map(_int32, make_disjoint_window(each))) for each in windows]
    out += windows
    counts.append(len(windows))
  return _plan(engine, out), counts, 0


def _prompts(engine: Engine, requests: list[tuple[str, dict]]):
  """For each way to sample: the numbers of its requests, their prompts, which were cut."""
  groups = defaultdict(lambda: ([], [], []))
  texts = _encode(engine.tokenizer, [text for text, _ in requests])
  for number, (tokens, (_, settings)) in enumerate(zip(texts, requests, strict=True)):
    sampling, most, stops = _generation(settings)
    if most >= engine.context:
      raise UserError(
        f'{most} tokens to generate leave no room for a prompt in a context of {engine.context}: '
        'lower max_gen_toks in the task, or raise EvalConfig.context'
      )
    kept = tokens[max(0, len(tokens) + most - engine.context) :]
    numbers, prompts, truncated = groups[sampling]
    numbers.append(number)
    prompts.append(Prompt(kept, most, stops))
    truncated.append(len(kept) < len(tokens))
  return groups


def _generation(settings: dict) -> tuple[Sampling, int, tuple[str, ...]]:
  """How to sample, how many tokens, and where to stop, of lm-eval's generation_kwargs."""
  from lm_eval.models.utils import normalize_gen_kwargs

  known = normalize_gen_kwargs(settings, MAX_NEW)
  stops = [stop for stop in known.pop('until') if stop]
  most, samples = known.pop('max_gen_toks'), known.pop('do_sample')
  temperature = float(known.pop('temperature', 0.0))
  top_k, top_p = int(known.pop('top_k', 0)), float(known.pop('top_p', 1.0))
  if samples and not temperature:
    raise UserError('a task samples at temperature 0: set its temperature, or do_sample to false')
  if known.pop('num_beams', 1) != 1 or known:
    unknown = ', '.join(known) or 'num_beams'
    raise UserError(f'a task generates with {unknown}, which is not known here: leave it out')
  # As there, an end piece that is spelt out ends a text too.
  stops = (*stops, NAMES[1])
  return Sampling(temperature, top_k, top_p) if samples else Sampling(), most, stops


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
  return [_int32(np.append(tokenizer.bos, ids)) for ids in tokenizer.encode(texts)]


def _int32(tokens) -> np.ndarray:
  return np.asarray(tokens, np.int32)


def _plan(engine: Engine, requests: list[Continuation]):
  # A request's last token is predicted but not seen.
  return plan(requests, engine.context + 1, engine.batch_tokens, engine.shards)


# Tasks.


def _build(task, split: str, asked: HarnessTask) -> bool:
  """Writes the requests for one split of a task's documents; False if that has none."""
  shots, halves = asked.shots, defaultdict(dict)
  for number, doc in enumerate(task.eval_docs):
    halves[_half(doc) if asked.divide else 'test'][number] = _content(doc)
  own, (other,) = halves[split], {*SPLITS} - {split}
  numbers, others = [*own][: asked.limit], {*halves[other].values()}
  fixed = task.get_config('num_fewshot')
  if fixed == 0 and shots:
    raise UsageError(f'{task.task_name} fixes 0 shots: leave `shots` out')
  task.set_config('num_fewshot', fixed or 0 if shots is None else shots)
  task.set_fewshot_seed(SEED)
  if task.get_config('num_fewshot'):
    task.sampler.df = [d for d in task.sampler.fewshot_docs() if _content(d) not in others]
  if not numbers:
    return False
  task.build_all_requests(samples=numbers)
  # A task may shuffle its documents whenever they are read.
  if any(_content(instance.doc) in others for instance in task.instances):
    raise UserError(f'{task.task_name} reads other documents each time: fix its seed')
  return True


def _half(doc: dict) -> str:
  return SPLITS[hashlib.sha256(_content(doc).encode()).digest()[0] % 2]


def _metric(asked: str | None, tasks: list) -> tuple[str, str]:
  """The metric and the filter, which all of the tasks must have."""
  from lm_eval.api.metrics import mean

  metric, _, filter_name = (asked or next(iter(tasks[0].aggregation()))).partition(',')
  filter_name = filter_name or tasks[0]._filters[0].name
  for task in tasks:
    known, filters = task.aggregation(), [each.name for each in task._filters]
    if metric not in known or filter_name not in filters:
      raise UsageError(
        f'{task.task_name} has no metric "{metric},{filter_name}": it has {", ".join(known)} after '
        f'the filters {", ".join(filters)}'
      )
    rolling = metric in ROLLING and task.OUTPUT_TYPE == 'loglikelihood_rolling'
    if not rolling and not (known[metric] is mean and task.higher_is_better().get(metric)):
      raise UsageError(
        f'{metric} of {task.task_name} is no mean over examples of which more is better: name '
        f'another metric ({", ".join(known)})'
      )
  return metric, filter_name


def _respond(model, instances: list, wanted: set[int]) -> None:
  """Gives each request whose id is `wanted` its responses, in place of the last candidate's."""
  kinds = defaultdict(list)
  for each in instances:
    each.resps, each.filtered_resps = [], {}
    kinds[each.request_type] += [each] * each.repeats
  for kind, requests in kinds.items():
    if chosen := [i for i, request in enumerate(requests) if id(request) in wanted]:
      for i, response in zip(chosen, getattr(model, kind)(requests, chosen=chosen), strict=True):
        requests[i].resps.append(response)


def _by_document(task) -> list[list]:
  documents = defaultdict(list)
  for each in task.instances:
    documents[each.doc_id].append(each)
  return [sorted(requests, key=lambda each: each.idx) for requests in documents.values()]


def _measure(name: str, metric: str, found: dict, request) -> tuple[float, float]:
  """(bits, bytes), or (how right, 1), of one example."""
  value = found[metric]
  if metric in ROLLING:
    nats, size = next((found[m] for m in ROLLING[1:] if m in found), (value[0], None))
    return -nats / math.log(2), size or len(request.args[0].encode())
  if not 0 <= value <= 1:
    raise UserError(f'{name}: {metric} of an example is {value}, not between 0 and 1')
  return float(value), 1.0


def _digest(tasks: list, settings: list) -> str:
  """sha256 over requests, documents (they hold the answers) and how responses are judged."""
  digest = hashlib.sha256(json.dumps(settings).encode())
  for task in tasks:
    config = task.dump_config()
    # Not where the data lie, nor what the requests already say.
    judged = ('output_type', 'metric_list', 'filter_list', 'process_results', 'doc_to_target')
    digest.update(_content({key: config.get(key) for key in judged}).encode())
    for each in task.instances:
      digest.update(_content([each.doc_id, each.repeats, each.args, each.doc]).encode())
  return digest.hexdigest()[:32]


def _content(value: object) -> str:
  return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


# lm-eval.


def _manager(names: Sequence[str], include: str | None):
  """A `TaskManager` that knows all of `names`; lm-eval's own tasks are read only if needed."""
  _lm_eval()
  from lm_eval.tasks import TaskManager
  from lm_eval.tasks._yaml_loader import load_yaml

  if include is not None:
    if not Path(include).is_dir():
      raise UserError(f'{include} is missing: give the directory of the task files')
    for path in sorted(Path(include).rglob('*.yaml')):
      try:
        load_yaml(path, resolve_func=False)
      except Exception as error:  # the parser's or a file's that it includes; lm-eval is silent
        raise UserError(f'{path} is not a task file ({_reason(error)}): mend it') from None
    manager = TaskManager(include_path=include, include_defaults=False)
    if all(name in manager.task_index for name in names):
      return manager
  manager = _all_tasks(include)
  for name in names:
    if name not in manager.task_index:
      close = get_close_matches(name, manager.all_tasks, 1)
      hint = f': did you mean {close[0]}?' if close else ': give the directory of its file'
      raise UsageError(f'lm-eval knows no task {name!r}{hint}')
  return manager


@functools.cache
def _all_tasks(include: str | None):
  """Reading lm-eval's 14,000 task files takes seconds."""
  from lm_eval.tasks import TaskManager

  return TaskManager(include_path=include)


@contextmanager
def _explained(what: str):
  """One sentence for whatever lm-eval, and the libraries that read its data, raise."""
  try:
    yield
  except (UserError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    reason = _reason(error)
    raise UserError(f'lm-eval failed on {what} ({reason}): check its task file and data') from error


def _reason(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return f'{type(error).__name__}: {lines[0]}' if lines else type(error).__name__


def _lm_eval():
  try:
    import lm_eval
  except ImportError:
    raise UserError(
      'lm-eval is not installed: pip install "optimer_jax[lm_eval]" for its tasks'
    ) from None
  return lm_eval
