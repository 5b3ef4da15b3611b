"""launch/colab/quickstart.ipynb and the .py that it is paired with."""

import json
import re
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / 'launch' / 'colab' / 'quickstart.ipynb'
SCRIPT = NOTEBOOK.with_suffix('.py')
FORM = re.compile(r'^([A-Z_]+) = (.+?)  # @param (.+)$', re.MULTILINE)


def read(file: Path = NOTEBOOK):
  """The notebook, from either file."""
  return jupytext.read(file)


def code(containing: str) -> str:
  """The source of the one cell of code that has this text."""
  cells = [cell.source for cell in read().cells if cell.cell_type == 'code']
  (found,) = (source for source in cells if containing in source)
  return found


def fields() -> dict[str, tuple[str, list | dict]]:
  """Of the forms: name to (the value as written, the choices or the type)."""
  sources = [cell.source for cell in read().cells if cell.cell_type == 'code']
  found = {
    name: (value, json.loads(kind)) for s in sources for name, value, kind in FORM.findall(s)
  }
  assert len(found) == sum(source.count('@param') for source in sources)
  return found
