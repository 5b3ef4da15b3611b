"""Rows of examples from every kind of place, and their division into dev, test and shots."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation import splits as splits_module
from optimer_jax.evaluation.examples import Example, Examples
from optimer_jax.evaluation.splits import Splits, draw


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text.encode() if isinstance(text, str) else text)
  return str(path)


def write_rows(path, rows):
  return write(path, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))


def write_parquet(path, rows):
  import pyarrow as pa
  import pyarrow.parquet

  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
  return str(path)


def values(examples):
  return [dict(row.values) for row in examples.rows()]


# Files.


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
  rows = [{'q': 'a, "b"', 'n': '1'}, {'q': 'zwei\u2028ü', 'n': '2'}]
  places = {
    write_rows(tmp_path / 'a.jsonl', rows): ':2',
    write(tmp_path / 'a.json', json.dumps(rows)): ', row 1',
    write(tmp_path / 'a.csv', '\ufeffq,n\r\n"a, ""b""",1\r\n\r\nzwei\u2028ü,2\r\n'): ':4',
    write(tmp_path / 'a.tsv', 'q\tn\na, "b"\t1\nzwei\u2028ü\t2\n'): ':3',
    write_parquet(tmp_path / 'a.parquet', rows): ', row 1',
  }
  for place, second in places.items():
    assert values(Examples(place)) == rows
    assert Examples(place).rows()[1].where == place + second


def test_a_cell_of_several_lines_keeps_the_count_of_lines(tmp_path):
  path = write(tmp_path / 'a.csv', 'q,n\n"one\ntwo",1\nthree,2\n')
  assert [row.where for row in Examples(path).rows()] == [f'{path}:2', f'{path}:4']


def test_columns_without_a_header_and_with_the_same_one(tmp_path):
  bare = write(tmp_path / 'bare.csv', 'why?,A\nhow?,B\n')
  headed = write(tmp_path / 'headed.csv', 'Q,answer\nwhy?,A\nhow?,B\n')
  columns = ('q', 'answer')
  assert values(Examples(bare, columns=columns)) == values(Examples(headed, columns=columns))
  assert values(Examples(headed))[0] == {'Q': 'why?', 'answer': 'A'}
  # A row that repeats the header is one only at the top.
  again = write(tmp_path / 'again.csv', 'q,answer\nwhy?,A\nq,answer\n')
  assert len(Examples(again).rows()) == 2


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.jsonl', '', 'holds no examples: it is empty'),
    ('a.jsonl', '{"q": 1}\n{"q": \n', r'a\.jsonl:2 is not JSON'),
    ('a.jsonl', '[1]\n', r'a\.jsonl:1 is not a JSON object'),
    ('a.jsonl', b'{"q": "a"}\n{"q": "\xff"}\n', r'a\.jsonl:2 is not UTF-8'),
    ('a.json', '', 'holds no examples'),
    ('a.json', '{"q": 1}', 'is not a list'),
    ('a.json', '{"q": 1}\n{"q": 2}', r'ends in \.jsonl'),
    ('a.json', '[1]', 'row 0 is not a JSON object'),
    ('a.csv', 'q,n\n', 'holds no examples'),
    ('a.csv', 'q,n\n1,2\n1,2,3\n', r'a\.csv:3 has 3 cells, not the 2 of q, n'),
    ('a.csv', 'q,n\n1,"2" x\n', r'a\.csv:2 cannot be read'),
    ('a.csv', 'q,n\n1,"2\n', r'a\.csv:2 cannot be read'),
    ('a.parquet', 'PAR1', 'is not a whole Parquet file'),
  ],
)
def test_damaged_files(tmp_path, name, content, message):
  path = write(tmp_path / name, content)
  with pytest.raises(UserError, match=message) as error:
    Examples(path).rows()
  assert path in str(error.value)


def test_missing_places(tmp_path):
  with pytest.raises(UserError, match='no file matches'):
    Examples(f'{tmp_path}/no.jsonl').rows()
  with pytest.raises(UsageError, match=r'give Examples\.split'):
    Examples(str(tmp_path)).rows()
  with pytest.raises(UserError, match='nowhere is missing'):
    Examples('nowhere').rows()
  write(tmp_path / 'data' / 'train.csv', 'q\n1\n')
  with pytest.raises(UserError, match=r'no files of the split "test": it has data/train\.csv'):
    Examples(str(tmp_path), split='test').rows()
  with pytest.raises(UserError, match=r'nobody/nothing/main \(test\) is no file or folder here'):
    Examples('nobody/nothing', 'main', 'test').rows()


def test_missing_keys_name_the_nearest(tmp_path):
  path = write_rows(tmp_path / 'a.jsonl', [{'question': 'a', 'answer': None}])
  (row,) = Examples(path).rows()
  with pytest.raises(UserError, match=r'a\.jsonl:1 has no key "qestion": did you mean "question"'):
    row.value('qestion')
  with pytest.raises(UserError, match=r'a\.jsonl:1, key "answer", is empty'):
    row.value('answer')


# Folders.


@pytest.mark.parametrize(
  ('config', 'files'),
  [
    (None, ('data/test-00000-of-00002.parquet', 'data/test-00001-of-00002.parquet')),
    ('main', ('main/test-00000-of-00001.parquet',)),
    ('main', ('data/main/test-00000-of-00001.parquet',)),
    (None, ('test.jsonl',)),
    (None, ('data/test.csv',)),
    ('main', ('main/test.csv',)),
    (None, ('test/a.csv', 'test/b.csv')),
  ],
)
def test_layouts_of_the_hub(tmp_path, config, files):
  rows = [{'q': name} for name in files]
  for name, row in zip(files, rows, strict=True):
    for split in ('test', 'train'):
      path = tmp_path / name.replace('test', split)
      row_there = row if split == 'test' else {'q': 'train'}
      if path.suffix == '.parquet':
        write_parquet(path, [row_there])
      elif path.suffix == '.jsonl':
        write_rows(path, [row_there])
      else:
        write(path, f'q\n{row_there["q"]}\n')
  write(tmp_path / 'README.md', 'test')
  found = Examples(str(tmp_path), config, 'test').rows()
  assert [row.values['q'] for row in found] == list(files)


def test_subjects(tmp_path):
  for subject in ('law', 'art'):
    write(tmp_path / f'test/{subject}_test.csv', f'q\nof {subject}\n')
    write_parquet(
      tmp_path / f'other/{subject}/val-00000-of-00001.parquet', [{'q': f'of {subject}'}]
    )
  expected = [{'subject': 'art', 'q': 'of art'}, {'subject': 'law', 'q': 'of law'}]
  for place in (
    Examples(f'{tmp_path}/test/*.csv'),
    Examples(str(tmp_path), '*', 'test'),
    Examples(f'{tmp_path}/other', '*', 'val'),
  ):
    assert values(place) == expected
  # One file has no subject by its name, nor has a part of a file; a column of its own goes first.
  assert values(Examples(f'{tmp_path}/test/law_test.csv')) == [{'q': 'of law'}]
  write(tmp_path / 'own' / 'x.csv', 'subject,q\nmusic,1\n')
  assert Examples(f'{tmp_path}/own/*.csv').rows()[0].subject == 'music'
  assert Examples(f'{tmp_path}/other/law/*.parquet').rows()[0].subject is None


# Splits.


class Held:
  """Examples that are there already."""

  is_file = True

  def __init__(self, texts, subjects=None):
    subjects = subjects or [None] * len(texts)
    self.examples = [
      Example({'q': text} | ({'subject': s} if s else {}), f'row {i}')
      for i, (text, s) in enumerate(zip(texts, subjects, strict=True))
    ]

  def __str__(self):
    return 'held'

  def rows(self):
    return self.examples

  def is_same_set(self, other):
    return self is other


def content(example):
  return example.values['q']


def texts(drawn):
  return [example.values['q'] for example in drawn.examples]


def both(splits, shots=0):
  return [draw(splits, split, shots, content) for split in ('dev', 'test')]


@settings(deadline=None)
@given(
  st.lists(st.text('abAＡ ', max_size=4), min_size=2, max_size=30),
  st.integers(1, 12),
  st.integers(0, 3),
  st.randoms(use_true_random=False),
)
def test_divided_sets_share_nothing_and_do_not_depend_on_order(names, dev_count, shots, random):
  def division(names):
    splits = Splits(Held(names), dev_count=dev_count)
    try:
      dev, test = both(splits, shots)
    except UserError:
      return None
    return texts(dev), texts(test), [content(shot) for shot in dev.shots.get(None, [])]

  def plain(names):
    return [' '.join(n.replace('Ａ', 'a').lower().split()) for n in names]

  found = division(names)
  shuffled = random.sample(names, len(names))
  again = division(shuffled)
  assert (found is None) == (again is None)
  if found is not None:
    everything = plain([*found[0], *found[1], *found[2]])
    assert len(everything) == len(set(everything))
    assert set(everything) == set(plain(names))
    assert [plain(part) for part in found] == [plain(part) for part in again]


@settings(deadline=None)
@given(st.sets(st.integers(0, 999), min_size=4, max_size=30), st.sets(st.integers(1000, 1999)))
def test_appended_rows_move_as_many_from_dev_to_test_and_none_back(old, new):
  old, new = [str(n) for n in old], [str(n) for n in new]
  before = [set(texts(d)) for d in both(Splits(Held(old), dev_count=2))]
  after = [set(texts(d)) for d in both(Splits(Held(old + new), dev_count=2))]
  assert not before[1] & after[0]
  assert len(before[0] & after[1]) <= len(new)
  assert before[1] <= after[1]


def test_counts_and_seeds():
  names = [str(n) for n in range(40)]
  dev, test = both(Splits(Held(names)))
  assert (len(dev.examples), len(test.examples)) == (20, 20)
  dev, test = both(Splits(Held(names), dev_count=5, test_count=7))
  assert (len(dev.examples), len(test.examples)) == (5, 7)
  other = draw(Splits(Held(names), dev_count=5, seed=1), 'dev', 0, content)
  assert texts(other) != texts(dev)
  # Sets that are apart are cut alike.
  dev, test = both(Splits(Held(names), Held([f'dev {n}' for n in names]), None, 5, 7))
  assert (len(dev.examples), len(test.examples)) == (5, 7)
  assert all(text.startswith('dev') for text in texts(dev))


def test_repeats_are_left_out_and_counted(monkeypatch):
  said = []
  monkeypatch.setattr(splits_module, 'say', said.append)
  dev, test = both(Splits(Held(['a', 'b', 'A ', 'c', 'b']), dev_count=1))
  assert sorted(texts(dev) + texts(test)) == ['a', 'b', 'c']
  assert said[0] == 'held: 2 of 5 examples are repeats of others, and are left out'


def test_overlaps():
  test, dev = Held(['a', 'b', 'c']), Held(['x', 'B', 'c ', 'y'])
  for split in ('dev', 'test'):
    with pytest.raises(UserError, match=r'dev \(held\) and .* share 2 examples, the first at row'):
      draw(Splits(test, dev), split, 0, content)
  found = [texts(each) for each in both(Splits(test, dev, drop_overlap=True))]
  assert [sorted(each) for each in found] == [['x', 'y'], ['a', 'b', 'c']]
  with pytest.raises(UserError, match=r'the shots \(held\) and .* share 1 examples'):
    draw(Splits(test, Held(['x']), Held(['n', 'a'])), 'dev', 2, content)
  # Only what is shown matters, and what is shared can be passed over.
  shown = draw(Splits(test, Held(['x']), Held(['n', 'a'])), 'dev', 1, content).shots
  assert [content(shot) for shot in shown[None]] == ['n']
  splits = Splits(test, Held(['x']), Held(['a', 'n', 'm']), drop_overlap=True)
  assert [content(shot) for shot in draw(splits, 'test', 2, content).shots[None]] == ['n', 'm']


def test_shots_out_of_dev():
  names = [str(n) for n in range(12)]
  one = Held(names)
  for splits in (Splits(one, dev_count=6), Splits(one, shots=one, dev_count=6)):
    dev, test = both(splits, 2)
    assert dev.shots == test.shots
    assert len(dev.examples) == 4 and len(test.examples) == 6
    assert not {content(s) for s in dev.shots[None]} & {*texts(dev), *texts(test)}
  apart = Held(['x', 'y', 'z'])
  for shots in (None, apart):
    dev, _ = both(Splits(one, apart, shots), 2)
    assert len(dev.examples) == 1


def test_shots_of_each_subject():
  names = [f'{subject} {n}' for subject in ('law', 'art') for n in range(20)]
  subjects = ['law'] * 20 + ['art'] * 20
  dev, test = both(Splits(Held(names, subjects)), 3)
  for drawn in (dev, test):
    for example in drawn.examples:
      shots = drawn.shots_for(example)
      assert len(shots) == 3
      assert {shot.subject for shot in shots} == {example.subject}
  assert len(dev.examples) == 14
  shots = Held(['one', 'two', 'three', 'four'], ['law', 'law', 'art', 'law'])
  found = draw(Splits(Held(names, subjects), shots=shots), 'test', 1, content).shots
  assert {k: [content(s) for s in v] for k, v in found.items()} == {
    'law': ['one'],
    'art': ['three'],
  }
  with pytest.raises(UserError, match=r'has 1 examples of the subject "art" to show, and 2 shots'):
    draw(Splits(Held(names, subjects), shots=shots), 'test', 2, content)


def test_empty_splits_and_wrong_settings():
  with pytest.raises(UserError, match='no example is left for test of 3'):
    draw(Splits(Held(['a', 'b', 'c']), dev_count=3), 'test', 0, content)
  with pytest.raises(UserError, match='no example is left for dev of 3'):
    draw(Splits(Held(['a', 'b', 'c']), dev_count=1), 'dev', 1, content)
  with pytest.raises(UsageError, match="no split 'valid'"):
    draw(Splits(Held(['a', 'b'])), 'valid', 0, content)
  with pytest.raises(UsageError, match=r'Splits\.dev_count is 0'):
    Splits(Held(['a']), dev_count=0)


def test_one_file_is_one_set_whatever_split_is_asked(tmp_path):
  path = write_rows(tmp_path / 'a.jsonl', [{'q': str(n)} for n in range(8)])
  splits = Splits(
    Examples(path, 'main', 'test'), Examples(path, 'main', 'dev'), Examples(path, split='train')
  )
  dev, test = both(splits, 1)
  assert (len(dev.examples), len(test.examples), len(dev.shots[None])) == (3, 4, 1)
