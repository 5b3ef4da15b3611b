"""Scores of examples, what they sum to, and how two candidates' scores are compared."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

UNITS = ('bits/byte', 'accuracy')
DRAWS = 10_000  # of signs, for the p value of a paired difference

# (i, n): of N examples in an order that N fixes the i-th of n parts, from the i-th on every n-th.
Part = tuple[int, int]
WHOLE: Part = (0, 1)


@dataclasses.dataclass(frozen=True)
class Score:
  """The score of every example of a task.

  Attributes:
    values: float64 [N]: bits of each example, or 1 where it was solved and 0 where not.
    sizes: float64 [N]: bytes of each example, or ones.
    unit: 'bits/byte' (lower is better) or 'accuracy' (higher is better).
    truncated: prompts that were too long for the context, of which the end was kept.
    tokens: that the model read or wrote for the score, padding not counted.
  """

  values: np.ndarray
  sizes: np.ndarray
  unit: str = 'bits/byte'
  truncated: int = 0
  tokens: int = 0

  @property
  def value(self) -> float:
    """Bits per byte, or the share of solved examples."""
    return float(self.values.sum() / self.sizes.sum())

  @property
  def loss(self) -> float:
    """Lower is better: bits per byte, or the share of examples that were not solved."""
    return loss(self.summary())

  @property
  def stderr(self) -> float:
    """Standard error of `value` over examples (the ratio estimator's)."""
    return _stderr(self.values, self.sizes)

  def summary(self) -> dict:
    """What the ledger keeps, fit for JSON: what is not finite is None."""
    return {
      'value': _finite(self.value),
      'stderr': _finite(self.stderr),
      'count': len(self.values),
      'unit': self.unit,
      'tokens': self.tokens,
      'truncated': self.truncated,
    }

  def per_example(self) -> dict:
    """What `from_summary` needs beside the summary: lists of values and sizes."""
    return {'values': [*map(_finite, self.values.tolist())], 'sizes': self.sizes.tolist()}


def from_summary(summary: Mapping, per_example: Mapping) -> Score:
  """The score that was written as `summary()` and `per_example()`."""
  return Score(
    np.asarray(per_example['values'], np.float64),
    np.asarray(per_example['sizes'], np.float64),
    summary['unit'],
    summary['truncated'],
    summary['tokens'],
  )


def loss(summary: Mapping) -> float:
  """A score's summary as a number of which less is better; None and NaN stay NaN."""
  value = math.nan if summary['value'] is None else summary['value']
  return 1.0 - value if summary.get('unit') == 'accuracy' else value


def shown(summary: Mapping) -> str:
  """A score for people: '41.2% ± 1.3' or '1.2620 ± 0.0310 bits/byte'."""
  value, error = summary['value'], summary.get('stderr')
  if value is None:
    return 'not finite'
  if summary['unit'] == 'accuracy':
    return f'{value:.1%}' + ('' if error is None else f' ± {error * 100:.1f}')
  return f'{value:.4f}' + ('' if error is None else f' ± {error:.4f}') + f' {summary["unit"]}'


def compare(a: Mapping[str, Score], b: Mapping[str, Score]) -> dict:
  """Paired difference of the losses a - b, per task and as the mean over tasks.

  Examples are paired one to one; tasks are independent. `p` is the two-sided p value of no
  difference: the share of sign flips of the examples' differences (a paired permutation test)
  whose sum lies as far from 0 as the one observed.

  Raises:
    ValueError: the two were scored on other examples.
  """
  per_task, flipped = {}, np.zeros(DRAWS)
  rng = np.random.default_rng(0)
  for name, one in a.items():
    two = b[name]
    apart = _apart(name, one, two)
    total = one.sizes.sum()
    flips = _flipped_sums(rng, apart) / total
    flipped += flips / len(a)
    value = float(apart.sum() / total)
    per_task[name] = {
      'difference': value,
      'stderr': _stderr(apart, one.sizes),
      'p': _share_beyond(flips, value),
    }
  k = len(per_task)
  mean = sum(t['difference'] for t in per_task.values()) / k
  return {
    'difference': mean,
    'stderr': math.sqrt(sum(t['stderr'] ** 2 for t in per_task.values())) / k,
    'p': _share_beyond(flipped, mean),
    'per_task': per_task,
  }


# Parts.


def places(count: int, part: Part) -> np.ndarray:
  """The places int [n] of a part's examples among `count`, rising.

  ValueError if there is no such part.
  """
  i, n = part
  if not 0 <= i < n <= max(count, 1):
    raise ValueError(f'there is no part {i} of {n} of {count} examples')
  return np.sort(_mixed(count)[i::n])


def seen(count: int, m: int, n: int) -> np.ndarray:
  """bool [count]: which examples are in the first m of n parts."""
  found = np.zeros(count, bool)
  for i in range(m):
    found[places(count, (i, n))] = True
  return found


def _mixed(count: int) -> np.ndarray:
  """The places in an order without pattern: texts of several sources may come in turns."""
  return np.random.default_rng(0).permutation(count)


def joined(parts: Sequence[Score], of: int, count: int) -> Score:
  """The score of the first parts of `of` as one, its examples in the order of the task's `count`.

  Of all parts it is the score of the whole, but for the last bits (batches had other shapes) and
  for the tokens: what examples of several parts begin with was read in each.
  """
  order = np.argsort(np.concatenate([places(count, (i, of)) for i in range(len(parts))]))
  return Score(
    np.concatenate([part.values for part in parts])[order],
    np.concatenate([part.sizes for part in parts])[order],
    parts[0].unit,
    sum(part.truncated for part in parts),
    sum(part.tokens for part in parts),
  )


def difference(partial: Score, rival: Score, m: int, n: int) -> tuple[float, float]:
  """The loss of a candidate on all N examples less a rival's, and its standard error.

  The candidate was scored on the first m of n parts, the rival on all. Examples are paired: it is
  the sum of their differences over the sum of their sizes. The N examples are what is asked about,
  not a sample: the error is of the unseen ones alone, and 0 where m is n (Cochran 1977, Sampling
  Techniques, theorem 2.5). It takes the seen ones for drawn at random: too small where examples of
  a few sources take turns and n has a divisor in common with their number. From few examples it is
  a rough guess, and 0 where all differ by the same.

  Args:
    partial: `joined` of the parts.
    rival: of N examples.
    m, n: which parts the candidate has seen.

  Raises:
    ValueError: the candidate was scored on other examples.
  """
  mask = seen(len(rival.values), m, n)
  same = Score(rival.values[mask], rival.sizes[mask], rival.unit)
  apart = _apart(f'{m} of {n} parts', partial, same)
  value = float(apart.sum() / partial.sizes.sum())
  unseen = 1 - mask.mean()
  if rival.unit == 'accuracy':
    stderr = _stderr(np.append(apart, [1, -1]), np.ones(len(apart) + 2))
  else:
    stderr = _stderr(apart, partial.sizes)
  return value, stderr * math.sqrt(unseen) if unseen else 0.0


def estimate(partial: Score, rival: Score, m: int, n: int) -> tuple[float, float]:
  """The `Score.value` to expect of a candidate on all examples, and its standard error.

  That is the rival's and their `difference`, whose arguments these are.
  """
  apart, error = difference(partial, rival, m, n)
  return rival.value + (-apart if rival.unit == 'accuracy' else apart), error


def _apart(name: str, one: Score, two: Score) -> np.ndarray:
  """The losses of the same examples, one less two: float64 [N]; of other ones ValueError."""
  if not np.array_equal(one.sizes, two.sizes):
    raise ValueError(f'{name}: the two scores are of other examples')
  return (one.values - two.values) * (-1 if one.unit == 'accuracy' else 1)


def _flipped_sums(rng: np.random.Generator, difference: np.ndarray) -> np.ndarray:
  """What the sum of the differences might as well have been if their signs meant nothing."""
  sums = []
  for draws in np.array_split(np.arange(DRAWS), -(-DRAWS * len(difference) // 2**22)):
    signs = rng.integers(0, 2, (len(draws), len(difference)), np.int8) * 2 - 1
    sums.append(signs @ difference)
  return np.concatenate(sums)


def _share_beyond(draws: np.ndarray, value: float) -> float:
  # The observed one is one of the draws; rounding must not put it beyond itself.
  beyond = np.abs(draws) >= abs(value) * (1 - 1e-9)
  return float((beyond.sum() + 1) / (len(draws) + 1))


def _stderr(values: np.ndarray, sizes: np.ndarray) -> float:
  """Standard error of sum(values) / sum(sizes) over n examples."""
  n = len(values)
  if n < 2:
    return math.inf
  residual = values - values.sum() / sizes.sum() * sizes
  return float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / sizes.sum())


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None
