"""The tiny quickstart on each Python, from nothing: a new copy, a new environment, one command."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def interpreter(version: str) -> str | None:
  """A `python3.x` of that version, on PATH or among pyenv's."""
  candidates = [shutil.which(f'python{version}')]
  if shutil.which('pyenv'):
    root = subprocess.run(['pyenv', 'root'], capture_output=True, text=True).stdout.strip()
    candidates += sorted(Path(root).glob(f'versions/{version}.*/bin/python'))
  show = 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])'
  for python in filter(None, candidates):
    # pyenv leaves a `python3.x` on PATH that fails unless that version is switched on.
    run = subprocess.run([python, '-c', show], capture_output=True, text=True)
    if run.stdout.strip() == version:
      return str(python)
  return None


def copy_checkout(to: Path) -> None:
  """Copies the files that git knows or does not ignore: no .venv, no runs/."""
  listed = subprocess.run(
    ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  for name in filter(None, listed.split('\0')):
    if (ROOT / name).is_file():
      (to / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, to / name)


@pytest.mark.parametrize('version', ['3.11', '3.12', '3.13'])
def test_tiny_quickstart(version, tmp_path):
  python = interpreter(version)
  if python is None:
    pytest.skip(f'no Python {version} on this machine')
  copy_checkout(tmp_path)
  # The environment that these tests run in must not lend the new one its packages.
  env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV', 'MAKEFLAGS')}
  run = subprocess.run(
    ['make', 'quickstart', 'MODEL=tiny', f'PYTHON={python}'],
    cwd=tmp_path,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert run.returncode == 0, run.stdout[-4000:]
  own = tmp_path / '.venv' / 'bin' / 'python'
  show = (
    'import sys, importlib.util as u; print("%d.%d" % sys.version_info[:2], u.find_spec("torch"))'
  )
  out = subprocess.run([own, '-c', show], env=env, capture_output=True, text=True, check=True)
  assert out.stdout.split() == [version, 'None'], 'another Python, or torch where none is needed'
  result = tmp_path / 'runs' / 'quickstart_tiny'
  assert (result / 'report' / 'index.html').stat().st_size > 10_000
  assert list(result.rglob('*.safetensors')), 'no exported checkpoint'
  assert not (tmp_path / 'runs' / 'quickstart').exists()
