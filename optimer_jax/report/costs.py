"""What every stage cost, in RUN/costs.jsonl; attempts that were killed are counted too."""

import contextlib
import datetime
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from optimer_jax.files import append_jsonl, read_json, write_text
from optimer_jax.progress import say

BEAT_S = 2.0


@contextlib.contextmanager
def account(run: Path, stage: str, worker: str = '') -> Iterator[dict]:
  """Measures a stage; the block may add `flops`, `tokens` … to the dict that it is given.

  While the stage runs, what it cost so far is written to RUN/.stage.json every two seconds. A stage
  that was killed is entered from there, marked `interrupted`, when the next one begins.
  """
  running = run / f'.stage{worker and "-"}{worker}.json'  # Workers share a stage.
  _enter_killed(running, run)
  row, start, done = {}, time.monotonic(), threading.Event()
  started = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  process, peak = psutil.Process(), [0]

  def measured() -> dict:
    peak[0] = max(peak[0], process.memory_info().rss)
    return {
      'stage': stage,
      'seconds': round(time.monotonic() - start, 2),
      'peak_rss_gb': round(peak[0] / 1e9, 3),
      'started': started,
    }

  def beat():
    written = 0.0
    while not done.wait(0.1):
      now = measured()
      if now['seconds'] - written >= BEAT_S:
        write_text(running, json.dumps({**now, **row, 'interrupted': True}))
        written = now['seconds']

  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  say(f'{stage} …')
  interrupted = {'interrupted': True}
  try:
    yield row
    interrupted = {}
  finally:
    done.set()
    thread.join()
    append_jsonl(run / 'costs.jsonl', {**measured(), **row, **interrupted})
    running.unlink(missing_ok=True)
  say(f'{stage}: {measured()["seconds"]:.0f} s')


def _enter_killed(running: Path, run: Path) -> None:
  if running.exists():
    append_jsonl(run / 'costs.jsonl', read_json(running))
    running.unlink()
