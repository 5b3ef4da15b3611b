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
class Half:
  """Every other document of a source, chosen by a hash of its text: 0 and 1 share none."""

  source: Source
  half: int

  def __str__(self) -> str:
    return f'{self.source} (half {self.half})'

  def documents(self) -> Iterator[Document]:
    for document in self.source.documents():
      if zlib.crc32(document.text.encode()) % 2 == self.half:
        yield document


def from_recipe(name: str, cache: str | None = None) -> Dataset:
  """One of the domains that `recipes` builds from packages: ja, zh, math, code."""
  return Dataset(name, *(Recipe(name, split, cache) for split in ('train', 'dev', 'test')))


def from_folder(path: str, names: tuple[str, ...] | None = None) -> tuple[Dataset, ...]:
  """One data set for each subfolder that holds train.jsonl and dev.jsonl (or valid.jsonl).

  Args:
    path: the folder.
    names: the subfolders to take, in this order; default: all, by name.

  Raises:
    UserError: the folder, or a file of one of its data sets, is missing.
  """
  root = Path(path)
  if names is None:
    names = tuple(sorted(p.parent.name for p in root.glob('*/train.jsonl')))
  if not names:
    raise UserError(f'{path} has no subfolder with a train.jsonl: give the folder of the data sets')
  found = []
  for name in names:
    files = {file.stem: str(file) for file in (root / name).glob('*.jsonl')}
    dev = files.get('dev', files.get('valid'))
    if 'train' not in files or dev is None:
      raise UserError(f'{root / name} needs train.jsonl and dev.jsonl (or valid.jsonl)')
    found.append(from_jsonl(name, files['train'], dev, files.get('test')))
  return tuple(found)


def from_jsonl(name: str, train: str, dev: str, test: str | None = None) -> Dataset:
  """JSONL files; without a test file, half of the dev file's documents are held out as test."""
  if test is not None:
    return Dataset(name, Jsonl(train), Jsonl(dev), Jsonl(test))
  return Dataset(name, Jsonl(train), Half(Jsonl(dev), 0), Half(Jsonl(dev), 1))


def synthetic(name: str, seed: int = 0) -> Dataset:
  """Generated text in an invented language: north, east, south or west."""
  return Dataset(name, *(Synthetic(name, split, seed) for split in ('train', 'dev', 'test')))
