"""The image's own steps, carried out in a folder with a new environment for the image's Python.

What needs root or a container engine is not run: the base image, `useradd`, `USER`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dockerfile
import pytest
from test_pythons import copy_checkout, interpreter

from optimer_jax import __version__
from optimer_jax.files import read_json, read_jsonl

TINY = '--gin_file=runs/quickstart_tiny.gin'


class Image:
  """A folder in the place of the image's root.

  Attributes:
    root: the folder.
    environment: of the image's processes.
    workdir: where they start.
    entrypoint: their command.
    not_run: instructions that were left out.
    at_home: files in the home when the image is made.
  """

  def __init__(self, root: Path, extras: str):
    self.root, self.workdir, self.not_run = root, root, []
    kept = ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV', 'JAX_COMPILATION_CACHE_DIR')
    self.environment = {k: v for k, v in os.environ.items() if k not in kept}
    checkout, context = root / 'checkout', root / 'context'
    copy_checkout(checkout)
    files = [str(f.relative_to(checkout)) for f in checkout.rglob('*') if f.is_file()]
    for file in dockerfile.context(files):
      (context / file).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(checkout / file, context / file)
    for name, text in dockerfile.instructions():
      text = re.sub(r'(?<![^\s="])/(?=\w)', f'{root}/', text)
      if name == 'FROM':
        (version,) = re.findall(r'^python:(\d+\.\d+)\.', text)
        self.python(interpreter(version) or sys.executable)
      elif name == 'ENV':
        self.environment |= dict(each.split('=', 1) for each in text.split())
      elif name == 'ARG':
        assert text.startswith('EXTRAS=')
        self.environment['EXTRAS'] = extras
      elif name == 'WORKDIR':
        self.workdir = root / text
        self.workdir.mkdir(parents=True, exist_ok=True)
      elif name == 'COPY':
        self.copy(context, *dockerfile.copied(text))
      elif name == 'ENTRYPOINT':
        self.entrypoint = dockerfile.entrypoint()
      elif name == 'USER' or text.startswith('useradd '):
        self.not_run.append(f'{name} {text}')
      else:
        subprocess.run(['sh', '-c', text], cwd=self.workdir, env=self.environment, check=True)
    self.at_home = list(Path(self.environment['HOME']).iterdir())

  def python(self, python: str) -> None:
    subprocess.run([python, '-m', 'venv', self.root / 'usr'], check=True)
    self.environment['PATH'] = f'{self.root / "usr" / "bin"}:{self.environment["PATH"]}'

  def copy(self, context: Path, sources: list[str], target: str) -> None:
    assert target.endswith('/')
    for source in sources:
      if (context / source).is_dir():
        shutil.copytree(context / source, self.workdir / target, dirs_exist_ok=True)
      else:
        (self.workdir / target).mkdir(parents=True, exist_ok=True)
        shutil.copy2(context / source, self.workdir / target)

  def start(self, *arguments: str, **how) -> subprocess.Popen:
    """`docker run IMAGE arguments`."""
    return subprocess.Popen(
      [*self.entrypoint, *arguments],
      cwd=self.workdir,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      **how,
    )

  def run(self, *arguments: str) -> str:
    process = self.start(*arguments)
    output = process.communicate()[0]
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope='module')
def image(tmp_path_factory) -> Image:
  """Without libtpu, which is hundreds of MB and the same in every environment."""
  return Image(tmp_path_factory.mktemp('image'), extras='gcs')


@pytest.fixture(scope='module')
def imported(image) -> Path:
  """A run of the image that has its base."""
  directory = image.workdir / 'runs' / 'tiny'
  image.run('import', TINY, f'--gin.DIRECTORY={str(directory)!r}')
  return directory


def test_every_step_that_needs_no_root_was_carried_out(image):
  assert image.not_run == ['RUN useradd --uid 1000 --create-home optimer', 'USER 1000:1000']


def test_what_is_installed_is_the_package_and_its_dependencies(image):
  (site,) = (image.root / 'usr' / 'lib').glob('python3*/site-packages')
  package = site / 'optimer_jax'
  for folder, installed in (('optimer_jax', package), ('gin', package / 'gin_files')):
    files = [f for f in (dockerfile.ROOT / folder).rglob('*') if f.is_file() and f.suffix != '.pyc']
    for file in files:
      copy = installed / file.relative_to(dockerfile.ROOT / folder)
      assert copy.read_bytes() == file.read_bytes(), copy
  names = {folder.name.split('-')[0].lower() for folder in site.glob('*.dist-info')}
  assert {'optimer_jax', 'jax', 'gcsfs'} <= names
  assert not names & {'libtpu', 'torch', 'pytest', 'ruff', 'setuptools'}
  pins = (dockerfile.ROOT / 'constraints.txt').read_text(encoding='utf-8')
  for info in site.glob('*.dist-info'):
    name, version = info.name.removesuffix('.dist-info').split('-')
    if name not in ('optimer_jax', 'pip'):
      assert re.search(rf'(?im)^{name.replace("_", "[-_.]")}=={re.escape(version)}\b', pins), name
  (wheel,) = site.glob('optimer_jax-*.dist-info/WHEEL')
  (builder,) = re.findall(r'^Generator: setuptools \((.+)\)$', wheel.read_text(), re.MULTILINE)
  assert f'\nsetuptools=={builder}\n' in pins


def test_nothing_is_left_that_only_the_build_needed(image):
  assert Path(image.environment['HOME']) == image.workdir and image.at_home == []
  (source,) = (image.root / text.lstrip('/') for text in dockerfile.named('WORKDIR')[:1])
  assert {file.name for file in source.iterdir()} == {
    'setup.py',
    'constraints.txt',
    'optimer_jax',
    'gin',
  }


def test_the_entrypoint(image):
  assert image.run('--version').strip() == __version__
  assert '--find-smallest' in image.run('plan', '--help')


def test_it_imports_a_base_where_it_is(imported):
  assert read_json(imported / 'base' / 'manifest.json')['kind'] == 'base'


def test_sigterm_reaches_training_which_saves_and_goes_on(image, imported):
  def command(steps):
    name = f'--gin.DIRECTORY={str(imported)!r}'
    return 'train', TINY, name, f'--gin.STEPS={steps}', '--dataset=north'

  metrics = imported / 'training' / 'north' / 'metrics.jsonl'
  process = image.start(*command(2000))
  while not (metrics.exists() and read_jsonl(metrics)):
    assert process.poll() is None, process.communicate()[0][-4000:]
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  output = process.communicate()[0]
  assert process.returncode == 75, output[-4000:]
  assert 'the same command goes on from here' in output
  saved = max(row['step'] for row in read_jsonl(metrics))
  again = image.start(*command(2000))
  while max(row['step'] for row in read_jsonl(metrics)) <= saved:
    assert again.poll() is None, again.communicate()[0][-4000:]
    time.sleep(0.1)
  again.send_signal(signal.SIGTERM)
  assert again.communicate() and again.returncode == 75
  steps = [row['step'] for row in read_jsonl(metrics) if 'loss' in row]
  assert steps == sorted(set(steps)), 'a step was done twice'
