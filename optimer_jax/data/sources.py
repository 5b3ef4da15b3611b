"""Where text comes from. Every source yields `Document`s, in the same order every time.

A source is a frozen dataclass with one method, `documents()`; its `str()` names it in messages.
A missing, empty or damaged file raises UserError with its name and, where it has lines, the line.
"""

import glob
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from optimer_jax.data import recipes, synthetic
from optimer_jax.errors import UserError


class Document(NamedTuple):
  text: str
  source: str  # what it is a part of: a file, a page, a chapter


@dataclass(frozen=True)
class Jsonl:
  """One JSON object a line, its text under the key `text`; a key "source" says where it is from."""

  path: str
  text: str = 'text'

  def __str__(self) -> str:
    return str(self.path)

  def documents(self) -> Iterator[Document]:
    found = False
    with open_bytes(self.path) as file:
      for number, line in enumerate(file, 1):
        where = f'{self.path}:{number}'
        if not line.strip():
          continue
        try:
          row = json.loads(decode(line, where))
        except ValueError as error:
          raise UserError(f'{where} is not JSON ({error}): write one JSON object a line') from None
        if not isinstance(row, dict):
          raise UserError(f'{where} is not a JSON object: write one a line, {{"{self.text}": "…"}}')
        text = _field(row, self.text, where)
        if text:
          found = True
          yield Document(text, _printable(str(row.get('source', where))))
    if not found:
      raise UserError(f'{self.path} holds no text: it is empty')


@dataclass(frozen=True)
class TextFiles:
  """Plain text: each file that matches the glob `pattern` (** for any depth) is a document."""

  pattern: str

  def __str__(self) -> str:
    return str(self.pattern)

  def documents(self) -> Iterator[Document]:
    paths = matching(self.pattern)
    found = False
    for path in paths:
      with open_bytes(path) as file:
        text = decode(file.read(), path)
      if text.strip():
        found = True
        yield Document(text, _printable(path))
    if not found:
      raise UserError(f'{self.pattern} holds no text: its {len(paths)} files are empty')


@dataclass(frozen=True)
class Parquet:
  """The texts in one string column of a Parquet file, streamed by record batch."""

  path: str
  column: str = 'text'

  def __str__(self) -> str:
    return str(self.path)

  def documents(self) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    open_bytes(self.path).close()
    row = 0
    found = False
    try:
      with pyarrow.parquet.ParquetFile(self.path) as file:
        names = file.schema_arrow.names
        if self.column not in names:
          hint = nearest(self.column, names)
          raise UserError(f'{self.path} has no column "{self.column}"{hint}')
        for batch in file.iter_batches(columns=[self.column]):
          for value in batch.column(0):
            where = f'{self.path}, row {row},'
            text = _text(value.as_py(), where)
            if text:
              found = True
              yield Document(text, f'{self.path}:{row}')
            row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
      reason = str(error).splitlines()[0]
      raise UserError(
        f'{self.path} is not a whole Parquet file ({reason}): copy it again'
      ) from None
    if not found:
      raise UserError(f'{self.path} holds no text: its column "{self.column}" is empty')


@dataclass(frozen=True)
class ArrayRecord:
  """The records of the ArrayRecord files that match the glob `pattern`, in the files' sorted order.

  A record is a JSON object in UTF-8 with its text under the key `text` (a key "source" says where
  it is from), or, with text = None, plain UTF-8 text. Serialized tf.train.Example protos, as
  TensorFlow Datasets writes them, are neither and are refused.
  """

  pattern: str
  text: str | None = 'text'

  def __str__(self) -> str:
    return str(self.pattern)

  def documents(self) -> Iterator[Document]:
    paths = matching(self.pattern)
    found = False
    for path in paths:
      for number, record in enumerate(_records(path)):
        where = f'{path}, record {number}'
        document = self._document(record, where, f'{path}:{number}')
        if document.text:
          found = True
          yield document
    if not found:
      raise UserError(f'{self.pattern} holds no text: its {len(paths)} files are empty')

  def _document(self, record: bytes, where: str, source: str) -> Document:
    if self.text is None:
      text = decode(record, where)
      return Document(text if text.strip() else '', _printable(source))
    try:
      row = json.loads(decode(record, where))
    except ValueError as error:
      raise UserError(
        f'{where} is not JSON ({error}): for records of plain text set text = None'
      ) from None
    if not isinstance(row, dict):
      raise UserError(f'{where} is not a JSON object: write {{"{self.text}": "…"}}')
    return Document(_field(row, self.text, where), _printable(str(row.get('source', source))))


@dataclass(frozen=True)
class Hub:
  """A data set of the Hugging Face hub; needs the `datasets` library and a reachable hub."""

  name: str
  config: str | None = None
  split: str = 'train'
  column: str = 'text'

  def __str__(self) -> str:
    return f'{self.name}{f"/{self.config}" if self.config else ""} ({self.split})'

  def documents(self) -> Iterator[Document]:
    try:
      import datasets
    except ImportError:
      raise UserError(
        f'{self} needs the datasets library: pip install datasets, or give a file with Jsonl or '
        'Parquet instead'
      ) from None
    try:
      rows = datasets.load_dataset(self.name, self.config, split=self.split)
    except Exception as error:  # no network, no such name, no permission: each its own class
      reason = str(error).splitlines()[0] if str(error) else type(error).__name__
      raise UserError(
        f'{self} could not be loaded ({reason}): check its name and the network, or download it '
        'elsewhere and give the file with Jsonl or Parquet'
      ) from None
    if self.column not in rows.column_names:
      hint = nearest(self.column, rows.column_names)
      raise UserError(f'{self} has no column "{self.column}"{hint}')
    found = False
    for row, value in enumerate(rows[self.column]):
      text = _text(value, f'{self}, row {row},')
      if text:
        found = True
        yield Document(text, f'{self.name}:{row}')
    if not found:
      raise UserError(f'{self} holds no text: its column "{self.column}" is empty')


@dataclass(frozen=True)
class Recipe:
  """A split (train, dev, test) of a domain that `recipes` builds, once, under `cache`."""

  name: str
  split: str
  cache: str | None = None

  def __str__(self) -> str:
    return f'{self.name} ({self.split})'

  def documents(self) -> Iterator[Document]:
    if self.split not in recipes.SPLITS:
      raise UserError(
        f'{self.name} has no split "{self.split}"{nearest(self.split, recipes.SPLITS)}'
      )
    cache = Path(self.cache) if self.cache else default_cache()
    directory = cache / 'recipes' / f'{self.name}-{recipes.VERSION}'
    path = directory / f'{self.split}.jsonl'
    if not path.exists():
      recipes.build(self.name, directory)
    yield from Jsonl(str(path)).documents()


@dataclass(frozen=True)
class Synthetic:
  """Generated text in one of four invented languages (north, east, south, west); no downloads."""

  name: str
  split: str
  seed: int = 0

  def __str__(self) -> str:
    return f'synthetic {self.name} ({self.split})'

  def documents(self) -> Iterator[Document]:
    for name, known in ((self.name, synthetic.LANGUAGES), (self.split, synthetic.DOCUMENTS)):
      if name not in known:
        raise UserError(f'synthetic text has no "{name}"{nearest(name, known)}')
    for number, text in enumerate(synthetic.texts(self.name, self.split, self.seed)):
      yield Document(text, f'{self.name}/{self.split}/{number}')


def default_cache() -> Path:
  """Where what can be built again is kept: $OPTIMER_CACHE, or the user's cache directory."""
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(os.environ.get('OPTIMER_CACHE') or Path(home) / 'optimer_jax')


def _printable(name: str) -> str:
  """A name that can be written as UTF-8, whatever bytes a file name has."""
  return name.encode('utf-8', 'replace').decode()


def matching(pattern: str) -> list[str]:
  paths = sorted(path for path in glob.glob(str(pattern), recursive=True) if Path(path).is_file())
  if not paths:
    raise UserError(f'no file matches {pattern}: check the path')
  return paths


def open_bytes(path: str):
  try:
    return open(path, 'rb')
  except FileNotFoundError:
    raise UserError(f'{path} is missing: check the path') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}): check the path') from None


def _records(path: str) -> Iterator[bytes]:
  """The records of an ArrayRecord file one by one, without read-ahead threads and their buffers."""
  from array_record.python.array_record_module import ArrayRecordReader

  open_bytes(path).close()
  try:
    # A reader of a file cut off between blocks has no records, and says why only on closing.
    with closing(ArrayRecordReader(path, 'readahead_buffer_size:0,max_parallelism:0')) as reader:
      for _ in range(reader.num_records()):
        yield reader.read()
  except (RuntimeError, IndexError) as error:
    reason = str(error).split(';')[0] or 'it ends early'
    raise UserError(f'{path} is not a whole ArrayRecord file ({reason}): copy it again') from None


def decode(content: bytes, where: str) -> str:
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    # A single line's place is already in `where`; a whole file's is not.
    line = f':{line}' if line > 1 or b'\n' in content[:-1] else ''
    raise UserError(
      f'{where}{line} is not UTF-8 (byte 0x{content[error.start]:02x}): convert the file first'
    ) from None


def _field(row: dict, key: str, where: str) -> str:
  if key not in row:
    raise UserError(f'{where} has no key "{key}"{nearest(key, row)}')
  return _text(row[key], f'{where}, key "{key}",')


def _text(value: object, where: str) -> str:
  """The value as text that can be encoded; '' for a missing or blank one."""
  if value is None:
    return ''
  if not isinstance(value, str):
    raise UserError(
      f'{where} is a {type(value).__name__}, not text: name the key or column of text'
    )
  try:
    value.encode()
  except UnicodeEncodeError:
    raise UserError(f'{where} holds half of a surrogate pair: mend the text first') from None
  return value if value.strip() else ''


def nearest(name: str, known) -> str:
  known = [str(each) for each in known]
  close = get_close_matches(name, known, 1, 0.3)
  return f': did you mean "{close[0]}"?' if close else f': it has {", ".join(known[:10]) or "none"}'
