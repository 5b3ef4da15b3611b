"""Where arrays are: a folder of a disk, or a prefix in a bucket of Google Cloud Storage (gs://…)."""

import contextlib
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import tensorstore as ts

from optimer_jax.errors import UsageError, UserError


def in_bucket(place: Path | str) -> bool:
  """Whether a place is in a bucket."""
  return str(place).startswith('gs://')


def check_place(place: str, name: str) -> None:
  """UsageError if a place, which people know as `name`, is none.

  Orbax takes it for a URL, in which other characters would mean something.
  """
  bucket, folder = '[a-z0-9][a-z0-9_.-]+[a-z0-9]', '[A-Za-z0-9_.=+-]+'
  if re.fullmatch(f'gs://{bucket}(/{folder})*/?', place):
    return
  if in_bucket(place) or not Path(place).is_absolute():
    raise UsageError(
      f'{name} is {place!r}: give gs://BUCKET/FOLDER, of letters, digits and any of -_.=+, '
      'or the absolute path of a folder'
    )


def absolute(place: Path | str) -> str:
  """As Orbax takes it."""
  return str(place if in_bucket(place) else Path(place).absolute())


def url(place: Path | str) -> str:
  """As TensorStore takes it."""
  return f'{"" if in_bucket(place) else "file://"}{quote(absolute(place), safe="/:")}/'


def reason(error: BaseException) -> str:
  """What a library says, without details and further sentences."""
  lines = str(error).splitlines() or [type(error).__name__]
  return lines[0].split(' [')[0].split('. ')[0].rstrip('.: ')


@contextlib.contextmanager
def reachable(place: Path | str) -> Iterator[None]:
  """Turns what goes wrong with a bucket into one sentence; around calls of libraries only."""
  try:
    yield
  except Exception as error:  # TensorStore, gcsfs and Google's libraries have many kinds.
    if not in_bucket(place) or isinstance(error, UserError):
      raise
    raise UserError(
      f'{place} cannot be reached ({reason(error)}): check that the bucket exists, and that you '
      'are logged in (gcloud auth application-default login) and may get it, and list, read, '
      'write and delete objects'
    ) from error


def prove(place: Path | str) -> None:
  """Looks at the bucket, if it is in one, and writes and deletes an object in the place.

  Orbax, which does the same, waits for minutes where it may not.

  Raises:
    UserError: the bucket is missing or may not be used, or a library is missing.
  """
  if not in_bucket(place):
    return
  if importlib.util.find_spec('gcsfs') is None:
    raise UserError(f"for {place} gcsfs is needed: pip install 'optimer_jax[gcs]'")
  with reachable(place):
    from google.cloud import storage

    storage.Client().get_bucket(str(place).split('/')[2])
    store = ts.KvStore.open(url(place)).result()
    store.write('probe', b'may I?').result()
    store.write('probe', None).result()


def delete(place: Path | str) -> None:
  """Deletes a place with everything in it, if there is anything."""
  if not in_bucket(place):
    shutil.rmtree(place, ignore_errors=True)
    return
  with reachable(place):
    ts.KvStore.open(url(place)).result().delete_range(ts.KvStore.KeyRange()).result()


def folders(place: Path | str) -> set[str]:
  """The names of the folders in a place."""
  if not in_bucket(place):
    return {path.name for path in Path(place).glob('*') if path.is_dir()}
  with reachable(place):
    keys = ts.KvStore.open(url(place)).result().list().result()
  return {key.decode().split('/')[0] for key in keys if b'/' in key}
