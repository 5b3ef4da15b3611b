"""What several test files need: a model small enough to compile in a second or two."""

import inspect
import os
import pickle
import re
import sys
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# Nothing here needs a network, and libraries read this once, when they are imported.
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import jax
import pytest
from filelock import FileLock

from optimer_jax.errors import UserError
from optimer_jax.gemma3 import Gemma3Config


@pytest.fixture(scope='session')
def all_processes(tmp_path_factory, worker_id) -> Path:
  """A folder of all the processes that share the tests among them."""
  here = tmp_path_factory.getbasetemp()
  return here if worker_id == 'master' else here.parent


@pytest.fixture(scope='session', autouse=True)
def compiled_programs(all_processes):
  """Programs compiled by one test serve the other processes, and those that tests start."""
  cache = str(all_processes / 'compiled')
  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'


@pytest.fixture(scope='session')
def small() -> Gemma3Config:
  """Two layers, grouped queries, a window shorter than the rows."""
  return Gemma3Config(2, 32, 64, 4, 2, 16, window=8, query_scalar=16.0, vocab_size=300)


@pytest.fixture(scope='session')
def done(all_processes):
  """A `Run` that has been through every stage; tests only add to its directory."""
  from small_run import make_run

  from optimer_jax import pipeline

  run = make_run(all_processes / 'pipeline' / 'run')
  with FileLock(all_processes / 'pipeline.lock'):
    if not run.path.exists():
      pipeline.pipeline(run)
  return run


@pytest.fixture
def stand_in(tmp_path_factory, monkeypatch):
  """Puts a Python program on the PATH, for one that is not to be had here; returns its folder."""

  def put(name: str, code: str) -> Path:
    folder = tmp_path_factory.mktemp(name)
    (folder / name).write_text(f'#!{sys.executable}\n{code}')
    (folder / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
    return folder

  return put


@pytest.fixture
def compiled():
  """The programs that XLA is asked for while the test runs, an entry for each."""
  found = []
  listen = lambda event, seconds, **_: found.append(event) if 'backend_compile' in event else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda x: x + 1)(1.0)
    assert found, 'compilations are not seen'
    found.clear()
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope='module')
def figures() -> dict:
  """What `drawn_once` has drawn, by the name of the drawing and its numbers."""
  return {}


@pytest.fixture
def drawn_once(figures, monkeypatch):
  """Figures of the same numbers are drawn once: they take most of the time of a page."""
  from optimer_jax.report import plots, vector_plots

  def once(draw):
    def drawn(*args, **kwargs):
      key = draw.__name__, pickle.dumps((args, kwargs))
      if key not in figures:
        figures[key] = draw(*args, **kwargs)
      return figures[key]

    return drawn

  for module in (plots, vector_plots):
    for name, draw in inspect.getmembers(module, inspect.isfunction):
      if hasattr(draw, '__wrapped__'):  # `styled`
        monkeypatch.setattr(module, name, once(draw))


def files_under(path: Path) -> set[str]:
  return {str(file.relative_to(path)) for file in path.rglob('*')}


@pytest.fixture
def refused(tmp_path):
  """Runs an action that must raise one sentence that says `named`, and must write nothing."""

  def check(action, *named: str):
    before = files_under(tmp_path)
    with pytest.raises(UserError) as error:
      action()
    text = str(error.value)
    assert '\n' not in text and not re.search(r'[.!?] [A-Z]', text) and len(text) < 600, text
    for part in named:
      assert part in text, text
    assert files_under(tmp_path) == before

  return check
