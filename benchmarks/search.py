"""The samplers on simulated surfaces: trials to within 1% of the best merge.

    python -m benchmarks.search [--quick] [--out FILE] [--minutes M]

A surface has K data sets and as many tasks. Task j's loss is a bowl in the weights: its curvature
comes from K vectors of different lengths that are not quite orthogonal, and its lowest point has
much of its own vector and a little, or less than nothing, of the others. Then come surfaces that
the composite's model cannot represent: `cubic` adds 0.3 times a cube along a random direction to
each loss, `saturating` passes the bowl through 1 - exp(-x), `ridge` adds the steep walls of a
valley, `kink` has absolute values for squares. The objective is the tasks' mean or the worst one.

A loss is observed with noise of 1% of what merging can gain: the objective at the base minus its
minimum over the box [0, 1]^K. Gradients are exact, as automatic differentiation gives them. Every
search begins with the uniform average and the base, which count as trials.

Regret is that of the recommendation after each trial, without noise, over what merging can gain.
composite and gradient recommend the optimum of the tasks' model, vizier that of its own GP, tpe and
random the best that they observed. In the columns named +fit, the tasks' model is fitted to what
vizier, tpe or random observed, and its optimum recommended, as a study does. A search ends once its
regrets have been below 1%, or after 40 trials. A trial costs one forward evaluation, and one with
gradients three.

Results are appended to --out, a line for each surface, sampler and seed, and what stands there is
not run again: the whole takes hours, and may be stopped and started. --minutes ends it earlier.
The tables and the last line are of the runs in the file. Differences are between the forward
equivalents of one surface and seed, where a search that did not arrive counts as one trial more
than it was given; their intervals are bootstrap intervals (95%) of the mean.

`search` needs no more of a surface than `Surface` has: measured pools fit beside simulated ones.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import scipy.optimize

from optimer_jax.files import append_jsonl, read_jsonl
from optimer_jax.search.samplers import Observation, make_sampler, recommend
from optimer_jax.search.vizier import surrogate_optimum

OUT = Path(__file__).parent / 'results' / 'search' / 'runs.jsonl'
TRIALS, SEEDS, TARGET, NOISE = 40, 10, 0.01, 0.01
COST = {'gradient': 3}  # Forward evaluations a trial; 1 for the others.
OBJECTIVES = {'mean': (jnp.mean, np.mean), 'worst': (jnp.max, np.max)}
FITTED = ('vizier', 'tpe', 'random')  # Those whose trials the composite's model is fitted to also.
SAMPLERS = ('gradient', 'composite', 'vizier', 'tpe', 'random')
PAIRS = (
  ('composite', 'vizier'),
  ('gradient', 'vizier'),
  ('vizier', 'tpe'),
  ('gradient', 'composite'),
)
CASES = [
  *[(k, objective, kind) for k in (4, 6, 10) for objective in OBJECTIVES for kind in ('', 'cubic')],
  *[(4, objective, kind) for objective in OBJECTIVES for kind in ('saturating', 'ridge', 'kink')],
]


@dataclasses.dataclass(frozen=True)
class Surface:
  """A pool as the search sees it.

  Attributes:
    losses: weights [K] -> the tasks' losses [J] without noise and their gradients [J, K].
    best: the objective's minimum over the box.
    gain: the objective at the base minus that.
  """

  k: int
  losses: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  best: float
  gain: float


def simulate(k: int, objective: str, kind: str, seed: int) -> Surface:
  rng = np.random.default_rng([k, seed])
  lowest = rng.uniform(-0.3, 0.3, (k, k))  # [J, K]
  np.fill_diagonal(lowest, rng.uniform(0.4, 1.0, k))
  vectors = rng.standard_normal((k, k, 2 * k))  # [J, K, .], as each task feels them
  vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
  lengths = np.exp(rng.uniform(np.log(0.3), np.log(3.0), k) / 2)
  felt = np.exp(rng.uniform(np.log(0.1), 0.0, (k, k)) / 2)
  np.fill_diagonal(felt, 1.0)
  vectors *= (lengths * felt)[:, :, None]
  bowls = np.einsum('jkv,jlv->jkl', vectors, vectors)
  across = rng.standard_normal((k, k))
  across /= np.linalg.norm(across, axis=1, keepdims=True)
  steepness = np.sqrt(np.einsum('jkk->jk', bowls))

  def shape(w):
    x = w - lowest  # [J, K]
    along = np.einsum('jk,jk->j', across, x)
    slope = np.einsum('jkl,jl->jk', bowls, x)
    value = np.einsum('jk,jk->j', x, slope) / 2
    if kind == 'cubic':
      return value + 0.3 * along**3, slope + 0.9 * along[:, None] ** 2 * across
    if kind == 'saturating':
      return 1 - np.exp(-value), np.exp(-value)[:, None] * slope
    if kind == 'ridge':
      walls = 0.1 * np.log(np.cosh(8 * along))
      return value + walls, slope + 0.8 * np.tanh(8 * along)[:, None] * across
    if kind == 'kink':
      return (steepness * np.abs(x)).sum(1) / 2, steepness * np.sign(x) / 2
    return value, slope

  base = rng.uniform(1.9, 2.1, k) - shape(np.zeros(k))[0]

  def losses(w):
    value, slope = shape(np.asarray(w))
    return base + value, slope

  best = _minimum(losses, objective, k)
  return Surface(k, losses, best, OBJECTIVES[objective][1](losses(np.zeros(k))[0]) - best)


def _minimum(losses, objective, k):
  """The least z over the box and z, with the mean of the losses, or each of them, below z."""
  mean, rng = objective == 'mean', np.random.default_rng(0)
  some = (lambda a: a.mean(0, keepdims=True)) if mean else (lambda a: a)
  below = {
    'type': 'ineq',
    'fun': lambda x: x[-1] - some(losses(x[:-1])[0]),
    'jac': lambda x: (lambda g: np.c_[-g, np.ones(len(g))])(some(losses(x[:-1])[1])),
  }
  best = np.inf
  for _ in range(40):
    w = rng.uniform(0, 1, k) * rng.uniform(0.1, 1)
    found = scipy.optimize.minimize(
      lambda x: x[-1],
      np.append(w, some(losses(w)[0]).max()),
      jac=lambda x: np.append(np.zeros(k), 1.0),
      bounds=[(0, 1)] * k + [(None, None)],
      constraints=below,
      method='SLSQP',
    )
    best = min(best, some(losses(np.clip(found.x[:-1], 0, 1))[0]).max())
  return float(best)


def search(surface: Surface, objective: str, name: str, seed: int) -> dict:
  """One search: its regrets after each trial, by what recommends, and seconds a suggestion."""
  traced, plain = OBJECTIVES[objective]
  k, rng = surface.k, np.random.default_rng([seed, 1])
  names, tasks = [f'd{i:02}' for i in range(k)], [f't{i:02}' for i in range(k)]
  space = dict.fromkeys(names, (0.0, 1.0))
  points, scalars, observed, seconds = [], [], [], []
  regrets = {column: [] for column in ([name, f'{name}+fit'] if name in FITTED else [name])}
  regret = lambda w: float((plain(surface.losses(w)[0]) - surface.best) / surface.gain)
  with tempfile.TemporaryDirectory() as folder:
    sampler = make_sampler(name, space, seed, tasks, traced, Path(folder) / 'study.db')
    for trial in range(TRIALS):
      if trial < 2:
        point = dict.fromkeys(names, (1 / k, 0.0)[trial])
      else:
        began = time.perf_counter()
        (point,) = sampler.suggest(1)
        seconds.append(time.perf_counter() - began)
      w = np.array([point[n] for n in names])
      losses, slopes = surface.losses(w)
      losses = losses + NOISE * surface.gain * rng.standard_normal(k)
      gradients = None
      if sampler.wants_gradients:
        gradients = {
          t: dict(zip(names, map(float, row), strict=True))
          for t, row in zip(tasks, slopes, strict=True)
        }
      points.append(w)
      scalars.append(float(plain(losses)))
      by_task = dict(zip(tasks, map(float, losses), strict=True))
      observed.append(Observation(point, scalars[-1], by_task, gradients=gradients))
      sampler.observe(observed[-1])
      if trial == 0:
        recommended = {column: w for column in regrets}
      else:
        found = recommend(space, seed, tasks, traced, observed).point
        recommended = {[*regrets][-1]: np.array([found[n] for n in names])}
        if name == 'vizier':
          pairs = [(trial.point, trial.objective) for trial in observed]
          own, _ = surrogate_optimum(space, seed, pairs)
          recommended[name] = np.array([own[n] for n in names])
        elif name in FITTED:
          recommended[name] = points[int(np.argmin(scalars))]
      for column, best in recommended.items():
        regrets[column].append(regret(best))
      if all(min(column) < TARGET for column in regrets.values()):
        break
  return {'regrets': regrets, 'seconds': seconds}


def label(k: int, objective: str, kind: str) -> str:
  return '_'.join(filter(None, [f'K{k}', objective, kind]))


def arrival(regrets: list[float]) -> int | None:
  """The first trial after which regret was below the target."""
  return next((i for i, regret in enumerate(regrets, 1) if regret < TARGET), None)


def median(arrivals: list[int | None]) -> float | None:
  """None if half of the searches or more never arrived."""
  found = statistics.median([TRIALS * 100 if x is None else x for x in arrivals])
  return None if found > TRIALS else found


def forwards(column: str, arrived: int | None) -> int:
  return COST.get(column, 1) * (TRIALS + 1 if arrived is None else arrived)


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
  trials, equivalents, paired = {}, {}, {}
  wins = {f'{a}_against_{b}': [0, 0, 0] for a, b in PAIRS}
  for surface, found in arrived.items():
    medians = {column: median([*found[column].values()]) for column in columns if column in found}
    trials[surface] = medians
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
      if surface.count('_') == 2:
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
    'trials_to_1pct': trials,
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
  parser.add_argument('--out', type=Path, default=OUT)
  parser.add_argument('--minutes', type=float, default=float('inf'))
  args = parser.parse_args()
  ends = time.monotonic() + 60 * args.minutes
  cases, seeds = (CASES, SEEDS) if not args.quick else ([(4, 'mean', ''), (4, 'worst', '')], 2)
  with tempfile.TemporaryDirectory() as folder:
    # The quick run measures afresh.
    out = Path(folder) / 'runs.jsonl' if args.quick else args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = read_jsonl(out)
    done = {(run['surface'], run['sampler'], run['seed']) for run in runs}
    # Seed after seed: a run that ends early has something of everything.
    for seed in range(seeds):
      for case in cases:
        missing = [name for name in SAMPLERS if (label(*case), name, seed) not in done]
        surface = simulate(*case, seed) if missing else None
        for name in missing:
          if time.monotonic() > ends:
            continue
          run = {'surface': label(*case), 'sampler': name, 'seed': seed}
          run |= search(surface, case[1], name, seed)
          append_jsonl(out, run)
          runs.append(run)
          arrivals = {column: arrival(x) for column, x in run['regrets'].items()}
          print(run['surface'], name, seed, arrivals, flush=True)
  print()
  print(json.dumps(report(runs)))


if __name__ == '__main__':
  main()
