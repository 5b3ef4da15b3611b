"""The report against realistic run directories: whole, partial and damaged."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from fake_run import DATASETS, fake_run, rows, shown, words

from optimer_jax.errors import UserError
from optimer_jax.files import append_jsonl, read_json, read_jsonl, write_json, write_text
from optimer_jax.report.held_out import gains, looked
from optimer_jax.report.outcome import gain, mean, outcome
from optimer_jax.report.page import render, write_report
from optimer_jax.report.read import fault, paired, read_run, stages
from optimer_jax.report.sections import build
from optimer_jax.report.style import DARK, LIGHT


@pytest.fixture(scope='module')
def full(tmp_path_factory) -> Path:
  return fake_run(tmp_path_factory.mktemp('full') / 'demo')


@pytest.fixture(scope='module')
def written(full) -> str:
  return write_report(full).read_text('utf-8')


@pytest.fixture(scope='module')
def tree(written) -> ElementTree.Element:
  return ElementTree.fromstring(written)  # stricter than a browser: every tag closed, ids aside


@pytest.fixture
def copy(full, tmp_path) -> Path:
  shutil.copytree(full, tmp_path / 'demo', ignore=shutil.ignore_patterns('report'))
  return tmp_path / 'demo'


SECTIONS = ['weights', 'scores', 'gap', 'search', 'space', 'vectors', 'training', 'costs', 'model']


def test_full_run_has_every_section_and_picture(full, written, tree):
  assert [section.get('id') for section in tree.iter('section')] == SECTIONS
  assert 'Not there yet' not in written and 'could not be used' not in written
  pictures = {file.name: file.read_bytes() for file in (full / 'report').glob('*.png')}
  assert {'overview.png', 'weights.png', 'convergence.png', 'cosine.png'} <= set(pictures)
  assert all(data.startswith(b'\x89PNG') for data in pictures.values())
  assert int.from_bytes(pictures['overview.png'][16:20], 'big') == 1800  # 900 px at double density
  plots_ = [node for node in tree.iter('div') if node.get('class') == 'plot']
  assert len(plots_) == len(pictures)
  assert all(node.get('role') == 'img' and len(node.get('aria-label')) > 30 for node in plots_)


def test_page_needs_nothing_else(tree, written):
  assert not re.search(r'https?:|//[a-z]|@import|<script|<iframe', written)
  ids = [node.get('id') for node in tree.iter() if node.get('id')]
  assert len(ids) == len(set(ids))
  for node in tree.iter():
    for key in ('href', 'src'):
      target = node.get(key)
      assert target is None or target.startswith('data:') or target.removeprefix('#') in ids
  assert set(re.findall(r'url\(#([^)]*)\)', written)) <= set(ids)


def test_every_colour_follows_the_theme(written):
  drawings = re.findall(r'<svg.*?</svg>', written, flags=re.DOTALL)
  assert drawings and not any(re.search(r'#[0-9a-f]{6}\b', drawing) for drawing in drawings)
  for theme in (LIGHT, DARK):
    assert len(set(theme.values())) == len(theme)
    paper = luminance(theme['paper'])
    for name in ('ink', 'muted', *(f'd{i}' for i in range(8))):
      high, low = sorted((luminance(theme[name]), paper), reverse=True)
      assert (high + 0.05) / (low + 0.05) >= (4.5 if name in ('ink', 'muted') else 3), name


def luminance(color: str) -> float:
  """Relative luminance as WCAG 2 defines it."""
  parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
  return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_numbers_are_the_artifacts(full, tree):
  table = rows(tree, 'Test bits per byte ±')
  labels = {'base': 'base', 'average': 'uniform average', 'optimer': 'OptiMer'}
  labels |= {f'cpt-{name}': f'CPT {name}' for name in DATASETS}
  labels['exported'] = 'OptiMer, exported'
  found = {}
  for name, label in labels.items():
    found[name] = read_json(full / 'evaluations' / f'{name}.json')
    assert table[label][0].startswith(shown(found[name]['mean']))
    for cell, task in zip(table[label][1:], DATASETS, strict=True):
      score = found[name]['scores'][task]
      assert cell.startswith(f'{shown(score["value"])} ± {shown(score["stderr"])}')
      change = score['value'] - found['base']['scores'][task]['value']
      assert name == 'base' or shown(change) in cell
  strong = [[node.text.split(' ')[0] for node in row.iter('strong')] for row in tree.iter('tr')]
  models = [value['scores'] for name, value in found.items() if name != 'exported']
  best = [min(m[task]['value'] for m in models) for task in DATASETS]
  best.append(min(value['mean'] for name, value in found.items() if name != 'exported'))
  assert sorted(value for row in strong for value in row) == sorted(map(shown, best))

  answer = read_json(full / 'studies' / 'mean' / 'best.json')
  weights = next(
    t for t in tree.iter('table') if ''.join(t.find('thead').itertext())[:9] == 'data setw'
  )
  assert {row[0].text: row[1].text for row in weights.find('tbody')} == {
    name: shown(value) for name, value in answer['weights'].items()
  }
  pairs = rows(tree, 'Paired differences')
  for row in read_json(full / 'evaluations' / 'comparisons.json'):
    value, error = pairs[f'OptiMer − {labels[row["b"]]}'][0].split(' | ')
    p = 'p < 0.001' if row['p'] < 0.001 else f'p = {row["p"]:.3f}'
    assert value.lstrip('+') == shown(row['difference'])
    assert error == f'± {shown(row["stderr"])}, {p}'
  costs = read_jsonl(full / 'costs.jsonl')
  text = ''.join(tree.itertext())
  assert f'{sum(row["seconds"] for row in costs):,.1f}' in text
  assert f'{sum(row["tokens"] for row in costs):,}' in text
  training, search = (
    sum(row['seconds'] for row in costs if row['stage'].startswith(kind))
    for kind in ('train/', 'search/')
  )
  trials = len(read_jsonl(full / 'studies' / 'mean' / 'trials.jsonl'))
  runs = {row['stage'] for row in costs if row['stage'].startswith('train/')}
  tuning = training / len(runs) * trials
  assert f'would take {tuning / search:.3g}' in text
  assert f'and {tuning / (search + training):.3g}' in text
  norm = rows(tree, 'Norm of each')
  geometry = read_json(full / 'vectors' / 'geometry.json')
  assert {name: cells[0] for name, cells in norm.items()} == {
    name: shown(value) for name, value in geometry['norm'].items()
  }


def test_outcome_says_what_the_difference_means(full, copy, written):
  data = read_run(full)
  sentence = outcome(data)
  assert sentence in html.unescape(written)
  average = next(c for c in data.comparisons if c['b'] == 'average')
  assert f'difference {shown(average["difference"])} ± {shown(average["stderr"])}' in sentence
  assert f'{shown(mean(data, "optimer").value)} bits per byte on the test text' in sentence
  file = copy / 'evaluations' / 'comparisons.json'
  for difference, stderr, verdict in (
    (-0.0021, 0.001, 'better than'),
    (-0.0019, 0.001, 'not distinguishable from'),
    (0.0019, 0.001, 'not distinguishable from'),
    (0.0021, 0.001, 'worse than'),
  ):
    write_json(file, [{'a': 'optimer', 'b': 'average', 'difference': difference, 'stderr': stderr}])
    assert f'{verdict} the uniform average' in outcome(read_run(copy))


def test_paired_stderr_is_that_of_the_paired_differences(copy):
  base = read_json(copy / 'evaluations' / 'base.json')
  other = read_json(copy / 'evaluations' / 'average.json')
  (copy / 'evaluations' / 'comparisons.json').unlink()
  for value in (base, other):
    value['per_example'] = {'ja': {'values': [], 'sizes': [200] * 40}}
    value['scores'] = {'ja': {'value': 1.0, 'stderr': 0.5}}
  rng = np.random.default_rng(3)
  one, two = rng.normal(200, 20, 40), rng.normal(0, 2, 40)
  base['per_example']['ja']['values'] = one.tolist()
  other['per_example']['ja']['values'] = (one + two).tolist()
  write_json(copy / 'evaluations' / 'base.json', base)
  write_json(copy / 'evaluations' / 'average.json', other)
  expected = two.std(ddof=1) / math.sqrt(40) / 200
  found = paired(read_run(copy), 'average', 'base')
  assert found['ja'].value == pytest.approx(two.mean() / 200)
  assert found['ja'].stderr == pytest.approx(expected)


FILES = {  # what a run can lack, and what the page must then say
  'base/manifest.json': 'base/manifest.json',
  'operative.gin': 'operative.gin',
  'costs.jsonl': 'costs.jsonl',
  'vectors/geometry.json': 'vectors/geometry.json',
  'studies/mean/trials.jsonl': 'studies/NAME/trials.jsonl',
  'studies/mean/best.json': r'studies/(NAME|mean)/best\.json',
  'studies/mean/examples.jsonl': 'studies/mean/examples.jsonl',
  'evaluations/test_looks.jsonl': 'evaluations/test_looks.jsonl',
  'evaluations/comparisons.json': 'evaluations/comparisons.json',
  **{
    f'evaluations/{name}.json': f'evaluations/{name}.json'
    for name in ('base', 'average', 'optimer', 'cpt-code', 'cpt-ja', 'cpt-math', 'cpt-zh')
  },
  **{f'cpt/{name}/metrics.jsonl': f'cpt/({name}|NAME)/metrics.jsonl' for name in DATASETS},
}


UNSCORED = ('evaluations/comparisons.json', 'evaluations/test_looks.jsonl')  # then not missed


@pytest.mark.parametrize('seed', range(8))
def test_partial_runs_name_what_is_missing(copy, drawn_once, seed):
  rng = np.random.default_rng(seed)
  gone = [name for name in FILES if rng.random() < (0.15, 0.5, 0.9)[seed % 3]]
  for name in gone:
    (copy / name).unlink()
  if {'evaluations/comparisons.json'} < set(gone) and all(
    f'evaluations/{name}.json' in gone for name in ('base', 'average', 'optimer')
  ):
    (copy / 'evaluations' / 'exported.json').unlink()
  data = read_run(copy)
  sections = build(data)
  assert [section.id for section in sections] == SECTIONS
  assert all(section.blocks for section in sections)
  text = words(sections)
  scored = list((copy / 'evaluations').glob('[!c]*.json')) or list(copy.glob('evaluations/cpt*'))
  for name, said in FILES.items():
    needless = name in UNSCORED and not scored
    # Without trials or an answer there are no gains whose examples could be missing.
    needless |= name == 'studies/mean/examples.jsonl' and bool(
      {'studies/mean/trials.jsonl', 'studies/mean/best.json'} & set(gone)
    )
    assert (re.search(said, text) is not None) == (name in gone) or needless, name
  assert not data.problems
  ElementTree.fromstring(render(data, sections if seed < 2 else sections[:2]))


def test_nothing_yet_and_not_a_run(tmp_path):
  with pytest.raises(UserError, match='not a run directory'):
    write_report(tmp_path)
  assert not list(tmp_path.iterdir())
  append_jsonl(tmp_path / 'costs.jsonl', {'stage': 'import', 'seconds': 3.0})
  page = write_report(tmp_path)
  assert 'No outcome yet' in page.read_text('utf-8')
  assert [file.name for file in page.parent.glob('*.png')] == ['costs.png']


JSONS = [name for name in FILES if name.endswith('.json')]


@pytest.mark.parametrize('name', [*JSONS, 'vectors/trajectory.json'])
def test_damaged_json_is_named(copy, drawn_once, name):
  file = copy / name
  for damage in (
    file.read_bytes()[: file.stat().st_size // 2],
    b'\xff\xfe\x00',
    b'[1, 2]',
    b'"text"',
    file.read_bytes().replace(b'0.', b'-NaN', 1) if b'0.' in file.read_bytes() else b'',
  ):
    file.write_bytes(damage)
    data = read_run(copy)
    assert [problem for problem in data.problems if f'{name} is damaged' in problem], damage[:40]
  assert [section.id for section in build(data)] == SECTIONS


def test_damaged_lines_are_counted(copy):
  logs = ('costs.jsonl', 'studies/mean/trials.jsonl', 'studies/mean/examples.jsonl')
  logs += ('cpt/ja/metrics.jsonl', 'evaluations/test_looks.jsonl')
  for name in logs:
    lines = (copy / name).read_bytes().splitlines(keepends=True)
    (copy / name).write_bytes(
      b''.join([lines[0][:9] + b'\n', b'{}\n', *lines[2:-1], lines[-1][:9]])
    )
  data = read_run(copy)
  assert len(data.problems) == len(logs)
  for problem in data.problems:
    # A line of metrics needs only its step, and {} has none.
    assert ' 3 lines that are cut short or damaged' in problem
  assert len(data.studies[0].trials) == len(data.studies[0].examples) == 21
  assert looked(data) == (5, 5)


def test_random_damage_never_stops_the_report(copy, drawn_once):
  rng = np.random.default_rng(7)
  names = [*FILES, 'vectors/trajectory.json']
  whole = {name: (copy / name).read_bytes() for name in names}
  for _ in range(8):
    name = names[rng.integers(len(names))]
    data = bytearray(whole[name])
    for place in rng.integers(0, len(data), rng.integers(1, 30)):
      data[place] = rng.choice(list(b'0123456789{}[]":,.eE-an \n'))
    (copy / name).write_bytes(data)
    run = read_run(copy)
    assert outcome(run) and len(build(run)) == len(SECTIONS)
    (copy / name).write_bytes(whole[name])


def test_vectors_are_the_artifacts(full, tree):
  geometry = read_json(full / 'vectors' / 'geometry.json')
  ways = read_json(full / 'vectors' / 'trajectory.json')
  norms, ranks = rows(tree, 'Norm of each'), rows(tree, 'Effective rank')
  straight = rows(tree, 'Straightness is')
  for name in DATASETS:
    assert norms[name][2:] == [
      shown(100 * geometry[key][name], 1) for key in ('embedding_share', 'embedding_rows_touched')
    ]
    assert ranks[name] == [
      f'{shown(r["effective"], 1)} of {r["bound"]:,} | stable {shown(r["stable"], 1)}'
      for r in geometry['effective_rank'][name].values()
    ]
    lowest = (min(ways[name][key]) for key in ('final_cosine', 'step_cosine'))
    assert straight[name] == ['6', *(shown(v, 3) for v in (ways[name]['straightness'], *lowest))]
  text = ''.join(tree.itertext())
  assert 'all agree on 21.0%' in text and '74.0% has the sign of the sum' in text
  pairs = [v for i, row in enumerate(geometry['sign_agreement']) for v in row[i + 1 :]]
  assert f'from {shown(min(pairs), 3)} (' in text and f'to {shown(max(pairs), 3)} (' in text


def test_one_and_many_datasets(tmp_path):
  for size in (1, 9):
    run = fake_run(tmp_path / str(size), tuple(f'set{i}' for i in range(size)), trials=4)
    data = read_run(run)
    ElementTree.fromstring(render(data, build(data)))
    assert not data.problems


def test_resumed_stages_and_metrics_are_one(full):
  data = read_run(full)
  first = next(row for row in stages(data.costs) if row['stage'] == 'train/code')
  assert first['attempts'] == 2 and first['seconds'] == pytest.approx(139 + 66.5)
  assert first['tokens'] == 24576 + 12288 and first['rss'] == 5.7


def test_trials_of_another_pool_are_left_out(copy):
  file = copy / 'studies' / 'mean' / 'trials.jsonl'
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  write_text(
    file,
    ''.join(
      json.dumps(r | {'pool': 'old' if i < 5 else 'new'}) + '\n' for i, r in enumerate(lines)
    ),
  )
  data = read_run(copy)
  assert len(data.studies[0].trials) == 19 and 'another vector pool' in data.problems[0]


def test_report_is_the_same_each_time(full, written, copy):
  (copy / 'report').mkdir()
  (copy / 'report' / 'stale.png').touch()
  assert write_report(copy).read_text('utf-8') == written
  names = [sorted(file.name for file in (run / 'report').iterdir()) for run in (full, copy)]
  assert names[0] == names[1]
  assert not [path.name for path in copy.iterdir() if path.name.startswith('.')]


def test_shapes():
  shape = {'a': [float], 'b?': {...: str}}
  assert fault({'a': [1, 2.5], 'c': 0}, shape) == ''
  assert fault({'a': [1], 'b': None}, shape) == ''
  assert fault({'a': [1, True]}, shape) == 'a[1] is not a finite number'
  assert fault({'a': [], 'b': {'x': 1}}, shape) == 'b.x is not a str'
  assert fault({'b': {}}, shape) == 'a is missing'


def test_quickstart_report(full, copy):
  def call(run: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, '-m', 'benchmarks.quickstart_report', str(run)],
      capture_output=True,
      text=True,
      cwd=Path(__file__).parents[1],
    )

  done = call(full)
  found = json.loads(done.stdout.splitlines()[-1])
  assert done.returncode == 0
  costs = read_jsonl(full / 'costs.jsonl')
  assert found['wall_s'] == pytest.approx(sum(row['seconds'] for row in costs))
  assert found['peak_rss_gb'] == 5.7
  optimer = read_json(full / 'evaluations' / 'optimer.json')
  expected = {name: score['value'] for name, score in optimer['scores'].items()}
  assert found['bpb']['optimer'] == pytest.approx(expected | {'mean': optimer['mean']})
  assert list(found['bpb']['cpt']) == list(DATASETS)
  assert found['weights'] == optimer['weights']
  average = read_json(full / 'evaluations' / 'average.json')['mean']
  assert found['optimer_minus_average']['difference'] == pytest.approx(optimer['mean'] - average)
  assert found['optimer_minus_average']['stderr'] > 0 and 'mean' in found['exported']
  dev, test = gains(read_run(full), 'average')['mean']
  assert found['gain_over_average']['development'] == {'gain': dev.value, 'stderr': dev.stderr}
  assert found['gain_over_average']['test'] == {'gain': test.value, 'stderr': test.stderr}
  assert f'{gain(dev, "bits/byte")} on development, {gain(test, "bits/byte")} on' in done.stdout
  assert 'test was scored 8 times, for 8 models\n' in done.stdout
  assert done.stdout.startswith('test bits per byte ') and '%' not in done.stdout

  (copy / 'evaluations' / 'optimer.json').unlink()
  done = call(copy)
  assert (done.returncode, done.stdout) == (1, '')
  assert len(done.stderr.splitlines()) == 1 and 'evaluations/optimer.json' in done.stderr


def test_what_optimer_is_compared_with_has_a_section(copy):
  rows_ = [
    {'model': 'optimer', 'kind': 'search', 'dev': 1.1, 'tried': 16, 'tokens': 98304},
    {'model': 'average', 'kind': 'mixture', 'dev': 1.2, 'tried': 1, 'tokens': 98304},
    {'model': 'base', 'kind': 'mixture', 'dev': 1.4, 'tried': 1, 'tokens': 0},
    {'model': 'merged-gone', 'kind': 'merge', 'dev': None, 'tried': 3, 'tokens': 98304},
  ]
  write_json(copy / 'baselines.json', rows_)
  run = read_run(copy)
  (section,) = [each for each in build(run) if each.id == 'baselines']
  text = words([section])
  assert 'Of 2 mixtures, uniform average is best on development text.' in text
  assert shown(paired(run, 'optimer', 'average')['mean'].value) in text
  page = render(run, build(run))
  assert 'merge gone' in page and '98,304' in page
  ElementTree.fromstring(page)
  write_text(copy / 'baselines.json', '[{"model": "optimer"}]')
  run = read_run(copy)
  assert [each.id for each in build(run)] == SECTIONS
  assert any(problem.startswith('baselines.json is') for problem in run.problems)
