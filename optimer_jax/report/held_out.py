"""The report's section on held-out data: what is left on test of the gain on dev, and how often
test was looked at."""

import json
import math
from collections.abc import Iterator

from optimer_jax.report import plots
from optimer_jax.report.blocks import Cell, Picture, Table, Text, missing
from optimer_jax.report.outcome import count, gain, label, score
from optimer_jax.report.read import (
  Measured,
  Run,
  Study,
  answer,
  core,
  difference,
  kinds,
  losses,
  paired,
  seeds,
)
from optimer_jax.report.style import looks

OVER = {'average': 'the uniform average', 'base': 'the base'}
Gains = dict[str, tuple[Measured, Measured]]  # by column: on development and on test


def held_out(run: Run) -> Iterator:
  """Development against test, and the looks at test."""
  yield from _gap(run)
  yield from _looks(run)


def on_dev(run: Run) -> dict[str, dict]:
  """The trials ({'scores', 'per_example', …}) of 'optimer', 'average' and 'base' in the search.

  OptiMer is the trial with the weights of evaluations/optimer.json, or of the search's answer where
  that is not there. What has no trial is left out.
  """
  study = answer(run)
  if not study:
    return {}
  rows = [{**row, 'per_example': _examples(study, row)} for row in study.trials]
  found = {name: rows[i] for name, i in seeds(study.trials).items()}
  weights = run.evaluations.get('optimer', {}).get('weights') or study.best['weights']
  chosen = [row for row in rows if row['weights'] == weights]
  # Where more than the weights is searched, one of several may have been chosen.
  numbers = study.best.get('numbers') or {}
  chosen.sort(key=lambda row: (row.get('numbers') or {}) != numbers)
  if chosen:
    found['optimer'] = chosen[0]
  if any(_method(row) for row in rows):
    found.pop('average', None)  # merged otherwise than the plain average that test has
  return found


def gains(run: Run, reference: str) -> Gains:
  """How much lower OptiMer's loss is than that of `reference` ('average' or 'base').

  Of each task that is scored on both splits, and their 'mean', as far as known: {} if not.
  """
  dev = on_dev(run)
  if not {'optimer', reference} <= dev.keys() & run.evaluations.keys():
    return {}
  splits = (
    difference(dev['optimer'], dev[reference], core(run)),
    paired(run, 'optimer', reference),
  )
  columns = [c for c in ('mean', *run.tasks) if all(c in split for split in splits)]
  return {c: tuple(s[c]._replace(value=0.0 - s[c].value) for s in splits) for c in columns}


def _examples(study: Study, trial: dict) -> dict:
  """The trial's scores by example, or those of the same candidate in another trial."""
  same = [
    row['trial']
    for row in [trial, *study.trials]
    if all(row.get(key) == trial.get(key) for key in ('weights', 'numbers'))
  ]
  return next((study.examples[number] for number in same if number in study.examples), {})


def _method(trial: dict) -> str:
  return (trial.get('search') or {}).get('merge method', '')


def _gap(run: Run) -> Iterator:
  study = answer(run)
  if not study:
    yield missing(
      run, 'development scores of base, uniform average and optimum', 'search', 'studies/NAME'
    )
    return
  dev, names = on_dev(run), ('optimer', 'average', 'base')
  yield from _lacking(run, study, dev, names)
  found = {name: gains(run, name) for name in OVER}
  found = {name: columns for name, columns in found.items() if columns}
  kind_of = kinds(run)
  for name, columns in found.items():
    if 'mean' in columns:
      yield Text(held_up(*columns['mean'], OVER[name], kind_of['mean']))
  if found:
    yield from _gains(run, study, dev, found, kind_of)
  levels = {
    (name, split): losses(scored['scores'], core(run))
    for name in names
    for split, scored in (('development', dev.get(name)), ('test', run.evaluations.get(name)))
    if scored
  }
  columns = [c for c in ('mean', *run.tasks) if any(c in level for level in levels.values())]
  if columns:
    yield Table(
      'Scores ± standard error. The two splits are different examples, so their levels differ for '
      'every model.',
      ['', *(f'{label(name)}, {split}' for name, split in levels)],
      [
        [
          Cell(column),
          *(
            Cell(*score(level[column], kind_of[column]).split(' ', 1))
            if column in level
            else Cell('–')
            for level in levels.values()
          ),
        ]
        for column in columns
      ],
    )


def _lacking(run: Run, study: Study, dev: dict[str, dict], names: tuple[str, ...]) -> Iterator:
  """What is not known of either split, and so of the gains."""
  place = f'studies/{study.name}'
  if methods := {method for row in study.trials if (method := _method(row))}:
    yield Text(
      f'The search merges otherwise ({"; ".join(sorted(methods))}) than the plain average that was '
      'scored on test: there is no gain over the average to compare.'
    )
  if absent := [n for n in names if n not in dev and not (n == 'average' and methods)]:
    what = f'trials with the weights of {", ".join(map(label, absent))}'
    yield missing(run, what, 'search', f'{place}/trials.jsonl')
  if absent := [name for name in names if name not in run.evaluations]:
    files = [f'evaluations/{name}.json' for name in absent]
    yield missing(run, f'test scores of {", ".join(map(label, absent))}', 'evaluate', *files)
  without = [name for name in names if name in dev and not dev[name]['per_example']]
  if without:
    what = f'development scores by example of {", ".join(map(label, without))}, and so the '
    what += 'standard errors of gains on development'
    yield missing(run, what, 'search', f'{place}/examples.jsonl')


def _gains(
  run: Run, study: Study, dev: dict[str, dict], found: dict[str, Gains], kind_of: dict[str, str]
) -> Iterator:
  scaled = {}
  for name, columns in found.items():
    splits = [losses(s['scores'], core(run)) for s in (dev[name], run.evaluations[name])]
    scaled[OVER[name]] = {
      column: tuple(
        plots.scaled(one, split[column].value, kind_of[column])
        for one, split in zip(pair, splits, strict=True)
      )
      for column, pair in columns.items()
    }
  told = '; '.join(
    f'over {OVER[name]} {gain(pair[0], kind_of["mean"])} and {gain(pair[1], kind_of["mean"])}'
    for name, columns in found.items()
    if (pair := columns.get('mean'))
  )
  yield Picture(
    'dev-test',
    plots.gap(scaled, kind_of, looks(run.datasets)),
    'What the search gained on the development data (hollow), where it chose among '
    f'{count(len(study.trials), "trial")}, and what is left on test (full): right is better. '
    'A candidate that was chosen by its development scores may be expected to gain less on test. '
    'Bars: ± 2 standard errors, paired by example.',
    f'Dot plot of OptiMer’s gains. Mean gain on development and test: {told or "none"}.',
  )
  for name, columns in found.items():
    yield Table(
      f'Gain over {OVER[name]} ± standard error of the paired difference; positive: OptiMer is '
      'better. Development and test are independent samples.',
      ['', 'development', 'test', 'development − test'],
      [
        [Cell(column), *(Cell(gain(one, kind_of[column])) for one in (*pair, lost(*pair)))]
        for column, pair in columns.items()
      ],
    )


def lost(dev: Measured, test: Measured) -> Measured:
  """How much of a gain on development is not there on test; the samples are independent."""
  return Measured(dev.value - test.value, math.hypot(dev.stderr, test.stderr))


def held_up(dev: Measured, test: Measured, over: str, kind: str) -> str:
  """In words, whether a gain on development is there on test, at 2 standard errors."""
  if dev.value > 0:
    text = f'Of the gain of {gain(dev, kind)} over {over} on development, {gain(test, kind)} is '
    text += 'left on test'
  else:
    text = f'There was no gain over {over} on development ({gain(dev, kind)}); on test it is '
    text += gain(test, kind)
  rest = lost(dev, test)
  if math.isnan(rest.stderr):
    return f'{text}; without the standard errors of both, their difference says nothing.'
  within = abs(rest.value) <= 2 * rest.stderr
  text += f'; the difference, {gain(rest, kind)}, is {"within" if within else "beyond"} two '
  text += 'standard errors'
  if dev.value <= 0:
    return f'{text}.'
  if test.value < -2 * test.stderr:
    return f'{text}, and on test it is a loss.'
  if test.value <= 2 * test.stderr:
    return f'{text}, but what is left cannot be told from none.'
  if within:
    return f'{text}: the gain held up.'
  return f'{text}: ' + ('part of it held up.' if rest.value > 0 else 'it is larger on test.')


def truncated(run: Run) -> str:
  """A sentence on prompts that were too long, or ''."""
  study = answer(run)
  parts = []
  for split, scored in (
    ('test', list(run.evaluations.values())),
    ('development', study.trials if study else []),
  ):
    cut = {}
    for each in scored:
      for task, one in each['scores'].items():
        if one.get('truncated'):
          # Every model reads the same prompts, if not all through the same tokenizer.
          cut[task] = max(cut.get(task, (0, 0)), (one['truncated'], one.get('count') or 0))
    if cut:
      listed = ', '.join(
        f'{task} {some:,}{f" of {size:,}" if size else ""}' for task, (some, size) in cut.items()
      )
      parts.append(f'on {split} {listed}')
  if not parts:
    return ''
  return f'Prompts too long for the context, which lost their middle: {"; ".join(parts)}.'


def looked(run: Run) -> tuple[int, int]:
  """How many times the test split was scored, and for how many different models."""
  return len(run.looks), len({_model(look) for look in run.looks})


def _model(look: dict) -> str:
  """What tells a scored model from others: its name and what it was made of."""
  made = look.get('identity') or look.get('weights')
  return f'{look["model"]} {json.dumps(made, sort_keys=True)}'


def _looks(run: Run) -> Iterator:
  if not run.looks:
    if run.evaluations:
      what = 'the record of how often test was scored'
      yield missing(run, what, 'evaluate', 'evaluations/test_looks.jsonl')
    return
  times, models = looked(run)
  text = f'The test split was scored {count(times, "time")}, for {count(models, "model")} '
  text += '(different weights or parameters)'
  if when := sorted(look['time'] for look in run.looks if look.get('time')):
    text += f', on {when[0]}' if len(set(when)) == 1 else f', from {when[0]} to {when[-1]}'
  yield Text(text + '.')
  seen = {}
  for look in run.looks:
    for task, digest in look['tasks'].items():
      seen.setdefault((task, digest), []).append(look)
  several = {}
  for (task, _), found in seen.items():
    candidates = {_model(look): look['model'] for look in found if _is_candidate(look['model'])}
    if len(candidates) > 1:
      several.setdefault(tuple(candidates.values()), []).append(task)
  for names, tasks in several.items():
    yield Text(
      f'{len(names)} candidates were scored on the same test data of '
      f'{", ".join(dict.fromkeys(tasks))} ({_listed(names)}): to choose among them by these scores '
      'is to select on test, and the score of the one chosen is then too good. Choose by '
      'development scores, or score the one chosen on fresh test data.',
      'warning',
    )
  old = len(seen) > len({task for task, _ in seen})
  yield Table(
    'How often each task’s test data were scored. Candidates: all but base, CPT models, uniform '
    'average and the export.' + (' A task that changed its test data has a row for each.' * old),
    ['task', 'times', 'models', 'candidates'],
    [
      [
        Cell(f'{task} ({digest[:8]})' if old else task),
        Cell(str(len(found))),
        Cell(str(len({_model(look) for look in found}))),
        Cell(str(len({_model(look) for look in found if _is_candidate(look['model'])}))),
      ]
      for (task, digest), found in sorted(seen.items(), key=lambda item: item[0][0])
    ],
  )


def _is_candidate(name: str) -> bool:
  return name not in ('base', 'average', 'exported') and not name.startswith('cpt-')


def _listed(names: tuple[str, ...]) -> str:
  """'OptiMer (2), mine': each once, in order, with how many there are of it."""
  counts = {name: names.count(name) for name in names}
  return ', '.join(
    f'{label(name)}{f" ({size} different ones)" if size > 1 else ""}'
    for name, size in counts.items()
  )
