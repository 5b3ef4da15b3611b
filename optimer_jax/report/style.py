"""Colours and type of the report's figures, and how a figure becomes SVG or PNG.

Every colour is one of LIGHT's values, so that the page can swap it for a CSS variable and follow
the reader's light or dark theme. A data set keeps its colour and marker in all figures; base and
uniform average are grey, OptiMer is ink.
"""

import functools
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

WIDTH = 9.0  # inches; the page shows 100 CSS pixels an inch

STEPS = 8
LIGHT = {
  'ink': '#1b1f24',
  'muted': '#68717b',
  'faint': '#d9dee3',
  'paper': '#fffffe',
  # Okabe and Ito's hues, darkened to at least 3:1 on white where theirs are paler.
  **dict(
    zip(
      [f'd{i}' for i in range(8)],
      '#0072b2 #d55e00 #009e73 #cc79a7 #a87600 #6a51c4 #5b4636 #00838f'.split(),
      strict=True,
    )
  ),
  # The better, the further from the paper: dark on light and, in DARK, bright on dark.
  **{f's{i}': to_hex(colormaps['viridis'](0.88 - 0.88 * i / (STEPS - 1))) for i in range(STEPS)},
}
DARK = {
  'ink': '#e8ebee',
  'muted': '#9aa4ae',
  'faint': '#353c44',
  'paper': '#15181c',
  **dict(
    zip(
      [f'd{i}' for i in range(8)],
      '#4aa8e8 #ff8a3d #2fc497 #e39bc6 #dfb13e #ab93f2 #c9a583 #55c8d2'.split(),
      strict=True,
    )
  ),
  **{f's{i}': to_hex(colormaps['viridis'](0.25 + 0.75 * i / (STEPS - 1))) for i in range(STEPS)},
}
INK, MUTED, FAINT, PAPER = (LIGHT[name] for name in ('ink', 'muted', 'faint', 'paper'))

STYLE = {
  'font.family': 'DejaVu Sans',  # ships with matplotlib: the same figure on every machine
  'font.size': 8.5,
  'axes.titlesize': 9,
  'axes.titlelocation': 'left',
  'axes.labelsize': 8.5,
  'axes.linewidth': 0.7,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': MUTED,
  'axes.labelcolor': INK,
  'axes.titlecolor': INK,
  'axes.facecolor': 'none',
  'axes.axisbelow': True,
  'axes.formatter.useoffset': False,
  'axes.unicode_minus': True,
  'figure.facecolor': 'none',
  'figure.constrained_layout.use': True,
  'grid.color': FAINT,
  'grid.linewidth': 0.7,
  'legend.frameon': False,
  'legend.fontsize': 8.5,
  'legend.labelcolor': INK,
  'lines.linewidth': 1.3,
  'lines.markersize': 5,
  'svg.fonttype': 'path',
  'text.color': INK,
  'xtick.color': MUTED,
  'ytick.color': MUTED,
  'xtick.labelcolor': INK,
  'ytick.labelcolor': INK,
  'xtick.labelsize': 8,
  'ytick.labelsize': 8.5,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
  """Draws under STYLE alone, whatever the caller's rcParams are, and leaves those as they were."""

  @functools.wraps(draw)
  def wrapped(*args, **kwargs):
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
      return draw(*args, **kwargs)

  return wrapped


@dataclass(frozen=True)
class Look:
  """How one series is drawn."""

  color: str
  marker: str
  fill: bool = True

  def kwargs(self) -> dict:
    face = self.color if self.fill else PAPER
    return {'color': self.color, 'marker': self.marker, 'mfc': face, 'mec': self.color}


BASE = Look(MUTED, 'o', fill=False)
AVERAGE = Look(MUTED, 's')
OPTIMER = Look(INK, 'D')


def looks(datasets: list[str]) -> dict[str, Look]:
  """One colour and marker a data set; from the ninth on colours come again, hollow."""
  return {
    name: Look(LIGHT[f'd{i % 8}'], 'osD^vPXh'[i % 8], fill=i < 8) for i, name in enumerate(datasets)
  }


def svg(figure: Figure, prefix: str) -> str:
  """The figure as an inline <svg> element: no namespaces, ids under `prefix`, CSS colours."""
  buffer = io.StringIO()
  with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, 'svg.hashsalt': prefix}):
    figure.savefig(buffer, format='svg', metadata={'Date': None})
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->', '', text, flags=re.DOTALL)
  text = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', '', text)
  text = re.sub(r'\bid="', f'id="{prefix}-', text)
  text = text.replace('xlink:href="#', f'href="#{prefix}-').replace('url(#', f'url(#{prefix}-')
  for name, color in LIGHT.items():
    text = text.replace(color, f'var(--{name})')
  width = round(figure.get_figwidth() * 100)
  return re.sub(
    r'<svg[^>]*?viewBox="([^"]*)"[^>]*>',
    rf'<svg viewBox="\1" width="{width}" aria-hidden="true">',
    text,
    count=1,
  ).strip()


def png(figure: Figure) -> bytes:
  """The figure on white at 200 dots an inch: 1,800 pixels across, shown at 900."""
  buffer = io.BytesIO()
  with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
    figure.savefig(buffer, format='png', dpi=200, facecolor='white', metadata={'Software': None})
  return buffer.getvalue()
