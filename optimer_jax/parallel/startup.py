"""What a process sets before its first computation."""

import contextlib
import ctypes
import gc
import logging
import os
import sys
import warnings
from pathlib import Path

import jax

from optimer_jax import progress
from optimer_jax.parallel.processes import primary


def start(cache: Path) -> None:
  """Joins the run's other processes, keeps compiled programs in `cache`, and libraries quiet."""
  jax.config.update('jax_compilation_cache_dir', str(cache / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)
  logging.getLogger('absl').setLevel(logging.ERROR)
  warnings.filterwarnings('ignore', category=DeprecationWarning)
  # When one read fails, Orbax drops its others, which then complain one by one.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  sys.unraisablehook = _unraisable
  quiet_libtpu()
  join()


def join() -> None:
  """Makes this process one of several that run the same program, where the environment says so.

  JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
  """
  if address := os.environ.get('JAX_COORDINATOR_ADDRESS'):
    number, count = (int(os.environ[f'JAX_{key}']) for key in ('PROCESS_ID', 'NUM_PROCESSES'))
    jax.distributed.initialize(address, count, number)
  progress.speaks = primary()


def quiet_libtpu(attached: bool = False) -> None:
  """Where no TPU is attached, libtpu, if it is installed, shall not ask the network and complain.

  Args:
    attached: also where one is, which is then not asked for.
  """
  if not attached and (any(Path('/dev').glob('accel*')) or any(Path('/dev/vfio').glob('[0-9]*'))):
    return
  for key, value in {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_LOG_DIR': 'disabled',
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
  }.items():
    os.environ.setdefault(key, value)


def release_memory() -> None:
  """Gives freed memory back to the system.

  The C library keeps blocks below 32 MB, which a model of many layers consists of, on top of
  whatever the next stage needs.
  """
  gc.collect()
  with contextlib.suppress(AttributeError):  # another C library than glibc
    ctypes.CDLL(None).malloc_trim(0)


def _unraisable(found) -> None:
  if str(found.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(found)
