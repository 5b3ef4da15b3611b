"""Google Cloud Storage on this machine: gcp-storage-emulator, and what it lacks of the service.

It ignores ifGenerationMatch and ifGenerationNotMatch, startOffset, endOffset and pages of a list,
does not say the generation of what is read, and knows no callers without rights. TensorStore needs
these, so they are added here. What neither knows is refused with 501.
"""

import base64
import contextlib
import functools
import http.server
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET, PUBLIC, PRIVATE = 'mine', 'public', 'private'  # For writing, for reading, for nobody.
PAGE = 5  # of a list; 1,000 there
UNDERSTOOD = {'alt', 'name', 'uploadType', 'upload_id', 'prefix', 'delimiter'}
NO_MATTER = {'tensorstore', 'projection', 'prettyPrint'}
LIST = {'startOffset', 'endOffset', 'maxResults', 'pageToken'}
CONDITIONS = {'ifGenerationMatch', 'ifGenerationNotMatch'}


class Handler(RequestHandler):
  def handle_one_request(self):
    self.generation = None
    super().handle_one_request()

  def do_GET(self):
    self.answer(super().do_GET)

  def do_POST(self):
    self.answer(super().do_POST)

  def do_PUT(self):
    self.answer(super().do_PUT)

  def do_DELETE(self):
    self.answer(super().do_DELETE)

  def answer(self, usual) -> None:
    url = urlsplit(self.path)
    query = {key: value[0] for key, value in parse_qs(url.query, keep_blank_values=True).items()}
    found = re.fullmatch(r'(?:/\w+)?/storage/v1/b/([\w.-]+)(?:/o(?:/(.+))?)?', url.path)
    if not found or query.keys() - UNDERSTOOD - NO_MATTER - LIST - CONDITIONS:
      return self.refuse(HTTPStatus.NOT_IMPLEMENTED, self.path)
    bucket, name = found[1], unquote(found[2] or '') or query.get('name')
    if bucket == PRIVATE:
      return self.refuse(HTTPStatus.UNAUTHORIZED, 'Anonymous caller does not have access')
    if bucket == PUBLIC and self.command != 'GET':
      return self.refuse(HTTPStatus.FORBIDDEN, 'Anonymous caller may not write')
    if bucket not in self.storage.buckets:
      return self.refuse(HTTPStatus.NOT_FOUND, 'The specified bucket does not exist')
    if self.command == 'GET' and url.path.endswith('/o'):
      return self.list(bucket, query)
    there = self.storage.objects.get(bucket, {}).get(name)
    self.generation = there['generation'] if there else '0'
    if query.get('ifGenerationMatch', self.generation) != self.generation:
      return self.refuse(HTTPStatus.PRECONDITION_FAILED, 'At least one condition did not hold')
    if query.get('ifGenerationNotMatch') == self.generation:
      same = HTTPStatus.NOT_MODIFIED if self.command == 'GET' else HTTPStatus.PRECONDITION_FAILED
      return self.refuse(same, '')
    if self.command in ('POST', 'PUT'):
      self.server.written(name)
    if wanted := self.headers.get('Range'):
      first = re.fullmatch(r'bytes=(\d+)-\d*', wanted)
      if not first:
        return self.refuse(HTTPStatus.NOT_IMPLEMENTED, wanted)
      if there and int(first[1]) >= int(there['size']):
        return self.refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, wanted)
    usual()

  def list(self, bucket: str, query: dict) -> None:
    if 'delimiter' in query and query.keys() & {'startOffset', 'endOffset'}:
      return self.refuse(HTTPStatus.NOT_IMPLEMENTED, self.path)
    items, prefixes = self.storage.get_file_list(
      bucket, query.get('prefix'), query.get('delimiter') or None
    )
    first, end = query.get('startOffset', ''), query.get('endOffset') or chr(0x10FFFF)
    after = base64.urlsafe_b64decode(query.get('pageToken', '')).decode()
    names = {item['name']: item for item in items if first <= item['name'] < end}
    names |= dict.fromkeys(prefixes)
    left = sorted(name for name in names if name > after)
    page = left[: min(PAGE, int(query.get('maxResults', PAGE)))]
    said = {
      'kind': 'storage#objects',
      'items': [names[name] for name in page if names[name]],
      'prefixes': [name for name in page if not names[name]],
    }
    if page != left:
      said['nextPageToken'] = base64.urlsafe_b64encode(page[-1].encode()).decode()
    self.say(HTTPStatus.OK, said)

  def refuse(self, status: HTTPStatus, message: str) -> None:
    if status == HTTPStatus.NOT_IMPLEMENTED:
      self.server.refused.append(message)
    self.say(status, {'error': {'code': status.value, 'message': message}})

  def say(self, status: HTTPStatus, value: dict) -> None:
    self.rfile.read(int(self.headers.get('Content-Length') or 0))
    body = b'' if status == HTTPStatus.NOT_MODIFIED else json.dumps(value).encode()
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def end_headers(self):
    if self.generation is not None:
      self.send_header('X-Goog-Generation', self.generation)
    super().end_headers()


class Server(http.server.HTTPServer):
  request_queue_size = 128  # Clients that find no room in it wait for a second.

  def handle_error(self, request, client_address):
    if not isinstance(error := sys.exception(), ConnectionError):  # Clients may change their mind.
      self.refused.append(repr(error))


class Bucket:
  """The objects, to be looked at and damaged."""

  def __init__(self, storage: Storage, server: Server):
    self._storage, self._server, self._about = storage, server, {}
    self.tell(lambda name: None)
    self.url = f'gs://{BUCKET}'

  def tell(self, written: Callable[[str], None]) -> None:
    """Has `written` called with the name of each object before it is there."""
    self._server.written = written

  def names(self, prefix: str = '') -> list[str]:
    return sorted(x for x in self._storage.objects.get(BUCKET, {}) if x.startswith(prefix))

  def read(self, name: str) -> bytes:
    return self._storage.get_file(BUCKET, name)

  def write(self, name: str, content: bytes) -> None:
    about = self._about.get(name) or self._storage.objects[BUCKET][name]
    self._storage.create_file(BUCKET, name, content, about)

  def delete(self, name: str) -> None:
    self._about[name] = self._storage.objects[BUCKET][name]
    self._storage.delete_file(BUCKET, name)


@contextlib.contextmanager
def served() -> Iterator[Bucket]:
  """A bucket; meanwhile this process and those that it starts take it for Google's.

  TensorStore asks the environment once, so a process can have one only.
  """
  storage = Storage(use_memory_fs=True)
  logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)  # Not found: quite usual.
  storage._write_config_to_file = lambda: None  # Else all names are written down at each write.
  create_bucket(BUCKET, storage)
  create_bucket(PUBLIC, storage)
  storage.buckets[BUCKET]['softDeletePolicy'] = {'retentionDurationSeconds': '0'}
  with Server(('127.0.0.1', 0), functools.partial(Handler, storage)) as server:
    bucket = Bucket(storage, server)
    server.refused = []  # What was asked for in vain: our own mistake, or the emulator's.
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    os.environ['STORAGE_EMULATOR_HOST'] = os.environ['TENSORSTORE_GCS_HTTP_URL'] = address
    os.environ['GOOGLE_AUTH_TOKEN_FOR_TESTING'] = 'nobody'
    # It asks over gRPC, which is not here.
    os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'
    try:
      yield bucket
    finally:
      server.shutdown()
  assert not server.refused, server.refused
