"""The pictures of RESULTS.md, of what `benchmarks.study` keeps."""

import itertools
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from optimer_jax.report.style import AVERAGE, BASE, INK, OPTIMER, WIDTH, looks, styled

Points = Sequence[tuple[float, float]]
FLOOR = 1e-5  # bits per byte: what is nearer to the best known is drawn here


@styled
def ahead(differences: Mapping[str, tuple[float, float]]) -> Figure:
  """A row a model: how far OptiMer is ahead of it on test text, +- 2 s.e.

  Args:
    differences: by model, OptiMer's loss minus the model's, and its standard error.
  """
  figure = Figure(figsize=(WIDTH, 0.27 * len(differences) + 0.7))
  panel = figure.subplots()
  panel.axvline(0, color=INK, linewidth=0.9)
  values, errors = zip(*differences.values(), strict=True)
  bars = [2 * error for error in errors]
  panel.errorbar(values, [*differences], xerr=bars, linestyle='none', **OPTIMER.kwargs())
  panel.set_ylim(len(differences) - 0.5, -0.5)
  panel.grid(axis='x')
  panel.set_xlabel('OptiMer minus it, bits per byte on test text, ± 2 s.e.')
  return figure


@styled
def settings(losses: Mapping[tuple[int, float], Mapping[str, float]]) -> Figure:
  """Test losses by the tokens of a data set, and by the learning rate.

  Args:
    losses: by (tokens, learning rate), the loss of each model, 'base', 'average' and 'OptiMer'
      among them.
  """
  figure = Figure(figsize=(WIDTH, 3.2))
  panels = figure.subplots(1, 2, sharey=True)
  models = [*next(iter(losses.values()))]
  look = looks(models) | {'base': BASE, 'average': AVERAGE, 'OptiMer': OPTIMER}
  # Each panel has the settings that differ in its axis alone from what most of them share.
  tokens, rate = (statistics.mode(each) for each in zip(*losses, strict=True))
  by_tokens = {t: (t, r) for t, r in losses if r == rate}
  by_rate = {r: (t, r) for t, r in losses if t == tokens}
  ways = (
    ('tokens of each data set', f'learning rate {rate:g}', by_tokens),
    ('learning rate', f'{tokens:,} tokens of each data set', by_rate),
  )
  for panel, (label, title, points) in zip(panels, ways, strict=True):
    for model in models:
      values = [losses[points[x]][model] for x in sorted(points)]
      panel.plot(sorted(points), values, label=model, **look[model].kwargs())
    panel.set_xscale('log')
    panel.set_xticks(sorted(points), [f'{x:,g}' for x in sorted(points)])
    panel.minorticks_off()
    panel.set_title(title)
    panel.set_xlabel(label)
    panel.grid(axis='y')
  panels[0].set_ylabel('bits per byte on test text')
  figure.legend(*panels[0].get_legend_handles_labels(), loc='outside upper center', ncols=5)
  return figure


@styled
def mixing(ways: Sequence[tuple[Points, Mapping[str, float]]]) -> Figure:
  """The uniform mixture's loss on its way, and those of merges beside it.

  Args:
    ways: for each seed, the (tokens, loss on development text) of the mixture and the losses of
      'base', 'average' and 'OptiMer'.
  """
  figure = Figure(figsize=(WIDTH, 2.9))
  panel = figure.subplots()
  mixture = looks(['uniform mixture'])['uniform mixture']
  for seed, (way, merges) in enumerate(ways):
    tokens, losses = zip(*[(0, merges['base']), *way], strict=True)
    label = None if seed else 'uniform mixture'
    panel.plot([each / 1000 for each in tokens], losses, label=label, **mixture.kwargs())
    for name, look, line in (('average', AVERAGE, '--'), ('OptiMer', OPTIMER, '-')):
      label = None if seed else name
      panel.axhline(merges[name], color=look.color, linestyle=line, label=label)
  panel.set_xlabel('thousand tokens, all data sets')
  panel.grid(axis='y')
  panel.set_ylabel('bits per byte, development')
  panel.legend(loc='upper right')
  return figure


@styled
def searching(found: Mapping[str, Sequence[Points]]) -> Figure:
  """How far the best trial so far of each sampler is from the best known, by what it cost.

  Args:
    found: by sampler, for each seed, the (cost in forward evaluations, loss above the best known)
      of its trials.
  """
  figure = Figure(figsize=(WIDTH, 3.2))
  panel = figure.subplots()
  look = looks([*found])
  for sampler, seeds in found.items():
    for seed, trials in enumerate(seeds):
      costs, losses = zip(*trials, strict=True)
      best = [max(loss, FLOOR) for loss in itertools.accumulate(losses, min)]
      label = None if seed else sampler
      panel.step(costs, best, where='post', ms=3, label=label, **look[sampler].kwargs())
  panel.set_yscale('log')
  panel.set_xlabel('forward evaluations')
  panel.grid(axis='y')
  panel.set_ylabel('bits per byte above the best known')
  figure.legend(loc='outside upper center', ncols=len(found))
  return figure
