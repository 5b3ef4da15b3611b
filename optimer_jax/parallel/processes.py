"""What the processes of one run do together; with one process, nothing is left to do.

Every process runs the same program. Files are written by process 0, and all see the same file
system. What they tell each other goes through the coordination service of `jax.distributed` and not
through the devices, so that it does not wait for a step that is under way.
"""

import contextlib
import functools
import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optimer_jax import errors

P, T = ParamSpec('P'), TypeVar('T')

_PATIENCE_MS = 24 * 3600 * 1000  # Process 0 may import a model meanwhile; a dead one is noticed.
_number = itertools.count()
_alone = False  # Inside `once`, where the other processes do not come.


def primary() -> bool:
  """Whether this is process 0, which speaks and writes."""
  return jax.process_index() == 0


def once(action: Callable[[], T]) -> T:
  """Runs `action` in process 0; its result (JSON) or its error is that of every process.

  The others wait meanwhile, and see the files that it wrote. All must come here in the same order.
  """
  global _alone
  if jax.process_count() == 1 or _alone:
    return action()
  service, key = distributed.global_state.client, f'optimer/{next(_number)}'
  if not primary():
    said = json.loads(service.blocking_key_value_get(key, _PATIENCE_MS))
    if 'error' in said:
      raise getattr(errors, said['kind'])(said['error'])
    return said['result']
  _alone = True
  try:
    result = action()
  except BaseException as error:
    kind = type(error).__name__ if isinstance(error, errors.UserError) else 'UserError'
    text = str(error) if kind == type(error).__name__ else f'process 0: {error!r}'
    service.key_value_set(key, json.dumps({'error': text, 'kind': kind}))
    raise
  finally:
    _alone = False
  service.key_value_set(key, json.dumps({'result': result}))
  return result


def meet() -> None:
  """Waits until every process has come here: some compile what others find in the cache."""
  if jax.process_count() > 1:
    distributed.global_state.client.wait_at_barrier(f'optimer/{next(_number)}', _PATIENCE_MS)


def alone(function: Callable[P, T]) -> Callable[P, T | None]:
  """Has `function` run by process 0, which gets its result; the others wait and get None."""

  @functools.wraps(function)
  def by_process_0(*args, **kwargs):
    found = []
    once(lambda: found.append(function(*args, **kwargs)))
    return found[0] if found else None

  return by_process_0


def in_turn(action: Callable[[], T]) -> T:
  """The result of `action` in each process: in process 0 first, so that others find its files."""
  found = alone(action)()
  return found if primary() else action()


def whole_rows(array: jax.Array, start: int, stop: int) -> np.ndarray:
  """Rows of an array that is spread over the devices of all processes, which must all come here."""
  return np.asarray(_taker(array.sharding.mesh)(array, start, stop - start))


@functools.lru_cache
def _taker(mesh: Mesh) -> Callable:
  take = lambda array, start, count: jax.lax.dynamic_slice_in_dim(array, start, count)
  return jax.jit(take, static_argnums=2, out_shardings=NamedSharding(mesh, PartitionSpec()))


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
  """Inside, SIGTERM does not end the process; what is yielded says whether to save and stop.

  It is asked once a step, and says yes to every process at the same step, which is the next one or
  the one after, whichever of them was told to stop.
  """
  if jax.process_count() > 1:  # JAX catches the signal from `jax.distributed.initialize` on.
    yield multihost_utils.reached_preemption_sync_point
    return
  told = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # Python gives signals to the main thread alone.
    return
  before = signal.signal(signal.SIGTERM, lambda *_: told.set())
  try:
    yield lambda step: told.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)
