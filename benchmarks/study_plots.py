"""The pictures of RESULTS.md, of what `benchmarks.study` keeps."""

import itertools
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from optimer_jax.report.style import AVERAGE, INK, OPTIMER, WIDTH, looks, styled

Points = Sequence[tuple[float, float]]


@styled
def ahead(differences: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
  """A row a model, a mark a setting: how far OptiMer is ahead of it on test text, +- 2 s.e.

  Args:
    differences: by setting and model, OptiMer's loss minus the model's, and its standard error.
  """
  models = [*dict.fromkeys(model for found in differences.values() for model in found)]
  figure = Figure(figsize=(WIDTH, 0.27 * len(models) + 1.0))
  panel = figure.subplots()
  panel.axvline(0, color=INK, linewidth=0.9)
  look = looks([*differences])
  for i, (setting, found) in enumerate(differences.items()):
    rows = [models.index(model) + 0.16 * (i - (len(differences) - 1) / 2) for model in found]
    values, errors = zip(*found.values(), strict=True)
    panel.errorbar(
      values,
      rows,
      xerr=[2 * error for error in errors],
      linestyle='none',
      label=setting,
      **look[setting].kwargs(),
    )
  panel.set_yticks(range(len(models)), models)
  panel.set_ylim(len(models) - 0.5, -0.5)
  panel.grid(axis='x')
  panel.set_xlabel('OptiMer minus it, bits per byte on test text, ± 2 s.e.')
  figure.legend(loc='outside upper right', ncols=3)
  return figure


@styled
def mixing(ways: Mapping[str, Sequence[tuple[Points, Mapping[str, float]]]]) -> Figure:
  """A panel a setting: the uniform mixture's loss on its way, and those of merges beside it.

  Args:
    ways: by setting, for each seed, the (tokens, loss on development text) of the mixture and the
      losses of 'base', 'average' and 'OptiMer'.
  """
  figure = Figure(figsize=(WIDTH, 2.9))
  panels = figure.subplots(1, len(ways), squeeze=False)[0]
  mixture = looks(['uniform mixture'])['uniform mixture']
  for panel, (setting, seeds) in zip(panels, ways.items(), strict=True):
    panel.set_title(setting)
    for seed, (way, merges) in enumerate(seeds):
      tokens, losses = zip(*[(0, merges['base']), *way], strict=True)
      label = None if seed else 'uniform mixture'
      panel.plot([each / 1000 for each in tokens], losses, label=label, **mixture.kwargs())
      for name, look, line in (('average', AVERAGE, '--'), ('OptiMer', OPTIMER, '-')):
        label = None if seed else name
        panel.axhline(merges[name], color=look.color, linestyle=line, label=label)
    panel.set_xlabel('thousand tokens, all data sets')
    panel.grid(axis='y')
  panels[0].set_ylabel('bits per byte, development')
  panels[-1].legend(loc='upper right')
  return figure


@styled
def searching(found: Mapping[str, Mapping[str, Sequence[Points]]]) -> Figure:
  """A panel a setting: the best loss so far of each sampler, by what it cost.

  Args:
    found: by setting and sampler, for each seed, the (cost in forward evaluations, loss) of the
      trials in order.
  """
  figure = Figure(figsize=(WIDTH, 2.9))
  panels = figure.subplots(1, len(found), squeeze=False)[0]
  for panel, (setting, samplers) in zip(panels, found.items(), strict=True):
    panel.set_title(setting)
    look = looks([*samplers])
    for sampler, seeds in samplers.items():
      for seed, trials in enumerate(seeds):
        costs, losses = zip(*trials, strict=True)
        best = [*itertools.accumulate(losses, min)]
        label = None if seed else sampler
        panel.step(costs, best, where='post', ms=3, label=label, **look[sampler].kwargs())
    panel.set_xlabel('forward evaluations')
    panel.grid(axis='y')
  panels[0].set_ylabel('best so far, bits per byte, development')
  panels[-1].legend(loc='upper right')
  return figure
