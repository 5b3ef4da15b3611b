"""The report of a run: one HTML file that needs nothing else, and its figures as PNG."""

from importlib import resources
from pathlib import Path

import jinja2

from optimer_jax.files import atomic_directory
from optimer_jax.report.blocks import Picture, Section
from optimer_jax.report.outcome import outcome, reading
from optimer_jax.report.read import Run, read_run
from optimer_jax.report.sections import build
from optimer_jax.report.style import DARK, LIGHT, png, svg


def write_report(run: Path) -> Path:
  """Writes RUN/report/index.html and RUN/report/*.png from what RUN holds; returns the page.

  Missing and damaged parts are named in the page. Raises UserError if RUN is not a run directory.
  """
  data = read_run(Path(run))
  sections = build(data)
  with atomic_directory(Path(run) / 'report') as folder:
    (folder / 'index.html').write_text(render(data, sections), encoding='utf-8')
    for section in sections:
      for block in section.blocks:
        if isinstance(block, Picture):
          (folder / f'{block.name}.png').write_bytes(png(block.figure))
  return Path(run) / 'report' / 'index.html'


def render(run: Run, sections: list[Section]) -> str:
  """The page as text."""
  template = resources.files('optimer_jax.report').joinpath('page.html').read_text('utf-8')
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  return environment.from_string(template).render(
    run=run,
    outcome=outcome(run),
    reading=reading(run),
    sections=sections,
    light=LIGHT,
    dark=DARK,
    svg=svg,
    kind=lambda block: type(block).__name__,
  )
