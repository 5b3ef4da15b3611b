"""A study in several processes: process 0 leads it, and all evaluate its candidates together."""

import functools
from collections.abc import Callable, Mapping

import jax

from optimer_jax.parallel.processes import once, primary


def led(lead: Callable[[Callable[..., Mapping]], dict], evaluate: Callable[..., Mapping]) -> dict:
  """Runs `lead(evaluate)` in process 0 alone, and says its result (JSON) or error in every process.

  Whenever it evaluates a candidate, all processes do. What it decides meanwhile, whether to stop
  there, is decided in process 0 too.

  Args:
    lead: what suggests candidates, and keeps files.
    evaluate: as `loop.run_study` takes it.
  """
  if jax.process_count() == 1:
    return lead(evaluate)
  if primary():
    return _lead(lead, evaluate)
  while 'point' in (task := once(dict)):
    stop = (lambda *_: once(bool)) if task['stops'] else None
    evaluate(task['point'], gradients=task['gradients'], stop=stop)
  return task['found']


def _lead(lead, evaluate):
  def together(point: Mapping[str, float], gradients: bool = False, stop: Callable | None = None):
    once(lambda: {'point': dict(point), 'gradients': gradients, 'stops': stop is not None})
    told = None if stop is None else lambda *now: once(lambda: bool(stop(*now)))
    return evaluate(point, gradients=gradients, stop=told)

  def failed(error: BaseException):
    raise error

  try:
    found = lead(together)
  except BaseException as error:  # The others must not wait for ever.
    once(functools.partial(failed, error))
    raise
  return once(lambda: {'found': found})['found']
