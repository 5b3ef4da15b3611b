"""Files that are the old ones or the new ones, and accounts that survive a kill."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from optimer_jax.errors import UserError
from optimer_jax.files import (
  append_jsonl,
  atomic_directory,
  no_room,
  read_json,
  read_jsonl,
  write_json,
)
from optimer_jax.report.costs import account


def test_directory_appears_whole_or_not_at_all(tmp_path):
  place = tmp_path / 'artifact'
  with atomic_directory(place) as new:
    (new / 'a').write_text('1')
    assert not place.exists()
  with pytest.raises(KeyError), atomic_directory(place) as new:
    (new / 'a').write_text('2')
    raise KeyError
  assert (place / 'a').read_text() == '1'
  with atomic_directory(place) as new:
    (new / 'b').write_text('3')
  assert [p.name for p in place.iterdir()] == ['b']
  assert [p.name for p in tmp_path.iterdir()] == ['artifact']


def test_a_killed_writer_leaves_the_old_directory(tmp_path):
  code = f"""
from pathlib import Path
import os, signal
from optimer_jax.files import atomic_directory
with atomic_directory(Path({str(tmp_path / 'x')!r})) as new:
  (new / 'half').write_text('half')
  os.kill(os.getpid(), signal.SIGKILL)
"""
  with atomic_directory(tmp_path / 'x') as new:
    (new / 'whole').write_text('whole')
  killed = subprocess.run([sys.executable, '-c', code])
  assert killed.returncode == -signal.SIGKILL
  assert [p.name for p in (tmp_path / 'x').iterdir()] == ['whole']
  with atomic_directory(tmp_path / 'x') as new:
    (new / 'next').write_text('next')
  assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_several_writers_do_not_take_one_another_for_dead(tmp_path):
  code = f"""
from pathlib import Path
import sys, time
from optimer_jax.files import atomic_directory
for _ in range(40):
  with atomic_directory(Path({str(tmp_path / 'x')!r})) as new:
    for name in 'abc':
      time.sleep(0.001)
      (new / name).write_text(sys.argv[1])
"""
  writers = [subprocess.Popen([sys.executable, '-c', code, str(n)]) for n in range(4)]
  assert [writer.wait() for writer in writers] == [0] * 4
  assert [p.name for p in tmp_path.iterdir()] == ['x']
  (text,) = {(tmp_path / 'x' / name).read_text() for name in 'abc'}  # all three of one writer
  assert text in '0123'


def test_a_full_disk_is_one_sentence(tmp_path):
  sentence = r'no room on the disk for .*place: free some space'
  with pytest.raises(UserError, match=sentence), no_room(tmp_path / 'place'):
    raise OSError(errno.ENOSPC, 'No space left on device')
  with pytest.raises(UserError, match='no room'), no_room(tmp_path):
    raise ValueError('RESOURCE_EXHAUSTED: No space left on device [data file]')
  with pytest.raises(ValueError), no_room(tmp_path):
    raise ValueError('another matter')


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can mount a small disk')
def test_a_really_full_disk_keeps_what_was_there(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', disk]).returncode:
    pytest.skip('no mount is allowed here')
  try:
    write_json(disk / 'a.json', {'old': True})
    with pytest.raises(UserError, match='no room on the disk'):
      write_json(disk / 'a.json', {'new': 'x' * 200_000})
    assert read_json(disk / 'a.json') == {'old': True}
    assert [p.name for p in disk.iterdir()] == ['a.json']
  finally:
    subprocess.run(['umount', disk], check=True)


def test_json_errors_name_the_file(tmp_path):
  with pytest.raises(UserError, match=r'no\.json is missing'):
    read_json(tmp_path / 'no.json')
  (tmp_path / 'bad.json').write_text('{"a": ')
  with pytest.raises(UserError, match=r'bad\.json is damaged'):
    read_json(tmp_path / 'bad.json')


def test_a_torn_line_is_dropped_and_the_next_one_is_whole(tmp_path):
  path = tmp_path / 'rows.jsonl'
  append_jsonl(path, {'a': 1})
  with open(path, 'a') as file:
    file.write('{"a": 2, "tor')
  append_jsonl(path, {'a': 3})
  assert read_jsonl(path) == [{'a': 1}, {'a': 3}]
  assert read_jsonl(tmp_path / 'none.jsonl') == []


def test_costs_of_an_error_and_of_a_kill_are_counted(tmp_path):
  with pytest.raises(KeyError), account(tmp_path, 'one') as cost:
    cost['tokens'] = 7
    raise KeyError
  code = f"""
from pathlib import Path
import time
from optimer_jax.report.costs import account
with account(Path({str(tmp_path)!r}), 'two') as cost:
  cost['flops'] = 5.0
  time.sleep(60)
"""
  process = subprocess.Popen([sys.executable, '-c', code])
  beat = tmp_path / '.stage.json'
  deadline = time.monotonic() + 60
  while not beat.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  process.kill()
  process.wait()
  with account(tmp_path, 'three'):
    pass
  rows = [json.loads(line) for line in (tmp_path / 'costs.jsonl').read_text().splitlines()]
  assert [row['stage'] for row in rows] == ['one', 'two', 'three']
  assert rows[0]['interrupted'] and rows[0]['tokens'] == 7
  assert rows[1]['interrupted'] and rows[1]['seconds'] >= 2 and rows[1]['flops'] == 5
  assert 'interrupted' not in rows[2] and rows[2]['peak_rss_gb'] > 0
  assert not beat.exists()
