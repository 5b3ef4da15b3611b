"""Progress on long work: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

speaks = True  # One of several processes speaks: see parallel.startup.


def say(text: str) -> None:
  """One plain line for the person who waits."""
  if not speaks:
    return
  tqdm.write(text, file=sys.stderr)
  sys.stderr.flush()


def progress(
  iterable: Iterable, total: int | None, what: str, unit: str, initial: int = 0
) -> Iterator:
  """Iterates with rate and time left: a bar on a terminal, a line every ten seconds otherwise.

  Args:
    iterable: what is left to do.
    total: how many there are, with those that were done before; None if that is not known.
    what: the work's name.
    unit: of what is counted.
    initial: how many were done before.
  """
  if not speaks:
    yield from iterable
    return
  if sys.stderr.isatty():
    yield from tqdm(iterable, total=total, desc=what, unit=unit, initial=initial)
    return
  start = told = time.monotonic()
  for done, item in enumerate(iterable, 1):
    yield item
    now = time.monotonic()
    if now - told >= 10 or initial + done == total:
      rate, told = done / (now - start), now
      of, left = '', ''
      if total is not None:
        of, left = f'/{total}', f', {(total - initial - done) / rate:.0f} s left'
      say(f'{what} {initial + done}{of} {unit}, {rate:.2f} {unit}/s{left}')
