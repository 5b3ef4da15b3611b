"""The paper's claims, tested by what runs/study_270m.gin left.

    python -m benchmarks.study [--keep RUN …] [--untimed RUN …] [--write]

Reads benchmarks/results/study: run directories without their weights, as --keep copies them there
from RUN (a directory that `optimer pipeline --gin_file=runs/study_270m.gin` filled), and --untimed
without the seconds, which say nothing where runs shared a device. Prints the tables of RESULTS.md
and, as the last line, one JSON object of the main comparison: the setting with most seeds. --write
puts the tables into RESULTS.md, between their markers, and draws its pictures.

A difference is of mean losses on test text, paired by example, over the tasks that count; where a
setting has several seeds, their mean, and the standard error of that mean from the differences of
the seeds or, if it is larger, from the examples (which the seeds share).
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import print_found, study_plots
from benchmarks.study_kept import Kept, keep
from optimer_jax.errors import UserError
from optimer_jax.files import write_text
from optimer_jax.gemma3 import SIZES
from optimer_jax.report.style import png

KEPT = Path(__file__).parent / 'results' / 'study'
RESULTS = Path(__file__).parents[1] / 'RESULTS.md'
NAMES = {
  'base': 'base',
  'best-single': 'best single CPT model',
  'average': 'average of the vectors',
  'merged-task_arithmetic': 'task arithmetic, tuned',
  'merged-ties': 'TIES, tuned',
  'merged-dare_linear': 'DARE-linear, tuned',
  'optimer': 'OptiMer, Vizier',
  'studies-composite': 'OptiMer, composite',
  'studies-gradient': 'OptiMer, gradients',
  'studies-tpe': 'OptiMer, TPE',
  'studies-sobol': 'OptiMer, points spread evenly',
  'studies-blocks': 'OptiMer, weights for 4 blocks',
  'studies-modules': 'OptiMer, weights for module types',
  'studies-checkpoints': 'OptiMer, checkpoints in the pool',
  'studies-with_mixture': 'OptiMer, the uniform mixture in the pool',
  'mixed-healed': 'OptiMer, trained on with its ratios',
  'mixed-healed-slowly': 'OptiMer, trained on at a quarter of the rate',
  'mixed-uniform': 'mixture, uniform',
  'mix-best': 'mixture, best of the grid',
  'mixed-searched': 'mixture, the searched ratios',
  'mixed-uniform-longer': 'mixture, uniform, longer',
}
SEARCHES = 'vizier', 'composite', 'gradient', 'tpe', 'sobol'  # one weight for each vector
CONFIGURATIONS = 16  # that a mixture is tuned over, where costs are compared


Runs = Sequence[Kept]  # of one setting, with a seed each


def settings(runs: Iterable[Kept]) -> dict[str, Runs]:
  """The runs of each setting, by what tells it from others; the shortest training first."""
  found = {}
  for run in runs:
    found.setdefault((run.tokens, run.training['learning_rate']), []).append(run)
  return {_named(rate, group): group for (_, rate), group in sorted(found.items())}


def _named(rate: float, runs: Runs) -> str:
  seeds = f'{len(runs)} seed{"s" * (len(runs) > 1)}'
  return f'{runs[0].tokens / 1000:.0f}k tokens, lr {rate:g}, {seeds}'


def together(differences: Sequence[dict]) -> tuple[float, float]:
  """The mean difference of seeds, and its standard error."""
  values = [each['difference'] for each in differences]
  of_examples = max(each['stderr'] for each in differences)
  of_seeds = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
  return statistics.fmean(values), max(of_examples, of_seeds)


def having(runs: Runs, name: str) -> Runs:
  """The seeds that have a model: some have the main comparison alone."""
  return [run for run in runs if run.evaluation(name)]


def mean(runs: Runs, name: str) -> float | None:
  """The mean test loss of a model over the seeds that have it; None if none has."""
  found = [run.evaluation(name)['mean'] for run in having(runs, name)]
  return statistics.fmean(found) if found else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Markdown."""
  line = lambda cells: f'| {" | ".join(cells)} |'
  return '\n'.join([line(head), line(['---', *['---:'] * (len(head) - 1)]), *map(line, rows)])


def ahead(runs: Runs, name: str, of: str = 'optimer') -> tuple[float, float] | None:
  """`of`'s loss minus a model's, over the seeds that have both; None if none is known."""
  found = [run.difference(of, name) for run in having(having(runs, of), name)]
  return None if not found or None in found else together(found)


def signed(difference: tuple[float, float] | None) -> str:
  return '' if difference is None else '{:+.4f} ± {:.4f}'.format(*difference)


def fewer(some: Runs, runs: Runs) -> str:
  """A remark where not all seeds of a setting have something."""
  return f' ({len(some)} of {len(runs)} seeds)' if 0 < len(some) < len(runs) else ''


def main_setting(groups: dict[str, Runs]) -> str:
  """The name of the setting with most seeds."""
  return max(groups, key=lambda name: len(groups[name]))


def scores_table(groups: dict[str, Runs]) -> str:
  """Test losses of every model, and how far OptiMer is ahead: below 0, it is."""
  setting, rows = main_setting(groups), []
  runs = groups[setting]
  for name, label in NAMES.items():
    some = having(runs, name)
    score = f'{mean(runs, name):.4f}{fewer(some, runs)}' if some else '–'
    rows.append([label, score, signed(ahead(runs, name))])
  return table([f'bits per byte on test text: {setting}', 'mean', 'OptiMer minus it'], rows)


def settings_table(groups: dict[str, Runs]) -> str:
  """The merge, the average and the mixture for other lengths and rates of training."""
  names, rows = ('base', 'best-single', 'average', 'optimer', 'mixed-uniform'), []
  for setting, runs in groups.items():
    values = (mean(runs, name) for name in names)
    differences = (ahead(runs, name) for name in ('average', 'mixed-uniform', 'mixed-healed'))
    rows.append([setting, *(f'{v:.4f}' for v in values), *(signed(d) or '–' for d in differences)])
  others = ('OptiMer minus the average', 'minus the mixture', 'minus itself trained on')
  return table(['bits per byte on test text', *(NAMES[name] for name in names), *others], rows)


def domains_table(groups: dict[str, Runs]) -> str:
  """How far OptiMer is ahead on the test text of each domain: below 0, it is."""
  rows = []
  for name, runs in groups.items():
    for other in ('average', 'mixed-uniform'):
      cells = [f'{name}: {NAMES[other]}']
      for task in runs[0].domains:
        found = [run.bits('optimer', task) - run.bits(other, task) for run in having(runs, other)]
        cells.append(f'{statistics.fmean(found):+.4f}' if found else '–')
      rows.append(cells)
  return table(['OptiMer minus', *next(iter(groups.values()))[0].domains], rows)


def costs_table(groups: dict[str, Runs]) -> str:
  """What a configuration costs, searched and trained."""
  rows = []
  for name, runs in groups.items():
    timed = [run for run in runs if run.timed]
    for key, form, some in (('flops', '.3g', runs), ('seconds', '.1f', timed)):
      if not some:
        continue
      found = cost_ratio(some, key)
      costs = (f'{found[each]:{form}}' for each in ('training', 'trial', 'mixture'))
      kinds = ('excluding_training', 'including_training')
      equal = found['equal_quality']
      cells = [f'{found[kind]:.1f}' for kind in kinds]
      cells += ['–'] * 2 if equal is None else [f'{equal[kind]:.1f}' for kind in kinds]
      rows.append([f'{name}: {key}{fewer(some, runs)}', *costs, *cells])
  head = [
    *('', 'the K CPT runs', 'a trial of the search', 'a mixture, trained and scored'),
    *('mixture / trial', f'{CONFIGURATIONS} of each, with the CPT runs'),
    *('mixture / trial, to equal loss', f'{CONFIGURATIONS} of each, with the CPT runs'),
  ]
  return table(head, rows)


def cost_ratio(runs: Runs, key: str) -> dict:
  """Of tuning a mixture over CONFIGURATIONS to a search over as many, in seconds or FLOPs.

  `equal_quality` has the ratios if each mixture is trained no longer than the uniform one takes to
  the loss of the merge; None where that is not known, or was not reached.
  """
  average = lambda pattern: statistics.fmean(
    sum(run.costs(pattern, key)) / len(run.costs(pattern, key)) for run in runs
  )
  asked = len(runs[0].trials('vizier'))
  training = len(runs[0].domains) * average('train/.*')
  trial = average('search/vizier') / asked
  trained = average('mixed/uniform')

  def ratios(share: float) -> dict[str, float]:
    tuning, search = CONFIGURATIONS * (share * trained + trial), CONFIGURATIONS * trial
    return {
      'excluding_training': tuning / search,
      'including_training': tuning / (search + training),
    }

  shares = [run.reached for run in runs]
  return {
    'training': training,
    'trial': trial,
    'mixture': trained + trial,
    **ratios(1.0),
    'share_to_equal_quality': None if None in shares else statistics.fmean(shares),
    'equal_quality': None if None in shares else ratios(statistics.fmean(shares)),
  }


def projected() -> dict[str, float]:
  """The same at 27B and 1B tokens for each of 4 data sets, from FLOPs alone.

  A trial scores 128 rows of 2,048 tokens of 5 tasks; a step of training costs three times a token's
  forward pass.
  """
  k, tokens, scored = 4, 1e9, 5 * 128 * 2048
  training, trial = 3 * k * tokens, scored
  tuning, search = CONFIGURATIONS * (training + trial), CONFIGURATIONS * trial
  return {
    'flops_of_training': training * SIZES['27b'].flops_per_token(2048),
    'excluding_training': tuning / search,
    'including_training': tuning / (search + training),
  }


def weights_table(groups: dict[str, Runs]) -> str:
  """The searched weights, beside the ratios that they are read as."""
  rows = [
    [
      f'{name.rpartition(", ")[0]}, seed {run.training["seed"]}',
      *(f'{w:.3f} ({best["ratios"][each]:.0%})' for each, w in best['weights'].items()),
    ]
    for name, runs in groups.items()
    for run in runs
    for best in [run.best('vizier')]
  ]
  return table(['', *next(iter(groups.values()))[0].domains], rows)


def modules_table(groups: dict[str, Runs]) -> str:
  """The searched weights of each type of module, means over the seeds that have them."""
  rows, domains = [], next(iter(groups.values()))[0].domains
  for name, runs in groups.items():
    found = [run.best('modules')['weights'] for run in having(runs, 'studies-modules')]
    for kind in dict.fromkeys(key.partition(':')[2] for each in found for key in each):
      means = (statistics.fmean(each[f'{d}:{kind}'] for each in found) for d in domains)
      rows.append([f'{name}{fewer(found, runs)}: {kind}', *(f'{w:.3f}' for w in means)])
  return table(['weights of module types', *domains], rows)


def ratios_table(groups: dict[str, Runs]) -> str:
  """What is ahead of the mixtures, below 0: the searched ratios, other ratios, a merge with one."""
  models, others = ('mixed-searched', 'studies-with_mixture'), ('mixed-uniform', 'mix-best')
  rows = []
  for name, runs in groups.items():
    for model in models:
      if some := having(runs, model):
        cells = (signed(ahead(runs, other, of=model)) or '–' for other in others)
        rows.append([f'{name}{fewer(some, runs)}: {NAMES[model]}', *cells])
  return table(['minus', *(NAMES[other] for other in others)], rows)


def again_table(groups: dict[str, Runs]) -> str:
  """Other objectives on the same vectors: the first answer, and that of a few trials more."""
  rows = []
  for name, runs in groups.items():
    for study, what in (('worst', 'worst domain / base'), ('limited', 'mean, English no worse')):
      some = having(runs, f'studies-{study}')
      if not some:
        continue
      values = []
      for model in ('optimer', f'studies-{study}'):
        each = [_objective(run, study, model) for run in some]
        values.append(f'{statistics.fmean(each):.4f}')
      asked = f'{some[0].best(study)["evaluations"]} after {some[0].best("vizier")["evaluations"]}'
      rows.append([f'{name}: {what}', *values, asked])
  return table(['objective on test text', 'the first answer', 'searched again', 'trials'], rows)


def _objective(run: Kept, study: str, model: str) -> float:
  if study == 'worst':
    return max(run.bits(model, task) / run.bits('base', task) for task in run.domains)
  return run.evaluation(model)['mean']


def watched_table(groups: dict[str, Runs]) -> str:
  """What is scored and not trained on."""
  names = {name: NAMES[name] for name in ('base', 'average', 'optimer')}
  names['studies-limited'] = 'OptiMer, English no worse'
  names |= {name: NAMES[name] for name in ('mixed-uniform', 'mix-best', 'mixed-healed')}
  rows = []
  for group, runs in groups.items():
    for task in sorted({*runs[0].evaluation('base')['scores']} - {*runs[0].domains}):
      cells = [f'{group}: {task}']
      for name in names:
        known = [run.bits(name, task) for run in having(runs, name)]
        cells.append(f'{statistics.fmean(known):.4f}' if known else '–')
      rows.append(cells)
  return table(['bits per byte', *names.values()], rows)


def geometry_table(groups: dict[str, Runs]) -> str:
  """How the vectors lie to one another, and how straight training went."""
  rows = []
  for name, runs in groups.items():
    cosines = [cosine for run in runs for cosine in run.cosines]
    ways = [way for run in runs for way in run.ways]
    half = [
      weight
      for way in ways
      for step, weight in zip(way['steps'], way['projection'], strict=True)
      if step == way['steps'][-1] // 2
    ]
    values = [max(cosines, key=abs), statistics.fmean(cosines)]
    values += [statistics.fmean(way['straightness'] for way in ways)] if ways else [math.nan]
    values += [statistics.fmean(half)] if half else [math.nan]
    rows.append([name, *(f'{value:.3f}' for value in values)])
  return table(
    ['', 'largest cosine', 'mean', 'straightness of training', 'w that acts like half of it'], rows
  )


def slopes_table(groups: dict[str, Runs]) -> str:
  """What more of a vector does to the loss of its own data set, and to those of the others."""
  rows = []
  for name, runs in groups.items():
    some = having(runs, 'studies-gradient')
    if not some:
      continue
    for where, total in (('base', 0), ('average', 1)):
      found = [run.slopes(total / len(run.domains)) for run in some]
      cells = [f'{name}: at the {where}']
      for vector in runs[0].domains:
        own = statistics.fmean(each[vector][vector] for each in found)
        whole = statistics.fmean(sum(row[vector] for row in each.values()) for each in found)
        cells.append(f'{own:+.3f}, {whole - own:+.3f}')
      rows.append(cells)
  head = 'bits per byte for 1 more of a weight: own data set, the others together'
  return table([head, *next(iter(groups.values()))[0].domains], rows)


def gap_table(groups: dict[str, Runs]) -> str:
  """What is left on test text of the gain on development text."""
  rows = []
  for name, runs in groups.items():
    dev = statistics.fmean(run.dev_at(0) - run.found for run in runs)
    test = mean(runs, 'base') - mean(runs, 'optimer')
    rows.append([name, f'{dev:.4f}', f'{test:.4f}', f'{test / dev:.0%}'])
  return table(['gain over the base', 'development', 'test', 'left'], rows)


def pictures(groups: dict[str, Runs]) -> dict[str, Figure]:
  """By the name of their file: of the main comparison, and across settings."""
  runs = groups[main_setting(groups)]
  found = {
    label: ahead(runs, model)
    for model, label in NAMES.items()
    if model not in ('base', 'best-single', 'optimer')  # They would flatten the others.
  }
  compared = [run for run in runs if sum(map(bool, map(run.trials, SEARCHES))) > 1]
  searches = {
    study: [_search(run, study) for run in compared if run.trials(study)] for study in SEARCHES
  }
  models = {
    **{'base': 'base', 'best CPT model': 'best-single', 'average': 'average'},
    **{'OptiMer': 'optimer', 'uniform mixture': 'mixed-uniform'},
  }
  losses = {
    (each[0].tokens, each[0].training['learning_rate']): {
      label: mean(each, name) for label, name in models.items()
    }
    for each in groups.values()
  }
  made = {
    'ahead': study_plots.ahead({label: each for label, each in found.items() if each}),
    'searching': study_plots.searching({name: each for name, each in searches.items() if each}),
    'settings': study_plots.settings(losses),
  }
  ways = [_way(run) for run in runs if run.way]
  return {**made, **({'mixing': study_plots.mixing(ways)} if ways else {})}


def _way(run: Kept) -> tuple[study_plots.Points, dict[str, float]]:
  a_step = run.training['batch'] * run.training['length']
  merges = {
    'base': run.dev_at(0),
    'average': run.dev_at(1 / len(run.domains)),
    'OptiMer': run.found,
  }
  return [(step * a_step, loss) for step, loss in run.way], merges


def _search(run: Kept, study: str) -> study_plots.Points:
  """The cost of its trials so far, and their losses above the best that is known of the vectors."""
  trials, forward = run.trials(study), run.trials('vizier')[0]['flops']
  best = min(run.loss(row) for each in SEARCHES for row in run.trials(each))
  costs = itertools.accumulate(row['flops'] / forward for row in trials)
  return [*zip(costs, (run.loss(row) - best for row in trials), strict=True)]


TABLES: dict[str, Callable[[dict[str, Runs]], str]] = {
  'scores': scores_table,
  'settings': settings_table,
  'domains': domains_table,
  'costs': costs_table,
  'weights': weights_table,
  'modules': modules_table,
  'ratios': ratios_table,
  'again': again_table,
  'watched': watched_table,
  'geometry': geometry_table,
  'slopes': slopes_table,
  'gap': gap_table,
}


def tables() -> tuple[dict[str, Runs], dict[str, str]]:
  """The kept runs by setting, and the tables by name."""
  runs = [Kept(path.parent) for path in sorted(KEPT.glob('*/baselines.json'))]
  if not runs:
    raise UserError(f'{KEPT} holds no run: give one with --keep RUN')
  groups = settings(runs)
  return groups, {name: make(groups) for name, make in TABLES.items()}


def filled(text: str, made: dict[str, str]) -> str:
  """The text with the tables between their markers `<!-- NAME -->` and `<!-- end -->`."""
  for name, each in made.items():
    begin, end = f'<!-- {name} -->\n', '<!-- end -->'
    before, found, after = text.partition(begin)
    if found:
      text = f'{before}{begin}{each}\n{end}{after.partition(end)[2]}'
  return text


def measure(options: argparse.Namespace) -> dict:
  """Prints the tables, and returns the last line."""
  for run in options.keep:
    keep(run, KEPT)
  for run in options.untimed:
    keep(run, KEPT, timed=False)
  groups, made = tables()
  for name, text in made.items():
    print(f'{name}\n\n{text}\n')
  if options.write:
    write_text(RESULTS, filled(RESULTS.read_text(encoding='utf-8'), made))
    for name, figure in pictures(groups).items():
      (KEPT / f'{name}.png').write_bytes(png(figure))
  most = groups[main_setting(groups)]
  ratio = cost_ratio(most, 'flops')
  names = {
    'base': 'base',
    'mix_uniform': 'mixed-uniform',
    'mix_best': 'mix-best',
    'average': 'average',
    'optimer_vizier': 'optimer',
    'optimer_gradient': 'studies-gradient',
    'retrain_ratios': 'mixed-searched',
  }
  return {
    'bpb_mean': {key: mean(most, name) for key, name in names.items()},
    'search_cost_ratio': {
      key: ratio[key]
      for key in ('excluding_training', 'including_training', 'share_to_equal_quality')
    },
    'search_cost_ratio_to_equal_quality': ratio['equal_quality'],
    'projected_27b': projected(),
    'cosine_max': max((cosine for run in most for cosine in run.cosines), key=abs),
  }


def main(arguments: list[str]) -> int:
  """Prints the tables and the JSON object; returns the exit status."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.study')
  for option in ('--keep', '--untimed'):
    parser.add_argument(option, type=Path, action='append', default=[], metavar='RUN')
  parser.add_argument('--write', action='store_true', help='put the tables into RESULTS.md')
  options = parser.parse_args(arguments)
  return print_found(lambda: measure(options))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
