"""The sections of the report: which text, figures and tables stand where, or what is missing."""

import json
import math
from collections.abc import Iterator

from optimer_jax.report import plots
from optimer_jax.report.blocks import Cell, Details, Picture, Section, Table, Text, missing
from optimer_jax.report.outcome import count, label, number, pick, plus_minus, scientific, verdict
from optimer_jax.report.read import Run, Study, answer, mean, mean_stderr, paired, stages
from optimer_jax.report.style import AVERAGE, BASE, MUTED, OPTIMER, Look, looks
from optimer_jax.report.vectors import vectors


def build(run: Run) -> list[Section]:
  """Every section in reading order, whatever the run has."""
  parts = (
    ('weights', 'Merge weights and mixture ratios', _weights),
    ('scores', 'Test scores', _scores),
    ('search', 'Search', _search),
    ('space', 'Trials in weight space', _space),
    ('gap', 'Development and test', _gap),
    ('vectors', 'Distribution vectors', vectors),
    ('training', 'Training', _training),
    ('costs', 'Costs', _costs),
    ('model', 'Model and configuration', _model),
  )
  return [Section(id, title, list(blocks(run))) for id, title, blocks in parts]


def _chosen(best: dict) -> dict:
  return best.get(best['chosen']) or best.get('best_observed') or {}


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
  row = _chosen(best)
  if row:
    text += f', {number(row["objective"])} bits/byte on the development text'
    if row.get('predicted') is not None:
      text += f' (predicted {number(row["predicted"])})'
  yield Text(text + '.')
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


def models(run: Run) -> list[plots.Model]:
  """Every evaluated model: base, CPT models, uniform average, others, OptiMer, exported."""
  look = looks(run.datasets)
  first = ['base', *(f'cpt-{name}' for name in run.datasets), 'average']
  last = ['optimer', 'exported']
  others = [name for name in run.evaluations if name not in first + last]
  styles = {'base': BASE, 'average': AVERAGE, 'optimer': OPTIMER}
  found = []
  for name in [*first, *others, *last]:
    if name not in run.evaluations:
      continue
    scores = run.evaluations[name]['scores']
    found.append(
      plots.Model(
        name,
        label(name),
        styles.get(name) or look.get(name[4:]) or Look(MUTED, 'X'),
        {
          'mean': (mean(run.evaluations[name]), mean_stderr(scores)),
          **{task: (score['value'], score['stderr']) for task, score in scores.items()},
        },
        _change(run, name),
      )
    )
  return found


def _change(run: Run, name: str) -> dict[str, tuple[float, float]]:
  """Paired difference from base by column, {} where the two cannot be compared."""
  if 'base' not in run.evaluations:
    return {}
  tasks = run.evaluations['base']['scores']
  if name == 'base':
    return dict.fromkeys(['mean', *tasks], (0.0, 0.0))
  found = paired(run, name, 'base')
  if not found:
    return {}
  each = {'mean': found, **{task: found['per_task'].get(task) for task in tasks}}
  return {column: tuple(pick(one).values()) for column, one in each.items() if one}


def _scores(run: Run) -> Iterator:
  wanted = ['base', *(f'cpt-{name}' for name in run.datasets), 'average', 'optimer']
  if absent := [name for name in wanted if name not in run.evaluations]:
    files = [f'evaluations/{name}.json' for name in absent]
    yield missing(run, f'test scores of {", ".join(map(label, absent))}', 'evaluate', *files)
  rows = models(run)
  if not rows:
    return
  columns = ['mean', *run.tasks]
  drawn = [model for model in rows if model.name != 'exported']
  relative = all(model.change for model in drawn)
  if drawn:
    told = '; '.join(f'{model.label} {number(model.scores["mean"][0])}' for model in drawn)
    yield Picture(
      'overview',
      plots.scores(drawn, columns),
      (
        'Change of test bits per byte against the base, in per cent of the base’s own score, '
        'since domains differ in scale; to the left is better. Bars: ± 2 standard errors of the '
        'paired difference. Beside each point: bits per byte, the lowest in bold.'
        if relative
        else 'Test bits per byte ± 2 standard errors, each panel on its own scale (without '
        'scores of the base on the same tasks there is no change to show).'
      ),
      f'Dot plot of test scores by domain. Mean bits per byte: {told}.',
    )
  best = {
    column: min((row.scores[column][0] for row in drawn if column in row.scores), default=None)
    for column in columns
  }
  table = [
    [
      Cell(row.label),
      *(
        Cell(
          f'{number(row.scores[column][0])} ± {number(row.scores[column][1])}',
          plus_minus(*row.change[column]) if column in row.change and row.name != 'base' else '',
          row.name != 'exported' and row.scores[column][0] == best[column],
        )
        if column in row.scores
        else Cell('–')
        for column in columns
      ),
    ]
    for row in rows
  ]
  yield Table(
    'Test bits per byte ± standard error; below, the change against base ± standard error of the '
    'paired difference. Bold: the lowest of each column.',
    ['model', *columns],
    table,
  )
  if run.comparisons:
    compared = {task for row in run.comparisons for task in row.get('per_task') or {}}
    tasks = [task for task in run.tasks if task in compared]
    yield Table(
      'Paired differences, bits per byte, and standard errors; negative: the first is better.',
      ['pair', 'mean', *tasks, 'by the mean, at 2 s.e.'],
      [
        [
          Cell(f'{label(row["a"])} − {label(row["b"])}'),
          *(
            Cell(*plus_minus(**pick(one)).split(' ', 1)) if one else Cell('–')
            for one in [row, *((row.get('per_task') or {}).get(task) for task in tasks)]
          ),
          Cell(verdict(**pick(row)).removesuffix(' than').removesuffix(' from')),
        ]
        for row in run.comparisons
      ],
    )
  else:
    yield missing(run, 'paired comparisons', 'evaluate', 'evaluations/comparisons.json')


def _seeds(trials: list[dict]) -> dict[str, int]:
  """Where in `trials` the base (w = 0) and the uniform average (w = 1/K) stand."""
  found = {}
  for i, trial in enumerate(trials):
    weights = list(trial['weights'].values())
    if not any(weights):
      found.setdefault('base', i)
    elif all(math.isclose(w, 1 / len(weights), rel_tol=1e-6) for w in weights):
      found.setdefault('uniform average', i)
  return found


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
      f'{number(best["objective"])} bits/byte in trial {best["trial"]} ({best["sampler"]}).'
    )
    yield Picture(
      f'convergence{suffix}',
      plots.convergence(study.trials, study.best.get('objective', ''), _seeds(study.trials)),
      'Objective on the development text against the trial, by where the trial came from, and the '
      'best so far. Trials far above the rest stand at the upper edge with their value.',
      f'Search of study {study.name}: the best objective falls from '
      f'{number(study.trials[0]["objective"])} to {number(best["objective"])} '
      f'in {count(len(study.trials), "trial")}.',
    )
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


def _gap(run: Run) -> Iterator:
  study = answer(run)
  if not study:
    yield missing(
      run, 'development scores of base, uniform average and optimum', 'search', 'studies/NAME'
    )
    return
  seeds = {name: study.trials[i] for name, i in _seeds(study.trials).items()}
  dev = {'base': seeds.get('base'), 'average': seeds.get('uniform average')}
  dev['optimer'] = _chosen(study.best)
  rows = []
  for name, look in zip(dev, (BASE, AVERAGE, OPTIMER), strict=True):
    test = run.evaluations.get(name)
    if not dev[name] or not test:
      where = 'development' if not dev[name] else 'test'
      file = f'studies/{study.name}' if not dev[name] else f'evaluations/{name}.json'
      verb = 'search' if not dev[name] else 'evaluate'
      yield missing(run, f'{where} scores of {label(name)}', verb, file)
      continue
    rows.append(
      plots.Gap(
        label(name),
        look,
        _columns(dev[name]['scores']),
        _columns(test['scores'], mean(test)),
        _change(run, name),
      )
    )
  if not rows or rows[0].label != 'base':
    return
  base = rows[0]
  told = '; '.join(
    f'{row.label} {number(row.dev["mean"][0])} and {number(row.test["mean"][0])}' for row in rows
  )
  yield Picture(
    'dev-test',
    plots.gap(rows, looks(run.datasets)),
    'Left: the two texts are different documents, so their levels differ for every model. Right: '
    'what the search gained on the development text against what stays on the test text; on the '
    'diagonal everything stays. Bars: ± 2 standard errors, paired on the right (test only).',
    f'Mean bits per byte on development and test text: {told}.',
  )
  yield Table(
    'Mean bits per byte ± standard error, and the change against base.',
    ['model', 'development', 'test', 'change, development', 'change, test'],
    [
      [
        Cell(row.label),
        *(Cell(f'{number(v)} ± {number(e)}') for v, e in (row.dev['mean'], row.test['mean'])),
        *(
          Cell('–' if row is base else f'{number(100 * (r["mean"][0] / b["mean"][0] - 1), 2)}%')
          for r, b in ((row.dev, base.dev), (row.test, base.test))
        ),
      ]
      for row in rows
    ],
  )


def _columns(scores: dict, average: float | None = None) -> dict[str, tuple[float, float]]:
  average = mean({'scores': scores}) if average is None else average
  each = {task: (score['value'], score['stderr']) for task, score in scores.items()}
  return {'mean': (average, mean_stderr(scores)), **each}


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
  seconds, flops = (
    {
      kind: [row[key] for row in rows if row['stage'].split('/')[0] == kind]
      for kind in ('train', 'search')
    }
    for key in ('seconds', 'flops')
  )
  if seconds['search'] and sum(seconds['train']):
    text = (
      f'The search took {sum(seconds["search"]):,.1f} s, '
      f'{sum(seconds["search"]) / sum(seconds["train"]):.2f} times the wall time of the '
      f'{count(len(seconds["train"]), "training run")} ({sum(seconds["train"]):,.1f} s)'
    )
    if sum(flops['train']) and sum(flops['search']):
      text += (
        f', and {scientific(sum(flops["search"]))} FLOPs, '
        f'{sum(flops["search"]) / sum(flops["train"]):.2f} times theirs '
        f'({scientific(sum(flops["train"]))})'
      )
    yield Text(text + '.')
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
