"""What the processes of one run do together; with one process, nothing is left to do.

Every process runs the same program. Files are written by process 0, and all see the same file
system. What they tell each other goes through the coordination service of `jax.distributed` and not
through the devices, so that it does not wait for a step that is under way.
"""

import contextlib
import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from optimer_jax import errors

T = TypeVar('T')

_PATIENCE_MS = 24 * 3600 * 1000  # Process 0 may import a model meanwhile; a dead one is noticed.
_number = itertools.count()


def primary() -> bool:
  """Whether this is process 0, which speaks and writes."""
  return jax.process_index() == 0


def once(action: Callable[[], T]) -> T:
  """Runs `action` in process 0; its result (JSON) or its error is that of every process.

  The others wait meanwhile, and see the files that it wrote. All must come here in the same order.
  """
  if jax.process_count() == 1:
    return action()
  service, key = distributed.global_state.client, f'optimer/{next(_number)}'
  if not primary():
    said = json.loads(service.blocking_key_value_get(key, _PATIENCE_MS))
    if 'error' in said:
      raise getattr(errors, said['kind'])(said['error'])
    return said['result']
  try:
    result = action()
  except BaseException as error:
    kind = type(error).__name__ if isinstance(error, errors.UserError) else 'UserError'
    text = str(error) if kind == type(error).__name__ else f'process 0: {error!r}'
    service.key_value_set(key, json.dumps({'error': text, 'kind': kind}))
    raise
  service.key_value_set(key, json.dumps({'result': result}))
  return result


def whole(array: jax.Array) -> jax.Array:
  """The array with all its values in every process, which must all come here."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return array
  return multihost_utils.process_allgather(array, tiled=True)


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
