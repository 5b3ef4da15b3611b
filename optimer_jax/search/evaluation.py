"""A trial: from a point of the search to the scores of its candidate."""

import time
from collections.abc import Callable, Mapping

from optimer_jax.evaluation.engine import Prepared
from optimer_jax.evaluation.scores import Score, joined
from optimer_jax.merging.candidates import MergeConfig, candidates
from optimer_jax.search.study import Study
from optimer_jax.vectors.pool import Pool

GRADIENT_COST = 3  # Forward passes that a forward and a backward pass are worth.


def evaluation(
  study: Study,
  pool: Pool,
  merging: MergeConfig,
  tasks: Mapping[str, Prepared],
  length: int,
  spent: dict,
) -> Callable[..., dict]:
  """What `run_study` calls for each candidate.

  Args:
    study: the study.
    pool: base and vectors.
    merging: how a point becomes a candidate.
    tasks: what is scored.
    length: tokens at which a token's FLOPs are counted.
    spent: 'flops' and 'tokens' are counted up in it.
  """
  config = study.config
  candidate = candidates(pool, merging, config.groups)
  parts = {name: min(config.parts, task.count) for name, task in tasks.items()}
  # The names of the weights in the order of a gradient [G, K].
  by_group = [name for group in zip(*study.parameters.values(), strict=True) for name in group]
  spent |= {'flops': 0.0, 'tokens': 0}

  def in_parts(params: dict, stop: Callable) -> tuple[dict[str, Score], int]:
    """Scores part after part, and after how many it ended."""
    seen = {name: [] for name in tasks}
    for i in range(config.parts):
      for name, task in tasks.items():
        if i < parts[name]:
          seen[name].append(task.score(params, (i, parts[name])))
      found = {name: joined(x, parts[name], tasks[name].count) for name, x in seen.items()}
      if i + 1 < config.parts and stop(found, i + 1):
        break
    return found, i + 1

  def evaluate(
    point: Mapping[str, float], gradients: bool = False, stop: Callable | None = None
  ) -> dict:
    began, params, done, slopes = time.monotonic(), candidate(point), config.parts, {}
    if stop:
      scores, done = in_parts(params, stop)
    elif gradients:
      scores = {}
      for name, task in tasks.items():
        if not task.gradient:
          scores[name] = task.score(params)
          continue
        scores[name], found = task.gradient(params, pool.vectors, config.groups)
        slopes[name] = dict(zip(by_group, found.reshape(-1).tolist(), strict=True))
    else:
      scores = {name: task.score(params) for name, task in tasks.items()}
    per_token = pool.model.config.flops_per_token(length)
    flops = sum(
      score.tokens * per_token * (GRADIENT_COST if name in slopes else 1)
      for name, score in scores.items()
    )
    spent['flops'] += flops
    spent['tokens'] += sum(score.tokens for score in scores.values())
    result = {
      'scores': {name: score.summary() for name, score in scores.items()},
      'per_example': {name: score.per_example() for name, score in scores.items()},
      'seconds': time.monotonic() - began,
      'flops': flops,
    }
    if slopes:
      result['gradients'] = slopes
    if done < config.parts:
      result['parts'] = done
    return result

  return evaluate
