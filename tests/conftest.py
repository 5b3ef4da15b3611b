"""What several test files need: a model small enough to compile in a second or two."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# Nothing here needs a network, and libraries read this once, when they are imported.
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import jax
import pytest

from optimer_jax.gemma3 import Gemma3Config


@pytest.fixture(scope='session', autouse=True)
def compiled_programs(tmp_path_factory):
  """Programs compiled by one test serve the processes that other tests start."""
  cache = str(tmp_path_factory.mktemp('compiled'))
  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'


@pytest.fixture(scope='session')
def small() -> Gemma3Config:
  """Two layers, grouped queries, a window shorter than the rows."""
  return Gemma3Config(2, 32, 64, 4, 2, 16, window=8, query_scalar=16.0, vocab_size=300)


@pytest.fixture(scope='session')
def done(tmp_path_factory):
  """A `Run` that has been through every stage."""
  from small_run import make_run

  from optimer_jax import pipeline

  run = make_run(tmp_path_factory.mktemp('pipeline') / 'run')
  pipeline.pipeline(run)
  return run
