"""Measurements: `python -m benchmarks.NAME` prints a table, then one line of JSON."""

import json
import sys
from collections.abc import Callable

from optimer_jax.errors import UserError
from optimer_jax.parallel.startup import quiet_libtpu

quiet_libtpu()


def print_found(measure: Callable[[], dict]) -> int:
  """Prints what `measure` finds as the last line; returns the exit status.

  A UserError is one sentence on standard error, and status 1.
  """
  try:
    found = measure()
  except UserError as error:
    print(error, file=sys.stderr)
    return 1
  print(json.dumps(found))
  return 0
