"""What a section of the report is made of; page.html knows how each is shown."""

from dataclasses import dataclass, field

from matplotlib.figure import Figure

from optimer_jax.report.read import Run


@dataclass(frozen=True)
class Text:
  """A paragraph; `kind` is '', 'missing' or 'warning'."""

  text: str
  kind: str = ''


@dataclass(frozen=True)
class Picture:
  """A figure under its file name, with what it says (`alt`) for those who cannot see it."""

  name: str
  figure: Figure
  caption: str
  alt: str


@dataclass(frozen=True)
class Cell:
  """A table cell: the value, a second line below it, and whether it is the column's best."""

  text: str
  below: str = ''
  best: bool = False


@dataclass(frozen=True)
class Table:
  """Rows of cells; the first of each row is its heading."""

  caption: str
  head: list[str]
  rows: list[list[Cell]]


@dataclass(frozen=True)
class Details:
  """Long text, folded."""

  summary: str
  text: str


@dataclass(frozen=True)
class Section:
  """A heading and what stands under it."""

  id: str
  title: str
  blocks: list = field(default_factory=list)


def missing(run: Run, what: str, verb: str, *files: str) -> Text:
  """Says that files which the verb writes are not there, or damaged."""
  text = f'Not there yet: {what} ({", ".join(f"RUN/{file}" for file in files)}); “optimer {verb}” '
  text += 'writes it.' if len(files) == 1 else 'writes them.'
  damaged = [file for file in files if any(p.startswith(f'{file} is') for p in run.problems)]
  if damaged:
    text += f' Damaged, as said at the top: {", ".join(damaged)}.'
  return Text(text, 'missing')
