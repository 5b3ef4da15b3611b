"""launch/Dockerfile as far as it can be read; tests/long/test_image.py carries it out."""

import subprocess
import sys
from pathlib import Path

import dockerfile
import pytest

HADOLINT = Path(sys.executable).with_name('hadolint')


def lint(text: str) -> str:
  run = subprocess.run([HADOLINT, '-'], input=text, capture_output=True, text=True)
  return run.stdout + run.stderr


def test_hadolint_is_content():
  assert lint(dockerfile.DOCKERFILE.read_text(encoding='utf-8')) == ''


@pytest.mark.parametrize(
  'right, wrong, rule',
  [
    ('FROM python:3.12.12-slim-bookworm', 'FROM python', 'DL3006'),
    ('USER 1000:1000', 'USER root', 'DL3002'),
    ('ENTRYPOINT ["optimer"]', 'ENTRYPOINT optimer', 'DL3025'),
    ('WORKDIR /optimer', 'WORKDIR optimer', 'DL3000'),
  ],
)
def test_hadolint_finds_a_planted_fault(right, wrong, rule):
  text = dockerfile.DOCKERFILE.read_text(encoding='utf-8')
  assert text.count(right) == 1
  assert rule in lint(text.replace(right, wrong))


def test_the_context_is_what_is_copied():
  sources = {
    source for arguments in dockerfile.named('COPY') for source in dockerfile.copied(arguments)[0]
  }
  for source in sources:
    assert (dockerfile.ROOT / source).exists(), source
    assert not dockerfile.ignored(source), source
  listed = subprocess.run(
    ['git', 'ls-files', '--cached', '--others', '--exclude-standard'],
    cwd=dockerfile.ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split('\n')
  seen = dockerfile.context(filter(None, listed))
  assert 'optimer_jax/report/page.html' in seen and 'gin/runs/quickstart.gin' in seen
  for file in seen:
    assert any(file == source or file.startswith(f'{source}/') for source in sources), file
  for path in (
    '.git/HEAD',
    '.venv/bin/python',
    'runs/quickstart/base/manifest.json',
    'tests/test_image.py',
    'benchmarks/results/index.html',
    'launch/Dockerfile',
    'optimer_jax/__pycache__/cli.cpython-312.pyc',
    'optimer_jax/report/__pycache__/page.cpython-312.pyc',
  ):
    assert dockerfile.ignored(path), path


def test_dependencies_come_before_the_source():
  """What the layer of dependencies is made of are the three files that say which they are."""
  steps = dockerfile.instructions()
  install = next(i for i, (name, text) in enumerate(steps) if name == 'RUN' and 'pip' in text)
  before = [text for name, text in steps[:install] if name == 'COPY']
  assert {source for text in before for source in dockerfile.copied(text)[0]} == {
    'setup.py',
    'constraints.txt',
    'optimer_jax/__init__.py',
  }
  assert '--constraint constraints.txt' in steps[install][1]
  assert dockerfile.settings()['PIP_CONSTRAINT'] == '/optimer/constraints.txt'
  later = [text for name, text in steps[install + 1 :] if name == 'RUN' and 'pip' in text]
  assert later and all('--no-deps' in text for text in later)


def test_it_runs_as_a_numbered_user_and_without_a_shell():
  names = [name for name, _ in dockerfile.instructions()]
  assert dockerfile.named('USER') == ['1000:1000']
  assert 'RUN' not in names[names.index('USER') :] and 'COPY' not in names[names.index('USER') :]
  (user,) = [text for text in dockerfile.named('RUN') if 'useradd' in text]
  assert user == 'useradd --uid 1000 --create-home optimer'
  assert dockerfile.entrypoint() == ['optimer']


def test_no_cache_is_kept_and_output_is_not_held_back():
  settings = dockerfile.settings()
  assert settings['PYTHONUNBUFFERED'] == settings['PIP_NO_CACHE_DIR'] == '1'
  assert settings['HOME'] == '/home/optimer' == dockerfile.named('WORKDIR')[-1]
