"""Gemma's tokenizer: read from a model directory, made from a GGUF, trimmed to the ids in use.

Gemma's SentencePiece model in the `tokenizers` library's terms: a space becomes U+2581, the whole
text is one BPE word, pieces that the text lacks fall back to the bytes of their characters, and
runs of newlines, tabs and spaces are symbols of their own that no merge may cross.

ids: int32[N] of one document, without BOS. V: the vocabulary's size (after trimming, if any).
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from optimer_jax.errors import UserError
from optimer_jax.files import write_json

SPACE = '\u2581'
NAMES = ('<pad>', '<eos>', '<bos>', '<unk>')
BYTES = tuple(f'<0x{byte:02X}>' for byte in range(256))
# Batches for the library's threads: large enough to keep them busy, small enough to hold twice.
BATCH_CHARACTERS = 2_000_000


class Source(Protocol):
  def documents(self) -> Iterator: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A Gemma tokenizer, over its full vocabulary or over the rows of `kept`.

  Attributes:
    pieces: the `tokenizers` object; control pieces written out in a text are text to it.
    kept: None, or the ascending full-vocabulary ids that a trimmed model has: its row i is full
      id kept[i].
    digest: of the tokenizer's files and `kept`.
  """

  pieces: tokenizers.Tokenizer
  kept: np.ndarray | None
  digest: str

  @classmethod
  def load(cls, directory: Path | str, kept: np.ndarray | None = None) -> 'Tokenizer':
    """Reads `directory`/tokenizer.json; UserError if it is missing, damaged or not Gemma's form."""
    path = Path(directory) / 'tokenizer.json'
    try:
      content = path.read_bytes()
    except OSError:
      raise UserError(
        f'{path} is missing: a base needs the tokenizer.json that Gemma checkpoints have'
      ) from None
    try:
      pieces = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises a bare Exception for any damage
      raise UserError(f'{path} is not a tokenizer ({error}): copy it again') from None
    for piece in (*NAMES, *BYTES):
      if pieces.token_to_id(piece) is None:
        raise UserError(f'{path} has no piece {piece}: it is not a Gemma tokenizer')
    # A text that says '<eos>' must not end a document.
    pieces.encode_special_tokens = True
    # Both are what one caller may have set for its own batches; rows are cut here, not there.
    pieces.no_padding()
    pieces.no_truncation()
    digest = hashlib.sha256(content)
    if kept is not None:
      kept = np.asarray(kept, np.int32)
      needed = [pieces.token_to_id(piece) for piece in (*NAMES, *BYTES)]
      full = max(pieces.get_vocab().values()) + 1
      if (np.diff(kept) <= 0).any() or not np.isin(needed, kept).all() or kept[-1] >= full:
        raise UserError(
          f'the trimmed vocabulary does not fit {path}: it must be ascending ids below {full} with '
          'every byte and special piece; import the base again'
        )
      digest.update(kept.tobytes())
    return cls(pieces, kept, digest.hexdigest())

  @cached_property
  def bos(self) -> int:
    return self._row('<bos>')

  @cached_property
  def eos(self) -> int:
    return self._row('<eos>')

  @cached_property
  def size(self) -> int:
    return self._full_size if self.kept is None else len(self.kept)

  @cached_property
  def byte_lengths(self) -> np.ndarray:
    """int32[V]: the UTF-8 bytes of text each id stands for; 0 for special pieces.

    They sum to len(text.encode()) over a text's ids, unless the text itself holds U+2581, which
    Gemma cannot tell from a space.
    """
    lengths = np.zeros(self._full_size, np.int32)
    for piece, number in self.pieces.get_vocab().items():
      lengths[number] = len(piece.replace(SPACE, ' ').encode())
    lengths[[self.pieces.token_to_id(piece) for piece in BYTES]] = 1
    lengths[list(self._special)] = 0
    return lengths if self.kept is None else lengths[self.kept]

  def encode(self, texts: Iterable[str]) -> list[np.ndarray]:
    """The ids int32[N] of each text, without BOS; all cores."""
    ids = []
    for batch in _batches(texts):
      for encoding in self.pieces.encode_batch_fast(batch, add_special_tokens=False):
        ids.append(np.array(encoding.ids, np.int32))
    return ids if self.kept is None else [self._trim(each) for each in ids]

  def decode(self, ids: np.ndarray) -> str:
    """The text of ids; special pieces stand for nothing."""
    ids = np.asarray(ids)
    ids = ids if self.kept is None else self.kept[ids]
    return self.pieces.decode(ids.tolist(), skip_special_tokens=True)

  def holding(self, characters: Iterable[str]) -> np.ndarray:
    """bool[V]: the tokens that hold one of these characters, or the last byte of one."""
    wanted = set(characters)
    found = np.zeros(self._full_size, bool)
    for piece, number in self.pieces.get_vocab().items():
      found[number] = not wanted.isdisjoint(piece.replace(SPACE, ' '))
    found[[self.pieces.token_to_id(BYTES[each.encode()[-1]]) for each in wanted]] = True
    return found if self.kept is None else found[self.kept]

  @cached_property
  def _full_size(self) -> int:
    return max(self.pieces.get_vocab().values()) + 1

  @cached_property
  def _special(self) -> frozenset[int]:
    added = self.pieces.get_added_tokens_decoder()
    return frozenset(number for number, piece in added.items() if piece.special)

  def _row(self, piece: str) -> int:
    number = self.pieces.token_to_id(piece)
    return number if self.kept is None else int(np.searchsorted(self.kept, number))

  @cached_property
  def _spelling(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rows[starts[i]:starts[i] + counts[i]] spell the full id i in the trimmed vocabulary."""
    row = {int(number): index for index, number in enumerate(self.kept)}
    byte = [row[self.pieces.token_to_id(piece)] for piece in BYTES]
    spelt = [[row[self.pieces.token_to_id('<unk>')]]] * self._full_size
    for piece, number in self.pieces.get_vocab().items():
      if number in row:
        spelt[number] = [row[number]]
      elif number not in self._special:
        spelt[number] = [byte[value] for value in piece.replace(SPACE, ' ').encode()]
    counts = np.array([len(rows) for rows in spelt], np.int32)
    rows = np.fromiter((row for rows in spelt for row in rows), np.int32, counts.sum())
    return np.cumsum(counts) - counts, counts, rows

  def _trim(self, ids: np.ndarray) -> np.ndarray:
    starts, counts, rows = self._spelling
    count = counts[ids]
    # The k-th row of an id's spelling sits k after its start: count up within each id.
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return rows[np.repeat(starts[ids], count) + within]


def choose_kept(tokenizer: Tokenizer, sources: Iterable[Source]) -> np.ndarray:
  """The ascending ids, int32[V'], that a model trimmed to the texts of `sources` needs.

  Those that occur in the texts, all bytes, and the special pieces that have a use. Gemma's
  thousands of `<unused…>` pieces occur in no text and are left out. `tokenizer` is the full one.
  """
  kept = np.zeros(tokenizer.size, bool)
  for source in sources:
    for texts in _batches(document.text for document in source.documents()):
      kept[np.concatenate(tokenizer.encode(texts))] = True
  kept[[tokenizer.pieces.token_to_id(piece) for piece in BYTES]] = True
  for number in tokenizer._special:
    kept[number] = not tokenizer.pieces.id_to_token(number).startswith('<unused')
  return np.flatnonzero(kept).astype(np.int32)


def write_gguf_tokenizer(gguf_path: Path | str, directory: Path | str) -> None:
  """Writes tokenizer.json and tokenizer_config.json from the pieces inside a GGUF.

  Raises UserError if the file is not a GGUF with a SentencePiece (`llama`) tokenizer.
  """
  import gguf

  try:
    fields = gguf.GGUFReader(str(gguf_path)).fields
    model, tokens, scores, types = (
      fields[f'tokenizer.ggml.{key}'].contents()
      for key in ('model', 'tokens', 'scores', 'token_type')
    )
  except FileNotFoundError:
    raise UserError(f'{gguf_path} is missing: check the path') from None
  except (ValueError, IndexError) as error:
    raise UserError(f'{gguf_path} is not a whole GGUF file ({error}): fetch it again') from None
  except KeyError as error:
    raise UserError(f'{gguf_path} has no {error.args[0]}: it holds no Gemma tokenizer') from None
  if model != 'llama':
    raise UserError(f'{gguf_path} has a {model!r} tokenizer, not a SentencePiece one like Gemma’s')
  kind = gguf.TokenType
  vocabulary, special, symbols, ordinary = {}, [], [], {}
  for number, (token, score, type_) in enumerate(zip(tokens, scores, types, strict=True)):
    if type_ in (kind.CONTROL, kind.UNKNOWN) or token in NAMES:
      special.append(token)
    elif type_ == kind.USER_DEFINED:
      token = token.replace(' ', SPACE)  # GGUF writers undo SentencePiece's spaces here only
      symbols.append(token)
    elif type_ == kind.NORMAL:
      ordinary[token] = score
    vocabulary[token] = number
  _write(directory, vocabulary, _merges(ordinary), special, symbols)


def write_tiny_tokenizer(directory: Path | str, texts: Iterable[str], size: int) -> None:
  """Trains and writes a BPE tokenizer in Gemma's form with at most `size` pieces.

  The first 260 are <pad> <eos> <bos> <unk> and the bytes, the next are newline and space runs.
  """
  symbols = ['\n\n', SPACE * 2]
  reserved = [*NAMES, *BYTES, *symbols]
  if size <= len(reserved):
    raise UserError(f'a tokenizer of {size} pieces has no room: take more than {len(reserved)}')
  trainee = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True))
  trainee.normalizer = normalizers.Replace(' ', SPACE)
  # Only for training: pieces start at a space and end before the next one, or at a line's end.
  trainee.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(SPACE, 'merged_with_next'),
      pre_tokenizers.Split('\n', 'isolated'),
    ]
  )
  # Rarer characters are spelt in bytes: the pieces beyond them are what makes rows shorter. They
  # are chosen here because the trainer's own choice among equally frequent ones is random.
  texts = list(texts)
  counts = collections.Counter(itertools.chain.from_iterable(texts))
  counts[SPACE] += counts.pop(' ', 0)
  by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
  alphabet = by_frequency[: (size - len(reserved)) // 2]
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=reserved,
    initial_alphabet=alphabet,
    limit_alphabet=len(alphabet),
    show_progress=False,
  )
  trainee.train_from_iterator(texts, trainer)
  learnt = json.loads(trainee.to_str())['model']
  _write(directory, learnt['vocab'], learnt['merges'], list(NAMES), symbols)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
  """Every pair of pieces whose join is a piece, best join first: SentencePiece's order."""
  merges = []
  for piece, score in scores.items():
    for cut in range(1, len(piece)):
      left, right = piece[:cut], piece[cut:]
      if left in scores and right in scores:
        merges.append((-score, len(merges), left, right))
  merges.sort()
  return [(left, right) for _, _, left, right in merges]


def _write(
  directory: Path | str,
  vocabulary: dict[str, int],
  merges: list[tuple[str, str]],
  special: list[str],
  symbols: list[str],
) -> None:
  model = models.BPE(
    vocabulary,
    [tuple(pair) for pair in merges],
    unk_token='<unk>',
    fuse_unk=True,
    byte_fallback=True,
  )
  made = tokenizers.Tokenizer(model)
  made.normalizer = normalizers.Replace(' ', SPACE)
  made.decoder = decoders.Sequence(
    [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  made.add_special_tokens([tokenizers.AddedToken(each, normalized=False) for each in special])
  # Matched in the normalised text, longest first, before any merge: as SentencePiece does.
  made.add_tokens([tokenizers.AddedToken(each, normalized=True) for each in symbols])
  made.post_processor = processors.TemplateProcessing(
    single='<bos> $A',
    pair='<bos> $A <bos> $B',
    special_tokens=[('<bos>', vocabulary['<bos>'])],
  )
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  made.save(str(directory / 'tokenizer.json'), pretty=False)
  # The generic class takes tokenizer.json as it is; transformers' Gemma class would rebuild it
  # without its symbols.
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': True}
  config |= {'bos_token': '<bos>', 'eos_token': '<eos>', 'pad_token': '<pad>'}
  config |= {'unk_token': '<unk>', 'clean_up_tokenization_spaces': False}
  config |= {'model_max_length': 32768, 'padding_side': 'right'}
  write_json(directory / 'tokenizer_config.json', config)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
  batch, characters = [], 0
  for text in texts:
    batch.append(text)
    characters += len(text)
    if characters >= BATCH_CHARACTERS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch
