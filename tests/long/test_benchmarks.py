"""The benchmarks in their small form: they agree with their peers and end with their last line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.surfaces import from_ledger, live, simulate
from optimer_jax import pipeline
from optimer_jax.files import read_jsonl
from optimer_jax.search.objectives import losses_of
from optimer_jax.search.study import StudyConfig

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


def test_train_step():
  """The same losses as torch's, step for step."""
  sizes = ['--quick', '--batch=2', '--length=64', '--rounds=3']
  command = [sys.executable, '-m', 'benchmarks.train_step', *sizes]
  out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  found = json.loads(out.splitlines()[-1])
  assert abs(found['ratio'] / (found['tokens_per_s'] / found['peer_tokens_per_s']) - 1) < 1e-9
  assert found['memory_ratio'] == found['peak_rss_gb'] / found['peer_peak_rss_gb'] > 0
  assert len(found['losses']) == 4 and len(found['round_ratios']) == 3
  assert len(set(found['losses'])) == 4 and found['loss_difference'] < 1e-6


def test_search():
  """Every sampler on two surfaces; the one with gradients needs a handful of trials."""
  command = [sys.executable, '-m', 'benchmarks.search', '--quick']
  out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  found = json.loads(out.splitlines()[-1])
  trials = found['trials_to_1pct']
  assert set(trials) == {'K4_mean', 'K4_worst'}
  for arrived in trials.values():
    assert {'gradient', 'composite', 'vizier', 'tpe', 'random'} <= set(arrived)
    assert arrived['gradient'] <= 6
  for surface, forwards in found['forward_equivalents_to_1pct'].items():
    assert forwards['gradient'] == 3 * trials[surface]['gradient']
  assert all(found['suggest_s_p50'][name] > 0 for name in ('vizier', 'composite'))


@pytest.mark.parametrize('kind', ['', 'cubic', 'saturating', 'ridge', 'kink'])
def test_simulated_surfaces(kind):
  surface = simulate(4, 'worst', kind, seed=0)
  w, step = np.array([0.3, 0.5, 0.2, 0.7]), 1e-6 * np.eye(4)
  slopes = [(surface.losses(w + s) - surface.losses(w - s)) / 2e-6 for s in step]
  np.testing.assert_allclose(surface.gradients(w), np.transpose(slopes), rtol=1e-6, atol=1e-8)
  some = np.random.default_rng(0).uniform(size=(10_000, 4))
  assert surface.best < min(surface.losses(w).max() for w in some)
  assert surface.gain == surface.losses(np.zeros(4)).max() - surface.best


def test_surfaces_of_a_pool(done):
  """The live pool is the study's evaluation; the splines pass through the ledger's trials."""
  run = dataclasses.replace(
    done, study=StudyConfig('more', trials=8, sampler='sobol', parts=1, reuse=())
  )
  pipeline.search(run)
  rows = read_jsonl(run.path / 'studies' / 'more' / 'trials.jsonl')
  base = losses_of(next(r for r in rows if not any(r['weights'].values()))['scores'], run.names)
  pools = [live(run, 'mean'), from_ledger(run.path, 'mean')]
  for row in rows:
    w = np.array([row['weights'][name] for name in run.vector_paths])
    for surface in pools:
      np.testing.assert_allclose(
        surface.losses(w), losses_of(row['scores'], run.names) / base, rtol=1e-9
      )
  measured, splines = pools
  w, step = np.array([0.4, 0.6]), 1e-2 * np.eye(2)
  slopes = [(measured.losses(w + s) - measured.losses(w - s)) / 2e-2 for s in step]
  np.testing.assert_allclose(measured.gradients(w), np.transpose(slopes), rtol=0.02)
  assert measured.best <= min(measured.losses(w).mean() for w in np.eye(2))
  assert abs(splines.best - measured.best) < 0.2 * measured.gain
