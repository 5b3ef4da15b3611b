"""The token cache: documents cut, packed and kept on disk as rows of T tokens.

N rows, T tokens a row. A document becomes windows of BOS and at most T - 1 of its tokens. Every
window starts with BOS, not only a document's first: Gemma was trained with it always, and its loss
is far too high without it. The target at t is the token at t + 1 of the same segment, so that each
token of a document is a target exactly once, whatever T.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import grain
import numpy as np
from grain import experimental

from optimer_jax.data.tokenizer import Tokenizer
from optimer_jax.errors import UserError
from optimer_jax.files import atomic_directory, write_json
from optimer_jax.progress import progress

FORMAT = 1  # of the cache entries: raise it with any change to what a row holds
ARRAYS = ('tokens', 'segment_ids', 'positions')
# Rows that are filled at the same time: more leaves less padding, and takes longer.
BINS = 128
DOCUMENTS = 512  # tokenised at a time


class Source(Protocol):
  def documents(self) -> Iterator: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """N rows, memory-mapped; also a random-access source of {tokens, segment_ids, positions}.

  Attributes:
    name: of the data set, for messages.
    tokens: int32[N, T], 0 in the padding at a row's end.
    segment_ids: int32[N, T], 1, 2, … for the windows in a row, 0 for padding.
    positions: int32[N, T], from 0 in each segment.
    bytes: int32[N], the UTF-8 bytes that a row's targets stand for.
    sources: where each row's text is from; () for packed rows, which mix sources.
    digest: of the tokens; '' for rows made by hand.
  """

  name: str
  tokens: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  bytes: np.ndarray
  sources: tuple[str, ...] = ()
  digest: str = ''

  def __len__(self) -> int:
    return len(self.tokens)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(getattr(self, name)[index]) for name in ARRAYS}

  def __repr__(self) -> str:
    return f'{self.name}: {len(self)} rows of {self.tokens.shape[1]} tokens'


def packed_rows(source: Source, tokenizer: Tokenizer, length: int, cache: Path | str) -> Rows:
  """Rows for training: windows packed best fit, several to a row.

  Packed once and kept under `cache`, keyed by the documents' content, the tokenizer and `length`.
  Raises UserError for whatever is wrong with the source, before anything is written.
  """
  return _cached(
    source, tokenizer, cache, {'kind': 'packed', 'length': length}, _pack(source, tokenizer, length)
  )


def window_rows(
  source: Source, tokenizer: Tokenizer, length: int, count: int | None, seed: int, cache: Path | str
) -> Rows:
  """Rows for evaluation: one window of one document each, nothing packed.

  `count` rows, fewer if there are fewer, all if None, from as many different sources as possible:
  sources take turns in an order drawn by `seed`, each giving its windows in a drawn order.
  """
  settings = {'kind': 'windows', 'length': length, 'count': count, 'seed': seed}
  return _cached(
    source, tokenizer, cache, settings, _spread(source, tokenizer, length, count, seed)
  )


# A block of rows on its way to disk: the three arrays [n, T], and the rows' sources or [].
Block = tuple[dict[str, np.ndarray], list[str]]


def _pack(source: Source, tokenizer: Tokenizer, length: int) -> Iterator[Block]:
  """Full windows are rows as they are; Grain packs the rest."""
  short = []
  for _, windows in _windows(source, tokenizer, length):
    full = [window for window in windows if len(window) == length]
    short.extend(window for window in windows if len(window) < length)
    if full:
      yield _rows(full, length), []
  if not short:
    return
  # A drawn order mixes long and short rests from all over the data set.
  order = np.random.default_rng(0).permutation(len(short))
  rests = grain.MapDataset.source([{'tokens': short[index]} for index in order])
  packed = experimental.BestFitPackIterDataset(
    rests.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
    length_struct={'tokens': length},
    num_packing_bins=min(BINS, len(short)),
    shuffle_bins=False,
  )
  names = dict(zip(ARRAYS, ('tokens', 'tokens_segment_ids', 'tokens_positions'), strict=True))
  block = []
  for row in packed:
    block.append({name: row[given] for name, given in names.items()})
    if len(block) == DOCUMENTS:
      yield {name: np.stack([row[name] for row in block]) for name in ARRAYS}, []
      block = []
  if block:
    yield {name: np.stack([row[name] for row in block]) for name in ARRAYS}, []


def _spread(
  source: Source, tokenizer: Tokenizer, length: int, count: int | None, seed: int
) -> Iterator[Block]:
  by_source: dict[str, list[np.ndarray]] = {}
  for name, windows in _windows(source, tokenizer, length):
    by_source.setdefault(name, []).extend(windows)
  draw = np.random.default_rng(seed)
  names = [list(by_source)[index] for index in draw.permutation(len(by_source))]
  for name in names:
    # A window of a full row says more than a document's last few tokens: those come last.
    order = draw.permutation(len(by_source[name]))
    order = sorted(order, key=lambda index: len(by_source[name][index]) < length // 2)
    by_source[name] = [by_source[name][index] for index in order]
  turns = (
    (name, by_source[name][turn])
    for turn in range(max(map(len, by_source.values()), default=0))
    for name in names
    if turn < len(by_source[name])
  )
  chosen = [each for each, _ in zip(turns, range(count), strict=False)] if count else list(turns)
  if chosen:
    yield _rows([window for _, window in chosen], length), [name for name, _ in chosen]


def _windows(
  source: Source, tokenizer: Tokenizer, length: int
) -> Iterator[tuple[str, list[np.ndarray]]]:
  """(source, windows) of each document; a window is int32[1 < n <= length], BOS first."""
  if length < 2:
    raise UserError(f'rows of {length} tokens hold no target: take a length of 2 or more')
  bos = np.array([tokenizer.bos], np.int32)
  for documents in _groups(source.documents(), DOCUMENTS):
    for document, ids in zip(
      documents, tokenizer.encode([each.text for each in documents]), strict=True
    ):
      starts = range(0, len(ids), length - 1)
      windows = [np.concatenate([bos, ids[start : start + length - 1]]) for start in starts]
      yield document.source, windows


def _rows(windows: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
  """One window a row, padded to [n, length]."""
  lengths = np.array([len(window) for window in windows])
  real = np.arange(length) < lengths[:, None]
  tokens = np.zeros((len(windows), length), np.int32)
  tokens[real] = np.concatenate(windows)
  positions = np.where(real, np.arange(length), 0).astype(np.int32)
  return {'tokens': tokens, 'segment_ids': real.astype(np.int32), 'positions': positions}


def _groups(items: Iterable, size: int) -> Iterator[list]:
  group = []
  for item in items:
    group.append(item)
    if len(group) == size:
      yield group
      group = []
  if group:
    yield group


# The cache.


def _cached(
  source: Source, tokenizer: Tokenizer, cache: Path | str, settings: dict, blocks: Iterator[Block]
) -> Rows:
  """The entry for these documents and settings, written from `blocks` unless it is there whole."""
  key = hashlib.sha256(json.dumps([FORMAT, tokenizer.digest, settings], sort_keys=True).encode())
  key.update(_content(source))
  directory = Path(cache) / f'{settings["kind"]}-{key.hexdigest()[:24]}'
  rows = _read(str(source), directory)
  if rows is None:
    with atomic_directory(directory) as new:
      _write(new, settings, tokenizer, progress(blocks, None, f'packing {source}', 'blocks'))
    rows = _read(str(source), directory)
  if rows is None:
    raise UserError(f'{directory} does not hold what was written to it: check the disk')
  return rows


def _content(source: Source) -> bytes:
  """A digest of every document, each text and source with its length: no two lists share it."""
  digest = hashlib.sha256()
  for document in source.documents():
    for part in (document.text.encode(), document.source.encode()):
      digest.update(len(part).to_bytes(8, 'little'))
      digest.update(part)
  return digest.digest()


def _write(directory: Path, settings: dict, tokenizer: Tokenizer, blocks: Iterable[Block]) -> None:
  length, count, sources = settings['length'], 0, []
  with (
    open(directory / 'tokens.npy', 'wb') as tokens,
    open(directory / 'segment_ids.npy', 'wb') as segment_ids,
    open(directory / 'positions.npy', 'wb') as positions,
    open(directory / 'bytes.npy', 'wb') as sizes,
  ):
    files = dict(zip((*ARRAYS, 'bytes'), (tokens, segment_ids, positions, sizes), strict=True))
    for name, file in files.items():
      _header(file, (0,) if name == 'bytes' else (0, length))
    for arrays, names in blocks:
      # BOS and padding stand for no bytes, and all else in a row is a target.
      real = arrays['segment_ids'] > 0
      arrays['bytes'] = (tokenizer.byte_lengths[arrays['tokens']] * real).sum(1)
      for name, file in files.items():
        file.write(np.ascontiguousarray(arrays[name], '<i4').tobytes())
      count += len(arrays['tokens'])
      sources += names
    for name, file in files.items():
      _header(file, (count,) if name == 'bytes' else (count, length))
  write_json(
    directory / 'entry.json',
    settings
    | {'rows': count, 'sources': sources}
    | {'digests': {name: _digest(directory / f'{name}.npy') for name in files}},
  )


def _header(file, shape: tuple[int, ...]) -> None:
  """At the file's start; NumPy pads it so that the first axis can grow in place."""
  file.seek(0)
  header = {'descr': '<i4', 'fortran_order': False, 'shape': shape}
  np.lib.format.write_array_header_1_0(file, header)


def _read(name: str, directory: Path) -> Rows | None:
  """The entry's rows; None if it is missing, half there or damaged."""
  try:
    entry = json.loads((directory / 'entry.json').read_text(encoding='utf-8'))
    for array, digest in entry['digests'].items():
      if _digest(directory / f'{array}.npy') != digest:
        return None
    arrays = {
      array: np.load(directory / f'{array}.npy', mmap_mode='r' if entry['rows'] else None)
      for array in entry['digests']
    }
    return Rows(
      name, **arrays, sources=tuple(entry['sources']), digest=entry['digests']['tokens'][:32]
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None


def _digest(path: Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
