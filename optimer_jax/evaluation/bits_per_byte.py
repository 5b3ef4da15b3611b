"""Bits per byte of held-out text: comparable across tokenizers, lower is better."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from optimer_jax.data.rows import Rows
from optimer_jax.gemma3 import Model, token_nats


@dataclasses.dataclass(frozen=True)
class Score:
  """Nats and bytes of each example, and what they sum to."""

  nats: np.ndarray  # float64 [N]
  bytes: np.ndarray  # int64 [N]

  @property
  def value(self) -> float:
    """Bits per byte over all examples."""
    return float(self.nats.sum() / math.log(2) / self.bytes.sum())

  @property
  def stderr(self) -> float:
    """Standard error of `value` over examples (the ratio estimator's)."""
    return _stderr(self.nats / math.log(2), self.bytes)

  def summary(self) -> dict:
    """What the ledger keeps."""
    return {
      'value': self.value,
      'stderr': self.stderr,
      'count': len(self.nats),
      'unit': 'bits/byte',
    }


def score(model: Model, params: dict, rows: Rows, batch: int) -> Score:
  """Scores every row once.

  One program serves every candidate and every batch: parameters are arguments, and the last
  batch is filled up with padding rows that count nothing.

  Args:
    model: what to compute.
    params: the candidate.
    rows: N evaluation rows.
    batch: rows at once.
  """
  nats = [_row_nats(model, params, *arrays) for arrays in _batches(rows, batch)]
  # Everything is queued before the first result is waited for.
  nats = np.concatenate([np.asarray(n, np.float64) for n in nats])[: len(rows.tokens)]
  return Score(nats, np.asarray(rows.bytes, np.int64))


def compare(a: Mapping[str, Score], b: Mapping[str, Score]) -> dict:
  """Paired difference a - b in bits per byte, per task and as the mean over tasks.

  Examples are paired one to one; tasks are independent.
  """
  per_task = {}
  for name in a:
    difference = (a[name].nats - b[name].nats) / math.log(2)
    per_task[name] = {
      'difference': float(difference.sum() / a[name].bytes.sum()),
      'stderr': _stderr(difference, a[name].bytes),
    }
  k = len(per_task)
  return {
    'difference': sum(t['difference'] for t in per_task.values()) / k,
    'stderr': math.sqrt(sum(t['stderr'] ** 2 for t in per_task.values())) / k,
    'per_task': per_task,
  }


@functools.partial(jax.jit, static_argnames='model')
def _row_nats(model, params, tokens, positions, segment_ids):
  return token_nats(model, params, tokens, positions, segment_ids)[0].sum(axis=1)


def _batches(rows: Rows, batch: int) -> Iterator[tuple[jax.Array, ...]]:
  for start in range(0, len(rows.tokens), batch):
    arrays = [a[start : start + batch] for a in (rows.tokens, rows.positions, rows.segment_ids)]
    missing = batch - len(arrays[0])
    yield tuple(jnp.asarray(np.pad(a, ((0, missing), (0, 0)))) for a in arrays)


def _stderr(bits: np.ndarray, sizes: np.ndarray) -> float:
  """Standard error of sum(bits) / sum(sizes) over n examples."""
  n = len(bits)
  if n < 2:
    return math.inf
  residual = bits - bits.sum() / sizes.sum() * sizes
  return float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / sizes.sum())
