"""Weights that are none below 0 and sum to 1, as points of a box.

The i-th of K - 1 sticks is how much of what the weights before it left the i-th weight takes, on a
scale on which points that are even in the box are even on the simplex.
"""

import dataclasses
from collections.abc import Mapping, Sequence

_SUM = 1e-6  # How far from 1 a sum may be and still be rounding.


def sticks(names: Sequence[str]) -> dict[str, tuple[float, float]]:
  """The box, for K weights."""
  return {f'stick {i:02}': (0.0, 1.0) for i in range(len(names) - 1)}


def from_sticks(names: Sequence[str], point: Mapping[str, float]) -> dict[str, float]:
  """The weights, by name, of a point of the box."""
  left, weights = 1.0, {}
  for i, name in enumerate(names[:-1]):
    others = len(names) - 1 - i
    weights[name] = left * (1.0 - (1.0 - point[f'stick {i:02}']) ** (1 / others))
    left -= weights[name]
  return {**weights, names[-1]: max(left, 0.0)}


def to_sticks(names: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
  """The point of the box of weights on the simplex."""
  left, point = 1.0, {}
  for i, name in enumerate(names[:-1]):
    share = min(max(weights[name] / left, 0.0), 1.0) if left > 0 else 0.0
    point[f'stick {i:02}'] = 1.0 - (1.0 - share) ** (len(names) - 1 - i)
    left -= weights[name]
  return point


def scaled(weights: Mapping[str, float]) -> dict[str, float]:
  """Weights above 0 so that they sum to 1."""
  total = sum(weights.values())
  return {name: weight / total for name, weight in weights.items()}


def on_sticks(names: Sequence[str], observed: Sequence) -> list:
  """The observations that are on the simplex, each with its point of the box."""
  return [
    dataclasses.replace(trial, point=to_sticks(names, trial.point))
    for trial in observed
    if min(trial.point.values()) >= 0 and abs(sum(trial.point.values()) - 1) < _SUM
  ]
