"""Examples of a task, read from files, from a folder or from the hub.

An example is one row of a data set: a mapping from column to value.
"""

import csv
import dataclasses
import glob
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from optimer_jax.data.sources import decode, matching, nearest, open_bytes
from optimer_jax.errors import UsageError, UserError

KINDS = ('.jsonl', '.json', '.csv', '.tsv', '.parquet')


class Example(NamedTuple):
  values: Mapping[str, object]
  where: str  # file:line, or the row's number in its set

  def value(self, key: str) -> object:
    """The value under `key`; UserError if there is none, or nothing in it."""
    if key not in self.values:
      raise UserError(f'{self.where} has no key "{key}"{nearest(key, self.values)}')
    if self.values[key] is None:
      raise UserError(f'{self.where}, key "{key}", is empty: name another key, or mend the row')
    return self.values[key]

  @property
  def subject(self) -> str | None:
    """What the example is about, in sets that have several subjects."""
    found = self.values.get('subject')
    return None if found is None else str(found)


@dataclasses.dataclass(frozen=True)
class Examples:
  """The rows of one split of a data set.

  Attributes:
    path: a file (.jsonl, .json: a list of objects, .csv, .tsv: unquoted, .parquet) or a glob of
      such files; or a folder as it is downloaded from the hub; or the hub's own name for the set,
      which needs the `datasets` library and a reachable hub.
    config: of a folder or a hub's set; '*' for all, each one's name becoming `subject`.
    split: of a folder or a hub's set. A file has neither splits nor configs, and what is set here
      is not used for it: so one binding of `path` can stand for either.
    columns: names of the columns of .csv and .tsv files without a header; a header that says the
      same is passed over.

  Each file of a glob is a subject, named by the file (without _test and the like), where the rows
  themselves have no column `subject`.
  """

  path: str
  config: str | None = None
  split: str | None = None
  columns: tuple[str, ...] | None = None

  def __str__(self) -> str:
    if self.is_file:
      return self.path
    return f'{self.path}{f"/{self.config}" if self.config else ""} ({self.split})'

  @property
  def is_file(self) -> bool:
    return Path(self.path).suffix in KINDS

  def is_same_set(self, other: 'Examples') -> bool:
    """Whether both read the same rows: a file is one set, whatever split is asked of it."""
    return self == other or (self.is_file and self.path == other.path)

  def rows(self) -> list[Example]:
    """Every row, in order.

    Raises:
      UserError: a file is missing, empty or damaged (with its line), the folder has no such split,
        or the hub cannot be reached.
      UsageError: no split was given where one is needed.
    """
    if self.is_file:
      rows = [row for path, subject in self._globbed() for row in self._read(path, subject)]
    elif self.split is None:
      if not Path(self.path).exists() and '/' not in self.path.strip('/'):
        raise UserError(
          f'{self.path} is missing: give a {", ".join(KINDS)} file, a folder or a set'
        )
      raise UsageError(f'{self.path}: give Examples.split, the split to read')
    elif Path(self.path).is_dir():
      rows = [row for path, subject in self._in_folder() for row in self._read(path, subject)]
    else:
      rows = list(self._on_hub())
    if not rows:
      raise UserError(f'{self} holds no examples: it is empty')
    return rows

  def _globbed(self) -> Iterator[tuple[str, str | None]]:
    for path in matching(self.path):
      yield path, _subject_of(path) if glob.has_magic(self.path) else None

  def _in_folder(self) -> list[tuple[str, str | None]]:
    """The files of the split, in the first of the hub's usual layouts that has any."""
    if self.config == '*':
      places = ('*', 'data/*', 'data', '.')
    elif self.config:
      places = (self.config, f'data/{self.config}')
    else:
      places = ('data', '.')
    root = Path(self.path)
    for place in places:
      for name in (f'{self.split}-*', f'{self.split}.*', f'{self.split}/*'):
        found = sorted(p for p in root.glob(f'{place}/{name}') if p.suffix in KINDS)
        if found and name.endswith('/*'):
          return [(str(p), _subject_of(str(p))) for p in found]
        if found:
          every = place.endswith('*')
          return [(str(p), p.parent.name if every else None) for p in found]
    there = sorted(str(p.relative_to(root)) for p in root.rglob('*') if p.suffix in KINDS)
    raise UserError(
      f'{self.path} has no files of the split "{self.split}"'
      f'{f" of {self.config}" if self.config else ""}: it has {", ".join(there[:6]) or "none"}'
    )

  def _on_hub(self) -> Iterator[Example]:
    try:
      import datasets
    except ImportError:
      raise UserError(
        f'{self} needs the datasets library: pip install datasets, or give a file or folder instead'
      ) from None
    try:
      every = self.config == '*'
      configs = datasets.get_dataset_config_names(self.path) if every else [self.config]
      sets = [datasets.load_dataset(self.path, each, split=self.split) for each in configs]
    except Exception as error:  # no network, no such name, no permission: each its own class
      reason = str(error).splitlines()[0] if str(error) else type(error).__name__
      raise UserError(
        f'{self} is no file or folder here, and could not be loaded from the hub ({reason}): check '
        'its name and the network, or download it elsewhere and give its folder'
      ) from None
    for config, rows in zip(configs, sets, strict=True):
      name = f'{self.path}{f"/{config}" if config else ""} ({self.split})'
      for number, row in enumerate(rows):
        yield _example(row, f'{name}, row {number}', config if every else None)

  def _read(self, path: str, subject: str | None) -> Iterator[Example]:
    suffix = Path(path).suffix
    if suffix == '.parquet':
      rows = _parquet(path)
    elif suffix == '.jsonl':
      rows = _json_lines(path)
    elif suffix == '.json':
      rows = _json_list(path)
    else:
      rows = _table(path, '\t' if suffix == '.tsv' else ',', self.columns)
    for where, row in rows:
      yield _example(row, where, subject)


# The files.


def _example(row: Mapping[str, object], where: str, subject: str | None) -> Example:
  return Example(row if subject is None else {'subject': subject, **row}, where)


def _subject_of(path: str) -> str | None:
  """'anatomy' of anatomy_test.csv; None for a part of a file (test-00000-of-00002.parquet)."""
  stem = Path(path).stem
  if re.search(r'-\d+-of-\d+$', stem):
    return None
  return re.sub(r'[_-](train|dev|val|valid|validation|test)$', '', stem)


def _json_lines(path: str) -> Iterator[tuple[str, dict]]:
  with open_bytes(path) as file:
    for number, line in enumerate(file, 1):
      where = f'{path}:{number}'
      if not line.strip():
        continue
      try:
        row = json.loads(decode(line, where))
      except ValueError as error:
        raise UserError(f'{where} is not JSON ({error}): write one JSON object a line') from None
      yield where, _object(row, where)


def _json_list(path: str) -> Iterator[tuple[str, dict]]:
  with open_bytes(path) as file:
    text = decode(file.read(), path)
  if not text.strip():
    return
  try:
    rows = json.loads(text)
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}): a file of JSON lines ends in .jsonl') from None
  if not isinstance(rows, list):
    raise UserError(f'{path} is not a list: write the examples as a list of JSON objects')
  for number, row in enumerate(rows):
    where = f'{path}, row {number}'
    yield where, _object(row, where)


def _object(row: object, where: str) -> dict:
  if not isinstance(row, dict):
    raise UserError(f'{where} is not a JSON object: write {{"question": "…", …}}')
  return row


def _table(
  path: str, delimiter: str, columns: tuple[str, ...] | None
) -> Iterator[tuple[str, dict]]:
  """Rows of a .csv, or of a .tsv, whose quotation marks are text."""
  with open_bytes(path) as file:
    lines = io.StringIO(decode(file.read(), path), newline='')
  quoting = csv.QUOTE_NONE if delimiter == '\t' else csv.QUOTE_MINIMAL
  reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
  names, line, header = columns, 1, True
  try:
    for cells in reader:
      where, line = f'{path}:{line}', reader.line_num + 1
      if not any(cell.strip() for cell in cells):
        continue
      names = names or tuple(cells)
      if header and _plain(cells) == _plain(names):
        header = False
        continue
      header = False
      if len(cells) != len(names):
        raise UserError(
          f'{where} has {len(cells)} cells, not the {len(names)} of {", ".join(names)}: mend the '
          'row, or give Examples.columns if the file has no header'
        )
      yield where, dict(zip(names, cells, strict=True))
  except csv.Error as error:
    raise UserError(f'{path}:{line} cannot be read ({error}): mend the row') from None


def _plain(cells: Iterable[str]) -> list[str]:
  return [cell.strip().lower() for cell in cells]


def _parquet(path: str) -> Iterator[tuple[str, dict]]:
  import pyarrow
  import pyarrow.parquet

  open_bytes(path).close()
  number = 0
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      for batch in file.iter_batches():
        for row in batch.to_pylist():
          yield f'{path}, row {number}', row
          number += 1
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f'{path} is not a whole Parquet file ({reason}): copy it again') from None
