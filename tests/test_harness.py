"""Our model inside lm-evaluation-harness, beside lm-eval's own model of transformers (torch)."""

import dataclasses
import json
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

# Before lm-eval is imported: nothing here needs a network.
os.environ.setdefault('HF_DATASETS_OFFLINE', '1')

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from benchmarks.parity import torch_model
from optimer_jax.checkpoints.base import open_source, read_leaves
from optimer_jax.data.tokenizer import BYTES, Tokenizer, write_tiny_tokenizer
from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation import harness
from optimer_jax.evaluation.engine import Engine
from optimer_jax.evaluation.harness import HarnessTask, language_model
from optimer_jax.evaluation.scores import joined, seen
from optimer_jax.files import read_jsonl
from optimer_jax.gemma3 import Gemma3Config, Model, from_leaves

CONTEXT = 48  # shorter than some of the texts
# Every token sees all before it: one too few or too many in front changes what is compared.
CONFIG = Gemma3Config(2, 32, 64, 4, 2, 16, window=64, query_scalar=16.0, vocab_size=317)
COUNT = 16  # multiple-choice questions
WORDS = 'red green blue one two three 赤い 青い 空 海 山  the a of'.split(' ')


def sentence(rng: np.random.Generator, words: int) -> str:
  return ' '.join(rng.choice(WORDS, words))


@pytest.fixture(scope='module')
def torch_directory(tmp_path_factory):
  """A random model in transformers' files, whose end piece is not rare."""
  import torch

  directory = tmp_path_factory.mktemp('model')
  rng = np.random.default_rng(0)
  write_tiny_tokenizer(directory, [sentence(rng, 50) for _ in range(20)], CONFIG.vocab_size)
  model = torch_model(CONFIG)
  tokenizer = Tokenizer.load(directory)
  with torch.no_grad():
    embedding = model.get_input_embeddings().weight
    embedding *= 0.1  # else a tied model says the same token over and over
    embedding[[tokenizer.pieces.token_to_id(piece) for piece in BYTES]] *= 0.2
    embedding[tokenizer.eos] *= 1.2
  model.save_pretrained(directory)
  return directory


@pytest.fixture(scope='module')
def engine(torch_directory) -> Engine:
  tokenizer = Tokenizer.load(torch_directory)
  return Engine(Model(CONFIG), tokenizer, CONTEXT, batch_tokens=256, generate_rows=4)


@pytest.fixture(scope='module')
def params(torch_directory, engine) -> dict:
  _, leaves = read_leaves(open_source(str(torch_directory), torch_directory), None)
  return jax.tree.map(jnp.asarray, from_leaves(engine.model, leaves))


@pytest.fixture(scope='module')
def theirs(torch_directory):
  """lm-eval's own model."""
  import torch
  from lm_eval.models.huggingface import HFLM
  from transformers import Gemma3ForCausalLM

  model = Gemma3ForCausalLM.from_pretrained(
    torch_directory, dtype=torch.float32, attn_implementation='eager'
  )
  return HFLM(model, tokenizer=str(torch_directory), max_length=CONTEXT, batch_size=1)


def write_task(directory, name: str, rows: list[dict], **settings) -> None:
  lines = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  (directory / f'{name}.jsonl').write_text(lines, encoding='utf-8')
  data = {'dataset_path': 'json', 'dataset_kwargs': {}, 'test_split': 'test'}
  data['dataset_kwargs']['data_files'] = {'test': str(directory / f'{name}.jsonl')}
  text = yaml.safe_dump({'task': name, **data, **settings}, sort_keys=False)
  (directory / f'{name}.yaml').write_text(text, encoding='utf-8')


def metric(name: str, better: bool = True, **settings) -> dict:
  known = {'aggregation': name if name in harness.ROLLING[2:] else 'mean'}
  return {'metric': name, **known, 'higher_is_better': better, **settings}


@pytest.fixture(scope='module')
def tasks(tmp_path_factory) -> str:
  """Task files and their data: choices, a rolling text, greedy generations."""
  directory, rng = tmp_path_factory.mktemp('tasks'), np.random.default_rng(1)
  questions = []
  for number in range(COUNT):
    # Some do not fit into the context, some end with spaces.
    question = f'q{number} ' + sentence(rng, 60 if number % 8 == 7 else 4) + '  ' * (number % 5)
    choices = [sentence(rng, n) or 'x' for n in (1, 2, 3)]
    questions.append({'question': question, 'choices': choices, 'label': int(rng.integers(3))})
  write_task(
    directory,
    'choice',
    questions,
    output_type='multiple_choice',
    doc_to_text='{{question}}',
    doc_to_choice='{{choices}}',
    doc_to_target='label',
    metric_list=[metric('acc'), metric('acc_norm')],
  )
  texts = [{'text': sentence(rng, n)} for n in (1, 3, 9, 30, 60, 200, 5, 7, 8, 11)]
  write_task(
    directory,
    'rolling',
    texts,
    output_type='loglikelihood_rolling',
    doc_to_text='',
    doc_to_target='{{text}}',
    metric_list=[metric('bits_per_byte', better=False)],
  )
  asked = [{'text': sentence(rng, n), 'answer': 'b'} for n in (1, 2, 3, 4, 5, 6, 7, 8, 80, 90)]
  write_task(
    directory,
    'generation',
    asked,
    output_type='generate_until',
    doc_to_text='{{text}}',
    doc_to_target='{{answer}}',
    generation_kwargs={'until': ['\n\n', '</s>', 'gr'], 'max_gen_toks': 12, 'do_sample': False},
    filter_list=[
      {'name': 'whole', 'filter': [{'function': 'take_first'}]},
      {
        'name': 'letter',
        'filter': [{'function': 'regex', 'regex_pattern': '([a-z])'}, {'function': 'take_first'}],
      },
    ],
    metric_list=[metric('exact_match')],
  )
  return str(directory)


def run(model, name: str, include: str, every: bool = False) -> tuple[dict, list]:
  """lm-eval's own results of a task, and the response (or `every` one) to each request."""
  import lm_eval
  from lm_eval.tasks import TaskManager

  found = lm_eval.simple_evaluate(
    model=model,
    tasks=[name],
    task_manager=TaskManager(include_path=include, include_defaults=False),
    bootstrap_iters=0,
    log_samples=True,
  )
  samples = sorted(found['samples'][name], key=lambda sample: sample['doc_id'])
  samples = [sample for sample in samples if sample['filter'] == samples[0]['filter']]
  responses = [[r if every else r[0] for r in sample['resps']] for sample in samples]
  return found['results'][name], responses


# Against lm-eval's own model.


def test_choices_match(engine, params, theirs, tasks):
  ours, found = run(language_model(engine, params), 'choice', tasks)
  reference, expected = run(theirs, 'choice', tasks)
  nats, greedy = np.array(found)[..., 0], np.array(found)[..., 1]
  np.testing.assert_allclose(nats, np.array(expected)[..., 0], rtol=0, atol=1e-4)
  np.testing.assert_array_equal(greedy, np.array(expected)[..., 1])
  assert [ours[key] for key in ('acc,none', 'acc_norm,none')] == [
    reference[key] for key in ('acc,none', 'acc_norm,none')
  ]
  assert 0 < ours['acc,none'] < 1


def test_rolling_matches(engine, params, theirs, tasks):
  ours, found = run(language_model(engine, params), 'rolling', tasks)
  reference, expected = run(theirs, 'rolling', tasks)
  np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-4)
  assert ours['bits_per_byte,none'] == pytest.approx(reference['bits_per_byte,none'], rel=1e-6)


def test_generations_match(engine, params, theirs, tasks):
  ours, found = run(language_model(engine, params), 'generation', tasks)
  reference, expected = run(theirs, 'generation', tasks)
  assert found == expected
  # Whole texts, cut ones and ones that ended by themselves.
  assert len({len(text) for (text, *_) in found}) > 4
  for key in ('exact_match,whole', 'exact_match,letter'):
    assert ours[key] == reference[key]
  assert 0 < ours['exact_match,letter'] < 1


# Results.


@pytest.mark.parametrize(
  ('task', 'metric', 'key'),
  [
    ('choice', None, 'acc,none'),
    ('choice', 'acc_norm', 'acc_norm,none'),
    ('generation', 'exact_match,letter', 'exact_match,letter'),
    ('rolling', 'bits_per_byte', 'bits_per_byte,none'),
  ],
)
def test_halves_are_the_whole(engine, params, tasks, task, metric, key):
  halves = [HarnessTask('x', task, metric, tasks).prepare(engine, s) for s in ('dev', 'test')]
  undivided = HarnessTask('x', task, metric, tasks, divide=False)
  whole = undivided.prepare(engine, 'test')
  assert len({whole.digest, *(half.digest for half in halves)}) == 3
  assert min(half.count for half in halves) > 0
  assert sum(half.count for half in halves) == whole.count
  scores = [half.score(params) for half in halves]
  expected = whole.score(params)
  assert expected.unit == ('bits/byte' if task == 'rolling' else 'accuracy')
  assert {score.unit for score in scores} == {expected.unit}
  pairs = [pair for s in scores for pair in zip(s.sizes, s.values, strict=True)]
  found = [*zip(expected.sizes, expected.values, strict=True)]
  assert len(pairs) == whole.count
  np.testing.assert_allclose(sorted(pairs), sorted(found), rtol=1e-5)
  # What lm-eval itself makes of the same responses.
  theirs, _ = run(language_model(engine, params), task, tasks)
  assert expected.value == pytest.approx(theirs[key], rel=1e-6)
  with pytest.raises(UsageError, match='x is not divided and has no dev'):
    undivided.prepare(engine, 'dev')


def test_cut_prompts_are_counted(engine, params, tasks):
  for task, cut in (('choice', 2 * 3), ('generation', 2), ('rolling', 0)):
    halves = [HarnessTask('x', task, include=tasks).prepare(engine, s) for s in ('dev', 'test')]
    assert sum(half.score(params).truncated for half in halves) == cut, task


def test_a_second_candidate_compiles_nothing(engine, params, tasks, compiled):
  other = jax.tree.map(lambda leaf: leaf * 1.01, params)
  prepared = [
    HarnessTask('x', task, metric, tasks).prepare(engine, 'dev')
    for task, metric in (('choice', 'acc'), ('rolling', None), ('generation', None))
  ]
  parts = [(0, 1), (0, 2), (1, 2)]
  first = [each.score(params, part) for each in prepared for part in parts]
  compiled.clear()
  second = [each.score(other, part) for each in prepared for part in parts]
  assert not compiled
  assert not np.allclose(first[3].values, second[3].values)
  again = [each.score(params, part) for each in prepared for part in parts]
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a.values, b.values)
    assert (a.tokens, a.truncated) == (b.tokens, b.truncated)


def test_digest_is_of_what_the_score_depends_on(engine, tasks, tmp_path):
  base = HarnessTask('x', 'choice', include=tasks)
  digest = lambda task, split='dev', e=engine: task.prepare(e, split).digest
  seen = [
    digest(base),
    digest(base, 'test'),
    digest(dataclasses.replace(base, metric='acc_norm')),
    digest(dataclasses.replace(base, shots=1)),
    digest(dataclasses.replace(base, limit=2)),
    digest(base, e=dataclasses.replace(engine, context=40)),
  ]
  assert digest(base) == seen[0]
  rows = read_jsonl(f'{tasks}/choice.jsonl')
  settings = yaml.safe_load(Path(tasks, 'choice.yaml').read_text(encoding='utf-8'))
  settings = {k: v for k, v in settings.items() if k not in ('task', 'dataset_kwargs')}
  write_task(tmp_path, 'choice', rows, **settings)
  moved = dataclasses.replace(base, include=str(tmp_path))
  assert digest(moved) == seen[0]
  # Another answer to a question that stays in its half.
  place, other = next(
    (i, {**row, 'label': label})
    for i, row in enumerate(rows)
    for label in {0, 1, 2} - {row['label']}
    if harness._half(row) == harness._half({**row, 'label': label}) == 'dev'
  )
  write_task(tmp_path, 'choice', [*rows[:place], other, *rows[place + 1 :]], **settings)
  seen.append(digest(moved))
  assert len(set(seen)) == len(seen)


def test_shots_are_never_of_the_other_half(tasks):
  names = {}
  for split in ('dev', 'test'):
    (task,) = harness._manager(['choice'], tasks).load(['choice'])['tasks'].values()
    assert harness._build(task, split, HarnessTask('x', 'choice', shots=2))
    own = {instance.doc['question'].split()[0] for instance in task.instances}
    prompts = {instance.args[0] for instance in task.instances}
    shown = {name for prompt in prompts for name in re.findall(r'q\d+', prompt)}
    # Each is asked once, and shown before others.
    assert own == shown and all(len(re.findall(r'q\d+', prompt)) == 3 for prompt in prompts)
    names[split] = own
  assert not names['dev'] & names['test'] and len(names['dev'] | names['test']) == COUNT


def test_groups_pool_their_tasks(engine, params, tasks, tmp_path):
  for name in ('choice', 'generation'):
    shutil.copy(f'{tasks}/{name}.yaml', tmp_path)
  both = {'group': 'both', 'task': ['choice', 'choice2']}
  (tmp_path / 'both.yaml').write_text(yaml.safe_dump(both))
  second = yaml.safe_load((tmp_path / 'choice.yaml').read_text()) | {'task': 'choice2'}
  (tmp_path / 'choice2.yaml').write_text(yaml.safe_dump(second))
  single = HarnessTask('x', 'choice', 'acc', tasks).prepare(engine, 'dev').score(params)
  pooled = HarnessTask('x', 'both', 'acc', str(tmp_path)).prepare(engine, 'dev').score(params)
  np.testing.assert_array_equal(pooled.values, np.tile(single.values, 2))
  # Metrics that a task lacks are named before anything is computed.
  wrong = {'group': 'wrong', 'task': ['choice', 'generation']}
  (tmp_path / 'wrong.yaml').write_text(yaml.safe_dump(wrong))
  with pytest.raises(UsageError, match='generation has no metric "acc,none"'):
    HarnessTask('x', 'wrong', 'acc', str(tmp_path)).prepare(engine, 'dev')


@pytest.mark.parametrize('task', ['choice', 'rolling', 'mixed'])
def test_parts_are_the_whole(engine, params, tasks, tmp_path, monkeypatch, task):
  if task == 'mixed':  # answers that are drawn, and others
    shutil.copy(f'{tasks}/generation.yaml', tmp_path)
    drawn = yaml.safe_load((tmp_path / 'generation.yaml').read_text())
    drawn |= {'task': 'drawn', 'repeats': 2}
    drawn['generation_kwargs'] |= {'do_sample': True, 'temperature': 1.5}
    (tmp_path / 'drawn.yaml').write_text(yaml.safe_dump(drawn))
    both = {'group': 'mixed', 'task': ['generation', 'drawn']}
    (tmp_path / 'mixed.yaml').write_text(yaml.safe_dump(both))
    tasks = str(tmp_path)
    # About half of the responses are right, whatever they are.
    found = lambda request: repr([request.resps, request.filtered_resps]).encode()
    odd = lambda _, __, ___, request: (zlib.crc32(found(request)) % 2, 1)
    monkeypatch.setattr(harness, '_measure', odd)
  prepared = HarnessTask('x', task, include=tasks, divide=False).prepare(engine, 'test')
  whole, n = prepared.score(params), 3
  # As the search would: a part of one candidate after one of another.
  other = jax.tree.map(lambda leaf: leaf * 1.5, params)
  parts = []
  for i in range(n):
    prepared.score(other, (i, n))
    parts.append(prepared.score(params, (i, n)))
  found = joined(parts, n, prepared.count)
  assert len({*whole.values}) > 1
  np.testing.assert_allclose(found.values, whole.values, rtol=1e-6)
  np.testing.assert_array_equal(found.sizes, whole.sizes)
  assert (found.unit, found.truncated) == (whole.unit, whole.truncated)
  some = joined(parts[:2], n, prepared.count)
  np.testing.assert_array_equal(some.sizes, whole.sizes[seen(prepared.count, 2, n)])
  with pytest.raises(ValueError, match='there is no part'):
    prepared.score(params, (0, prepared.count + 1))


def test_sampled_generations(engine, params, tmp_path):
  rows = [{'text': f'{number} red green blue one two three red green'} for number in range(6)]
  sampled = {'until': [], 'do_sample': True, 'temperature': 1.5, 'max_new_tokens': 6, 'top_k': 50}
  settings = {'output_type': 'generate_until', 'doc_to_text': '{{text}}', 'doc_to_target': 'text'}
  settings |= {'generation_kwargs': sampled, 'repeats': 3, 'metric_list': [metric('exact_match')]}
  write_task(tmp_path, 'sampled', rows, **settings)
  model = language_model(engine, params)
  _, found = run(model, 'sampled', str(tmp_path), every=True)
  assert [len(each) for (each,) in found] == [3] * 6
  assert all(len(set(each)) > 1 for (each,) in found)
  assert found == run(model, 'sampled', str(tmp_path), every=True)[1]
  # A task that is scored draws as often.
  task = HarnessTask('x', 'sampled', include=str(tmp_path))
  tokens = [task.prepare(engine, split).score(params).tokens for split in ('dev', 'test')]
  prompts = sum(len(ids) + 1 for ids in engine.tokenizer.encode(row['text'] for row in rows))
  assert 3 * prompts < sum(tokens) <= 3 * (prompts + 6 * 6) < model.tokens


# Errors.


def test_lm_eval_is_asked_for_only_when_needed(monkeypatch, engine):
  for name in [name for name in sys.modules if name.partition('.')[0] == 'lm_eval']:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  harness._language_model_class.cache_clear()
  for call in (
    lambda: language_model(engine),
    lambda: HarnessTask('x', 'choice').prepare(engine, 'dev'),
  ):
    with pytest.raises(UserError, match=r'pip install "optimer_jax\[lm_eval\]"'):
      call()


@pytest.mark.parametrize(
  ('change', 'kind', 'named'),
  [
    ({'task': 'choise'}, UsageError, "no task 'choise': did you mean choice?"),
    ({'metric': 'f2'}, UsageError, 'no metric "f2,none": it has acc, acc_norm'),
    ({'metric': 'acc,strict'}, UsageError, 'no metric "acc,strict"'),
    ({'include': 'nowhere'}, UserError, 'nowhere is missing'),
    ({'task': 'gone'}, UserError, r'failed on gone \(FileNotFoundError: .*gone.jsonl'),
    ({'task': 'nats', 'shots': 9}, UserError, 'failed on nats'),
    ({'task': 'nats', 'metric': 'perplexity'}, UsageError, 'perplexity of nats is no mean over'),
    ({'task': 'nats', 'metric': 'acc'}, UserError, "'' after 'the 0' has 0 tokens of its own"),
    ({'task': 'fixed', 'shots': 3}, UsageError, 'fixed fixes 0 shots'),
    ({'task': 'beams'}, UserError, 'num_beams, which is not known'),
    ({'task': 'frozen'}, UserError, 'samples at temperature 0'),
    ({'task': 'long'}, UserError, '48 tokens to generate leave no room'),
  ],
)
def test_errors(engine, params, tasks, tmp_path, change, kind, named):
  # More than one in each half.
  rows = [{'text': f'the {number}', 'answer': ''} for number in range(6)]
  shared = {'doc_to_text': '{{text}}', 'doc_to_target': '{{answer}}', 'target_delimiter': ''}
  nats = shared | {'output_type': 'loglikelihood', 'metric_list': [metric('acc')]}
  perplexity = metric('perplexity', better=False) | {'aggregation': 'perplexity'}
  writes = shared | {'output_type': 'generate_until', 'metric_list': [metric('exact_match')]}
  for name, settings in {
    'nats': nats | {'metric_list': [metric('acc'), perplexity]},
    'gone': nats,
    'fixed': nats | {'num_fewshot': 0},
    'beams': writes | {'generation_kwargs': {'until': [], 'num_beams': 2}},
    'frozen': writes | {'generation_kwargs': {'until': [], 'do_sample': True}},
    'long': writes | {'generation_kwargs': {'until': [], 'max_gen_toks': 48}},
  }.items():
    write_task(tmp_path, name, rows, **settings)
  (tmp_path / 'gone.jsonl').unlink()
  shutil.copy(f'{tasks}/choice.yaml', tmp_path)
  task = dataclasses.replace(HarnessTask('x', 'choice', include=str(tmp_path)), **change)
  with pytest.raises(UserError, match=named) as error:
    task.prepare(engine, 'dev').score(params)
  assert type(error.value) is kind and '\n' not in str(error.value)


def test_a_half_without_documents(engine, tasks, tmp_path):
  shutil.copy(f'{tasks}/rolling.yaml', tmp_path)
  settings = yaml.safe_load((tmp_path / 'rolling.yaml').read_text())
  settings = {k: v for k, v in settings.items() if k not in ('task', 'dataset_kwargs')}
  write_task(tmp_path, 'rolling', [{'text': 'red'}], **settings)
  task = HarnessTask('x', 'rolling', include=str(tmp_path))
  with pytest.raises(UserError, match='rolling has no document for'):
    _ = [task.prepare(engine, split) for split in ('dev', 'test')]
  with pytest.raises(UsageError, match="no split 'train'"):
    task.prepare(engine, 'train')


def test_broken_task_files_are_named(engine, tasks, tmp_path):
  shutil.copy(f'{tasks}/choice.yaml', tmp_path)
  (tmp_path / 'broken.yaml').write_text('task: [unclosed\n')
  with pytest.raises(UserError, match=r'broken\.yaml is not a task file'):
    HarnessTask('x', 'choice', include=str(tmp_path)).prepare(engine, 'dev')
