"""What a study answers: before its first trial, and at its end."""

from collections.abc import Mapping, Sequence

import numpy as np

from optimer_jax.errors import UserError
from optimer_jax.evaluation.scores import compare
from optimer_jax.progress import say
from optimer_jax.search.objectives import front, losses_of, stderrs_of
from optimer_jax.search.racing import difference, read_scores
from optimer_jax.search.samplers import Recommendation, recommend
from optimer_jax.search.study import Study

_DIRECTIONS = 12  # Points of a front that are predicted.


def recommended(study: Study, rows: Sequence[Mapping], number: int | None = None) -> Recommendation:
  """The optimum of what the trials taught; of a front, that of a direction."""
  feasible(study, rows)
  objective = study.objective(rows, number)
  return recommend(
    study.space,
    study.config.seed,
    [*study.tasks],
    objective,
    study.observations(rows, objective),
    study.config.simplex,
  )


def feasible(study: Study, rows: Sequence[Mapping]) -> list[Mapping]:
  """The trials whose scores are all finite; UserError if there are none."""
  found = [row for row in rows if np.isfinite(losses_of(row['scores'], study.tasks)).all()]
  if not found:
    bad = sorted(t for t, score in rows[-1]['scores'].items() if score['value'] is None)
    raise UserError(
      f'no candidate has finite scores, not even the base and the average (see {", ".join(bad)}): '
      'check the vectors and the evaluation data'
    )
  return found


def first_answer(study: Study, prior: Sequence[Mapping]) -> dict | None:
  """What the other studies' trials say of this one's question, before it evaluates anything.

  None if they do not hold what the objective is measured by.
  """
  if not prior or (objective := study.objective(prior)) is None:
    return None
  found = recommended(study, prior)
  best = _best_observed(study, prior, objective)
  sure = 'by a model that does not say how sure it is'
  if found.stderr is not None:
    sure = f'± {found.stderr:.4f}'
  say(
    f'study {study.config.name}: the {len(prior)} trials of other studies say, before anything is '
    f'evaluated: {shown(found.point)}, predicted {found.predicted:.4f} {sure}; the best of them '
    f'has {best["objective"]:.4f} (trial {best["trial"]} of {best["study"]})'
  )
  return {
    'trials': len(prior),
    'weights': found.point,
    'predicted': found.predicted,
    'stderr': found.stderr,
    'misfit': found.misfit,
  }


def best_of(
  study: Study,
  prior: Sequence[Mapping],
  rows: Sequence[Mapping],
  examples: Mapping[int, Mapping],
  first: Mapping | None,
) -> dict:
  """best.json: the optimum of what was learnt, which is the last trial, beside the best observed.

  Both are of the whole development set. Which one is taken is said with the paired difference
  between them.
  """
  every = [*prior, *rows]
  objective = study.objective(every)
  last = _with_objective(study, rows[-1], objective)
  observed = _best_observed(study, [*prior, *rows[:-1]], objective)
  taken = (
    observed if last['objective'] is None or last['objective'] > observed['objective'] else last
  )
  chosen = 'surrogate_optimum' if taken is last else 'best_observed'
  best = {
    'objective': study.config.objective.label,
    'best_observed': observed,
    'surrogate_optimum': last,
    'chosen': chosen,
    'weights': taken['weights'],
    'numbers': taken.get('numbers', {}),
    'ratios': _ratios(study, taken['weights']),
    'evaluations': len(rows),
    'reused': len(prior),
    'objectives': {str(row['trial']): study.value(row, objective) for row in rows},
  }
  if last['objective'] is not None:
    gain, error = observed['objective'] - last['objective'], last['objective_stderr']
    how = 'the standard error of one evaluation'
    if 'study' not in observed and {observed['trial'], last['trial']} <= examples.keys():
      gain, error = _paired(study, objective, observed, last, examples)
      how = 'the standard error of the paired difference'
      best['difference'] = {'difference': -gain, 'stderr': error}
    if gain <= error:
      say(
        f'the optimum of what was learnt ({last["objective"]:.4f}) is not better than the best '
        f'observed (trial {observed["trial"]}, {observed["objective"]:.4f}) by more than {how} '
        f'({error:.4f}): {chosen} is taken'
      )
  if first:
    best['first_answer'] = first
  if study.config.objective.kind == 'pareto':
    best['front'] = _front(study, every)
  return best


def _best_observed(study: Study, rows: Sequence[Mapping], objective) -> dict:
  full = [row for row in feasible(study, rows) if 'parts' not in row]
  return min(
    (_with_objective(study, row, objective) for row in full), key=lambda row: row['objective']
  )


def _with_objective(study: Study, row: Mapping, objective) -> dict:
  value, stderr = study.value(row, objective), None
  if value is not None:
    losses = losses_of(row['scores'], study.tasks)
    stderr = objective.stderr(losses, stderrs_of(row['scores'], study.tasks))
  return {**row, 'objective': value, 'objective_stderr': stderr}


def _paired(study, objective, observed, last, examples) -> tuple[float, float]:
  """By how much the objective of `last` is lower, and its standard error over the examples."""
  here, there = (read_scores(row, examples[row['trial']]) for row in (last, observed))
  gaps = compare(there, here)['per_task']
  found = [(gaps[task]['difference'], gaps[task]['stderr']) for task in study.tasks]
  differences, stderrs = map(np.array, zip(*found, strict=True))
  return difference(objective, losses_of(last['scores'], study.tasks), differences, stderrs)


def _ratios(study: Study, weights: Mapping[str, float]) -> dict[str, float]:
  """The weights above 0 as shares of their sum; of a vector, the mean of its groups."""
  positive = {
    vector: sum(max(weights[name], 0.0) for name in names) / len(names)
    for vector, names in study.parameters.items()
  }
  total = sum(positive.values())
  # The base itself (all weights zero) is no mixture.
  return {vector: weight / total if total else 0.0 for vector, weight in positive.items()}


def _front(study: Study, rows: Sequence[Mapping]) -> dict:
  """The trials that no other beats in every task, and what the model says lies between them."""
  counted = [
    task
    for task, w in zip(study.tasks, study.config.objective.weights_of([*study.tasks]), strict=True)
    if w
  ]
  full = [row for row in feasible(study, rows) if 'parts' not in row]
  losses = np.array([losses_of(row['scores'], counted) for row in full])
  there = [row for row, on in zip(full, front(losses), strict=True) if on]
  place = lambda row: {'trial': row['trial'], **({'study': row['study']} if 'study' in row else {})}
  predicted = [recommended(study, rows, number) for number in range(_DIRECTIONS)]
  return {
    'tasks': counted,
    'observed': [
      {
        **place(row),
        'weights': row['weights'],
        'losses': dict(zip(counted, losses_of(row['scores'], counted).tolist(), strict=True)),
      }
      for row in there
    ],
    'predicted': [
      {'weights': each.point, 'losses': {task: each.losses[task] for task in counted}}
      for each in predicted
      if each.losses
    ],
  }


def shown(point: Mapping[str, float]) -> str:
  """'ja 0.310 zh 0.120'"""
  return ' '.join(f'{name} {value:.3f}' for name, value in point.items())
