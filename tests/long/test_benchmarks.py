"""The benchmarks in their small form: they agree with their peers and end with their last line."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_evaluate():
  """Same choices and answers as transformers, and nothing compiled after the first candidate."""
  sizes = ['--model=tiny', '--examples=8', '--shots=2', '--rounds=2']
  command = [sys.executable, '-m', 'benchmarks.evaluate', *sizes]
  out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  *_, rounds, last = out.splitlines()
  found = json.loads(last)
  for what in ('score', 'generate'):
    ratio = found[f'{what}_tokens_per_s'] / found[f'peer_{what}_tokens_per_s']
    assert abs(found[f'{what}_ratio'] / ratio - 1) < 1e-9
  assert found['recompiles_per_candidate'] == 0
  assert '8/8 choices' in rounds and '8/8 answers' in rounds
