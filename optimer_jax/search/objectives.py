"""Objectives: pure functions of per-task scores, always to be minimised."""

import difflib
import math
from collections.abc import Callable, Mapping

from optimer_jax.errors import UsageError
from optimer_jax.evaluation.scores import loss

# {task: {'value': …, 'stderr': …, 'unit': …}}; a value that is not finite stands as None or NaN.
# Objectives see losses: bits per byte, 1 - accuracy.
Scores = Mapping[str, Mapping]


def mean(scores: Scores) -> float:
  """The unweighted mean of the tasks' losses; NaN if a task has no finite value."""
  values = _values(scores)
  return sum(values) / len(values)


def worst(scores: Scores) -> float:
  """The loss of the worst task; NaN if a task has no finite value."""
  values = _values(scores)
  return math.nan if any(map(math.isnan, values)) else max(values)


OBJECTIVES: dict[str, Callable[[Scores], float]] = {'mean': mean, 'worst': worst}


def objective_named(name: str) -> Callable[[Scores], float]:
  """The objective of that name.

  Raises:
    UsageError: there is none; the message gives the nearest name.
  """
  if name not in OBJECTIVES:
    near = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0)
    raise UsageError(
      f'there is no objective {name!r}: did you mean {near[0]!r}? (known: {", ".join(OBJECTIVES)})'
    )
  return OBJECTIVES[name]


def standard_error(objective: Callable[[Scores], float], scores: Scores) -> float:
  """The objective's standard error, the tasks' errors taken as independent and small.

  Each task is moved by its own standard error in turn and the changes are added in squares. A
  task without a standard error counts as exact.
  """
  centre, total = objective(scores), 0.0
  for task, score in scores.items():
    moved = {**score, 'value': score['value'] + (score.get('stderr') or 0.0)}
    total += (objective({**scores, task: moved}) - centre) ** 2
  return math.sqrt(total)


def _values(scores: Scores) -> list[float]:
  values = [loss(score) for score in scores.values()]
  return [value if math.isfinite(value) else math.nan for value in values]
