"""What a run's numbers say, in words."""

import math

from optimer_jax.report.read import Run, mean, paired


def outcome(run: Run) -> str:
  """One sentence: OptiMer's mean test score against base, best CPT model and uniform average."""
  if 'optimer' not in run.evaluations:
    return 'No outcome yet: OptiMer’s test scores (evaluations/optimer.json) are missing.'
  single = best_single(run)
  clauses = []
  for name, label in (
    ('base', 'base'),
    (single, 'the best single CPT model'),
    ('average', 'the uniform average'),
  ):
    if name not in run.evaluations:
      clauses.append(f'not compared with {label} (no test scores)')
    elif not (found := paired(run, 'optimer', name)):
      clauses.append(f'not compared with {label} (other tasks were scored)')
    else:
      which = f'{name[4:]}, ' if name == single else ''
      value = f'{which}{number(mean(run.evaluations[name]))}'
      clauses.append(
        f'{verdict(**pick(found))} {label} ({value}; difference {plus_minus(**pick(found))})'
      )
  value = number(mean(run.evaluations['optimer']))
  return (
    f'OptiMer reaches a mean of {value} bits per byte on the test text of '
    f'{count(len(run.evaluations["optimer"]["scores"]), "domain")}: {"; ".join(clauses)}.'
  )


def best_single(run: Run) -> str:
  """The name of the CPT evaluation with the lowest mean, among those on the most tasks; or ''."""
  singles = [name for name in run.evaluations if name.startswith('cpt-')]
  return min(
    singles,
    key=lambda name: (-len(run.evaluations[name]['scores']), mean(run.evaluations[name])),
    default='',
  )


def verdict(difference: float, stderr: float) -> str:
  """What a difference in bits/byte means, at 2 standard errors."""
  if math.isnan(stderr):
    return ('lower than' if difference < 0 else 'not lower than') + ', without a standard error,'
  if abs(difference) <= 2 * stderr:
    return 'not distinguishable from'
  return 'better than' if difference < 0 else 'worse than'


def count(size: int, what: str) -> str:
  """'1 trial', '2 trials'."""
  return f'{size} {what}{"" if size == 1 else "s"}'


def number(value: float, digits: int = 4) -> str:
  """A decimal with a true minus sign."""
  return f'{value:.{digits}f}'.replace('-', '−')


def plus_minus(difference: float, stderr: float) -> str:
  """A signed difference and its standard error."""
  sign = '+' if difference > 0 else ''
  error = '?' if math.isnan(stderr) else number(stderr)
  return f'{sign}{number(difference)} ± {error}'


def pick(found: dict) -> dict[str, float]:
  """Just the difference and its standard error."""
  return {'difference': found['difference'], 'stderr': found['stderr']}


def scientific(value: float) -> str:
  """FLOPs to three figures: 3.10e13."""
  return f'{value:.2e}'.replace('e+', 'e') if value else '–'


def label(name: str) -> str:
  names = {'base': 'base', 'average': 'uniform average', 'optimer': 'OptiMer'}
  names['exported'] = 'OptiMer, exported'
  return names.get(name) or (f'CPT {name[4:]}' if name.startswith('cpt-') else name)
