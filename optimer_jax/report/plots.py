"""The figures of the report: plain data in, a matplotlib Figure out, no pyplot.

Wherever a figure has error bars they are 2 standard errors long on either side.
"""

import itertools
import math
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from optimer_jax.report.outcome import LOSSES, level
from optimer_jax.report.read import Measured
from optimer_jax.report.style import FAINT, INK, LIGHT, MUTED, PAPER, STEPS, WIDTH, Look, styled


@dataclass(frozen=True)
class Model:
  """One row of the score figure and table.

  `scores` and `change` map a column (a task, or 'mean') to a loss. `change` is the paired
  difference from base; {} where there is none.
  """

  name: str
  label: str
  look: Look
  scores: dict[str, Measured]
  change: dict[str, Measured]


@styled
def scores(models: list[Model], columns: list[str], kinds: dict[str, str]) -> Figure:
  """A panel a column, a row a model: change of loss against base, +- 2 s.e., the score beside it.

  Changes are in per cent of the base's loss, those of accuracy in points; the panels of one kind
  share one scale. Where not all models have a change, the losses themselves, each on its own scale.
  """
  relative = all(model.change for model in models)
  across = min(len(columns), 5)
  down = math.ceil(len(columns) / across)
  figure = Figure(figsize=(WIDTH, down * (0.27 * len(models) + 0.62) + 0.25))
  figure.get_layout_engine().set(wspace=0.09)
  panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
  points = {
    column: [_point(model, column, models, kinds[column], relative) for model in models]
    for column in columns
  }
  for panel, column in zip(panels, columns, strict=False):
    drawn = [item for item in enumerate(points[column]) if item[1]]
    # With a base all panels of a kind share one scale; otherwise each has its own.
    shared = [name for name in columns if relative and kinds[name] == kinds[column]] or [column]
    seen = [point for name in shared for point in points[name] if point]
    edges = [x + sign * 2 * error for x, error in seen for sign in (-1, 1)]
    low, high = min(edges), max(edges)
    span = (high - low) or abs(high) or 1
    # Room on the right for the values, which stand in a column of their own.
    panel.set_xlim(low - 0.08 * span, high + 0.56 * span)
    panel.set_ylim(len(models) - 0.4, -0.6)
    panel.set_yticks(range(len(models)), [model.label for model in models])
    panel.tick_params(axis='y', length=0)
    panel.hlines(range(len(models)), low, high, color=FAINT, linewidth=0.7, zorder=0)
    if relative:
      panel.axvline(0, color=MUTED, linewidth=0.8, zorder=0.5)
    for y, (x, error) in drawn:
      look = models[y].look
      panel.errorbar(x, y, xerr=2 * error, linestyle='none', elinewidth=1.3, **look.kwargs())
    best = min((models[y].scores[column][0] for y, _ in drawn), default=None)
    for y, _ in drawn:
      value = models[y].scores[column][0]
      panel.text(
        0.99,
        y,
        level(value, kinds[column], 3),
        transform=panel.get_yaxis_transform(),
        ha='right',
        va='center',
        fontsize=8,
        color=INK if value == best else MUTED,
        fontweight='bold' if value == best else 'normal',
      )
    ticks = MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(low, high)
    panel.set_xticks([tick for tick in ticks if low - 0.04 * span <= tick <= high + 0.04 * span])
    panel.set_title(column, fontweight='bold' if column == 'mean' else 'normal')
    panel.spines['left'].set_visible(False)
    panel.spines['bottom'].set_bounds(low, high)
  for panel in panels[len(columns) :]:
    panel.set_visible(False)
  units = {*kinds.values()}
  if relative:
    text = {
      ('bits/byte',): 'change against base, %',
      ('accuracy',): 'change of 1 − accuracy against base, points',
    }.get((*units,), 'change against base: of 1 − accuracy in points, of the rest in %')
  else:
    text = {('bits/byte',): 'bits/byte', ('accuracy',): '1 − accuracy'}.get((*units,), 'loss')
  words = 'bits/byte, lower is better' if units == {'bits/byte'} else 'scores; left is better'
  figure.supxlabel(f'{text}  (bars: ± 2 s.e.; numbers: {words})', fontsize=8.5)
  return figure


def _point(model: Model, column: str, models: list[Model], kind: str, relative: bool):
  if column not in model.scores or (relative and column not in model.change):
    return None
  if not relative:
    return _drawn(model.scores[column])
  base = next(other for other in models if other.name == 'base').scores[column]
  return _drawn(scaled(model.change[column], base.value, kind))


def scaled(change: Measured, loss: float, kind: str) -> Measured:
  """A change of loss in per cent of `loss`, or in points of accuracy."""
  scale = 100.0 if kind == 'accuracy' else 100 / loss
  return Measured(scale * change.value, scale * change.stderr)


def _drawn(found: Measured) -> tuple[float, float]:
  # An error that is not known has no bar.
  return found.value, 0.0 if math.isnan(found.stderr) else found.stderr


@styled
def weights(found: dict[str, float], ratios: dict[str, float], look: dict[str, Look]) -> Figure:
  """Bars: merge weights w (left) and mixture ratios in per cent (right); a line at uniform."""
  names = list(found)
  figure = Figure(figsize=(WIDTH, 0.3 * len(names) + 0.75))
  left, right = figure.subplots(1, 2, sharey=True)
  percent = {name: 100 * value for name, value in ratios.items()}
  for panel, values, title, uniform, text in (
    (left, found, 'merge weight $w$', 1 / len(names), '{:.3f}'),
    (right, percent, 'mixture ratio, %', 100 / len(names), '{:.1f}'),
  ):
    bars = [values.get(name, 0) for name in names]
    panel.barh(range(len(names)), bars, height=0.62, color=[look[name].color for name in names])
    widest = max(map(abs, [*bars, uniform]))
    low = min([0, *bars])
    panel.set_xlim(low - (0.16 * widest if low < 0 else 0), max([0, uniform, *bars]) * 1.16)
    for y, value in enumerate(bars):
      panel.annotate(
        text.format(value).replace('-', '−'),
        (value, y),
        xytext=(4 if value >= 0 else -4, 0),
        textcoords='offset points',
        va='center',
        ha='left' if value >= 0 else 'right',
        fontsize=8,
        bbox={'facecolor': PAPER, 'edgecolor': 'none', 'pad': 2},
      )
    panel.axvline(0, color=MUTED, linewidth=0.8)
    panel.axvline(uniform, color=INK, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0)
    panel.text(
      uniform,
      -0.56,
      f'uniform, 1/{len(names)}',
      ha='center',
      va='bottom',
      fontsize=7.5,
      color=MUTED,
    )
    panel.set_xlabel(title)
    panel.tick_params(axis='y', length=0)
    panel.spines['left'].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(5))
  left.set_yticks(range(len(names)), names)
  left.set_ylim(len(names) - 0.5, -0.55)
  return figure


SAMPLERS = {'seed': Look(MUTED, 's'), 'vizier': Look(LIGHT['d0'], 'o')}
SAMPLERS['surrogate'] = Look(LIGHT['d1'], 'D')


@styled
def convergence(
  trials: list[dict], objective: str, marked: dict[str, int], unit: str = 'bits/byte'
) -> Figure:
  """Objective of each trial in order, by sampler, with the best so far as a line.

  `marked` names trials by index (for example the base, the uniform average). A few trials far
  worse than the rest, as the base is, would flatten the others: they stand at the upper edge.
  """
  figure = Figure(figsize=(WIDTH, 2.9))
  panel = figure.subplots()
  values = [trial['objective'] for trial in trials]
  ceiling = _ceiling(values)
  span = (ceiling - min(values)) or 1
  number = [trial['trial'] for trial in trials]
  best = [min(values[: i + 1]) for i in range(len(values))]
  shown = [min(value, ceiling + 0.1 * span) for value in best]
  panel.step(number, shown, where='post', color=INK, linewidth=1.1, label='best so far', zorder=1)
  names = list(dict.fromkeys(trial['sampler'] for trial in trials))
  extra = iter([Look(LIGHT[f'd{i}'], marker) for i, marker in ((2, '^'), (3, 'v'), (5, 'P'))] * 9)
  for name in names:
    look = SAMPLERS.get(name) or next(extra)
    own = [i for i, trial in enumerate(trials) if trial['sampler'] == name]
    inside = [i for i in own if values[i] <= ceiling]
    panel.plot(
      [number[i] for i in inside],
      [values[i] for i in inside],
      linestyle='none',
      label=name,
      **look.kwargs(),
    )
    for i in set(own) - set(inside):
      panel.plot(number[i], ceiling + 0.1 * span, **{**look.kwargs(), 'marker': '^'})
  called = {i: name for name, i in marked.items()}
  for i, value in enumerate(values):
    if value > ceiling:
      # Upright, so that neighbours keep clear of each other.
      panel.annotate(
        f'{called.get(i, "")} {value:.3f}'.strip(),
        (number[i], ceiling + 0.1 * span),
        xytext=(0, 6),
        textcoords='offset points',
        ha='center',
        va='bottom',
        rotation=90,
        fontsize=7.5,
        color=MUTED,
      )
    elif i in called:
      panel.annotate(
        called[i],
        (number[i], value),
        xytext=(5, 4),
        textcoords='offset points',
        va='bottom',
        fontsize=8,
        color=MUTED,
      )
  panel.set_ylim(
    min(values) - 0.08 * span, ceiling + (0.12 if max(values) > ceiling else 0.08) * span
  )
  panel.xaxis.set_major_locator(MaxNLocator(integer=True))
  panel.set_xlabel('trial')
  name = f'objective ({objective})' if objective else 'objective'
  panel.set_ylabel(f'{name}, {unit}')
  panel.grid(axis='y')
  figure.legend(loc='outside upper left', ncols=len(names) + 1, handletextpad=0.4)
  return figure


def _ceiling(values: list[float]) -> float:
  """The highest value that is drawn to scale: the upper quartile plus three times its height."""
  ordered = sorted(values)
  if len(ordered) < 5:
    return ordered[-1]
  quartile = ordered[math.ceil(0.75 * len(ordered)) - 1]
  return max(v for v in ordered if v <= quartile + 3 * (quartile - ordered[0]))


@styled
def weight_space(trials: list[dict], names: list[str]) -> Figure:
  """Parallel coordinates: a line a trial over the weights, ending at its objective's rank.

  Colour runs over ranks (darker, and in dark mode brighter, is better); the best is thick.
  """
  figure = Figure(figsize=(WIDTH, 3.1))
  panel = figure.subplots()
  order = sorted(range(len(trials)), key=lambda i: trials[i]['objective'], reverse=True)
  spread = [trial['weights'].get(name, 0) for trial in trials for name in names]
  low, high = min([0, *spread]), max([*spread, 0.1])
  low, high = (low - 0.06 * (high - low) if low < 0 else 0), high + 0.06 * (high - low)
  panel.set_ylim(low - 0.03 * (high - low), high)
  last = len(names)
  for place, i in enumerate(order):
    rank = place / max(len(order) - 1, 1)
    best = place == len(order) - 1
    values = [trials[i]['weights'].get(name, 0) for name in names]
    end = low + rank * (high - low) * 0.97
    panel.plot(
      [*range(last), last],
      [*values, end],
      color=LIGHT[f's{round(rank * (STEPS - 1))}'],
      linewidth=2.4 if best else 1.0,
      alpha=1 if best else 0.8,
      solid_joinstyle='round',
      zorder=2 + rank,
      clip_on=False,
    )
  for x in range(last + 1):
    panel.axvline(x, color=MUTED, linewidth=0.8, zorder=1)
  panel.hlines(1 / last, 0, last - 1, color=INK, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
  panel.set_xlim(-0.02, last + 0.02)
  panel.set_xticks(range(last + 1), [*(f'$w$  {name}' for name in names), 'objective (rank)'])
  panel.tick_params(axis='x', length=0, pad=6, labelsize=8.5)
  panel.set_ylabel('merge weight $w$')
  for side in panel.spines.values():
    side.set_visible(False)
  for rank, i in ((1, order[-1]), (0, order[0])):
    panel.annotate(
      f'{trials[i]["objective"]:.3f}{" best" if rank else " worst"}',
      (last, low + rank * (high - low) * 0.97),
      xytext=(6, 0),
      textcoords='offset points',
      va='center',
      fontsize=8,
      fontweight='bold' if rank else 'normal',
      annotation_clip=False,
    )
    if len(order) == 1:
      break
  return figure


@styled
def front(
  observed: list[dict[str, float]], predicted: list[dict[str, float]], tasks: list[str]
) -> Figure:
  """A panel for each pair of tasks: the losses of trials on a front, and predicted ones between."""
  pairs = [*itertools.combinations(tasks, 2)]
  figure = Figure(figsize=(WIDTH, 2.9 if len(pairs) == 1 else 2.4))
  panels = figure.subplots(1, len(pairs), squeeze=False)[0]
  kinds = [
    ('predicted', predicted, Look(MUTED, 'o', False)),
    ('trials', observed, SAMPLERS['vizier']),
  ]
  for panel, (x, y) in zip(panels, pairs, strict=True):
    for name, points, look in kinds:
      points = sorted(points, key=lambda point: point[x])
      line = '-' if name == 'predicted' and len(pairs) == 1 else 'none'
      across, up = ([point[task] for point in points] for task in (x, y))
      panel.plot(across, up, **{**look.kwargs(), 'linestyle': line, 'linewidth': 0.8}, label=name)
    panel.set_xlabel(f'loss of {x}')
    panel.set_ylabel(f'loss of {y}')
    panel.grid()
  figure.legend(*panels[0].get_legend_handles_labels(), loc='outside upper left', ncols=2)
  return figure


@styled
def gap(
  gains: dict[str, dict[str, tuple[Measured, Measured]]],
  kinds: dict[str, str],
  look: dict[str, Look],
) -> Figure:
  """A panel a reference ('over …'), a row a column: gain on development and on test, +- 2 s.e.

  Gains are already in per cent or points, as `kinds` says; each kind has panels of its own scale.
  """
  columns = list(dict.fromkeys(column for found in gains.values() for column in found))
  groups = {}
  for column in columns:
    groups.setdefault(kinds[column], []).append(column)
  sizes = [len(group) for group in groups.values()]
  figure = Figure(figsize=(WIDTH, 0.34 * len(columns) + 0.75 * len(groups) + 0.35))
  # Space for the axis and its name is the same for each group: let heights follow the rows.
  panels = figure.subplots(
    len(groups), len(gains), squeeze=False, sharey='row', height_ratios=[n + 0.6 for n in sizes]
  )
  for row, (kind, group) in zip(panels, groups.items(), strict=True):
    for panel, (title, found) in zip(row, gains.items(), strict=True):
      for y, column in enumerate(group):
        color = INK if column == 'mean' else look[column].color if column in look else MUTED
        for measured, shift in zip(found.get(column, ()), (-0.15, 0.15), strict=False):
          value, error = _drawn(measured)
          style = Look(color, 'o', False) if shift < 0 else Look(color, 's')
          panel.errorbar(value, y + shift, xerr=2 * error, elinewidth=1.2, **style.kwargs())
      panel.axvline(0, color=MUTED, linewidth=0.8, zorder=0.6)  # above the grid
      panel.set_yticks(range(len(group)), group)
      panel.set_ylim(len(group) - 0.5, -0.5)
      panel.tick_params(axis='y', length=0)
      panel.spines['left'].set_visible(False)
      panel.grid(axis='x')
      panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
      unit = 'points of accuracy' if kind == 'accuracy' else f'% of its {LOSSES[kind]}'
      panel.set_xlabel(f'gain over {title}, {unit}')
  figure.legend(
    handles=[
      Line2D([], [], linestyle='none', label='development', **Look(INK, 'o', False).kwargs()),
      Line2D([], [], linestyle='none', label='test', **Look(INK, 's').kwargs()),
    ],
    loc='outside upper left',
    ncols=2,
    handletextpad=0.2,
  )
  return figure


@styled
def training(runs: dict[str, list[dict]], look: dict[str, Look]) -> Figure:
  """A column a CPT run: training loss (above) and held-out bits/byte (below) against the step."""
  names = list(runs)
  across = min(len(names), 5)
  blocks = math.ceil(len(names) / across)
  figure = Figure(figsize=(WIDTH, 3.3 * blocks))
  panels = figure.subplots(2 * blocks, across, squeeze=False, sharex='col')
  for i in range(blocks * across):
    block, column = divmod(i, across)
    pair = panels[2 * block][column], panels[2 * block + 1][column]
    for panel, key, marked in zip(pair, ('loss', 'dev_bits_per_byte'), (False, True), strict=True):
      panel.set_visible(i < len(names))
      if i >= len(names):
        continue
      # A resumed run writes again the steps after its last save: the later line counts.
      rows = {row['step']: row[key] for row in runs[names[i]] if row.get(key) is not None}
      style = look[names[i]].kwargs() if marked else {'color': look[names[i]].color}
      panel.plot(sorted(rows), [rows[step] for step in sorted(rows)], markersize=4, **style)
      panel.grid(axis='y')
      panel.yaxis.set_major_locator(MaxNLocator(4))
      panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
      if not rows:
        panel.text(0.5, 0.5, 'none', ha='center', color=MUTED, transform=panel.transAxes)
        panel.set_yticks([])
    if i < len(names):
      pair[0].set_title(names[i])
      pair[1].set_xlabel('step')
    if column == 0:
      pair[0].set_ylabel('training loss,\nnats/token')
      pair[1].set_ylabel('development,\nbits/byte')
  figure.align_ylabels(panels[:, 0])
  return figure


@styled
def costs(stages: list[dict], look: dict[str, Look]) -> Figure:
  """Bars: wall time in seconds (left) and FLOPs (right) of each stage, both from zero."""
  figure = Figure(figsize=(WIDTH, 0.25 * len(stages) + 0.75))
  panels = figure.subplots(1, 2, sharey=True)
  colors = [
    look[name].color if (name := row['stage'].rpartition('/')[2]) in look else MUTED
    for row in stages
  ]
  for panel, key, title, text in (
    (panels[0], 'seconds', 'wall time, s', '{:,.0f}'),
    (panels[1], 'flops', 'FLOPs', '{:.2g}'),
  ):
    values = [row[key] for row in stages]
    panel.barh(range(len(stages)), values, height=0.62, color=colors)
    panel.set_xlim(0, (max(values) or 1) * 1.17)
    for y, value in enumerate(values):
      label = text.format(value).replace('e+', 'e') if value else '–'
      panel.annotate(
        label if value >= 1 or not value else f'{value:.1f}',
        (value, y),
        xytext=(4, 0),
        textcoords='offset points',
        va='center',
        fontsize=8,
      )
    panel.set_xlabel(title)
    panel.tick_params(axis='y', length=0)
    panel.spines['left'].set_color(MUTED)
    panel.xaxis.set_major_locator(MaxNLocator(5))
    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-3, 5))
    panel.xaxis.set_major_formatter(formatter)
  panels[0].set_yticks(range(len(stages)), [row['stage'] for row in stages])
  panels[0].set_ylim(len(stages) - 0.45, -0.55)
  return figure
