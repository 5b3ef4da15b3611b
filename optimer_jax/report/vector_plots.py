"""The figures of the distribution vectors: for the report, and for RUN/vectors."""

import itertools
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from optimer_jax.report.style import FAINT, LIGHT, MUTED, STEPS, WIDTH, Look, looks, styled


def vector_figures(
  geometry: Mapping,
  trajectories: Mapping[str, Mapping] | None = None,
  look: Mapping[str, Look] | None = None,
) -> dict[str, Figure]:
  """Every figure that there is something to draw for, by the name of its file.

  Args:
    geometry: what `vectors.geometry.geometry` gives, or {}; files of older versions lack parts.
    trajectories: data set name to what `vectors.trajectory.trajectory` gives.
    look: of each data set; the report's own, so that a data set looks the same in both.
  """
  trajectories = trajectories or {}
  look = look or looks(sorted({*geometry.get('datasets', []), *trajectories}))
  place = {name: i for i, name in enumerate(geometry.get('datasets', []))}
  names = [name for name in look if name in place]
  found = {}

  def ordered(matrix: list[list]) -> list[list]:
    return [[matrix[place[a]][place[b]] for b in names] for a in names]

  def own(key: str) -> dict:
    values = geometry.get(key) or {}
    return {name: values[name] for name in names if values.get(name)}

  if names:
    found['cosine'] = cosine(names, ordered(geometry['cosine']))
  layers = [ordered(matrix) for matrix in geometry.get('cosine_by_layer') or []]
  modules = {m: ordered(matrix) for m, matrix in (geometry.get('cosine_by_module') or {}).items()}
  if len(names) > 1 and layers and modules:
    found['cosine-layers'] = cosine_layers(names, layers, modules, look)
  if len(names) > 1 and geometry.get('sign_agreement'):
    found['signs'] = signs(names, ordered(geometry['sign_agreement']))
  if own('by_layer') and own('by_module'):
    found['norms'] = norms(own('by_layer'), own('by_module'), look)
  if own('layer_module'):
    found['norms-layers'] = norms_layers(own('layer_module'))
  if ways := {name: trajectories[name] for name in look if name in trajectories}:
    found['trajectory'] = trajectory(ways, look)
  return found


@styled
def cosine(names: list[str], matrix: list[list[float]]) -> Figure:
  """The cosine of each pair of distribution vectors; colour to the largest pair, at least .1."""
  return _pairs(names, matrix, middle=0.0, least=0.1)


@styled
def signs(names: list[str], matrix: list[list[float | None]]) -> Figure:
  """The share of one sign of each pair; colour to the pair farthest from .5, at least .05."""
  return _pairs(names, matrix, middle=0.5, least=0.05)


def _pairs(names: list[str], matrix: list[list], middle: float, least: float) -> Figure:
  """A square a pair: blue above `middle`, orange below, the stronger the farther; – for None."""
  size = len(names)
  side = min(0.62 * size + 1.1, WIDTH)
  figure = Figure(figsize=(side, side * 0.86))
  panel = figure.subplots()
  cells = list(itertools.product(range(size), repeat=2))
  pairs = [abs(v - middle) for i, j in cells if i != j and (v := matrix[i][j]) is not None]
  top = max([*pairs, least])
  for i, j in cells:
    away = (middle if matrix[i][j] is None else matrix[i][j]) - middle
    panel.add_patch(
      Rectangle(
        (j - 0.48, i - 0.48),
        0.96,
        0.96,
        facecolor=FAINT if i == j else LIGHT['d0' if away >= 0 else 'd1'],
        alpha=0.5 if i == j else 0.06 + 0.5 * abs(away) / top,
        linewidth=0,
      )
    )
    text = '–' if matrix[i][j] is None else f'{matrix[i][j]:.3f}'
    text = '1' if i == j else text.replace('0.', '.', 1).replace('-', '−')
    panel.text(j, i, text, ha='center', va='center', fontsize=8.5 if size < 12 else 6)
  panel.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect='equal')
  panel.set_xticks(range(size), names)
  panel.set_yticks(range(size), names)
  panel.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
  for spine in panel.spines.values():
    spine.set_visible(False)
  return figure


@styled
def cosine_layers(
  names: list[str],
  by_layer: list[list[list[float]]],
  by_module: dict[str, list[list[float]]],
  look: Mapping[str, Look],
) -> Figure:
  """Cosines per layer (left) and per module (right): a line a pair, of up to four data sets.

  A pair has the line of the first and the markers of the second, edged like the line. Of more
  data sets, each one's mean cosine with the others.
  """
  places = range(len(names))
  if len(names) <= 4:
    label = 'cosine'
    series = {
      f'{names[i]}, {names[j]}': (
        lambda matrix, i=i, j=j: matrix[i][j],
        {
          **look[names[j]].kwargs(),
          'color': look[names[i]].color,
          'mec': look[names[i]].color,
          'mew': 1.2,
        },
      )
      for i, j in itertools.combinations(places, 2)
    }
  else:
    label = 'mean cosine with the others'
    series = {
      names[i]: (
        lambda matrix, i=i: sum(matrix[i][j] for j in places if j != i) / (len(names) - 1),
        look[names[i]].kwargs(),
      )
      for i in places
    }
  return _layers_and_modules(
    {name: [value(matrix) for matrix in by_layer] for name, (value, _) in series.items()},
    {
      name: {module: value(matrix) for module, matrix in by_module.items()}
      for name, (value, _) in series.items()
    },
    {name: style for name, (_, style) in series.items()},
    label,
  )


@styled
def norms(
  by_layer: dict[str, list[float]],
  by_module: dict[str, dict[str, float]],
  look: Mapping[str, Look],
) -> Figure:
  """The vectors' norms per layer (left) and per module (right), both from zero."""
  styles = {name: look[name].kwargs() for name in {**by_layer, **by_module}}
  figure = _layers_and_modules(by_layer, by_module, styles, r'norm of $\tau$')
  left, right = figure.axes
  left.set_ylim(0)
  right.set_xlim(0)
  return figure


def _layers_and_modules(
  by_layer: Mapping[str, list[float]],
  by_module: Mapping[str, Mapping[str, float]],
  styles: Mapping[str, dict],
  label: str,
) -> Figure:
  modules = list(dict.fromkeys(name for row in by_module.values() for name in row))
  figure = Figure(figsize=(WIDTH, max(2.9, 0.24 * len(modules) + 0.9)))
  left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
  for name, values in by_layer.items():
    left.plot(range(len(values)), values, markersize=3.6, **styles[name])
  for i, (name, row) in enumerate(by_module.items()):
    shift = (i - (len(by_module) - 1) / 2) * min(0.13, 0.7 / len(by_module))
    own = [(row[module], y + shift) for y, module in enumerate(modules) if module in row]
    right.plot(*zip(*own, strict=True), linestyle='none', markersize=4, **styles[name])
  for line in (left.axhline, right.axvline):
    line(0, color=MUTED, linewidth=0.8, zorder=0)
  left.set_xlabel('layer')
  left.set_ylabel(label)
  left.xaxis.set_major_locator(MaxNLocator(integer=True))
  left.grid(axis='y')
  right.set_yticks(range(len(modules)), modules)
  right.set_ylim(len(modules) - 0.5, -0.5)
  right.tick_params(axis='y', length=0)
  for y in range(len(modules) - 1):
    right.axhline(y + 0.5, color=FAINT, linewidth=0.7)
  right.set_xlabel(label)
  right.spines['left'].set_visible(False)
  _legend(figure, styles)
  return figure


@styled
def norms_layers(norms: Mapping[str, Mapping[str, list[float]]]) -> Figure:
  """A panel a data set: the norm of each module in each layer, one scale of eight colours."""
  top = max((x for rows in norms.values() for row in rows.values() for x in row), default=0) or 1.0
  across = min(len(norms), 2)
  down = -(-len(norms) // across)
  tall = max(map(len, norms.values()))
  figure = Figure(figsize=(WIDTH, down * (0.17 * tall + 0.3) + 0.75))
  panels = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
  for panel, (name, rows) in zip(panels, norms.items(), strict=False):
    for step in range(STEPS):
      # One path a colour: thousands of rectangles would make the page heavy.
      boxes = [
        Path(
          [(x - 0.47, y - 0.44), (x + 0.47, y - 0.44), (x + 0.47, y + 0.44), (x - 0.47, y + 0.44)]
        )
        for y, row in enumerate(rows.values())
        for x, value in enumerate(row)
        if min(int(STEPS * value / top), STEPS - 1) == step
      ]
      if boxes:
        box = Path.make_compound_path(*boxes)
        panel.add_patch(PathPatch(box, facecolor=LIGHT[f's{step}'], linewidth=0))
    wide = max([1, *map(len, rows.values())])
    panel.set(xlim=(-0.6, wide - 0.4), ylim=(len(rows) - 0.4, -0.6))
    panel.set_yticks(range(len(rows)), list(rows), fontsize=7.5)
    panel.tick_params(axis='y', length=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_title(name)
    for side in ('left', 'bottom'):
      panel.spines[side].set_visible(False)
  for panel in panels[len(norms) :]:
    panel.set_visible(False)
  for panel in panels[max(0, len(norms) - across) : len(norms)]:
    panel.set_xlabel('layer')
    panel.tick_params(axis='x', labelbottom=True)
  figure.legend(
    handles=[
      Patch(facecolor=LIGHT[f's{i}'], label=f'{top * (i + 1) / STEPS:.2g}') for i in range(STEPS)
    ],
    title=r'norm of $\tau$, up to',
    title_fontsize=8.5,
    alignment='left',
    loc='outside upper left',
    ncols=STEPS,
    handlelength=1.2,
    handletextpad=0.4,
    columnspacing=1.2,
  )
  return figure


@styled
def trajectory(ways: Mapping[str, Mapping], look: Mapping[str, Look]) -> Figure:
  """How straight training was, against the share of the steps: weight and two kinds of cosine.

  Left: the projection on tau, dashed where every step adds the same. Middle: the cosine of the way
  so far with tau. Right: the cosine of successive differences, at the step between them.
  """
  figure = Figure(figsize=(WIDTH, 2.9))
  panels = figure.subplots(1, 3)
  for name, way in ways.items():
    share = [step / way['steps'][-1] for step in way['steps']]
    style = {'markersize': 4, **look[name].kwargs()}
    panels[0].plot([0, *share], [0, *way['projection']], **style)
    panels[1].plot(share, way['final_cosine'], **style)
    panels[2].plot(share[:-1], way['step_cosine'], **style)
  panels[0].plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0)
  for panel, title in zip(
    panels,
    (r'weight of $\tau$ that it equals', r'cosine with $\tau$', 'cosine of successive changes'),
    strict=True,
  ):
    panel.set_title(title)
    panel.set_xlim(-0.03, 1.03)
    panel.set_xlabel('step / last step')
    panel.grid(axis='y')
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ['0', '.25', '.5', '.75', '1'])
    panel.yaxis.set_major_locator(MaxNLocator(5))
  for panel in panels[1:]:
    low = panel.get_ylim()[0]
    panel.set_ylim(min(low, 0), max(1.03, panel.get_ylim()[1]))
  if not any(way['step_cosine'] for way in ways.values()):
    panels[2].text(0.5, 0.5, 'none', ha='center', color=MUTED, transform=panels[2].transAxes)
  _legend(figure, {name: look[name].kwargs() for name in ways})
  return figure


def _legend(figure: Figure, styles: Mapping[str, dict]) -> None:
  handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
  figure.legend(
    handles=handles, loc='outside upper left', ncols=min(len(styles), 8), handletextpad=0.4
  )
