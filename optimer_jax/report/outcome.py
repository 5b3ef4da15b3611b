"""What a run's numbers say, in words.

Losses are shown in the words of their kind (`read.kind`): bits per byte as they are, accuracy as a
percentage and its changes in points, and the mean over tasks of both kinds as a loss.
"""

import math

from optimer_jax.report.read import Measured, Run, core, kind, kinds, losses, paired, stages

LOSSES = {'bits/byte': 'bits/byte', 'accuracy': '1 − accuracy', 'mixed': 'loss'}
SCORES = {'bits/byte': 'bits per byte', 'accuracy': 'accuracy', 'mixed': 'scores'}
MEANS = {
  'bits/byte': 'bits per byte',
  'accuracy': 'accuracy',
  'mixed': 'loss (bits per byte; 1 − accuracy)',
}


def outcome(run: Run) -> str:
  """One sentence: OptiMer's mean test score against base, best CPT model and uniform average."""
  if 'optimer' not in run.evaluations:
    return 'No outcome yet: OptiMer’s test scores (evaluations/optimer.json) are missing.'
  what = kinds(run)['mean']
  own = mean(run, 'optimer')
  if not own:
    return 'No outcome yet: OptiMer, base and average were scored on other test tasks.'
  single = best_single(run)
  clauses = []
  for name, label in (
    ('base', 'base'),
    (single, 'the best single CPT model'),
    ('average', 'the uniform average'),
  ):
    found = paired(run, 'optimer', name).get('mean')
    if name not in run.evaluations:
      clauses.append(f'not compared with {label} (no test scores)')
    elif not found or not mean(run, name):
      clauses.append(f'not compared with {label} (other tasks were scored)')
    else:
      which = f'{name[4:]}, ' if name == single else ''
      value = f'{which}{level(mean(run, name).value, what)}'
      clauses.append(f'{verdict(found)} {label} ({value}; difference {change(found, what)})')
  value = level(own.value, what)
  size = len(core(run))
  return (
    'OptiMer reaches a mean '
    + {
      'bits/byte': f'of {value} bits per byte on the test text of {count(size, "domain")}: ',
      'accuracy': f'accuracy of {value} on the test data of {count(size, "task")}: ',
      'mixed': f'loss of {value} (bits per byte; 1 − accuracy) on the test data of '
      f'{count(size, "task")}: ',
    }[what]
    + f'{"; ".join(clauses)}.'
  )


def reading(run: Run) -> str:
  """Which scores are better."""
  return {
    'bits/byte': 'Lower bits per byte is better.',
    'accuracy': 'Higher accuracy is better.',
    'mixed': 'Lower bits per byte and higher accuracy are better. A mean over tasks of both kinds '
    'is of their losses (bits per byte; 1 − accuracy), and lower is better.',
  }[kind(score for each in run.evaluations.values() for score in each['scores'].values())]


def against_training(run: Run) -> str:
  """What the search cost, beside training and beside tuning the mixture by training; or ''."""
  rows = stages(run.costs)
  # Of a study that is under way the cost is not known yet.
  counted = {row['stage'] for row in rows}
  trials = sum(len(study.trials) for study in run.studies if f'search/{study.name}' in counted)
  runs = [row for row in rows if row['stage'].startswith('train/')]
  searches = [row for row in rows if row['stage'].startswith('search/')]
  found = []
  for key, show in (('seconds', '{:,.1f} s'.format), ('flops', '{:.2e} FLOPs'.format)):
    search, training = (sum(row[key] for row in each) for each in (searches, runs))
    if search and training:
      tuning = training / len(runs) * trials
      ratios = search / training, tuning / search, tuning / (search + training)
      found.append((show(search), show(training), *map('{:.3g}'.format, ratios)))
  if not trials or not found:
    return ''
  search, training, part, alone, whole = (' and '.join(each) for each in zip(*found, strict=True))
  return (
    f'The search scored {count(trials, "candidate")} in {search}: {part} times the '
    f'{count(len(runs), "training run")} ({training}). Tuning the mixture by training on each of '
    f'as many mixtures, as long as on a data set here, would take {alone} times the search, and '
    f'{whole} times the search and its training runs together.'
  ).replace('e+', 'e')


def mean(run: Run, name: str) -> Measured | None:
  """The evaluation's mean loss over the core tasks, if it has them all."""
  return losses(run.evaluations[name]['scores'], core(run)).get('mean')


def best_single(run: Run) -> str:
  """The name of the CPT evaluation with the lowest mean, among those that have one first; or ''."""
  singles = {name: mean(run, name) for name in run.evaluations if name.startswith('cpt-')}
  return min(singles, key=lambda name: singles[name] or (math.inf,), default='')


def verdict(found: Measured) -> str:
  """What a difference of losses means, at 2 standard errors."""
  if math.isnan(found.stderr):
    return ('ahead of' if found.value < 0 else 'not ahead of') + ' (without a standard error)'
  if abs(found.value) <= 2 * found.stderr:
    return 'not distinguishable from'
  return 'better than' if found.value < 0 else 'worse than'


def count(size: int, what: str) -> str:
  """'1 trial', '2 trials'."""
  return f'{size} {what}{"" if size == 1 else "s"}'


def number(value: float, digits: int = 4) -> str:
  """A decimal with a true minus sign; '?' where it is not known."""
  return '?' if math.isnan(value) else f'{value:.{digits}f}'.replace('-', '−')


def level(loss: float, what: str, digits: int = 4) -> str:
  """A loss as the score of its kind: 1.1114, or 41.2%."""
  return f'{number(100 * (1 - loss), 1)}%' if what == 'accuracy' else number(loss, digits)


def score(found: Measured, what: str) -> str:
  """The same with its standard error: 1.1114 ± 0.0102, or 41.2% ± 2.2%."""
  error = f'{number(100 * found.stderr, 1)}%' if what == 'accuracy' else number(found.stderr)
  return f'{level(found.value, what)} ± {error}'


def change(found: Measured, what: str) -> str:
  """A difference of losses as the signed change of the score: −0.0025 ± 0.0007, +3.1 ± 0.9 points.

  Less bits per byte and more accuracy are better.
  """
  if what == 'accuracy':
    found = found._replace(value=0.0 - found.value)  # and not -0.0
  return ('+' if found.value > 0 else '') + gain(found, what)


def gain(found: Measured, what: str) -> str:
  """How much the loss fell: 0.0025 ± 0.0007, or 3.1 ± 0.9 points of accuracy."""
  if what == 'accuracy':
    return f'{number(100 * found.value, 1)} ± {number(100 * found.stderr, 1)} points'
  return f'{number(found.value)} ± {number(found.stderr)}'


def chance(p: float | None) -> str:
  """A p value: 'p = 0.012', or '' where there is none."""
  if p is None:
    return ''
  return 'p < 0.001' if p < 0.001 else f'p = {p:.3f}'


def scientific(value: float) -> str:
  """FLOPs to three figures: 3.10e13."""
  return f'{value:.2e}'.replace('e+', 'e') if value else '–'


def label(name: str) -> str:
  names = {'base': 'base', 'average': 'uniform average', 'optimer': 'OptiMer'}
  names['exported'] = 'OptiMer, exported'
  kinds = {'cpt': 'CPT', 'mixed': 'mixture', 'merged': 'merge', 'studies': 'search'}
  kind, _, rest = name.partition('-')
  return names.get(name) or (f'{kinds[kind]} {rest}' if kind in kinds and rest else name)
