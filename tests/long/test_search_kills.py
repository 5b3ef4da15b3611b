"""A study, killed where it hurts."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.test_search import evaluate, ledger, run, unbroken

__all__ = ['unbroken']  # a fixture

CHILD = textwrap.dedent("""
  import os, signal, sys
  import jax
  jax.config.update('jax_compilation_cache_dir', sys.argv[3])
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  sys.path.insert(0, sys.argv[1])
  import test_search
  from pathlib import Path
  from vizier._src.algorithms.designers import gp_bandit
  die = lambda: os.kill(os.getpid(), signal.SIGKILL)
  where, trial, directory = sys.argv[4], int(sys.argv[5]), Path(sys.argv[2])
  seen = len(test_search.ledger(directory)) if directory.exists() else 0
  def evaluate(weights):
    global seen
    seen += 1
    if where == 'evaluate' and seen == trial:
      die()
    return test_search.evaluate(weights)
  suggest = gp_bandit.VizierGPBandit.suggest
  def suggest_or_die(self, count=1):
    found = suggest(self, count)
    if where == 'suggest' and seen + 1 == trial:
      die()
    return found
  gp_bandit.VizierGPBandit.suggest = suggest_or_die
  observe = test_search.VizierSampler.observe
  def observe_or_die(self, weights, objective):
    if where == 'observe' and seen == trial:
      die()
    observe(self, weights, objective)
  test_search.VizierSampler.observe = observe_or_die
  test_search.run(directory, evaluate)
""")


def test_killed_anywhere_it_ends_as_if_it_had_not_been(unbroken, tmp_path):
  """SIGKILL inside an evaluation, inside a suggestion, and between the ledger and the database."""
  directory, best, _ = unbroken
  here, cache = str(Path(__file__).parents[1]), str(tmp_path / 'cache')
  study_directory = tmp_path / 'study'
  for where, trial in [('evaluate', 4), ('suggest', 5), ('observe', 6)]:
    child = subprocess.run(
      [sys.executable, '-c', CHILD, here, str(study_directory), cache, where, str(trial)],
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    done = trial if where == 'observe' else trial - 1
    assert ledger(study_directory) == ledger(directory)[:done]
  asked = []
  resumed = run(study_directory, lambda weights: asked.append(weights) or evaluate(weights))
  assert ledger(study_directory) == ledger(directory)
  assert len(asked) == 12 - 6
  without_time = lambda best: json.dumps(best, sort_keys=True).split('"time"')[0]
  assert without_time(resumed) == without_time(best)
