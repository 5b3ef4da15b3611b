"""Files and directories that are either the old ones or the new ones, never half of each."""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from optimer_jax.errors import UserError


@contextlib.contextmanager
def no_room(path: Path | str) -> Iterator[None]:
  """Turns 'no space left on device' into one sentence that names the place."""
  try:
    yield
  except Exception as error:
    # Native writers report a full disk as text, Python's as an errno.
    full = getattr(error, 'errno', None) == errno.ENOSPC or 'No space left' in str(error)
    if not full:
      raise
    raise UserError(f'no room on the disk for {path}: free some space and start again') from error


@contextlib.contextmanager
def atomic_directory(
  path: Path | str, forget: Callable[[Path], None] = lambda _: None
) -> Iterator[Path]:
  """Yields an empty directory beside `path` that takes its place when the block ends well.

  What an earlier, killed writer left is removed first. The old directory, if any, stays readable
  until the new one is complete. `forget` is called with each directory before it is removed.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)

  def remove(directory: Path) -> None:
    if directory.exists():
      forget(directory)
      shutil.rmtree(directory, ignore_errors=True)

  for left in path.parent.glob(f'.{path.name}.tmp-*'):
    remove(left)
  new = path.parent / f'.{path.name}.tmp-{uuid.uuid4().hex[:8]}'
  new.mkdir()
  try:
    with no_room(path):
      yield new
      sync_directory(new)
    if path.exists():
      old = path.parent / f'.{path.name}.tmp-old-{uuid.uuid4().hex[:8]}'
      path.rename(old)
      new.rename(path)
      remove(old)
    else:
      new.rename(path)
    _sync(path.parent)
  finally:
    remove(new)


def sync_directory(path: Path) -> None:
  """Waits until all files below `path` are on the disk, readable by whom the directory is."""
  for file in path.rglob('*'):
    if file.is_file():
      file.chmod(path.stat().st_mode & 0o666)  # some writers let only the owner read
      _sync(file)


def write_text(path: Path | str, text: str) -> None:
  """Writes `text` (UTF-8) so that a reader sees the old file or the new one."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.parent / f'.{path.name}.tmp-{os.getpid()}'
  with no_room(path):
    try:
      with open(new, 'w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      new.replace(path)
    finally:
      new.unlink(missing_ok=True)


def write_json(path: Path | str, value: object) -> None:
  """Writes `value` as indented JSON, atomically."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def read_json(path: Path | str) -> object:
  """Reads JSON; a missing or damaged file is a UserError that names it."""
  try:
    return json.loads(Path(path).read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{path} is missing: check the path, or run the stage that writes it') from None
  except ValueError as error:
    raise UserError(f'{path} is damaged ({error}): delete it and write it again') from None


def append_jsonl(path: Path | str, row: dict) -> None:
  """Appends one line and waits until it is on the disk."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  line = json.dumps(row, ensure_ascii=False) + '\n'
  with no_room(path), open(path, 'ab+') as file:
    # A writer killed in mid-line left a line without its end: close it, so that ours is whole.
    if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b'\n':
      line = '\n' + line
    file.write(line.encode())
    file.flush()
    os.fsync(file.fileno())


def read_jsonl(path: Path | str) -> list[dict]:
  """Reads what `append_jsonl` wrote; a line torn by a kill is left out, a missing file is []."""
  rows = []
  if not Path(path).exists():
    return rows
  for line in Path(path).read_bytes().splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      continue
  return rows


def _sync(path: Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
