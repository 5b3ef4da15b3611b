"""The notebook, executed from top to bottom as it is, twice; and what it installs."""

import os
import site
import subprocess
import venv
from pathlib import Path

import notebook
import pytest
from nbclient import NotebookClient
from safetensors import safe_open
from test_pythons import copy_checkout

from optimer_jax.files import read_json, read_jsonl

LANGUAGES = {'north', 'east', 'south', 'west'}


def execute(folder: Path) -> list:
  """The cells of code with their outputs; fails where one does. The kernel starts in `folder`."""
  book = notebook.read()
  here = {'PYTHONPATH': str(notebook.ROOT), 'HOME': str(folder)}
  client = NotebookClient(
    book, kernel_name='python3', timeout=None, resources={'metadata': {'path': str(folder)}}
  )
  client.execute(env=os.environ | here)
  return [cell for cell in book.cells if cell.cell_type == 'code']


def said(cells: list) -> str:
  return ''.join(each.get('text', '') for cell in cells for each in cell.outputs)


def shown(cells: list, kind: str) -> list[int]:
  """How many outputs of a kind each cell has that has any."""
  counts = [sum(kind in each.get('data', {}) for each in cell.outputs) for cell in cells]
  return [count for count in counts if count]


def contents(run: Path) -> dict[str, bytes | int]:
  """What may not change when nothing is to be done: results as they are, models by their time."""
  keep = {}
  for file in run.rglob('*'):
    if file.name in ('best.json', 'trials.jsonl', 'test_looks.jsonl', 'geometry.json'):
      keep[str(file)] = file.read_bytes()
    elif file.name in ('manifest.json', 'metrics.jsonl') or file.suffix == '.safetensors':
      keep[str(file)] = file.stat().st_mtime_ns
  return keep


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
  """(the folder of the session, the cells of the first execution)."""
  folder = tmp_path_factory.mktemp('session')
  return folder, execute(folder)


def test_from_top_to_bottom(executed):
  folder, cells = executed
  run = folder / 'runs' / 'colab'
  text = said(cells)
  assert 'optimer_jax is installed.' in text and 'JAX computes on 1 x cpu.' in text
  assert 'study mean: trial 10/10' in text, 'no progress is seen'
  assert f'The model is in {Path("runs", "colab", "export", "optimer")}' in text
  # Training; vectors; search; weights; test scores.
  assert shown(cells, 'image/png') == [1, 5, 2, 1, 1]
  (page,) = [o for cell in cells for o in cell.outputs if 'srcdoc' in str(o.get('data', ''))]
  assert 'Merge weights and mixture ratios' in page['data']['text/html']

  best = read_json(run / 'studies' / 'mean' / 'best.json')
  assert best['evaluations'] == 10 and set(best['weights']) == LANGUAGES
  assert all(0 <= w <= 1 for w in best['weights'].values()) and any(best['weights'].values())
  assert abs(sum(best['ratios'].values()) - 1) < 1e-12
  assert best[best['chosen']]['objective'] < 1, 'no better than the base'
  for name, share in best['ratios'].items():
    assert f'{name} {share:.1%}' in text

  score = {file.stem: read_json(file) for file in (run / 'evaluations').glob('*.json')}
  assert score['optimer']['weights'] == best['weights']
  assert score['optimer']['mean'] < score['base']['mean']
  for name in ('base', 'average', 'optimer', 'exported', *(f'cpt-{one}' for one in LANGUAGES)):
    assert f'{name:12}{score[name]["mean"]:8.4f} bits per byte' in text

  export = run / 'export' / 'optimer'
  assert (export / 'config.json').exists() and (export / 'tokenizer.json').exists()
  with safe_open(export / 'model.safetensors', 'numpy') as file:
    assert any('embed_tokens' in name for name in file.keys())  # noqa: SIM118


def test_the_other_objective_is_answered_from_the_ledger(executed):
  folder, cells = executed
  studies = folder / 'runs' / 'colab' / 'studies'
  answer = read_json(studies / 'worst' / 'best.json')
  first = answer['first_answer']
  assert (first['trials'], answer['reused'], answer['evaluations']) == (10, 10, 2)
  assert len(read_jsonl(studies / 'worst' / 'trials.jsonl')) == 2
  assert set(first['weights']) == LANGUAGES
  text = said(cells)
  assert 'Of 10 trials that were there' in text and f'{first["predicted"]:.4f} predicted' in text
  assert 0 < answer[answer['chosen']]['objective'] < 1


def test_a_second_time_nothing_is_done_again(executed):
  folder, cells = executed
  run = folder / 'runs' / 'colab'
  before = contents(run)
  assert len(before) > 20
  trained = [row for row in read_jsonl(run / 'costs.jsonl') if row['stage'].startswith('train/')]
  assert {row['stage'] for row in trained} == {f'train/{name}' for name in LANGUAGES}
  again = execute(folder)
  assert contents(run) == before
  costs = read_jsonl(run / 'costs.jsonl')
  assert [row for row in costs if row['stage'].startswith('train/')] == trained
  assert 'trial 10/10' not in said(again)
  assert shown(again, 'image/png') == [1, 5, 4, 1, 1]  # The second study is there from the start.


def test_what_it_installs(tmp_path):
  """A clone of the checkout into a new environment, which sees the other packages of this one."""
  repository, session = tmp_path / 'repository', tmp_path / 'session'
  repository.mkdir()
  session.mkdir()
  copy_checkout(repository)
  who = ('-c', 'user.name=tests', '-c', 'user.email=tests@localhost')
  for arguments in (['init', '-q'], ['add', '--all'], [*who, 'commit', '-q', '-m', 'all']):
    subprocess.run(['git', *arguments], cwd=repository, check=True)
  venv.create(tmp_path / 'own', with_pip=True)
  (packages,) = (tmp_path / 'own').glob('lib/python*/site-packages')
  (packages / 'others.pth').write_text('\n'.join(site.getsitepackages()), encoding='utf-8')
  cell = notebook.code('REPOSITORY = ')

  def run(source):
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    python = tmp_path / 'own' / 'bin' / 'python'
    return subprocess.run(
      [python, '-c', source], cwd=session, env=env, capture_output=True, text=True
    )

  unset = run(cell)
  assert unset.returncode == 1 and 'Set REPOSITORY to the git address' in unset.stderr
  wrong = run(cell.replace("REPOSITORY = ''", "REPOSITORY = 'nowhere'"))
  assert wrong.returncode == 1 and 'git failed: see above' in wrong.stderr
  assert "repository 'nowhere' does not exist" in wrong.stdout
  done = run(cell.replace("REPOSITORY = ''", f'REPOSITORY = {str(repository)!r}'))
  assert done.returncode == 0, done.stdout + done.stderr
  there = run('import optimer_jax.configs as c; print(c.__file__); print(c.gin_search_paths()[1])')
  assert there.stdout.split() == [
    str(packages / 'optimer_jax' / name) for name in ('configs.py', 'gin_files')
  ], there.stderr
  assert run(cell).stdout == 'optimer_jax is installed.\n'
