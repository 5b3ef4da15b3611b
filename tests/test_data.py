import hashlib
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

from optimer_jax.data import recipes
from optimer_jax.data.manual import arguments, fill, html_paragraphs, man_paragraphs
from optimer_jax.data.mixtures import global_batch, mixture
from optimer_jax.data.rows import Rows, packed_rows, window_rows
from optimer_jax.data.sources import Document, Hub, Jsonl, Parquet, Recipe, Synthetic, TextFiles
from optimer_jax.data.tokenizer import Tokenizer, choose_kept, write_tiny_tokenizer
from optimer_jax.errors import UserError

# Sources.


def test_jsonl(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('\ufeff{"text": "one", "source": "s"}\n\n{"text": "zwei ü"}\n{"text": " "}\n')
  assert list(Jsonl(str(path)).documents()) == [('one', 's'), ('zwei ü', f'{path}:3')]
  path.write_text('{"body": "x"}\n')
  assert list(Jsonl(str(path), 'body').documents()) == [Document('x', f'{path}:1')]


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'holds no text'),
    (b'\n\n', 'holds no text'),
    (b'{"text": ""}\n', 'holds no text'),
    (b'{"text": "a"}\n{"text": "\xff"}\n', r'jsonl:2 is not UTF-8 \(byte 0xff\)'),
    (b'{"text": "a"}\n{"text": "b"\n', r'jsonl:2 is not JSON'),
    (b'["a"]\n', r'jsonl:1 is not a JSON object'),
    (b'{"txt": "a"}\n', r'jsonl:1 has no key "text": did you mean "txt"\?'),
    (b'{"text": "a"}\n{"q": 1}\n', r'jsonl:2 has no key "text": it has q'),
    (b'{"text": 3}\n', r'jsonl:1, key "text", is a int'),
    (b'{"text": "\\ud800"}\n', r'jsonl:1, key "text", holds half of a surrogate'),
  ],
)
def test_bad_jsonl(tmp_path, content, message):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    list(Jsonl(str(path)).documents())
  assert str(path) in str(error.value)


def test_missing_files(tmp_path):
  for source in (Jsonl(f'{tmp_path}/no'), Parquet(f'{tmp_path}/no')):
    with pytest.raises(UserError, match='no is missing'):
      list(source.documents())
  with pytest.raises(UserError, match='cannot be read'):
    list(Jsonl(str(tmp_path)).documents())
  with pytest.raises(UserError, match='no file matches'):
    list(TextFiles(f'{tmp_path}/*.txt').documents())


def test_text_files(tmp_path):
  for name, text in (('b.txt', 'bee'), ('a.txt', 'ay'), ('empty.txt', ''), ('c.md', 'sea')):
    (tmp_path / name).write_text(text)
  pattern = f'{tmp_path}/*.txt'
  assert [document.text for document in TextFiles(pattern).documents()] == ['ay', 'bee']
  (tmp_path / 'b.txt').write_bytes(b'fine\nnot \xe9\n')
  with pytest.raises(UserError, match=r'b\.txt:2 is not UTF-8'):
    list(TextFiles(pattern).documents())
  with pytest.raises(UserError, match='1 files are empty'):
    list(TextFiles(f'{tmp_path}/empty*').documents())


def test_parquet(tmp_path):
  import pyarrow as pa
  import pyarrow.parquet

  path = str(tmp_path / 'a.parquet')
  texts = [f'text {i}' for i in range(5000)]
  pyarrow.parquet.write_table(pa.table({'text': texts, 'n': list(range(5000))}), path)
  found = list(Parquet(path).documents())
  assert [document.text for document in found] == texts
  assert found[4999].source == f'{path}:4999'
  with pytest.raises(UserError, match=r'no column "texts": did you mean "text"\?'):
    list(Parquet(path, 'texts').documents())
  with pytest.raises(UserError, match='row 0, is a int'):
    list(Parquet(path, 'n').documents())
  content = (tmp_path / 'a.parquet').read_bytes()
  for damaged in (content[:-100], b'', content[:8] + bytes(2000) + content[2008:]):
    (tmp_path / 'a.parquet').write_bytes(damaged)
    with pytest.raises(UserError, match=r'a\.parquet is not a whole Parquet file'):
      list(Parquet(path).documents())
  pyarrow.parquet.write_table(pa.table({'text': pa.array([], pa.string())}), path)
  with pytest.raises(UserError, match='holds no text'):
    list(Parquet(path).documents())


def test_hub_out_of_reach(monkeypatch):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  with pytest.raises(UserError, match=r'nobody/nothing \(train\) .*(Jsonl|Parquet)'):
    list(Hub('nobody/nothing').documents())


def test_synthetic():
  texts = {}
  for name in ('north', 'east', 'south', 'west'):
    for split in ('train', 'dev', 'test'):
      documents = list(Synthetic(name, split).documents())
      assert len({document.source for document in documents}) == len(documents)
      texts[name, split] = [document.text for document in documents]
    size = len(''.join(texts[name, 'train']).encode())
    assert 140_000 < size < 320_000
    words = [set(re.findall(r'\w+', ' '.join(texts[name, split]))) for split in ('train', 'test')]
    assert words[1] <= words[0]
  assert not set(texts['north', 'train']) & set(texts['north', 'test'])
  assert texts['north', 'dev'] != [
    document.text for document in Synthetic('north', 'dev', 1).documents()
  ]
  # The same on every Python: these come from 3.11.
  digest = hashlib.sha256(''.join(texts['east', 'dev']).encode()).hexdigest()
  assert digest.startswith('fb310a5bd573')
  with pytest.raises(UserError, match='did you mean "north"'):
    list(Synthetic('nort', 'dev').documents())


# Recipes: what strips the markup, on samples written for this test.

ROFF = r"""'\" t
.\" A comment that nobody should read
.ie n \{\
.  ds C+ C plus
.\}
.el .ds C+ C\v'-.1v'+
.de XX
hidden
..
.ds Me \fBwalker\fR
.TH WALK 1 2020 "walk 2.0" 手引き
.SH 名前
walk \- 木を歩く
.SH "書式 と 例"
.B walk
.RB [ \-v "] [" file ...]
.br
.SH 説明
この道具は\fI木\fPを
歩きます。
.\" within
file を
.BR ls (1)
のように見せ、\*(Me と呼ばれ\c
ます。 \(co \(aq \e \%
.PP
二つ目の段落。 # 番号
.TP
.BI \-d " 深さ"
深さを
決める。
.TP 4
\fB\-v\fR, \fB\-\-verbose\fR
多く語る。
.IP \(bu 2
点の項目。
.nf
  walk  -v
    \-d 3
.fi
.TS
l l.
a	b
.TE
終わり。
.SH 著者
だれか書いた。
.SS 訳した人
ほかのだれか。
.SH バグ
ない。
"""


def test_man_page():
  assert man_paragraphs(ROFF) == [
    '名前',
    'walk - 木を歩く',
    '書式 と 例',
    'walk [-v] [file...]',
    '説明',
    "この道具は木を歩きます。 file を ls(1) のように見せ、walker と呼ばれます。 © ' \\",
    '二つ目の段落。 # 番号',
    '-d 深さ\n深さを決める。',
    '-v, --verbose\n多く語る。',
    '• 点の項目。',
    '  walk  -v\n    -d 3',
    '終わり。',
    'バグ',
    'ない。',
  ]


def test_man_pages_left_out():
  assert man_paragraphs('.so man1/walk.1\n') == []
  assert man_paragraphs('.Dd May 1, 2020\n.Sh 名前\n.Nm walk\n') == []
  assert man_paragraphs('.SH 名前\n' + '.Zz 独自 の 命令\n' * 5) == []


def test_roff_arguments():
  assert arguments(r'a "b c" d\ e "say ""no"""') == ['a', 'b c', r'd\ e', 'say "no"']
  assert fill(['漢字', 'かな', 'abc', 'def', '字']) == '漢字かな abc def 字'


def test_handbook_page():
  html = """<html><head><title>第 6 章 道具</title></head><body><div id="banner">no</div>
    <ul class="docnav top"><li>戻る</li></ul>
    <div class="chapter"><h1>第 6 章 道具</h1>
    <div class="toc"><dl><dt>6.1. 目次</dt></dl></div><a class="indexterm" id="x"></a>
    <div class="para">一つ目の <code>apt</code>
      の話&amp;例。<br/>次。</div><img src="x.png" alt="no">
    <pre>$ apt
  list</pre><ul><li><p>項目</p></li></ul></div>
    <ul class="docnav"><li>次へ</li></ul></body></html>"""
  assert html_paragraphs(html) == [
    '第 6 章 道具', '一つ目の apt の話&例。', '次。', '$ apt\n  list', '項目'
  ]  # fmt: skip


METAMATH = """$( a made-up database $)
$(
#*#*#*#*#*#*#*#*#*#*
   Preface
#*#*#*#*#*#*#*#*#*#*
 For whom the file is, and who keeps it these days. $)
$(
#####################
   PART ONE
#####################
  This part speaks about nothing in particular, at length.
$)
$(
=-=-=-=-=-=-=-=-=-=-=
   First things
=-=-=-=-=-=-=-=-=-=-=
$)
  ${
    $( If ` ph ` holds then so does ` ( ph -> ps ) ` , see ~ walk-1 , for the other
       way.  (Contributed by AB, 1-Jan-2001.)  (Proof shortened by CD (with
       help), 2-Jan-2001.)  (New usage is discouraged.) $)
    walk $p |- ( ph -> ps ) $= ABC $.
    $( Short. $)
    $( If ` ph ` holds then so does ` ( ph -> ps ) ` , see ~ walk-1 , for the other
       way. $)
    $( An old one @( that was put out of use @) old @p |- ph @= ? @. here. $)
  $}
$(
#*#*#*#*#*#*#*#*#*#*
   Second
#*#*#*#*#*#*#*#*#*#*
$)
  $( Every walk that begins here ends there, as _walks_,
     with ` ( F `` A ) .~ ` , as its value. $)
  $( $t htmldef "walk" as 'a <b>walk</b> and so on and so on and on'; $)
"""


def test_metamath_comments():
  pages = recipes.metamath_pages(METAMATH)
  assert [(page.key, page.source) for page in pages] == [
    ('PART ONE', 'set.mm/0001 PART ONE'),
    ('PART ONE', 'set.mm/0002 First things'),
    ('Second', 'set.mm/0003 Second'),
  ]
  assert pages[1].paragraphs == [
    'First things',
    'If `ph` holds then so does `( ph -> ps )`, see walk-1, for the other way.',
  ]
  assert (
    pages[2].paragraphs[1]
    == 'Every walk that begins here ends there, as _walks_, with `( F ‘ A ) .~`, as its value.'
  )


def test_splits_share_nothing():
  long = 'A paragraph that is repeated in many pages, word for word, as licences are.'
  pages = [
    recipes.Page(
      f'page{i % 300}.1', f'x/page{i}', ['Name', f'Only page {i} says this much. ' * 9, long]
    )
    for i in range(600)
  ]
  splits = recipes.split(pages, train_bytes=100_000)
  number = {
    part: {int(source.split('page')[1]) % 300 for source, _ in splits[part]} for part in splits
  }
  assert (
    not number['train'] & (number['dev'] | number['test']) and not number['dev'] & number['test']
  )
  text = {part: ''.join(text for _, text in splits[part]) for part in splits}
  assert text['train'].count(long) == 1 and long not in text['dev'] + text['test']
  assert 100_000 <= len(text['train']) < 101_000
  assert 5_000 < len(text['dev']) < 7_500 and 5_000 < len(text['test']) < 7_500
  # The order of the pages says nothing about which are taken.
  assert recipes.split(pages[::-1], train_bytes=100_000) == splits
  assert recipes.split_of('ls.1') == recipes.split_of('ls.1') == 'train'
  counts = Counter(recipes.split_of(f'{i}.1') for i in range(5000))
  assert 4300 < counts['train'] < 4500 and min(counts.values()) > 230


def test_code_recipe(tmp_path):
  source = Recipe('code', 'train', str(tmp_path))
  documents = list(source.documents())
  size = sum(len(document.text.encode()) for document in documents)
  assert 3_000_000 < size < 6_500_000
  names = {document.source for document in documents}
  assert not any(
    re.search(r'(^|/)(test|idlelib|lib2to3|site-packages|encodings)/', name) for name in names
  )
  held_out = [
    each for split in ('dev', 'test') for each in Recipe('code', split, str(tmp_path)).documents()
  ]
  assert len(held_out) > 20 and not names & {document.source for document in held_out}
  assert not any(re.match(r'(#.*\n)*#.*Copyright', document.text) for document in documents)
  built = next((tmp_path / 'recipes').glob('code-*/train.jsonl'))
  first = built.stat().st_mtime_ns
  assert list(source.documents()) == documents and built.stat().st_mtime_ns == first
  with pytest.raises(UserError, match='did you mean "train"'):
    list(Recipe('code', 'trian', str(tmp_path)).documents())
  with pytest.raises(UserError, match='no recipe "cod": did you mean "code"'):
    list(Recipe('cod', 'train', str(tmp_path)).documents())


def test_without_apt(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(UserError, match=r'manpages-ja could not be had .*a path .* hub'):
    list(Recipe('ja', 'train', str(tmp_path)).documents())
  assert not list(tmp_path.glob('recipes/ja*'))


# Rows.


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  directory = tmp_path_factory.mktemp('tokenizer')
  texts = [
    document.text for name in ('north', 'east') for document in Synthetic(name, 'dev').documents()
  ]
  write_tiny_tokenizer(directory, texts, 600)
  return Tokenizer.load(directory)


def segments(rows):
  """The token lists of every segment of every row, checking the layout on the way."""
  found = []
  for tokens, ids, positions in zip(rows.tokens, rows.segment_ids, rows.positions, strict=True):
    count = ids.max()
    real = (ids > 0).sum()
    assert (ids[real:] == 0).all() and (tokens[real:] == 0).all()
    assert (np.diff(ids[:real]) >= 0).all() and sorted(set(ids[:real])) == [*range(1, count + 1)]
    for segment in range(1, count + 1):
      at = np.flatnonzero(ids == segment)
      assert (positions[at] == np.arange(len(at))).all()
      found.append(tokens[at].tolist())
  return found


def whole(tokenizer, source, length):
  """What the windows should be, one document after another."""
  windows = []
  for document in source.documents():
    (ids,) = tokenizer.encode([document.text])
    for start in range(0, len(ids), length - 1):
      windows.append([tokenizer.bos, *ids[start : start + length - 1].tolist()])
  return windows


@pytest.mark.parametrize('length', [33, 128, 4096])
def test_packed_rows(tokenizer, tmp_path, length):
  source = Synthetic('north', 'dev')
  rows = packed_rows(source, tokenizer, length, tmp_path)
  for array in (rows.tokens, rows.segment_ids, rows.positions, rows.bytes):
    assert array.dtype == np.int32 and len(array) == len(rows)
  assert rows.tokens.shape[1] == length
  assert sorted(segments(rows)) == sorted(whole(tokenizer, source, length))
  assert rows.bytes.sum() == sum(len(document.text.encode()) for document in source.documents())
  for row, size in zip(rows.tokens, rows.bytes, strict=True):
    assert size == len(tokenizer.decode(row).encode())
  assert (rows.segment_ids > 0).mean() > 0.8
  if length == 4096:
    assert rows.segment_ids.max() > 1
  assert isinstance(rows.tokens, np.memmap)


def test_trimmed_rows_stand_for_the_same_bytes(tokenizer, tmp_path, tmp_path_factory):
  source = Synthetic('east', 'dev')
  directory = tmp_path / 'tokenizer'
  write_tiny_tokenizer(directory, [document.text for document in source.documents()], 600)
  full = Tokenizer.load(directory)
  trimmed = Tokenizer.load(directory, choose_kept(full, [Synthetic('north', 'dev')]))
  both = [packed_rows(source, each, 64, tmp_path) for each in (full, trimmed)]
  assert both[0].bytes.sum() == both[1].bytes.sum() and len(both[1]) > len(both[0])


def write(path, texts):
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return Jsonl(str(path))


def test_cache_keys(tokenizer, tmp_path):
  texts = [f'a text about {i} things and more of them' for i in range(20)]
  source, cache = write(tmp_path / 'a.jsonl', texts), tmp_path / 'cache'
  rows = packed_rows(source, tokenizer, 32, cache)
  (entry,) = cache.iterdir()
  before = (entry / 'tokens.npy').stat().st_mtime_ns
  again = packed_rows(source, tokenizer, 32, cache)
  assert (entry / 'tokens.npy').stat().st_mtime_ns == before
  assert (again.tokens == rows.tokens).all()
  content = (tmp_path / 'a.jsonl').read_bytes()
  (tmp_path / 'a.jsonl').write_bytes(content.replace(b'about 7', b'about 8'))
  packed_rows(source, tokenizer, 32, cache)
  assert len(list(cache.iterdir())) == 2
  packed_rows(source, tokenizer, 48, cache)
  window_rows(source, tokenizer, 32, 4, 0, cache)
  window_rows(source, tokenizer, 32, 4, 1, cache)
  kept = np.arange(tokenizer.size - 1)
  packed_rows(source, Tokenizer(tokenizer.pieces, kept, tokenizer.digest + 'kept'), 32, cache)
  assert len(list(cache.iterdir())) == 6


@pytest.mark.parametrize('damage', ['flip', 'cut', 'gone', 'entry', 'half'])
def test_damaged_cache_is_rebuilt(tokenizer, tmp_path, damage):
  source = Synthetic('north', 'test')
  good = packed_rows(source, tokenizer, 64, tmp_path)
  tokens = np.array(good.tokens)
  del good
  (entry,) = tmp_path.iterdir()
  content = bytearray((entry / 'tokens.npy').read_bytes())
  if damage == 'flip':
    content[-5] ^= 1
    (entry / 'tokens.npy').write_bytes(content)
  elif damage == 'cut':
    (entry / 'tokens.npy').write_bytes(content[: len(content) // 2])
  elif damage == 'gone':
    (entry / 'positions.npy').unlink()
  elif damage == 'entry':
    (entry / 'entry.json').write_text('{"rows": 3')
  else:
    (entry / 'entry.json').unlink()
  rows = packed_rows(source, tokenizer, 64, tmp_path)
  assert (rows.tokens == tokens).all()
  assert [each.name for each in tmp_path.iterdir()] == [entry.name]


def test_bad_source_leaves_no_cache(tokenizer, tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
  with pytest.raises(UserError, match=r'a\.jsonl:2'):
    packed_rows(Jsonl(str(tmp_path / 'a.jsonl')), tokenizer, 32, tmp_path / 'cache')
  with pytest.raises(UserError, match='length of 2'):
    packed_rows(Synthetic('north', 'dev'), tokenizer, 1, tmp_path / 'cache')
  assert not list((tmp_path / 'cache').glob('*'))


class Listed:
  def __init__(self, documents):
    self.listed = documents

  def documents(self):
    return iter(self.listed)


def test_window_rows(tokenizer, tmp_path):
  long = 'so many words follow one another in the long one ' * 40
  documents = [Document(long, 'long')] + [
    Document(f'{i} ' + long[:200], f'short{i}') for i in range(9)
  ]
  source = Listed(documents)
  every = window_rows(source, tokenizer, 32, None, 0, tmp_path)
  assert sorted(segments(every)) == sorted(whole(tokenizer, source, 32))
  assert every.segment_ids.max() == 1
  assert every.bytes.sum() == sum(len(document.text.encode()) for document in documents)
  ten = window_rows(source, tokenizer, 32, 10, 0, tmp_path)
  assert len(ten) == 10 and len(set(ten.sources)) == 10
  for name, row in zip(ten.sources, ten.tokens, strict=True):
    (text,) = (document.text for document in documents if document.source == name)
    assert tokenizer.decode(row) in text
  again = window_rows(source, tokenizer, 32, 10, 0, tmp_path / 'elsewhere')
  assert (again.tokens == ten.tokens).all() and again.sources == ten.sources
  other = window_rows(source, tokenizer, 32, 10, 1, tmp_path)
  assert other.sources != ten.sources
  assert len(window_rows(source, tokenizer, 32, 10**6, 0, tmp_path)) == len(every)


# Mixtures.


def made_rows(name, count, length=8):
  """Rows whose every token is their number."""
  tokens = np.repeat(np.arange(count, dtype=np.int32)[:, None], length, 1)
  ones = np.ones_like(tokens)
  return Rows(name, tokens, ones, ones * 0, ones[:, 0])


def numbers(dataset, steps, batch):
  batches = [global_batch(dataset, step, batch)['tokens'][:, 0] for step in steps]
  return np.concatenate(batches)


def test_one_data_set_is_covered_each_epoch():
  dataset = mixture({'a': made_rows('a', 24)}, {'a': 3.0}, seed=1)
  epochs = [numbers(dataset, range(3 * e, 3 * e + 3), 8).tolist() for e in range(3)]
  assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_batches_depend_on_seed_and_step_alone():
  rows = {'a': made_rows('a', 50), 'b': made_rows('b', 60)}
  weights = {'a': 0.3, 'b': 0.7}
  dataset = mixture(rows, weights, seed=1)
  forward = [numbers(dataset, [step], 8) for step in range(20)]
  again = mixture(rows, weights, seed=1)
  for step in reversed(range(20)):
    assert (numbers(again, [step], 8) == forward[step]).all()
  other = [numbers(mixture(rows, weights, seed=2), [step], 8) for step in range(20)]
  assert any((a != b).any() for a, b in zip(forward, other, strict=True))


@pytest.mark.parametrize('parts', [2, 3, 8])
def test_rows_of_a_batch_are_the_same_whoever_asks(parts):
  rows = {'a': made_rows('a', 50), 'b': made_rows('b', 60)}
  dataset = mixture(rows, {'a': 0.4, 'b': 0.6}, seed=3)
  for step in (0, 7, 1000):
    batch = global_batch(dataset, step, 8)
    cuts = [8 * i // parts for i in range(parts + 1)]
    found = [global_batch(dataset, step, 8, *cut) for cut in itertools.pairwise(cuts)]
    for name in ('tokens', 'segment_ids', 'positions'):
      assert found[0][name].shape == (cuts[1], 8) and found[0][name].dtype == np.int32
      assert (np.concatenate([part[name] for part in found]) == batch[name]).all()


def test_mixture_fractions():
  rows = {name: made_rows(name, 40 + 10 * i) for i, name in enumerate('abcd')}
  for i, each in enumerate(rows.values()):
    each.tokens[:] += 1000 * i
  weights = {'a': 2.0, 'b': 1.0, 'c': 5.0, 'd': 0}
  drawn = numbers(mixture(rows, weights, seed=0), range(100), 8) // 1000
  assert [np.mean(drawn == i) for i in range(4)] == pytest.approx([0.25, 0.125, 0.625, 0], abs=0.01)
  # Two data sets of one size are not in step.
  twins = [mixture({name: made_rows(name, 40)}, {name: 1}, seed=0) for name in ('a', 'b')]
  assert numbers(twins[0], [0], 40).tolist() != numbers(twins[1], [0], 40).tolist()
  # No data set's own order changes when it is mixed.
  alone = numbers(mixture({'b': rows['b']}, {'b': 1}, seed=0), range(5), 8)
  mixed = numbers(mixture(rows, weights, seed=0), range(40), 8)
  assert mixed[mixed // 1000 == 1].tolist() == alone[:40].tolist()


def test_short_data_set_is_named():
  rows = {'a': made_rows('a', 40), 'b': made_rows('b, a small one', 7)}
  dataset = mixture(rows, {'a': 1, 'b': 1}, seed=0)
  with pytest.raises(UserError, match='b, a small one has 7 rows, less than one batch of 8'):
    global_batch(dataset, 0, 8)
  # What counts is the global batch, whatever the share that is asked for.
  with pytest.raises(UserError, match='less than one batch of 8'):
    global_batch(dataset, 0, 8, 1, 4)
  assert global_batch(dataset, 0, 7)['tokens'].shape == (7, 8)


def test_bad_mixtures():
  rows = {'a': made_rows('a', 4), 'b': made_rows('b', 4, length=9), 'none': made_rows('none', 0)}
  for weights, message in (
    ({'a': 1.0, 'b': 1, 'nine': 1}, 'check nine, none'),
    ({'a': 0, 'b': 0, 'none': 0}, 'not all 0'),
    ({'a': 1, 'b': -1, 'none': 0}, 'numbers >= 0'),
    ({'a': 1, 'b': float('nan'), 'none': 0}, 'numbers >= 0'),
    ({'a': 1, 'b': 1, 'none': 0}, 'rows of one length'),
    ({'a': 1, 'b': 0, 'none': 1}, 'none has no rows'),
  ):
    with pytest.raises(UserError, match=message):
      mixture(rows, weights, seed=0)


def test_a_real_data_set_goes_through(tokenizer, tmp_path):
  rows = {
    name: packed_rows(Synthetic(name, 'dev'), tokenizer, 64, tmp_path) for name in ('north', 'east')
  }
  batch = global_batch(mixture(rows, {'north': 0.5, 'east': 0.5}, seed=0), 5, 16)
  assert batch['tokens'].shape == (16, 64)
  assert (batch['tokens'][:, 0] == tokenizer.bos).all()
  decoded = [tokenizer.decode(row) for row in batch['tokens']]
  assert sum(bool(re.search('[α-ω]', text)) for text in decoded) == 8
