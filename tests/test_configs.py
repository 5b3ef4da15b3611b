"""Every gin file is read, and what each run amounts to is held against a golden copy.

After a change that is meant: OPTIMER_WRITE_GOLDEN=1 python -m pytest tests/test_configs.py
"""

import os
from pathlib import Path

import pytest

import gin
from optimer_jax import configs
from optimer_jax import run as runs
from optimer_jax.errors import UsageError
from optimer_jax.gemma3 import SIZES

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / 'golden'
FILES = sorted(str(path.relative_to(ROOT / 'gin')) for path in (ROOT / 'gin').rglob('*.gin'))
RUNS = [file for file in FILES if file.startswith('runs/')]
# What the head of a run file says must be bound.
BOUND = {
  'runs/folder.gin': (
    ['models/gemma3_27b.gin'],
    ["DIRECTORY='runs/mine'", "FOLDER='tests/data/folder'"],
  ),
  'runs/paper_27b.gin': ([], ["FOLDER='tests/data/paper'"]),
  'runs/study_270m.gin': ([], ["FOLDER='tests/data/paper'"]),
  'runs/study_270m_main.gin': ([], ["FOLDER='tests/data/paper'"]),
}


def read(file, bindings=()):
  files, bound = BOUND.get(file, ([], []))
  return configs.read_run([file, *files], [*bound, *bindings])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """Folders with data sets, for the runs that read one."""
  monkeypatch.chdir(tmp_path)
  names = ('folder/en', 'folder/fr', *(f'paper/{n}' for n in ('ja', 'zh', 'math', 'code', 'en')))
  for name in names:
    place = tmp_path / 'tests' / 'data' / name
    place.mkdir(parents=True)
    for split in ('train', 'valid'):
      (place / f'{split}.jsonl').write_text('{"text": "words"}\n')


@pytest.mark.parametrize('file', FILES)
def test_every_file_is_read(file):
  if file in RUNS:
    assert isinstance(read(file), runs.Run)
    return
  # The parts stand on a run; none may be left out by it.
  rest = dict.fromkeys(('data', 'mesh', 'tasks'), 'models/tiny.gin') | {
    'models': 'data/synthetic.gin'
  }
  bindings = ["Run.directory='runs/x'", *BOUND['runs/folder.gin'][1][1:]]
  files = [file, rest[file.split('/')[0]]]
  if file.startswith(('mesh/', 'tasks/')):
    files.append('data/synthetic.gin')
  if file != 'data/folder.gin':
    bindings.pop()
  assert isinstance(configs.read_run(files, bindings), runs.Run)


def test_every_size_has_a_file():
  for size in SIZES:
    name = 'models/tiny.gin' if size == 'tiny' else f'models/gemma3_{size}.gin'
    assert name in FILES


@pytest.mark.parametrize('file', RUNS)
def test_operative_config_is_the_golden_one(file):
  found = read(file).gin
  golden = GOLDEN / Path(file).with_suffix('.txt').name
  if os.environ.get('OPTIMER_WRITE_GOLDEN'):
    golden.parent.mkdir(exist_ok=True)
    golden.write_text(found)
  assert found == golden.read_text()


def test_operative_config_reads_back_to_the_same_run(tmp_path):
  run = read('runs/quickstart.gin', ['TrainConfig.steps=7'])
  (tmp_path / 'again.gin').write_text(run.gin)
  again = configs.read_run([str(tmp_path / 'again.gin')], [])
  assert again == run and again.training.steps == 7


def test_bindings_win_over_files_and_later_ones_over_earlier():
  run = read('runs/quickstart_tiny.gin', ['STEPS=5', 'TrainConfig.batch=2', 'STEPS=6'])
  assert (run.training.steps, run.training.batch) == (6, 2)


def test_one_run_leaves_nothing_for_the_next():
  read('runs/quickstart_tiny.gin', ['TrainConfig.steps=5'])
  assert read('runs/quickstart_tiny.gin').training.steps == 60
  with pytest.raises(UsageError):
    configs.read_run(['runs/quickstart_tiny.gin'], ['Run.nothing=1'])
  assert read('runs/quickstart_tiny.gin').training.steps == 60
  assert 'optimer_jax' not in gin.__file__


def test_folder_names_can_be_chosen():
  run = read('runs/folder.gin', ["from_folder.names=('fr',)"])
  assert run.names == ('fr',)
