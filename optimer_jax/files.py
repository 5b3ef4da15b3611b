"""Files and directories that are either the old ones or the new ones, never half of each."""

import contextlib
import errno
import fcntl
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

  Of several writers at once, the last to end has its directory there. What an earlier, killed
  writer left is removed first. The old directory, if any, stays readable until the new one is
  complete. `forget` is called with each directory before it is removed.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)

  def remove(directory: Path) -> None:
    if directory.exists():
      forget(directory)
      shutil.rmtree(directory, ignore_errors=True)

  for left in path.parent.glob(f'.{path.name}.tmp-*'):
    with _hold(left) as alone:
      if alone:
        remove(left)
  name = uuid.uuid4().hex[:8]
  new, born = path.parent / f'.{path.name}.tmp-{name}', path.parent / f'.{name}'
  born.mkdir()
  with _hold(born):  # before it has the name by which others take it for left over
    born.rename(new)
    try:
      with no_room(path):
        yield new
        sync_directory(new)
      for old in _take_place(new, path):
        remove(old)
      _sync(path.parent)
    finally:
      remove(new)


@contextlib.contextmanager
def _hold(directory: Path) -> Iterator[bool]:
  """Whether no other process holds the directory; ours does until the block ends or it dies."""
  try:
    handle = os.open(directory, os.O_RDONLY)
  except FileNotFoundError:
    yield False
    return
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    alone = True
  except OSError:  # Another does, or it is a file system without locks.
    alone = False
  try:
    yield alone
  finally:
    os.close(handle)


def _take_place(new: Path, path: Path) -> list[Path]:
  """Renames `new` to `path`; returns what stood there, by its new name."""
  moved = []
  while True:
    try:
      new.rename(path)
      return moved
    except OSError as error:
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        raise
    old = path.parent / f'.{path.name}.tmp-old-{uuid.uuid4().hex[:8]}'
    with contextlib.suppress(FileNotFoundError):  # Another writer was faster.
      path.rename(old)
      moved.append(old)


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
