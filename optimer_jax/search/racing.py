"""Racing: a candidate that cannot win any more is not scored to the end.

All candidates meet the examples in the same order, so that one can be compared with another on
those seen so far, example by example: the difference of two merges is known far more sharply than
either one's score.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from optimer_jax.evaluation import scores
from optimer_jax.evaluation.scores import Score, from_summary
from optimer_jax.search.objectives import Aggregate
from optimer_jax.search.study import Study

_SURE = 0.999  # How sure it must be that the rival stays better.


# The scores of the best candidate so far, with those of each example, by task.
Rival = Mapping[str, Score]


def rival_of(
  study: Study, rows: Sequence[Mapping], objective: Aggregate, examples: Mapping[int, Mapping]
) -> Rival | None:
  """The best of the study's trials that was scored on all examples, if any was.

  Args:
    examples: what `Score.per_example` gave for each task, by trial.
  """
  there = [row for row in rows if 'parts' not in row and row['trial'] in examples]
  values = {row['trial']: study.value(row, objective) for row in there}
  there = [row for row in there if values[row['trial']] is not None]
  if not there:
    return None
  row = min(there, key=lambda row: values[row['trial']])
  return read_scores(row, examples[row['trial']])


def read_scores(row: Mapping, per_example: Mapping) -> dict[str, Score]:
  """A trial's scores with those of each example."""
  return {task: from_summary(row['scores'][task], per_example[task]) for task in row['scores']}


def difference(
  objective: Aggregate, losses: np.ndarray, differences: np.ndarray, stderrs: np.ndarray
) -> tuple[float, float]:
  """By how much the objective changes from `losses` [J], and the standard error of that.

  The tasks' differences [J] are independent of one another.
  """
  there = losses + differences
  return float(objective(there) - objective(losses)), objective.stderr(there, stderrs)


def cannot_win(
  study: Study, objective: Aggregate, rival: Rival, partial: Mapping[str, Score], done: int
) -> bool:
  """Whether the rival is sure to stay better than a candidate.

  Args:
    partial: the candidate's scores on the first `done` of the study's parts of the examples.
  """
  gaps = [
    scores.difference(partial[task], rival[task], *_parts(study, rival, task, done))
    for task in study.tasks
  ]
  differences, stderrs = map(np.array, zip(*gaps, strict=True))
  if not np.isfinite(differences).all():
    return True
  losses = np.array([rival[task].loss for task in study.tasks])
  value, stderr = difference(objective, losses, differences, stderrs)
  seen = min(len(score.values) for score in partial.values())
  return value > scipy.stats.t.ppf(_SURE, max(seen - 1, 1)) * stderr


def estimated(study: Study, rival: Rival, result: Mapping) -> dict:
  """The result of a candidate that was given up, with its scores as they would be on all examples.

  The standard errors are those of what the other examples may add.
  """
  found = {}
  for task, summary in result['scores'].items():
    partial = from_summary(summary, result['per_example'][task])
    value, stderr = scores.estimate(
      partial, rival[task], *_parts(study, rival, task, result['parts'])
    )
    found[task] = {**summary, 'value': value, 'stderr': stderr}
  return {**result, 'scores': found}


def _parts(study: Study, rival: Rival, task: str, done: int) -> tuple[int, int]:
  """How many parts of a task were scored, and how many there are: no more than examples."""
  count = min(study.config.parts, len(rival[task].values))
  return min(done, count), count
