"""The sections of the report: which text, figures and tables stand where, or what is missing."""

import json
import math
from collections.abc import Iterator

from optimer_jax.report import plots
from optimer_jax.report.blocks import Cell, Details, Picture, Section, Table, Text, missing
from optimer_jax.report.held_out import held_out, truncated
from optimer_jax.report.outcome import (
  LOSSES,
  MEANS,
  SCORES,
  against_training,
  chance,
  change,
  count,
  label,
  level,
  number,
  scientific,
  score,
  verdict,
)
from optimer_jax.report.read import (
  Measured,
  Run,
  Study,
  answer,
  core,
  kind,
  kinds,
  losses,
  paired,
  seeds,
  stages,
)
from optimer_jax.report.style import AVERAGE, BASE, MUTED, OPTIMER, Look, looks
from optimer_jax.report.vectors import vectors


def build(run: Run) -> list[Section]:
  """Every section in reading order, whatever the run has."""
  parts = (
    ('weights', 'Merge weights and mixture ratios', _weights),
    ('scores', 'Test scores', _scores),
    *([('baselines', 'Mixtures, merges and other searches', _baselines)] * bool(run.baselines)),
    ('gap', 'Development and test', held_out),
    ('search', 'Search', _search),
    ('space', 'Trials in weight space', _space),
    ('vectors', 'Distribution vectors', vectors),
    ('training', 'Training', _training),
    ('costs', 'Costs', _costs),
    ('model', 'Model and configuration', _model),
  )
  return [Section(id, title, list(blocks(run))) for id, title, blocks in parts]


def _weights(run: Run) -> Iterator:
  study = answer(run)
  if not study:
    yield missing(run, 'the answer of a search', 'search', 'studies/NAME/best.json')
    return
  best = study.best
  ratios = best.get('ratios') or {}
  found = {name: best['weights'][name] for name in run.datasets if name in best['weights']}
  how = {
    'surrogate_optimum': 'the optimum of the surrogate, evaluated again',
    'best_observed': 'the best trial observed',
  }.get(best['chosen'], best['chosen'])
  text = f'Study “{study.name}”, objective {best["objective"]}: {how}'
  row = best.get(best['chosen']) or best.get('best_observed')
  if row:
    text += f', {_objective(row["objective"], study)} on the development data'
    if row.get('predicted') is not None:
      text += f' (predicted {_expected(row["predicted"], row.get("predicted_stderr"))})'
  if gap := best.get('difference'):
    what = {'surrogate_optimum': 'it', 'best_observed': 'the optimum of the surrogate'}
    apart = change(Measured(gap['difference'], gap['stderr']), 'mixed')
    text += f'; paired, {what[best["chosen"]]} is {apart} against the best trial observed'
  yield Text(text + '.')
  if first := best.get('first_answer'):
    yield Text(
      f'Before the study evaluated anything, {count(first["trials"], "trial")} of other studies of '
      f'these vectors predicted {_expected(first["predicted"], first.get("stderr"))}.'
    )
  if study.grouped:
    yield Text(
      'A vector has weights of its own for each group of parameters; shown are their means.'
    )
  listed = ', '.join(
    f'{name} {number(value)} ({number(100 * ratios.get(name, 0), 1)}%)'
    for name, value in found.items()
  )
  yield Picture(
    'weights',
    plots.weights(found, ratios, looks(run.datasets)),
    'Left: weight of each distribution vector in the merge. Right: the weights normalised to a '
    'sum of one, which are the ratios of the equivalent data mixture. Dashed: uniform.',
    f'Bars of merge weights and mixture ratios: {listed}.',
  )
  yield Table(
    '',
    ['data set', 'w', 'ratio, %'],
    [
      [Cell(name), Cell(number(value)), Cell(number(100 * ratios.get(name, 0), 1))]
      for name, value in found.items()
    ],
  )


def _expected(value: float, error: float | None) -> str:
  return number(value) if error is None else f'{number(value)} ± {number(error)}'


def _fronts(run: Run) -> Iterator:
  """The front of a study that asked for one."""
  for study in run.studies:
    front = study.best.get('front')
    if not front:
      continue
    shown, between = front['observed'], front['predicted']
    yield Picture(
      f'front-{study.name}',
      plots.front([p['losses'] for p in shown], [p['losses'] for p in between], front['tasks']),
      f'Study “{study.name}”: the trials that no other beats in every task, and what the model of '
      'the losses says lies between them. Lower is better on both axes.',
      f'Pareto front of {", ".join(front["tasks"])}: {count(len(shown), "trial")}.',
    )
    names = [*shown[0]['weights']]
    yield Table(
      'The trials on the front, with their weights and losses',
      ['trial', *(f'w {name}' for name in names), *front['tasks']],
      [
        [
          Cell(' '.join(filter(None, [str(point['trial']), point.get('study', '')]))),
          *(Cell(number(point['weights'][name])) for name in names),
          *(Cell(number(point['losses'][task])) for task in front['tasks']),
        ]
        for point in sorted(shown, key=lambda point: point['losses'][front['tasks'][0]])
      ],
    )


def _baselines(run: Run) -> Iterator:
  """What `Run.baselines` asked for, the lowest loss on development text first."""
  what = kinds(run)['mean']
  rows = sorted(run.baselines, key=lambda row: math.inf if row['dev'] is None else row['dev'])
  for one in ('mixture', 'merge'):
    names = [row['model'] for row in rows if row['kind'] == one]
    found = paired(run, 'optimer', names[0]).get('mean') if names else None
    if found:
      yield Text(
        f'Of {count(len(names), one)}, {label(names[0])} is best on development text. On test, '
        f'OptiMer is {verdict(found)} it (difference {change(found, what)}).'
      )
  table = []
  for row in rows:
    apart = paired(run, 'optimer', row['model']).get('mean')
    scores = run.evaluations.get(row['model'], {}).get('scores', {})
    test = losses(scores, core(run)).get('mean')
    table.append(
      [
        Cell(label(row['model'])),
        Cell(row['kind']),
        Cell(str(row['tried'])),
        Cell(f'{row["tokens"]:,}'),
        Cell('–' if row['dev'] is None else level(row['dev'], what)),
        Cell(score(test, what) if test else '–'),
        Cell(change(apart, what) if apart and row['model'] != 'optimer' else ''),
      ]
    )
  yield Table(
    'Mean losses on development text, by which the best of several is chosen, and on test; and '
    'OptiMer’s minus it, paired by example (below 0: OptiMer is better). Tried: how many were '
    'scored on development text to find it. Tokens: trained on, those of the CPT runs included.',
    ['model', 'kind', 'tried', 'tokens', 'development', 'test', 'OptiMer minus it'],
    table,
  )


def models(run: Run) -> list[plots.Model]:
  """Every evaluated model: base, CPT models, uniform average, others, OptiMer, exported."""
  look = looks(run.datasets)
  first = ['base', *(f'cpt-{name}' for name in run.datasets), 'average']
  last = ['optimer', 'exported']
  others = [name for name in run.evaluations if name not in first + last]
  styles = {'base': BASE, 'average': AVERAGE, 'optimer': OPTIMER}
  return [
    plots.Model(
      name,
      label(name),
      styles.get(name) or look.get(name.removeprefix('cpt-')) or Look(MUTED, 'X'),
      losses(run.evaluations[name]['scores'], core(run)),
      _change(run, name),
    )
    for name in [*first, *others, *last]
    if name in run.evaluations
  ]


def _change(run: Run, name: str) -> dict[str, Measured]:
  """Paired difference from base by column, {} where the two cannot be compared."""
  if name == 'base':
    return dict.fromkeys(losses(run.evaluations['base']['scores'], core(run)), Measured(0.0, 0.0))
  return paired(run, name, 'base') if 'base' in run.evaluations else {}


def _scores(run: Run) -> Iterator:
  wanted = ['base', *(f'cpt-{name}' for name in run.datasets), 'average', 'optimer']
  if absent := [name for name in wanted if name not in run.evaluations]:
    files = [f'evaluations/{name}.json' for name in absent]
    yield missing(run, f'test scores of {", ".join(map(label, absent))}', 'evaluate', *files)
  rows = models(run)
  if not rows:
    return
  kind_of = kinds(run)
  columns = [column for column in ('mean', *run.tasks) if any(column in m.scores for m in rows)]
  if core(run) != run.tasks:
    yield Text(
      f'The mean is over {", ".join(core(run)) or "nothing"}: what OptiMer, base and uniform '
      'average were all scored on and, if there is such a task, the search sees too.'
    )
  # Where there is a base, a model or task that cannot be set against it is in the table only.
  relative = 'base' in run.evaluations
  drawn = [m for m in rows if m.name != 'exported' and (m.change or not relative)]
  panels = {
    column: kind_of[column]
    for column in columns
    if any(column in m.scores and (column in m.change or not relative) for m in drawn)
  }
  words = SCORES[
    kind(score for each in run.evaluations.values() for score in each['scores'].values())
  ]
  if drawn:
    told = '; '.join(
      f'{m.label} {level(m.scores["mean"].value, kind_of["mean"])}'
      for m in drawn
      if 'mean' in m.scores
    )
    yield Picture(
      'overview',
      plots.scores(drawn, [*panels], panels),
      _caption(words, {*panels.values()}, relative),
      f'Dot plot of test scores by {"domain" if words == SCORES["bits/byte"] else "task"}. '
      f'Mean {MEANS[kind_of["mean"]]}: {told or "none"}.',
    )
  own = [row for row in rows if row.name != 'exported']
  best = {
    column: min((row.scores[column].value for row in own if column in row.scores), default=None)
    for column in columns
  }
  yield Table(
    f'Test {words} ± standard error; below, the change against base ± standard error of the '
    'paired difference. Bold: the best of each column.',
    ['model', *columns],
    [
      [
        Cell(row.label),
        *(
          Cell(
            score(row.scores[column], kind_of[column]),
            change(row.change[column], kind_of[column])
            if column in row.change and row.name != 'base'
            else '',
            row.name != 'exported' and row.scores[column].value == best[column],
          )
          if column in row.scores
          else Cell('–')
          for column in columns
        ),
      ]
      for row in rows
    ],
  )
  if text := truncated(run):
    yield Text(text)
  if run.comparisons:
    yield _pairs(run, kind_of)
  else:
    yield missing(run, 'paired comparisons', 'evaluate', 'evaluations/comparisons.json')


def _caption(words: str, drawn: set[str], relative: bool) -> str:
  if not relative:
    return (
      f'Test {words}{", drawn as losses," if drawn != {"bits/byte"} else ""} ± 2 standard errors, '
      'each panel on its own scale (without scores of the base there is no change to show).'
    )
  if drawn == {'bits/byte'}:
    what = (
      'Change of test bits per byte against the base, in per cent of the base’s own score, since '
      'domains differ in scale; to the left is better. '
    )
    beside = 'bits per byte, the lowest'
  else:
    rest = '' if drawn == {'accuracy'} else ', of the rest in per cent of the base’s own'
    what = f'Change of 1 − accuracy on test against the base in points{rest}; left is better. '
    beside = 'the score, the best'
  return (
    f'{what}Bars: ± 2 standard errors of the paired difference. Beside each point: {beside} in '
    'bold.'
  )


def _pairs(run: Run, kind_of: dict[str, str]) -> Table:
  rows = [(row['a'], row['b'], paired(run, row['a'], row['b'])) for row in run.comparisons]
  tasks = [task for task in run.tasks if any(task in found for _, _, found in rows)]
  shown = {kind_of[column] for column in ('mean', *tasks)}
  better = {
    'bits/byte': 'negative is better in bits per byte',
    'accuracy': 'positive is better in points of accuracy',
    'mixed': 'negative is better in the mean loss (bits per byte; 1 − accuracy)',
  }
  if shown == {'bits/byte'}:
    text = 'Paired differences, bits per byte, and standard errors; negative: the first is better.'
  else:
    signs = '; '.join(better[each] for each in better if each in shown)
    text = f'Paired differences, the first less the second, and standard errors: {signs}.'
  if any(one.p is not None for _, _, found in rows for one in found.values()):
    text += (
      ' p: two-sided, of no difference, by flipping the signs of the examples’ differences; each '
      'for itself, not corrected for their number.'
    )
  return Table(
    text,
    ['pair', 'mean', *tasks, 'by the mean, at 2 s.e.'],
    [
      [
        Cell(f'{label(a)} − {label(b)}'),
        *(_difference(found.get(column), kind_of[column]) for column in ('mean', *tasks)),
        Cell(
          verdict(found['mean']).removesuffix(' than').removesuffix(' from')
          if 'mean' in found
          else '–'
        ),
      ]
      for a, b, found in rows
    ],
  )


def _difference(found: Measured | None, what: str) -> Cell:
  if not found:
    return Cell('–')
  value, error = change(found, what).split(' ', 1)
  return Cell(value, ', '.join(filter(None, [error, chance(found.p)])))


def _unit(study: Study) -> str:
  """What the study's objective is in."""
  search = study.trials[0].get('search', {}) if study.trials else {}
  if search.get('objective kind') == 'pareto':
    return 'scaled to the front'
  if (scale := search.get('objective scale', 'loss')) != 'loss':
    return {'base': 'of the base', 'best': 'from best CPT model, 0, to base, 1'}[scale]
  return LOSSES[kind(score for trial in study.trials for score in trial['scores'].values())]


def _objective(value: float, study: Study) -> str:
  unit = _unit(study)
  return f'{number(value)} {unit if unit == LOSSES["bits/byte"] else f"({unit})"}'


def _trials(run: Run) -> Iterator[tuple[Study, str]]:
  """Studies that have trials, each with a suffix that keeps picture names apart."""
  for i, study in enumerate(study for study in run.studies if study.trials):
    yield study, f'-{i + 1}' if i else ''


def _search(run: Run) -> Iterator:
  found = list(_trials(run))
  if not found:
    yield missing(run, 'trials', 'search', 'studies/NAME/trials.jsonl')
  for study, suffix in found:
    best = min(study.trials, key=lambda trial: trial['objective'])
    yield Text(
      f'Study “{study.name}”: {count(len(study.trials), "trial")}, the best '
      f'{_objective(best["objective"], study)} in trial {best["trial"]} ({best["sampler"]}).'
    )
    yield Picture(
      f'convergence{suffix}',
      plots.convergence(
        study.trials,
        study.best.get('objective', ''),
        {label(name): i for name, i in seeds(study.trials).items()},
        _unit(study),
      ),
      'Objective on the development data against the trial, by where the trial came from, and the '
      'best so far. Trials far above the rest stand at the upper edge with their value.',
      f'Search of study {study.name}: the best objective falls from '
      f'{number(study.trials[0]["objective"])} to {number(best["objective"])} '
      f'in {count(len(study.trials), "trial")}.',
    )
  yield from _fronts(run)
  for study in run.studies:
    if study.trials and not study.best:
      yield missing(run, 'the answer of the search', 'search', f'studies/{study.name}/best.json')


def _space(run: Run) -> Iterator:
  found = list(_trials(run))
  if not found:
    yield missing(run, 'trials', 'search', 'studies/NAME/trials.jsonl')
  for study, suffix in found:
    names = [name for name in run.datasets if any(name in t['weights'] for t in study.trials)]
    best = min(study.trials, key=lambda trial: trial['objective'])
    listed = ', '.join(f'{name} {number(best["weights"].get(name, 0), 3)}' for name in names)
    yield Picture(
      f'trials{suffix}',
      plots.weight_space(study.trials, names),
      f'Study “{study.name}”: one line a trial, from its weights to the rank of its objective. '
      'Stronger colour is better; the best trial is thick. Dashed: uniform.',
      f'Parallel coordinates of {count(len(study.trials), "trial")}. The best has w: {listed}.',
    )


def _training(run: Run) -> Iterator:
  absent = [name for name in run.datasets if name not in run.training]
  if absent or not run.training:
    files = [f'cpt/{name}/metrics.jsonl' for name in absent or ['NAME']]
    what = f'training metrics of {", ".join(absent) or "any data set"}'
    yield missing(run, what, 'train', *files)
  if not run.training:
    return
  rows = []
  for name, steps in run.training.items():
    dev = [row['dev_bits_per_byte'] for row in steps if row.get('dev_bits_per_byte') is not None]
    loss = [row['loss'] for row in steps if row.get('loss') is not None]
    pairs = (dev[0], dev[-1]) if dev else ()
    rows.append((name, max(row['step'] for row in steps), loss, pairs))
  yield Picture(
    'training',
    plots.training(run.training, looks(run.datasets)),
    'Each CPT run on its own data set: training loss and bits per byte on its development text. '
    'Every panel has its own scale, not from zero.',
    'Training curves. Development bits per byte, first and last: '
    + '; '.join(f'{n} {number(d[0])}, {number(d[1])}' for n, _, _, d in rows if d)
    + '.',
  )
  yield Table(
    '',
    ['data set', 'last step', 'last loss, nats/token', 'dev bits/byte, first', 'last'],
    [
      [
        Cell(name),
        Cell(f'{step:,}'),
        Cell(number(loss[-1]) if loss else '–'),
        *(Cell(number(value)) for value in (pairs or ())),
        *([] if pairs else [Cell('–'), Cell('–')]),
      ]
      for name, step, loss, pairs in rows
    ],
  )


def _costs(run: Run) -> Iterator:
  rows = stages(run.costs)
  if not rows:
    yield missing(run, 'costs', 'pipeline', 'costs.jsonl')
    return
  if text := against_training(run):
    yield Text(text)
  total = {key: sum(row[key] for row in rows) for key in ('seconds', 'flops', 'tokens', 'attempts')}
  peak = max(row['rss'] for row in rows)
  yield Picture(
    'costs',
    plots.costs(rows, looks(run.datasets)),
    'Wall time and floating-point operations of each stage, resumed attempts summed.',
    f'Bars of cost by stage. In all {total["seconds"]:,.1f} s and {scientific(total["flops"])} '
    'FLOPs.',
  )
  total |= {'stage': 'all', 'rss': peak}
  yield Table(
    '',
    ['stage', 'wall time, s', 'FLOPs', 'tokens', 'peak memory, GB', 'attempts'],
    [
      [
        Cell(row['stage']),
        Cell(f'{row["seconds"]:,.1f}'),
        Cell(scientific(row['flops'])),
        Cell(f'{row["tokens"]:,.0f}' if row['tokens'] else '–'),
        Cell(number(row['rss'], 2) if row['rss'] else '–'),
        Cell(str(row['attempts'])),
      ]
      for row in [*rows, total]
    ],
  )


def _model(run: Run) -> Iterator:
  manifest = run.manifest
  if not manifest:
    yield missing(run, 'the base’s manifest', 'import', 'base/manifest.json')
  else:
    facts = {key: manifest[key] for key in ('kind', 'fingerprint') if manifest.get(key)}
    for note in manifest.get('notes') or []:
      yield Text(note)
    for caption, values in (
      ('Base model', {**facts, **(manifest.get('model') or {})}),
      ('Versions', manifest.get('versions') or {}),
    ):
      if values:
        yield Table(
          caption,
          ['', ''],
          [[Cell(str(key)), Cell(_plain(value))] for key, value in values.items()],
        )
  if run.gin:
    yield Details('Operative gin', run.gin)
  else:
    yield missing(run, 'the operative gin', 'pipeline', 'operative.gin')


def _plain(value: object) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
