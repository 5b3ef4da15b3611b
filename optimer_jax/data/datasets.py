"""A data set of a run: a name, and the text to train on, to search on and to test on."""

import dataclasses
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from optimer_jax.data.sources import Document, Jsonl, Recipe, Synthetic
from optimer_jax.errors import UserError


class Source(Protocol):
  """Where text comes from; `sources` has the kinds there are."""

  def documents(self) -> Iterator[Document]: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Three texts that share no document: training sees `train`, the search `dev`, nothing `test`."""

  name: str
  train: Source
  dev: Source
  test: Source


@dataclasses.dataclass(frozen=True)
class Part:
  """Some of a source's documents, chosen by a hash of their text: two parts share none.

  Attributes:
    taken: which of `of` equal parts.
  """

  source: Source
  taken: tuple[int, ...]
  of: int

  def __str__(self) -> str:
    return f'{self.source} (parts {", ".join(map(str, self.taken))} of {self.of})'

  def documents(self) -> Iterator[Document]:
    for document in self.source.documents():
      if zlib.crc32(document.text.encode()) % self.of in self.taken:
        yield document


def from_recipe(name: str, cache: str | None = None) -> Dataset:
  """One of the domains that `recipes` builds from packages: ja, zh, math, code."""
  return Dataset(name, *(Recipe(name, split, cache) for split in ('train', 'dev', 'test')))


def from_folder(path: str, names: tuple[str, ...] | None = None) -> tuple[Dataset, ...]:
  """One data set for each file NAME.jsonl, or subfolder NAME with train.jsonl and dev.jsonl.

  Of a file alone, a tenth of the documents is held out as dev and a tenth as test. A subfolder may
  call its dev.jsonl valid.jsonl; without a test.jsonl, half of those documents are the test.

  Args:
    path: the folder.
    names: those to take, in this order; default: all, by name.

  Raises:
    UserError: the folder, or a file of one of its data sets, is missing.
  """
  root = Path(path)
  if names is None:
    folders = (file.parent.name for file in root.glob('*/train.jsonl'))
    names = tuple(sorted({*folders, *(file.stem for file in root.glob('*.jsonl'))}))
    if not names:
      raise UserError(
        f'{path} has no NAME.jsonl and no NAME/train.jsonl: give the folder of the data sets'
      )
  return tuple(_from_place(root / name) for name in names)


def _from_place(place: Path) -> Dataset:
  if (file := place.with_name(f'{place.name}.jsonl')).is_file():
    text = Jsonl(str(file))
    parts = ((*range(2, 10),), (0,), (1,))
    return Dataset(place.name, *(Part(text, taken, 10) for taken in parts))
  files = {file.stem: str(file) for file in place.glob('*.jsonl')}
  dev = files.get('dev', files.get('valid'))
  if 'train' not in files or dev is None:
    raise UserError(f'{place} needs train.jsonl and dev.jsonl (or valid.jsonl)')
  return from_jsonl(place.name, files['train'], dev, files.get('test'))


def from_jsonl(name: str, train: str, dev: str, test: str | None = None) -> Dataset:
  """JSONL files; without a test file, half of the dev file's documents are held out as test."""
  if test is not None:
    return Dataset(name, Jsonl(train), Jsonl(dev), Jsonl(test))
  return Dataset(name, Jsonl(train), *(Part(Jsonl(dev), (half,), 2) for half in (0, 1)))


def synthetic(name: str, seed: int = 0) -> Dataset:
  """Generated text in an invented language: north, east, south or west."""
  return Dataset(name, *(Synthetic(name, split, seed) for split in ('train', 'dev', 'test')))
