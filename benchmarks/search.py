"""The samplers on simulated and real pools: trials to within 1% of the best merge.

    python -m benchmarks.search [--quick] [--samplers NAME …] [--out FILE] [--minutes M]

A surface has K data sets and as many tasks. Task j's loss is a bowl in the weights: its curvature
comes from K vectors of different lengths that are not quite orthogonal, and its lowest point has
much of its own vector and a little, or less than nothing, of the others. Then come surfaces that
the composite's model cannot represent: `cubic` adds 0.3 times a cube along a random direction to
each loss, `saturating` passes the bowl through 1 - exp(-x), `ridge` adds the steep walls of a
valley, `kink` has absolute values for squares. The objective is the tasks' mean or the worst one.

A simulated loss is observed with noise of 1% of what merging can gain: the objective at the base
minus its minimum over the box [0, 1]^K. Gradients are exact, as automatic differentiation gives
them.

Two real pools stand beside the simulated ones. That of the run --live, where it has been trained,
is merged and scored at every trial, on its development set as it is. --ledger is a directory of
studies, through whose trials splines pass: some must be everywhere (the sampler sobol gives them).
Their losses count in shares of the base's.

Every search begins with the uniform average and the base, which count as trials.

Regret is that of the recommendation after each trial, without noise, over what merging can gain.
composite and gradient recommend the optimum of the tasks' model, vizier that of its own GP, tpe and
random the best that they observed. In the column vizier+fit the tasks' model is fitted to what
vizier observed, and its optimum recommended, as a study does. A search ends once its
regrets have been below 1%, or when it has cost 40 forward evaluations: a trial costs one, and one
with gradients three.

Results are appended to --out, a line for each surface, sampler and seed, and what stands there is
not run again: the whole takes hours, and may be stopped and started, and shared by two processes
with other --samplers. --minutes ends it earlier.
The tables and the last line are of the runs in the file. Differences are between the forward
equivalents of one surface and seed, where a search that did not arrive counts as one trial more
than it could have; their intervals are bootstrap intervals (95%) of the mean.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks.surfaces import OBJECTIVES, Surface, from_ledger, has_pool, live, simulate
from optimer_jax.configs import read_run
from optimer_jax.errors import UserError
from optimer_jax.files import append_jsonl, read_jsonl
from optimer_jax.search.samplers import Observation, make_sampler, recommend
from optimer_jax.search.vizier import surrogate_optimum

OUT = Path(__file__).parent / 'results' / 'search' / 'runs.jsonl'
BUDGET, SEEDS, TARGET = 40, 10, 0.01
COST = {'gradient': 3}  # Forward evaluations a trial; 1 for the others.
TRACED = {'mean': jnp.mean, 'worst': jnp.max}
SAMPLERS = ('gradient', 'composite', 'vizier', 'tpe', 'random')
PAIRS = (
  ('composite', 'vizier'),
  ('gradient', 'vizier'),
  ('vizier', 'tpe'),
  ('gradient', 'composite'),
)
SIMULATED = [
  *[(k, objective, kind) for k in (4, 6, 10) for objective in OBJECTIVES for kind in ('', 'cubic')],
  *[(4, objective, kind) for objective in OBJECTIVES for kind in ('saturating', 'ridge', 'kink')],
]
LEDGER = Path(__file__).parent / 'results' / 'study' / 'study_270m'


def search(surface: Surface, objective: str, name: str, seed: int) -> dict:
  """One search: its regrets after each trial, by what recommends, and seconds a suggestion."""
  traced, plain = TRACED[objective], OBJECTIVES[objective]
  k, rng = surface.k, np.random.default_rng([seed, 1])
  names = [f'd{i:02}' for i in range(k)]
  tasks = [f't{i:02}' for i in range(len(surface.losses(np.zeros(k))))]
  space = dict.fromkeys(names, (0.0, 1.0))
  points, scalars, observed, seconds = [], [], [], []
  regrets = {column: [] for column in ([name, 'vizier+fit'] if name == 'vizier' else [name])}
  regret = lambda w: float((plain(surface.losses(w)) - surface.best) / surface.gain)

  def recommended(column):
    """The weights [K] that `column` recommends after what was observed."""
    if column == name and name in ('tpe', 'random'):
      return points[int(np.argmin(scalars))]
    if column == 'vizier':
      pairs = [(trial.point, trial.objective) for trial in observed]
      found, _ = surrogate_optimum(space, seed, pairs)
    else:
      found = recommend(space, seed, tasks, traced, observed).point
    return np.array([found[n] for n in names])

  with tempfile.TemporaryDirectory() as folder:
    path, left = Path(folder) / 'study.db', trials(name) - 2
    sampler = make_sampler(name, space, seed, tasks, traced, path, left=left)
    for trial in range(trials(name)):
      if trial < 2:
        point = dict.fromkeys(names, (1 / k, 0.0)[trial])
      else:
        began = time.perf_counter()
        (point,) = sampler.suggest(1)
        seconds.append(time.perf_counter() - began)
      w = np.array([point[n] for n in names])
      losses = surface.losses(w) + surface.noise * rng.standard_normal(len(tasks))
      gradients = None
      if sampler.wants_gradients:
        gradients = {
          t: dict(zip(names, map(float, row), strict=True))
          for t, row in zip(tasks, surface.gradients(w), strict=True)
        }
      points.append(w)
      scalars.append(float(plain(losses)))
      by_task = dict(zip(tasks, map(float, losses), strict=True))
      observed.append(Observation(point, scalars[-1], by_task, gradients=gradients))
      sampler.observe(observed[-1])
      for column, found in regrets.items():
        if found and found[-1] < TARGET:
          continue  # It has arrived.
        found.append(regret(w if trial == 0 else recommended(column)))
      if all(found[-1] < TARGET for found in regrets.values()):
        break
  return {'regrets': regrets, 'seconds': seconds}


def cases(options: argparse.Namespace) -> dict[str, tuple[str, Callable[[int], Surface]]]:
  """By the surface's name: its objective, and what makes it of a seed."""
  if options.quick:
    return {f'K4_{each}': (each, partial(simulate, 4, each, '')) for each in OBJECTIVES}
  found = {
    '_'.join(filter(None, [f'K{k}', objective, kind])): (
      objective,
      partial(simulate, k, objective, kind),
    )
    for k, objective, kind in SIMULATED
  }
  measured = {'ledger': partial(from_ledger, options.ledger)}
  run = read_run([options.live], [])
  if has_pool(run):
    measured['live'] = partial(live, run)
  else:
    print(f'no surfaces live_*: {run.directory} has no vectors')
  for name, make in measured.items():
    for objective in OBJECTIVES:
      made = functools.cache(partial(make, objective))  # one for all seeds
      found[f'{name}_{objective}'] = objective, lambda seed, made=made: made()
  return found


def trials(column: str) -> int:
  """How many a search may have."""
  return BUDGET // COST.get(column, 1)


def arrival(regrets: list[float]) -> int | None:
  """The first trial after which regret was below the target."""
  return next((i for i, regret in enumerate(regrets, 1) if regret < TARGET), None)


def median(arrivals: list[int | None]) -> float | None:
  """None if half of the searches or more never arrived."""
  found = statistics.median([float('inf') if x is None else x for x in arrivals])
  return found if math.isfinite(found) else None


def forwards(column: str, arrived: int | None) -> int:
  return COST.get(column, 1) * (trials(column) + 1 if arrived is None else arrived)


def interval(differences: list[float]) -> list[float]:
  """The mean and the ends of its bootstrap interval."""
  drawn = np.random.default_rng(0).choice(differences, (2000, len(differences))).mean(1)
  ends = np.quantile(drawn, [0.025, 0.975])
  return [round(float(x), 1) for x in (np.mean(differences), *ends)]


def report(runs: list[dict]) -> dict:
  arrived = {}  # {surface: {column: {seed: trials or None}}}
  for run in runs:
    for column, regrets in run['regrets'].items():
      arrived.setdefault(run['surface'], {}).setdefault(column, {})[run['seed']] = arrival(regrets)
  columns = sorted({column for found in arrived.values() for column in found})
  print('median trials to 1% regret')
  print(f'{"surface":20}{"seeds":>6}' + ''.join(f'{column:>12}' for column in columns))
  medians_of, equivalents, paired = {}, {}, {}
  wins = {f'{a}_against_{b}': [0, 0, 0] for a, b in PAIRS}
  for surface, found in arrived.items():
    medians = {column: median([*found[column].values()]) for column in columns if column in found}
    medians_of[surface] = medians
    equivalents[surface] = {
      column: None if x is None else COST.get(column, 1) * x for column, x in medians.items()
    }
    seeds = max(len(column) for column in found.values())
    show = lambda x: '-' if x is None else f'{x:g}'
    print(f'{surface:20}{seeds:>6}' + ''.join(f'{show(medians.get(c)):>12}' for c in columns))
    for a, b in PAIRS:
      both = sorted(set(found.get(a, ())) & set(found.get(b, ())))
      if not both:
        continue
      change = [forwards(a, found[a][seed]) - forwards(b, found[b][seed]) for seed in both]
      paired.setdefault(surface, {})[f'{a}_minus_{b}'] = interval(change)
      if surface.startswith('K') and surface.count('_') == 2:
        for i, holds in enumerate([lambda x: x < 0, lambda x: x == 0, lambda x: x > 0]):
          wins[f'{a}_against_{b}'][i] += sum(map(holds, change))
  print('\nforward equivalents, mean difference of pairs [95% interval]')
  for surface, pairs in paired.items():
    show = lambda pair, x: f'{pair} {x[0]:+.1f} [{x[1]:+.1f}, {x[2]:+.1f}]'
    cells = [show(*item) for item in pairs.items()]
    print(f'{surface:20}' + '  '.join(cells))
  print('\non distorted surfaces: [better, alike, worse] in forward equivalents')
  for pair, counts in wins.items():
    print(f'  {pair}: {counts}')
  seconds = {}
  for run in runs:
    if run['surface'].startswith('K4_'):
      seconds.setdefault(run['sampler'], []).extend(run['seconds'])
  return {
    'trials_to_1pct': medians_of,
    'forward_equivalents_to_1pct': equivalents,
    'paired_forward_equivalents': paired,
    'suggest_s_p50': {
      name: round(statistics.median(times), 4) for name, times in seconds.items() if times
    },
    'wins_under_distortion': wins,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--quick', action='store_true', help='K = 4, two surfaces, two seeds')
  parser.add_argument('--samplers', nargs='+', choices=SAMPLERS, default=SAMPLERS, metavar='NAME')
  parser.add_argument('--live', default='runs/quickstart_tiny.gin', metavar='GIN_FILE')
  parser.add_argument('--ledger', type=Path, default=LEDGER, metavar='RUN')
  parser.add_argument('--out', type=Path, default=OUT)
  parser.add_argument('--minutes', type=float, default=float('inf'))
  options = parser.parse_args()
  ends = time.monotonic() + 60 * options.minutes
  with tempfile.TemporaryDirectory() as folder:
    # The quick run measures afresh.
    out = Path(folder) / 'runs.jsonl' if options.quick else options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = read_jsonl(out)
    done = {(run['surface'], run['sampler'], run['seed']) for run in runs}
    # Seed after seed: a run that ends early has something of everything.
    known = cases(options)
    for seed, (name, (objective, make)) in itertools.product(
      range(2 if options.quick else SEEDS), known.items()
    ):
      missing = [each for each in options.samplers if (name, each, seed) not in done]
      if not missing or time.monotonic() > ends:
        continue
      try:
        surface = make(seed)
      except UserError as error:
        print(f'no surface {name}: {error}')
        continue
      for sampler in missing:
        if time.monotonic() > ends:
          break
        run = {'surface': name, 'sampler': sampler, 'seed': seed}
        run |= search(surface, objective, sampler, seed)
        append_jsonl(out, run)
        runs.append(run)
        print(name, sampler, seed, {c: arrival(x) for c, x in run['regrets'].items()}, flush=True)
  print()
  print(json.dumps(report(runs)))


if __name__ == '__main__':
  main()
