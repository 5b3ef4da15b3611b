"""The report on tasks of several kinds, on development against test, and on looks at test."""

import json
import math
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from fake_run import DATASETS, QUIZZES, fake_run, rows, shown, words, words_of

from optimer_jax.files import append_jsonl, read_json, read_jsonl, write_json, write_text
from optimer_jax.report.held_out import gains, held_out, held_up, looked, on_dev, truncated
from optimer_jax.report.outcome import change, gain, outcome, score
from optimer_jax.report.page import render
from optimer_jax.report.read import Measured, core, paired, read_run
from optimer_jax.report.sections import build


@pytest.fixture(scope='module')
def mixed(tmp_path_factory) -> Path:
  return fake_run(tmp_path_factory.mktemp('mixed') / 'demo', quizzes=QUIZZES)


@pytest.fixture(scope='module')
def plain(tmp_path_factory) -> Path:
  return fake_run(tmp_path_factory.mktemp('plain') / 'demo')


@pytest.fixture
def copy(plain, tmp_path) -> Path:
  return shutil.copytree(plain, tmp_path / 'demo')


def test_paired_agrees_with_the_evaluation(mixed, tmp_path):
  """Whether comparisons.json has a pair, either way round, or the report pairs the examples."""
  run = shutil.copytree(mixed, tmp_path / 'demo')
  written = read_run(run)
  (run / 'evaluations' / 'comparisons.json').unlink()
  data = read_run(run)
  for name in ('average', 'cpt-ja'):
    found, kept = (paired(each, 'optimer', name) for each in (data, written))
    assert list(kept) == list(found) == ['mean', *DATASETS, *QUIZZES]
    turned = paired(written, name, 'optimer')
    for column, one in kept.items():
      assert found[column][:2] == pytest.approx(one[:2])
      assert turned[column] == (-one.value, one.stderr, one.p)
      assert one.p is not None


def test_kinds_of_scores_in_one_page(mixed):
  """Accuracy in per cent, its changes in points; the best and the mean follow the losses."""
  data = read_run(mixed)
  page = render(data, build(data)[:3])
  tree = ElementTree.fromstring(page)
  assert 'Not there yet' not in page and 'could not be used' not in page
  found = {f.stem: read_json(f) for f in (mixed / 'evaluations').glob('[!c]*.json')}
  base, optimer = (found[name]['scores'] for name in ('base', 'optimer'))
  table = rows(tree, 'Test scores ±')
  columns = ['mean', *sorted((*DATASETS, *QUIZZES))]
  for column, cell in zip(columns, table['OptiMer'], strict=True):
    if column in QUIZZES:
      score_, before = optimer[column], base[column]
      points = 100 * (score_['value'] - before['value'])
      assert cell.startswith(f'{100 * score_["value"]:.1f}% ± {100 * score_["stderr"]:.1f}% | ')
      assert f'| +{points:.1f} ± ' in cell and cell.endswith(' points')
  searched = [*DATASETS, 'gsm8k']  # mmlu is scored on test alone
  losses = [1 - optimer[t]['value'] if t in QUIZZES else optimer[t]['value'] for t in searched]
  assert table['OptiMer'][0].startswith(shown(sum(losses) / 5))
  assert f'a mean loss of {shown(sum(losses) / 5)} (bits per byte; 1 − accuracy) on' in page
  assert 'The mean is over code, gsm8k, ja, math, zh: ' in page
  assert 'Lower bits per byte and higher accuracy are better.' in page
  assert max(e['scores']['gsm8k']['value'] for n, e in found.items() if n != 'exported') > 0.4
  strong = [node.text for node in tree.iter('strong') if '%' in node.text]
  best = [
    max(e['scores'][q]['value'] for n, e in found.items() if n != 'exported') for q in QUIZZES
  ]
  assert {text.split('%')[0] for text in strong} == {f'{100 * value:.1f}' for value in best}
  pairs = rows(tree, 'Paired differences, the first less the second')
  row = next(r for r in read_json(mixed / 'evaluations' / 'comparisons.json') if r['b'] == 'base')
  one = row['per_task']['gsm8k']
  assert pairs['OptiMer − base'][columns.index('gsm8k')] == (
    f'+{-100 * one["difference"]:.1f} | ± {100 * one["stderr"]:.1f} points, p < 0.001'
  )
  assert truncated(data) == (
    'Prompts too long for the context, which lost their middle: on test mmlu 3 of 256.'
  )


def test_accuracy_alone(mixed, tmp_path):
  run = shutil.copytree(mixed, tmp_path / 'demo')
  (run / 'evaluations' / 'comparisons.json').unlink()
  for file in [*run.glob('evaluations/*.json'), run / 'studies' / 'mean' / 'trials.jsonl']:
    lines = []
    for row in read_jsonl(file) if file.suffix == '.jsonl' else [read_json(file)]:
      row['scores'] = {name: row['scores'][name] for name in QUIZZES if name in row['scores']}
      lines.append(json.dumps(row) + '\n')
    write_text(file, ''.join(lines))
  data = read_run(run)
  assert not data.problems and core(data) == ['gsm8k']
  value = data.evaluations['optimer']['scores']['gsm8k']['value']
  assert f'a mean accuracy of {100 * value:.1f}% on the test data of 1 task: ' in outcome(data)
  sections = build(data)
  assert ' (1 − accuracy) in trial ' in words(sections)
  assert 'bits' not in words(sections[:5])


def test_words_for_numbers():
  bits, share = Measured(-0.00251, 0.0007, 0.01), Measured(-0.031, 0.009)
  assert change(bits, 'bits/byte') == '−0.0025 ± 0.0007'
  assert change(share, 'accuracy') == '+3.1 ± 0.9 points'
  assert change(Measured(0.0, 0.01), 'accuracy') == '0.0 ± 1.0 points'
  assert change(Measured(0.2, math.nan), 'mixed') == '+0.2000 ± ?'
  assert score(Measured(0.588, 0.0221), 'accuracy') == '41.2% ± 2.2%'
  assert score(Measured(1.1114, math.nan), 'bits/byte') == '1.1114 ± ?'


@pytest.mark.parametrize('reference', ['average', 'base'])
def test_gains_on_both_splits(mixed, reference):
  """Against the formulas: a ratio of sums, and the share of solved examples."""
  data = read_run(mixed)
  kept = {
    row['trial']: row['per_example'] for row in read_jsonl(mixed / 'studies/mean/examples.jsonl')
  }
  places = {'average': 0, 'base': 1, 'optimer': 23}
  sides = (
    {name: kept[place] for name, place in places.items()},
    {n: read_json(mixed / 'evaluations' / f'{n}.json')['per_example'] for n in places},
  )
  found = gains(data, reference)
  assert list(found) == ['mean', *sorted((*DATASETS, 'gsm8k'))]
  for i, side in enumerate(sides):
    each = {}
    for task in (*DATASETS, 'gsm8k'):
      one, two = (np.array(side[name][task]['values']) for name in (reference, 'optimer'))
      size, n = np.array(side['optimer'][task]['sizes'], float), len(one)
      gained = (one - two) * (-1 if task == 'gsm8k' else 1)
      rate = gained.sum() / size.sum()
      error = math.sqrt(n / (n - 1) * ((gained - rate * size) ** 2).sum()) / size.sum()
      each[task] = rate, error
      assert found[task][i][:2] == pytest.approx(each[task])
    values, errors = np.array(list(each.values())).T
    assert found['mean'][i].value == pytest.approx(values.mean())
    assert found['mean'][i].stderr == pytest.approx(math.sqrt((errors**2).sum()) / 5)
  text = words_of(held_out(data))
  dev, test = (gain(one, 'mixed') for one in found['mean'])
  over = {'average': 'the uniform average', 'base': 'the base'}[reference]
  assert f'Of the gain of {dev} over {over} on development, {test} is left on test; ' in text


def test_whether_a_gain_held_up():
  def said(dev: float, test: float, dev_error: float = 0.001, test_error: float = 0.001) -> str:
    pair = Measured(dev, dev_error), Measured(test, test_error)
    return held_up(*pair, 'the uniform average', 'bits/byte')

  assert said(0.0042, 0.0025, 0.0011, 0.0007) == (
    'Of the gain of 0.0042 ± 0.0011 over the uniform average on development, 0.0025 ± 0.0007 is '
    'left on test; the difference, 0.0017 ± 0.0013, is within two standard errors: the gain held '
    'up.'
  )
  assert said(0.02, 0.01).endswith('is beyond two standard errors: part of it held up.')
  assert said(0.01, 0.02).endswith('is beyond two standard errors: it is larger on test.')
  assert said(0.01, 0.001).endswith('but what is left cannot be told from none.')
  assert said(0.01, -0.01).endswith('and on test it is a loss.')
  assert said(-0.01, 0.01).startswith('There was no gain over the uniform average on development')
  assert 'within two standard errors' not in said(0.01, 0.01, math.nan)


def test_examples_of_repeated_trials(copy):
  """The last line of a trial counts, and a copy of an earlier candidate has that one's examples."""
  file, ledger = (copy / 'studies' / 'mean' / f'{name}.jsonl' for name in ('examples', 'trials'))
  lines, trials = read_jsonl(file), read_jsonl(ledger)
  whole = gains(read_run(copy), 'average')
  twice = json.loads(json.dumps(lines[0]))
  twice['per_example']['ja']['values'] = lines[5]['per_example']['ja']['values']
  copied = [*trials, {**trials[-1], 'trial': len(trials)}]
  write_text(ledger, ''.join(json.dumps(row) + '\n' for row in copied))
  write_text(file, ''.join(json.dumps(row) + '\n' for row in [twice, *lines]))
  assert gains(read_run(copy), 'average') == whole

  write_text(ledger, ''.join(json.dumps(row) + '\n' for row in trials))
  write_text(file, ''.join(json.dumps(row) + '\n' for row in lines[:-1]))
  data = read_run(copy)
  found = gains(data, 'average')
  assert found['mean'][0].value == pytest.approx(whole['mean'][0].value)
  assert math.isnan(found['mean'][0].stderr) and found['mean'][1] == whole['mean'][1]
  text = words_of(held_out(data))
  assert 'scores by example of OptiMer' in text and 'their difference says nothing' in text


def test_a_gap_without_its_trials(copy):
  """The evaluated weights have no trial, or the search merged the average otherwise."""
  ledger, file = copy / 'studies' / 'mean' / 'trials.jsonl', copy / 'evaluations' / 'optimer.json'
  trials, optimer = read_jsonl(ledger), read_json(file)
  write_json(file, optimer | {'weights': dict.fromkeys(DATASETS, 0.9)})
  data = read_run(copy)
  assert 'optimer' not in on_dev(data) and gains(data, 'average') == {}
  assert 'trials with the weights of OptiMer' in words_of(held_out(data))
  write_json(file, optimer)
  ties = [{**row, 'search': {'merge method': 'method ties, density 0.5'}} for row in trials]
  write_text(ledger, ''.join(json.dumps(row) + '\n' for row in ties))
  data = read_run(copy)
  assert gains(data, 'average') == {} and gains(data, 'base')
  assert 'The search merges otherwise (method ties, density 0.5)' in words_of(held_out(data))


def test_a_trial_without_finite_scores(copy):
  ledger = copy / 'studies' / 'mean' / 'trials.jsonl'
  trials = read_jsonl(ledger)
  trials[4]['objective'] = trials[4]['scores']['ja']['value'] = None
  write_text(ledger, ''.join(json.dumps(row) + '\n' for row in trials))
  data = read_run(copy)
  assert len(data.studies[0].trials) == 23
  assert data.problems == [
    'studies/mean/trials.jsonl has no finite score of trial 4: left out here.'
  ]


def test_how_often_test_was_looked_at(copy):
  file = copy / 'evaluations' / 'test_looks.jsonl'
  data = read_run(copy)
  text = words_of(held_out(data))
  assert 'The test split was scored 8 times, for 8 models' in text and 'select on test' not in text
  assert 'from 2026-01-02T03:10:00Z to 2026-01-02T03:17:00Z' in text
  look = {'tasks': {'ja': 'd1ja', 'new': 'd1new'}, 'time': '2025-12-31T00:00:00Z'}
  append_jsonl(file, {'model': 'vectors-ja@0.5', 'weights': None, **look})
  append_jsonl(file, {'model': 'vectors-ja@0.5', 'weights': None, **look})
  append_jsonl(file, {'model': 'cpt-more', 'weights': {'ja': 1.0}, **look})
  blocks = list(held_out(read_run(copy)))
  assert looked(read_run(copy)) == (11, 10)
  (warning,) = [block.text for block in blocks if getattr(block, 'kind', '') == 'warning']
  assert warning.startswith(
    '2 candidates were scored on the same test data of ja (OptiMer, vectors-ja@0.5): '
  )
  assert 'from 2025-12-31T00:00:00Z to 2026-01-02T03:17:00Z' in words_of(blocks)
  counts = {row[0].text: [cell.text for cell in row[1:]] for row in blocks[-1].rows}
  assert counts['ja'] == ['11', '10', '2'] and counts['new'] == ['3', '2', '1']

  # Other weights under one name are another candidate, on other data there is no choice.
  lines = read_jsonl(file)[:8]
  optimer = next(row for row in lines if row['model'] == 'optimer')
  other = {**optimer, 'weights': dict.fromkeys(DATASETS, 0.3)}
  append = [*lines, other | {'tasks': {'ja': 'd2ja'}}]
  write_text(file, ''.join(json.dumps(row) + '\n' for row in append))
  blocks = list(held_out(read_run(copy)))
  assert 'select on test' not in words_of(blocks)
  assert {row[0].text for row in blocks[-1].rows} >= {'ja (d1ja)', 'ja (d2ja)'}
  write_text(file, ''.join(json.dumps(row) + '\n' for row in [*lines, other]))
  assert '(OptiMer (2 different ones))' in words_of(held_out(read_run(copy)))
  file.unlink()
  assert 'evaluations/test_looks.jsonl' in words_of(held_out(read_run(copy)))


def test_models_on_other_tasks_and_data(copy, drawn_once):
  """What is alike is compared, what is not is named, and neither hides the rest."""
  place = copy / 'evaluations'
  optimer = read_json(place / 'optimer.json')
  keys = ('scores', 'tasks', 'per_example')
  some = {key: {'ja': optimer[key]['ja'], 'extra': optimer[key]['zh']} for key in keys}
  write_json(place / 'gemma-3-270m-it.json', {**optimer, **some, 'weights': None})
  data = read_run(copy)
  assert core(data) == list(DATASETS) and not data.problems
  found = paired(data, 'gemma-3-270m-it', 'base')
  assert list(found) == ['ja'] and found['ja'] == paired(data, 'optimer', 'base')['ja']
  sections = build(data)
  assert 'The mean is over code, ja, math, zh: ' in words(sections)
  tree = ElementTree.fromstring(render(data, sections[:2]))
  cells = rows(tree, 'Test bits per byte ±')['gemma-3-270m-it']
  assert [cell == '–' for cell in cells] == [True, True, False, False, True, True]

  optimer['tasks']['ja'] = 'd2ja'
  optimer['scores']['zh'] |= {'unit': 'accuracy', 'value': 0.5}
  write_json(place / 'optimer.json', optimer)
  data = read_run(copy)
  kept = paired(data, 'optimer', 'base')
  assert list(kept) == ['mean', 'code', 'math'] and len(build(data)) == 9
  (place / 'comparisons.json').unlink()
  data = read_run(copy)
  assert core(data) == ['code', 'math']
  assert paired(data, 'optimer', 'base')['mean'][:2] == pytest.approx(kept['mean'][:2])
  assert [p.split(' on other')[0] for p in data.problems] == [
    f'evaluations/optimer.json has {task}' for task in ('ja', 'zh')
  ]
  assert 'text of 2 domains: better than base' in outcome(data) and len(build(data)) == 9
  single = {key: {'extra': optimer[key]['code']} for key in keys}
  write_json(place / 'optimer.json', {**optimer, **single})
  data = read_run(copy)
  assert core(data) == [] and 'other test tasks' in outcome(data) and len(build(data)) == 9


def test_scores_without_a_standard_error(copy):
  for file in (copy / 'evaluations').glob('[!c]*.json'):
    value = read_json(file)
    for task in DATASETS:
      value['scores'][task]['stderr'] = None
      value['per_example'][task] = {k: v[:1] for k, v in value['per_example'][task].items()}
    write_json(file, value)
  pairs = read_json(copy / 'evaluations' / 'comparisons.json')
  for row in pairs:
    for one in (row, *row['per_task'].values()):
      one['stderr'] = one['p'] = None
  write_json(copy / 'evaluations' / 'comparisons.json', pairs)
  data = read_run(copy)
  assert not data.problems and 'ahead of (without a standard error) base' in outcome(data)
  page = render(data, build(data)[:3])
  assert ' ± ?' in page and 'nan' not in re.sub(r'<svg.*?</svg>', '', page, flags=re.DOTALL)
  (copy / 'evaluations' / 'comparisons.json').unlink()
  found = paired(read_run(copy), 'optimer', 'base')
  assert found['mean'].value < 0 and math.isnan(found['mean'].stderr)


@pytest.mark.parametrize(
  'score_, said',
  [
    ({'value': 1.2, 'unit': 'accuracy'}, 'scores.ja.value is 1.2, which is no accuracy'),
    ({'value': 0.0}, 'scores.ja.value is 0.0, which is no bits/byte'),
    ({'value': 1.0, 'unit': 'nats'}, 'scores.ja.unit is nats, not bits/byte or accuracy'),
    ({'value': None, 'unit': 'accuracy'}, 'scores.ja.value is not a finite number'),
  ],
)
def test_scores_that_are_none(copy, score_, said):
  file = copy / 'evaluations' / 'cpt-zh.json'
  value = read_json(file)
  value['scores']['ja'] = score_
  write_json(file, value)
  assert read_run(copy).problems == [
    f'evaluations/cpt-zh.json is damaged ({said}): it is left out here.'
  ]
