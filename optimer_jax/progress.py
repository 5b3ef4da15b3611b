"""Progress on long work: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm


def say(text: str) -> None:
  """One plain line for the person who waits."""
  tqdm.write(text, file=sys.stderr)
  sys.stderr.flush()


def progress(
  iterable: Iterable, total: int | None = None, what: str = '', unit: str = 'it'
) -> Iterator:
  """Iterates with rate and time left: a bar on a terminal, a line every ten seconds otherwise."""
  if sys.stderr.isatty():
    yield from tqdm(iterable, total=total, desc=what, unit=unit)
    return
  total = len(iterable) if total is None and hasattr(iterable, '__len__') else total
  start = told = time.monotonic()
  for done, item in enumerate(iterable, 1):
    yield item
    now = time.monotonic()
    if now - told >= 10 or done == total:
      rate, told = done / (now - start), now
      left = f', {(total - done) / rate:.0f} s left' if total else ''
      say(f'{what} {done}/{total or "?"} {unit}, {rate:.2f} {unit}/s{left}')
