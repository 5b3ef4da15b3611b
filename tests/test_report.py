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
from fake_vectors import write_vectors

from optimer_jax.errors import UserError
from optimer_jax.evaluation.bits_per_byte import Score, compare
from optimer_jax.files import append_jsonl, read_json, read_jsonl, write_json, write_text
from optimer_jax.report.blocks import Text
from optimer_jax.report.outcome import outcome
from optimer_jax.report.page import render, write_report
from optimer_jax.report.read import fault, mean, paired, read_run, stages
from optimer_jax.report.sections import build
from optimer_jax.report.style import DARK, LIGHT

DATASETS = ('code', 'ja', 'math', 'zh')
LEVELS = {'code': 0.92, 'ja': 1.45, 'math': 0.71, 'zh': 1.83}


def fake_run(
  run: Path, datasets: tuple[str, ...] = DATASETS, trials: int = 24, seed: int = 0
) -> Path:
  """Writes what a finished run leaves: each domain's loss is quadratic in the merge weights."""
  rng = np.random.default_rng(seed)
  size = len(datasets)
  level = np.array([LEVELS.get(name, 1 + i / size) for i, name in enumerate(datasets)])
  best = rng.uniform(0.15, 0.6, size)
  own = np.eye(size) + 0.12 * rng.uniform(-0.2, 1, (size, size))
  start = np.einsum('ij,j->i', own, best)

  def loss(weights: np.ndarray) -> np.ndarray:
    """Bits per byte of each domain: 7% of its level gained at its own optimum."""
    away = own @ weights - start
    return level * (1 - 0.07 + 0.07 * (away / start) ** 2 + 0.004 * weights.sum() ** 2)

  def sample(count: int, source: np.random.Generator) -> dict:
    return {
      name: (source.integers(600, 1100, count), source.normal(1, 0.12, count)) for name in datasets
    }

  def score(weights: np.ndarray, texts: dict, noise: np.random.Generator) -> tuple[dict, dict]:
    scores, examples = {}, {}
    for name, value in zip(datasets, loss(weights), strict=True):
      size_, hard = texts[name]
      nats = value * math.log(2) * size_ * hard * noise.normal(1, 0.004, len(size_))
      rate = nats.sum() / size_.sum()
      rest = np.sqrt(((nats - rate * size_) ** 2).sum()) / size_.sum()
      scores[name] = {
        'value': rate / math.log(2),
        'stderr': rest / math.log(2),
        'count': len(size_),
        'unit': 'bits/byte',
      }
      examples[name] = {'nats': nats.tolist(), 'bytes': size_.tolist()}
    return scores, examples

  def average(scores: dict) -> float:
    return float(np.mean([one['value'] for one in scores.values()]))

  named = lambda weights: dict(zip(datasets, map(float, weights), strict=True))
  write_json(
    run / 'base' / 'manifest.json',
    {
      'kind': 'base',
      'fingerprint': 'b3:6f1d0c4e9a7758e2',
      'model': {'name': 'gemma3-270m', 'vocabulary': 17408, 'layers': 18, 'rope': {'local': 1e4}},
      'versions': {'jax': '0.10.2', 'flax': '0.12.8', 'optimer_jax': '0.1.0'},
      'notes': ['Vocabulary trimmed to the 17,408 pieces that occur in the corpora <of 262,144>.'],
    },
  )
  write_text(run / 'operative.gin', "import optimer_jax\nsearch.study.trials = 24 # <&>'\n" * 20)
  for i, name in enumerate(datasets):
    for step in range(1, 49):
      value = (2.4 + 0.5 * i) * (1 - 0.1 * (1 - math.exp(-step / 15)) + rng.normal(0, 0.02))
      append = {'step': step, 'loss': value, 'tokens_per_s': 350.0, 'learning_rate': 4e-5}
      _line(run / 'cpt' / name / 'metrics.jsonl', append)
      if step % 12 == 0 or step == 1:
        dev = level[i] * (1 - 0.06 * (1 - math.exp(-step / 18)))
        _line(run / 'cpt' / name / 'metrics.jsonl', {'step': step, 'dev_bits_per_byte': dev})
  write_vectors(run / 'vectors', datasets, np.random.default_rng(seed + 3))

  dev = sample(32, np.random.default_rng(seed + 1))
  rows = []
  for i in range(trials):
    if i < 2:
      weights, sampler = np.full(size, (1 - i) / size), 'seed'
    else:
      spread = 0.5 if i < 8 else 0.12
      weights, sampler = np.clip(best + rng.normal(0, spread, size), 0, 1), 'vizier'
    if i == trials - 1:
      weights, sampler = best + rng.normal(0, 0.02, size), 'surrogate'
    scores, _ = score(weights, dev, rng)
    rows.append(
      {
        'trial': i,
        'sampler': sampler,
        'weights': named(weights),
        'scores': scores,
        'objective': average(scores),
        'seconds': 8.1,
        'flops': 1.2e12,
        'pool': 'b3:77aa',
        'time': '2026-01-02T03:04:05Z',
      }
    )
    _line(run / 'studies' / 'mean' / 'trials.jsonl', rows[-1])
  found = np.array(list(rows[-1]['weights'].values()))
  write_json(
    run / 'studies' / 'mean' / 'best.json',
    {
      'objective': 'mean',
      'best_observed': min(rows, key=lambda row: row['objective']),
      'surrogate_optimum': {**rows[-1], 'predicted': rows[-1]['objective'] - 0.0011},
      'chosen': 'surrogate_optimum',
      'weights': named(found),
      'ratios': named(found / found.sum()),
      'evaluations': trials,
    },
  )

  test = sample(64, np.random.default_rng(seed + 2))
  candidates = {'base': np.zeros(size), 'average': np.full(size, 1 / size), 'optimer': found}
  # A short CPT run stops well before its own domain's optimum.
  candidates |= {f'cpt-{name}': np.eye(size)[i] * best[i] for i, name in enumerate(datasets)}
  candidates['exported'] = found
  for name, weights in candidates.items():
    scores, examples = score(weights, test, rng)
    write_json(
      run / 'evaluations' / f'{name}.json',
      {
        'name': name,
        'split': 'test',
        'weights': None if name == 'base' or name.startswith('cpt-') else named(weights),
        'scores': scores,
        'per_example': examples,
        'mean': average(scores),
        'seconds': 21.0,
        'flops': 3.1e12,
      },
    )
  read = read_run(run)
  write_json(
    run / 'evaluations' / 'comparisons.json',
    [
      paired(read, 'optimer', other)
      for other in ('base', *(f'cpt-{name}' for name in datasets), 'average')
    ],
  )
  for stage, seconds, flops, tokens, peak in (
    ('data', 41.0, 0, 0, 0.9),
    ('import', 33.2, 0, 0, 2.1),
    *((f'train/{name}', 139.0 + i, 3.1e13, 24576, 5.6) for i, name in enumerate(datasets)),
    (f'train/{datasets[0]}', 66.5, 1.5e13, 12288, 5.7),
    ('extract', 12.1, 0, 0, 3.0),
    ('search/mean', 301.7, 2.9e13, 786432, 4.4),
    ('evaluate', 188.8, 2.2e13, 524288, 3.3),
    ('export', 9.7, 0, 0, 2.8),
  ):
    _line(
      run / 'costs.jsonl',
      {'stage': stage, 'seconds': seconds, 'flops': flops, 'tokens': tokens, 'peak_rss_gb': peak},
    )
  return run


def _line(path: Path, row: dict) -> None:
  # append_jsonl without its fsync, which a hundred lines a run would wait for.
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps(row) + '\n')


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


def words(sections: list) -> str:
  """The paragraphs of a page that has not been drawn."""
  return '\n'.join(
    block.text for section in sections for block in section.blocks if isinstance(block, Text)
  )


def rows(tree: ElementTree.Element, caption: str) -> dict[str, list[str]]:
  """The body of the table with this caption: row heading to the text of its cells."""
  for table in tree.iter('table'):
    found = table.find('caption')
    if found is not None and caption in found.text:
      break
  else:
    raise AssertionError(f'no table {caption}')
  return {
    row[0].text: [' | '.join(t.strip() for t in cell.itertext() if t.strip()) for cell in row[1:]]
    for row in table.find('tbody')
  }


def shown(value: float, digits: int = 4) -> str:
  return f'{value:.{digits}f}'.replace('-', '−')


SECTIONS = ['weights', 'scores', 'search', 'space', 'gap', 'vectors', 'training', 'costs', 'model']


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
  table = rows(tree, 'Test bits per byte')
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
    assert value.lstrip('+') == shown(row['difference']) and error == f'± {shown(row["stderr"])}'
  costs = read_jsonl(full / 'costs.jsonl')
  text = ''.join(tree.itertext())
  assert f'{sum(row["seconds"] for row in costs):,.1f}' in text
  assert f'{sum(row["tokens"] for row in costs):,}' in text
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
  assert f'{shown(mean(data.evaluations["optimer"]))} bits per byte' in sentence
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
    value['per_example'] = {'ja': {'nats': [], 'bytes': [200] * 40}}
    value['scores'] = {'ja': {'value': 1.0, 'stderr': 0.5}}
    value.pop('mean')
  rng = np.random.default_rng(3)
  one, two = rng.normal(200, 20, 40), rng.normal(0, 2, 40)
  base['per_example']['ja']['nats'] = one.tolist()
  other['per_example']['ja']['nats'] = (one + two).tolist()
  write_json(copy / 'evaluations' / 'base.json', base)
  write_json(copy / 'evaluations' / 'average.json', other)
  expected = two.std(ddof=1) / math.sqrt(40) / 200 / math.log(2)
  found = paired(read_run(copy), 'average', 'base')
  assert found['per_task']['ja']['stderr'] == pytest.approx(expected)
  assert found['stderr'] == pytest.approx(expected)


def test_paired_agrees_with_the_evaluation(full, copy):
  (copy / 'evaluations' / 'comparisons.json').unlink()
  data = read_run(copy)
  one, two = (
    {
      task: Score(np.array(rows['nats']), np.array(rows['bytes']))
      for task, rows in data.evaluations[name]['per_example'].items()
    }
    for name in ('optimer', 'average')
  )
  expected = compare(one, two)
  found = paired(data, 'optimer', 'average')
  assert found['difference'] == pytest.approx(expected['difference'])
  assert found['stderr'] == pytest.approx(expected['stderr'])
  for task, values in expected['per_task'].items():
    assert found['per_task'][task] == pytest.approx(values)


FILES = {  # what a run can lack, and what the page must then say
  'base/manifest.json': 'base/manifest.json',
  'operative.gin': 'operative.gin',
  'costs.jsonl': 'costs.jsonl',
  'vectors/geometry.json': 'vectors/geometry.json',
  'studies/mean/trials.jsonl': 'studies/NAME/trials.jsonl',
  'studies/mean/best.json': r'studies/(NAME|mean)/best\.json',
  'evaluations/comparisons.json': 'evaluations/comparisons.json',
  **{
    f'evaluations/{name}.json': f'evaluations/{name}.json'
    for name in ('base', 'average', 'optimer', 'cpt-code', 'cpt-ja', 'cpt-math', 'cpt-zh')
  },
  **{f'cpt/{name}/metrics.jsonl': f'cpt/({name}|NAME)/metrics.jsonl' for name in DATASETS},
}


@pytest.mark.parametrize('seed', range(8))
def test_partial_runs_name_what_is_missing(copy, seed):
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
    needless = name == 'evaluations/comparisons.json' and not scored
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
def test_damaged_json_is_named(copy, name):
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
  for name in ('costs.jsonl', 'studies/mean/trials.jsonl', 'cpt/ja/metrics.jsonl'):
    lines = (copy / name).read_bytes().splitlines(keepends=True)
    (copy / name).write_bytes(
      b''.join([lines[0][:9] + b'\n', b'{}\n', *lines[2:-1], lines[-1][:9]])
    )
  data = read_run(copy)
  assert len(data.problems) == 3
  for problem in data.problems:
    # A line of metrics needs only its step, and {} has none.
    assert ' 3 lines that are cut short or damaged' in problem
  assert len(data.studies[0].trials) == 21


def test_random_damage_never_stops_the_report(copy):
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
  assert found['bpb']['optimer'] == expected | {'mean': optimer['mean']}
  assert list(found['bpb']['cpt']) == list(DATASETS)
  assert found['weights'] == optimer['weights']
  average = read_json(full / 'evaluations' / 'average.json')['mean']
  assert found['optimer_minus_average']['difference'] == pytest.approx(optimer['mean'] - average)
  assert found['optimer_minus_average']['stderr'] > 0 and 'mean' in found['exported']

  (copy / 'evaluations' / 'optimer.json').unlink()
  done = call(copy)
  assert (done.returncode, done.stdout) == (1, '')
  assert len(done.stderr.splitlines()) == 1 and 'evaluations/optimer.json' in done.stderr
