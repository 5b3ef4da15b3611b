import json

import numpy as np
import pytest

from optimer_jax.data.sources import Document, Synthetic
from optimer_jax.data.tokenizer import (
  BYTES,
  NAMES,
  Tokenizer,
  choose_kept,
  write_gguf_tokenizer,
  write_tiny_tokenizer,
)
from optimer_jax.errors import UserError

TEXTS = [
  'the cat sat on the mat, and the other cat sat there.',
  '  def f(x):\n    return x\n\n\n  # two  spaces\tand\ttabs \n',
  'この猫は、あの猫です。日本語の文を読みます。',
  '这只猫在那里。我们读中文。',
  '\u0661 🧿 \u1234 \x00\x7f é e\u0301',
  '<bos> and <eos> are written here, and <0x41>.',
  '',
]


class Texts:
  def __init__(self, *texts):
    self.texts = texts

  def documents(self):
    return iter(Document(text, 'here') for text in self.texts)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp('tokenizer')
  write_tiny_tokenizer(directory, TEXTS[:4] * 3, 420)
  return directory


def test_tiny_layout(directory):
  tokenizer = Tokenizer.load(directory)
  assert tokenizer.size <= 420
  assert [tokenizer.pieces.id_to_token(i) for i in range(260)] == [*NAMES, *BYTES]
  assert (tokenizer.bos, tokenizer.eos) == (2, 1)
  assert len(tokenizer.encode(['the cat'])[0]) < len('the cat')


@pytest.mark.parametrize('text', TEXTS)
def test_round_trip_and_bytes(directory, text):
  tokenizer = Tokenizer.load(directory)
  (ids,) = tokenizer.encode([text])
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
  assert not np.isin(ids, [0, 1, 2, 3]).any()  # '<eos>' in a text does not end it


def test_tokens_that_hold_a_character(directory):
  full = Tokenizer.load(directory)
  kept = choose_kept(full, [Texts(*TEXTS[:3])])
  for tokenizer in (full, Tokenizer.load(directory, kept)):
    for wanted in ('\n', ' ', 't', 'の', '。t', ''):
      held = tokenizer.holding(wanted)
      texts = [tokenizer.decode(np.array([i])) for i in range(tokenizer.size)]
      assert held.shape == (tokenizer.size,)
      for character in wanted:
        # Whatever way a text with the character in it is spelt, a token of it is among them.
        for text in (character, f'x{character}y', f'{character}{character}', f' {character}'):
          ids = tokenizer.encode([text])[0]
          assert held[ids].any(), (text, [texts[i] for i in ids])
        assert all(held[i] for i, text in enumerate(texts) if character in text)
      assert held.sum() < tokenizer.size / 2


def test_byte_lengths_of_special_pieces(directory):
  lengths = Tokenizer.load(directory).byte_lengths
  assert (lengths[:4] == 0).all() and (lengths[4:260] == 1).all() and (lengths[260:] > 0).all()


def test_transformers_reads_the_directory(directory):
  import transformers

  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  ours = Tokenizer.load(directory).encode(TEXTS[:5])
  for text, ids in zip(TEXTS[:5], ours, strict=True):
    assert theirs(text)['input_ids'] == [2, *ids.tolist()]
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 1, 0)


def test_trimmed(directory):
  full = Tokenizer.load(directory)
  kept = choose_kept(full, [Texts(TEXTS[0])])
  assert (np.diff(kept) > 0).all() and len(kept) < full.size
  trimmed = Tokenizer.load(directory, kept)
  assert trimmed.size == len(trimmed.byte_lengths) == len(kept)
  for text, ids, whole in zip(TEXTS, trimmed.encode(TEXTS), full.encode(TEXTS), strict=True):
    assert trimmed.decode(ids) == text
    assert trimmed.byte_lengths[ids].sum() == len(text.encode())
    expected = []
    for number in whole:
      if number in kept:
        expected.append(int(number))
      else:
        expected += [4 + byte for byte in full.decode([number]).encode()]
    assert kept[ids].tolist() == expected
  (ids,) = trimmed.encode([TEXTS[0]])
  assert kept[ids].tolist() == full.encode([TEXTS[0]])[0].tolist()
  assert kept[trimmed.bos] == full.bos and kept[trimmed.eos] == full.eos


def test_digest(directory, tmp_path):
  full = Tokenizer.load(directory)
  kept = choose_kept(full, [Texts(TEXTS[0])])
  write_tiny_tokenizer(tmp_path / 'again', TEXTS[:4] * 3, 420)
  write_tiny_tokenizer(tmp_path / 'other', TEXTS[:4] * 3, 300)
  assert Tokenizer.load(tmp_path / 'again').digest == full.digest
  others = [Tokenizer.load(directory, kept), Tokenizer.load(directory, np.delete(kept, -1))]
  others.append(Tokenizer.load(tmp_path / 'other'))
  assert len({full.digest, *(other.digest for other in others)}) == 4


def test_equally_rare_letters_are_always_the_same(tmp_path):
  for name in ('first', 'second', 'third'):
    write_tiny_tokenizer(tmp_path / name, ['zyxwvutsrqponmlkjihgfedcba'], 270)
  first, second, third = (Tokenizer.load(tmp_path / name) for name in ('first', 'second', 'third'))
  assert first.digest == second.digest == third.digest


def test_bad_directories(directory, tmp_path):
  with pytest.raises(UserError, match=r'tokenizer\.json is missing'):
    Tokenizer.load(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"half":')
  with pytest.raises(UserError, match=r'tokenizer\.json is not a tokenizer'):
    Tokenizer.load(tmp_path)
  content = json.loads((directory / 'tokenizer.json').read_text())
  del content['model']['vocab']['<0x7F>']
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match='<0x7F>'):
    Tokenizer.load(tmp_path)
  for kept in ([0, 1, 2, 3], [*range(260), 259], [*range(260), 10**6]):
    with pytest.raises(UserError, match='trimmed vocabulary'):
      Tokenizer.load(directory, np.array(kept))
  with pytest.raises(UserError, match='no room'):
    write_tiny_tokenizer(tmp_path, TEXTS, 200)


def pieces_and_scores():
  """A small SentencePiece vocabulary: name, score, type (1 normal, 2 unknown, 3 control, …)."""
  pieces = [('<pad>', 3), ('<eos>', 3), ('<bos>', 3), ('<unk>', 2), ('<mask>', 3), ('<unused0>', 3)]
  pieces += [('\n\n', 4), ('\n\n\n', 4), ('  ', 4), ('   ', 4), ('<b>', 4)]
  pieces += [(piece, 6) for piece in BYTES]
  pieces = [(piece, -1000.0, type_) for piece, type_ in pieces]
  merged = (
    'he ▁t the ▁the in er ▁a re on ▁c at cat ▁cat an and ▁and 本語 日本語 のは aa aaa ▁▁t'.split()
  )
  letters = sorted(set(''.join(TEXTS[:4]).replace(' ', '▁')) | set('ab<>/日本語のは\n'))
  ordinary = [(piece, -float(rank), 1) for rank, piece in enumerate(merged + letters)]
  return pieces + ordinary[::-1]  # it is the scores that rank merges, not the ids


def test_gguf_tokenizer_is_sentencepiece(tmp_path):
  import gguf
  import sentencepiece as spm
  from sentencepiece import sentencepiece_model_pb2

  pieces = pieces_and_scores()
  writer = gguf.GGUFWriter(tmp_path / 'model.gguf', 'gemma3')
  writer.add_tokenizer_model('llama')
  writer.add_token_list([piece for piece, _, _ in pieces])
  writer.add_token_scores([score for _, score, _ in pieces])
  writer.add_token_types([type_ for _, _, type_ in pieces])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  write_gguf_tokenizer(tmp_path / 'model.gguf', tmp_path / 'made')
  tokenizer = Tokenizer.load(tmp_path / 'made')
  assert tokenizer.size == len(pieces)

  model = sentencepiece_model_pb2.ModelProto()
  for piece, score, type_ in pieces:
    piece = piece.replace(' ', '▁') if type_ == 4 else piece
    model.pieces.add(piece=piece, score=score, type=type_)
  model.trainer_spec.model_type = 2  # BPE
  model.trainer_spec.byte_fallback = True
  model.trainer_spec.pad_id, model.trainer_spec.eos_id = 0, 1
  model.trainer_spec.bos_id, model.trainer_spec.unk_id = 2, 3
  model.normalizer_spec.name = 'identity'
  model.normalizer_spec.add_dummy_prefix = False
  model.normalizer_spec.remove_extra_whitespaces = False
  theirs = spm.SentencePieceProcessor(model_proto=model.SerializeToString())

  texts = [*TEXTS, 'aaaaaaaa the  cat   and\n\n\n\n\ncat <b> 日本語のは', ' ', '\n', '      t  t']
  letters = list('ab the\n<日本語é')
  draw = np.random.default_rng(0)
  texts += [''.join(draw.choice(letters, 60)) for _ in range(200)]
  for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
    assert ids.tolist() == theirs.encode(text), text
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
  kept = choose_kept(tokenizer, [Texts('the cat')])
  names = [tokenizer.pieces.id_to_token(int(i)) for i in kept]
  assert '<mask>' in names and '<unused0>' not in names and '▁cat' in names


def test_gguf_without_a_tokenizer(tmp_path):
  import gguf

  with pytest.raises(UserError, match='is missing'):
    write_gguf_tokenizer(tmp_path / 'none.gguf', tmp_path / 'made')
  (tmp_path / 'half.gguf').write_bytes(b'GGUF\x03\x00')
  with pytest.raises(UserError, match=r'half\.gguf is not a whole GGUF'):
    write_gguf_tokenizer(tmp_path / 'half.gguf', tmp_path / 'made')
  writer = gguf.GGUFWriter(tmp_path / 'bare.gguf', 'gemma3')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(UserError, match=r'bare\.gguf has no tokenizer'):
    write_gguf_tokenizer(tmp_path / 'bare.gguf', tmp_path / 'made')
  assert not (tmp_path / 'made').exists()


def test_synthetic_languages_fit_a_tiny_tokenizer(tmp_path):
  texts = [document.text for document in Synthetic('west', 'dev').documents()]
  write_tiny_tokenizer(tmp_path, texts, 512)
  tokenizer = Tokenizer.load(tmp_path)
  sizes = [len(ids) for ids in tokenizer.encode(texts)]
  assert sum(sizes) < 0.35 * sum(len(text.encode()) for text in texts)
