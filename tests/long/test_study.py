"""The paper's study on a stranger's data: two JSONL files, and the tiny model."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks import study
from optimer_jax.data.sources import Synthetic
from optimer_jax.files import read_json, read_jsonl

SMALL = {
  'DOMAINS': None,
  'WATCHED': (),
  'WEIGHTS': {},
  'LIMITS': {},
  'STEPS': 6,
  'MIXTURES': 1,
  'HEAL': 3,
  'TRIALS': 4,
  'FEW': 3,
  'QUARTER': 3,
  'TrainConfig.warmup': 2,
  'TrainConfig.keep_every': 3,
  'TrainConfig.learning_rate': 3e-3,
  'Run.trim_vocabulary': True,
  'Baselines.coefficients': (0.3, 0.8),
  'Baselines.densities': (0.5,),
  'EvalConfig.dev_rows': 8,
  'EvalConfig.test_rows': 8,
}
MODELS = {
  *('base', 'average', 'cpt-de', 'cpt-fr', 'optimer', 'exported'),
  *(f'mixed-{name}' for name in ('uniform', 'ratios-1', 'searched', 'uniform-longer')),
  *('mixed-healed', 'mixed-healed-slowly'),
  *(f'merged-{name}' for name in ('task_arithmetic', 'ties', 'dare_linear')),
  *(f'studies-{name}' for name in ('composite', 'gradient', 'tpe', 'sobol', 'worst', 'limited')),
  *(f'studies-{name}' for name in ('blocks', 'modules', 'checkpoints', 'with_mixture')),
}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('stranger')
  for name, language in {'de': 'south', 'fr': 'west'}.items():
    with open(folder / f'{name}.jsonl', 'w', encoding='utf-8') as file:
      for split in ('train', 'dev', 'test'):
        for document in Synthetic(language, split, 0).documents():
          print(json.dumps({'text': document.text}), file=file)
  values = {**SMALL, 'FOLDER': str(folder), 'DIRECTORY': str(folder / 'study')}
  command = [sys.executable, '-m', 'optimer_jax', 'pipeline', '--gin_file=runs/study_270m.gin']
  command += ['--gin_file=models/tiny.gin', *(f'--gin.{k}={v!r}' for k, v in values.items())]
  for _ in range(2):
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
  return folder / 'study'


def test_everything_is_scored_and_compared_once(run):
  rows = {row['model']: row for row in read_json(run / 'baselines.json')}
  assert {*rows} == {name for name in MODELS if name.startswith(('m', 'studies', 'optimer'))}
  assert {path.stem for path in (run / 'evaluations').glob('*.json')} == {*MODELS, 'comparisons'}
  compared = {(row['a'], row['b']) for row in read_json(run / 'evaluations' / 'comparisons.json')}
  assert {('optimer', name) for name in MODELS if name != 'optimer'} <= compared
  assert ('mixed-searched', 'mixed-uniform') in compared
  assert ('studies-with_mixture', 'mixed-uniform') in compared
  before = [name for name in rows if name.startswith('mixed')]
  before = before[: before.index('mixed-searched')]
  best = min(before, key=lambda name: rows[name]['dev'])
  assert before[0] == 'mixed-uniform' and ('mixed-searched', best) in compared
  # As many tokens in a mixture as in all CPT runs together, and in what is trained on, more.
  assert len({rows[name]['tokens'] for name in rows if 'longer' in name or 'healed' in name}) == 1
  assert rows['mixed-uniform']['tokens'] == 2 * 6 * 4 * 256 == rows['optimer']['tokens']
  # The second run found all of it there.
  trained = [row['stage'] for row in read_jsonl(run / 'costs.jsonl')]
  for stage in ('train/de', 'mixed/uniform', 'mixed/healed', 'tune/ties', 'tune/mixtures'):
    assert trained.count(stage) == 1, stage
  looks = [row['model'] for row in read_jsonl(run / 'evaluations' / 'test_looks.jsonl')]
  assert sorted(looks) == sorted(MODELS)


def test_tuned_is_the_best_of_what_was_tried(run):
  rows = {row['model']: row for row in read_json(run / 'baselines.json')}
  for method, tried in {'task_arithmetic': 2, 'ties': 2, 'dare_linear': 2}.items():
    losses = {}
    for row in read_jsonl(run / 'tuned' / f'{method}.jsonl'):
      mean = sum(score['value'] for score in row['scores'].values()) / len(row['scores'])
      losses[mean] = row['numbers']
    assert len(losses) == tried == rows[f'merged-{method}']['tried']
    assert rows[f'merged-{method}']['dev'] == pytest.approx(min(losses), rel=1e-12)
    made = read_json(run / 'merged' / method / 'manifest.json')['facts']
    numbers = losses[min(losses)]
    assert {*made['weights'].values()} == {numbers['weight']}
    assert made['merging']['scale'] == numbers.get('scale', 1.0)


def test_the_tables_are_rebuilt_from_what_is_kept(run, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(study, 'KEPT', tmp_path)
  assert study.main(['--keep', str(run)]) == 0
  *tables, last = capsys.readouterr().out.strip().splitlines()
  found = json.loads(last)
  scores = {'base': 'base', 'mix_uniform': 'mixed-uniform', 'optimer_gradient': 'studies-gradient'}
  for key, name in scores.items():
    assert found['bpb_mean'][key] == read_json(run / 'evaluations' / f'{name}.json')['mean']
  assert found['search_cost_ratio']['excluding_training'] > 0
  assert not [*tmp_path.rglob('*arrays*')] and sum('|' in line for line in tables) > 30
  assert study.filled('a\n<!-- gap -->\nold\n<!-- end -->\nb', {'gap': 'new'}) == (
    'a\n<!-- gap -->\nnew\n<!-- end -->\nb'
  )


def test_the_report_has_it(run):
  page = (run / 'report' / 'index.html').read_text()
  text = re.sub(r'<[^>]+>', ' ', page)
  assert 'Mixtures, merges and other searches' in text and 'mixture searched' in text
