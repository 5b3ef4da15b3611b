import json
import random
import subprocess
import sys

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from optimer_jax.data.sources import ArrayRecord, Document
from optimer_jax.errors import UserError


def write(path, records, options='group_size:1'):
  writer = ArrayRecordWriter(str(path), options)
  for record in records:
    record = json.dumps(record, ensure_ascii=False) if isinstance(record, dict) else record
    writer.write(record.encode() if isinstance(record, str) else record)
  writer.close()


def texts(n, length=2000, seed=0):
  letters = random.Random(seed)
  return [f'{i} ' + ''.join(letters.choices('abcdefgh 漢字かな', k=length)) for i in range(n)]


@pytest.mark.parametrize('group_size', [1, 16])
def test_shards_in_order(group_size, tmp_path):
  expected = []
  for shard in (2, 0, 1):
    path = tmp_path / f'd-{shard:05}-of-00003.array_record'
    write(path, [{'text': t} for t in texts(40, seed=shard)], f'group_size:{group_size}')
  for shard in range(3):
    path = tmp_path / f'd-{shard:05}-of-00003.array_record'
    expected += [Document(t, f'{path}:{i}') for i, t in enumerate(texts(40, seed=shard))]
  source = ArrayRecord(f'{tmp_path}/d-*.array_record')
  assert list(source.documents()) == expected
  assert list(source.documents()) == expected
  assert str(source) == f'{tmp_path}/d-*.array_record'


def test_json_and_text(tmp_path):
  path = tmp_path / 'a.array_record'
  write(path, [{'text': '森の木 ü 𠮷', 'source': '本'}, {'text': ' '}, {'text': 'b', 'n': 1}])
  found = list(ArrayRecord(str(path)).documents())
  assert found == [('森の木 ü 𠮷', '本'), ('b', f'{path}:2')]
  write(path, [{'body': 'x'}])
  assert list(ArrayRecord(str(path), 'body').documents()) == [Document('x', f'{path}:0')]
  # With text = None nothing is taken for JSON.
  plain = ['{\\bf 1}', 'zwei\nZeilen ü', '', '{"text": "3"}', '4', '\n']
  write(path, plain)
  found = list(ArrayRecord(str(path), None).documents())
  assert [document.text for document in found] == [t for t in plain if t.strip()]
  assert found[-1].source == f'{path}:4'


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'texts': 'a'}, r'record 1 has no key "text": did you mean "texts"\?'),
    ({'q': 'a'}, 'record 1 has no key "text": it has q'),
    ({'text': 3}, 'record 1, key "text", is a int, not text'),
    (b'{"text": "\\ud800"}', 'record 1, key "text", holds half of a surrogate'),
    ('["a"]', 'record 1 is not a JSON object'),
    ('{"text": "a"', r'record 1 is not JSON \(.*set text = None'),
    ('', r'record 1 is not JSON'),
    # The first bytes of a tf.train.Example.
    (b'\n\x90\x01\n\x8d\x01\n\x04text', 'record 1:2 is not UTF-8'),
  ],
)
def test_bad_records(record, message, tmp_path):
  path = tmp_path / 'a.array_record'
  write(path, [{'text': 'fine'}, record])
  documents = ArrayRecord(str(path)).documents()
  assert next(documents).text == 'fine'
  with pytest.raises(UserError, match=message) as error:
    next(documents)
  assert str(path) in str(error.value)


def test_plain_text_is_utf8(tmp_path):
  path = tmp_path / 'a.array_record'
  write(path, ['a', b'caf\xe9'])
  with pytest.raises(UserError, match=r'a\.array_record, record 1 is not UTF-8 \(byte 0xe9\)'):
    list(ArrayRecord(str(path), None).documents())


def test_missing_and_empty(tmp_path):
  source = ArrayRecord(f'{tmp_path}/*.array_record')
  (tmp_path / 'folder.array_record').mkdir()
  with pytest.raises(UserError, match=r'no file matches .*\*\.array_record: check'):
    list(source.documents())
  write(tmp_path / 'a.array_record', [])
  write(tmp_path / 'b.array_record', [{'text': ''}, {'text': None}])
  with pytest.raises(UserError, match='holds no text: its 2 files are empty'):
    list(source.documents())
  # One empty shard among others is no mistake.
  write(tmp_path / 'c.array_record', [{'text': 'x'}])
  assert [document.text for document in source.documents()] == ['x']
  (tmp_path / 'd.array_record').write_bytes(b'')
  with pytest.raises(UserError, match=r'd\.array_record is not a whole ArrayRecord file'):
    list(source.documents())


@pytest.mark.parametrize('cut', [0, 10, 1000, 65_535, 65_536, 100_000, -65_536, -1])
def test_cut_off(cut, tmp_path):
  path = tmp_path / 'a.array_record'
  write(path, [{'text': t} for t in texts(200)])
  content = path.read_bytes()
  path.write_bytes(content[:cut])
  with pytest.raises(UserError, match=r'a\.array_record is not a whole ArrayRecord file \(.+\):'):
    list(ArrayRecord(str(path)).documents())


def test_no_damage_is_read_as_text(tmp_path):
  path = tmp_path / 'a.array_record'
  write(path, [{'text': t} for t in texts(60)])
  content = path.read_bytes()
  whole = list(ArrayRecord(str(path)).documents())
  places = random.Random(0)
  refused = 0
  for _ in range(60):
    damaged = bytearray(content)
    damaged[places.randrange(len(content))] ^= 1 << places.randrange(8)
    path.write_bytes(damaged)
    try:
      # A bit of the padding between blocks can flip without harm.
      assert list(ArrayRecord(str(path)).documents()) == whole
    except UserError as error:
      refused += 1
      assert str(error).startswith(f'{path} is not a whole ArrayRecord file (')
      assert '\n' not in str(error)
  assert refused > 10


def test_it_is_a_stream(tmp_path):
  """Memory does not grow with the file."""
  path = tmp_path / 'a.array_record'
  text = ''.join(random.Random(0).choices('abcdefghijklmnop', k=1_000_000))
  write(path, [{'text': text[i:] + text[:i]} for i in range(200)], 'group_size:1,uncompressed')
  assert path.stat().st_size > 200_000_000
  code = (
    'import resource\n'
    'from optimer_jax.data.sources import ArrayRecord\n'
    'import array_record.python.array_record_module\n'
    'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
    f'count = sum(1 for _ in ArrayRecord({str(path)!r}).documents())\n'
    'print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  count, kilobytes = map(int, done.stdout.split())
  assert count == 200
  assert kilobytes < 60_000
