"""What an environment makes of a process: one of several, or one on its own."""

import http.server
import os
import socket
import subprocess
import sys
import threading

import jax
import pytest
from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster

from optimer_jax.parallel import startup
from optimer_jax.parallel.startup import VARIABLES, machine_metadata, others

NOBODY_ELSE = {'cluster_detection_method': 'deactivate'}
POD = {'TPU_WORKER_HOSTNAMES': 'pod-0.svc,pod-1.svc', 'TPU_WORKER_ID': '1'}


def environment(*values: str) -> dict[str, str]:
  return dict(zip(VARIABLES, values, strict=True))


def free_port() -> int:
  with socket.create_server(('', 0)) as free:
    return free.getsockname()[1]


def nowhere(name: str) -> str:
  raise AssertionError(f'the machine was asked for {name}')


@pytest.mark.parametrize('tpu', [False, True])
def test_three_variables_say_it_all(tpu):
  # JAX shall ask nobody else, wherever it is.
  expected = {
    'coordinator_address': 'host-0:1234',
    'num_processes': 2,
    'process_id': 1,
    **NOBODY_ELSE,
  }
  assert others(environment('host-0:1234', '2', '1') | POD, tpu, nowhere) == expected
  assert others(environment('[::1]:80', '1', '0'), tpu, nowhere)['num_processes'] == 1


@pytest.mark.parametrize(
  ('environ', 'sentence'),
  [
    ({VARIABLES[0]: 'a:1'}, 'JAX_COORDINATOR_ADDRESS without JAX_NUM_PROCESSES and JAX_PROCESS_ID'),
    ({VARIABLES[2]: '0'}, 'JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES'),
    (environment('a:1', '2', ''), 'and JAX_NUM_PROCESSES without JAX_PROCESS_ID'),
    (environment('a', '2', '0'), "JAX_COORDINATOR_ADDRESS is 'a': it must be host:port"),
    (environment('a:b', '2', '0'), "JAX_COORDINATOR_ADDRESS is 'a:b'"),
    (environment('a:1', 'two', '0'), "JAX_NUM_PROCESSES is 'two'"),
    (environment('a:1', '2', '-1'), "JAX_PROCESS_ID is '-1'"),
    (environment('a:1', '2', '2'), "JAX_PROCESS_ID is '2' and JAX_NUM_PROCESSES is '2'"),
    (environment('a:1', '0', '0'), "JAX_NUM_PROCESSES is '0'"),
  ],
)
def test_variables_that_cannot_be(environ, sentence, refused):
  refused(lambda: others(environ, False), sentence)


# Environments as GKE, Colab and others give them; what JAX shall find by itself is {}.
@pytest.mark.parametrize(
  ('environ', 'expected'),
  [
    (POD, {}),
    (POD | {'TPU_SKIP_MDS_QUERY': 'true'}, {}),
    ({'TPU_PROCESS_ADDRESSES': 'a:8471,b:8471', 'TPU_WORKER_HOSTNAMES': 'localhost'}, {}),
    # Two slices of one host each.
    ({'TPU_WORKER_HOSTNAMES': 'pod-0.svc', 'MEGASCALE_NUM_SLICES': '2'}, {}),
    ({'TPU_WORKER_HOSTNAMES': 'pod-0.svc', 'MEGASCALE_NUM_SLICES': '1'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
    ({'TPU_PROCESS_ADDRESSES': 'local'}, None),
    ({'TPU_WORKER_HOSTNAMES': ''}, None),
    ({'TPU_SKIP_MDS_QUERY': '1'}, None),
  ],
)
def test_what_the_environment_of_a_tpu_says(environ, expected):
  assert others(environ, True, nowhere) == expected
  # Where the TPU is not to be used, it says nothing.
  assert others(environ | {'JAX_PLATFORMS': 'cpu'}, False, nowhere) is None


@pytest.mark.parametrize(
  ('environ', 'expected'),
  [
    (POD, ('pod-0.svc:8482', 2, 1)),
    (POD | {'JAX_COORDINATOR_PORT': '99'}, ('pod-0.svc:99', 2, 1)),
    (
      POD
      | {
        'MEGASCALE_NUM_SLICES': '3',
        'MEGASCALE_SLICE_ID': '2',
        'MEGASCALE_COORDINATOR_ADDRESS': 'first-0:8080',
      },
      ('first-0:8482', 6, 5),
    ),
    ({'TPU_WORKER_HOSTNAMES': 'pod-0.svc', 'TPU_WORKER_ID': '0'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
    ({}, None),
  ],
)
def test_a_pod_whose_tpu_is_not_seen_is_not_alone(environ, expected, monkeypatch):
  found = others(environ, False, nowhere)
  keys = ('coordinator_address', 'num_processes', 'process_id')
  assert found == (expected and {**dict(zip(keys, expected, strict=True)), **NOBODY_ELSE})
  if found:  # As JAX itself reads the variables where there is a TPU.
    slices = ('MEGASCALE_NUM_SLICES', 'MEGASCALE_SLICE_ID', 'MEGASCALE_COORDINATOR_ADDRESS')
    for name, value in (dict.fromkeys(slices, '') | environ).items():
      monkeypatch.setenv(name, value)
    monkeypatch.setattr(GkeTpuCluster, 'wait_for_coordinator', lambda *_: None)
    port = environ.get('JAX_COORDINATOR_PORT')
    assert GkeTpuCluster.get_coordinator_address(1, port) == expected[0]
    assert GkeTpuCluster.get_process_count() == expected[1]
    assert GkeTpuCluster.get_process_id() == expected[2]


@pytest.mark.parametrize(
  ('attributes', 'environ', 'expected'),
  [
    ({'worker-network-endpoints': 'a:0:10.0.0.1,b:1:10.0.0.2'}, {}, {}),
    ({'worker-network-endpoints': 'a,b'}, {'MEGASCALE_NUM_SLICES': '1'}, {}),
    ({'worker-network-endpoints': 'a:0:10.0.0.1'}, {}, None),
    (
      {'worker-network-endpoints': 'a', 'tpu-env': "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"},
      *({}, {}),
    ),
    ({'worker-network-endpoints': 'a', 'tpu-env': "MEGASCALE_NUM_SLICES: '1'\n"}, {}, None),
    ({}, {}, None),
  ],
)
def test_what_a_machine_says_of_its_tpu(attributes, environ, expected, monkeypatch):
  class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      path, name = self.path.rsplit('/', 1)
      known = path == '/computeMetadata/v1/instance/attributes' and name in attributes
      self.send_response(200 if known and self.headers['Metadata-Flavor'] == 'Google' else 404)
      self.end_headers()
      self.wfile.write(attributes.get(name, '').encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(('127.0.0.1', 0), Answer) as server:
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{server.server_port}')
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
    try:
      assert others(environ, True) == expected
    finally:
      server.shutdown()


def test_a_machine_without_that_network_is_on_its_own(monkeypatch):
  monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{free_port()}')
  assert machine_metadata('tpu-env') == '' and others({}, True) is None


# For real.


def run(arguments: list[str], *values: str) -> subprocess.CompletedProcess:
  env = {**os.environ, **environment(*values)}
  return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def test_others_that_do_not_come_are_one_sentence():
  address = f'localhost:{free_port()}'
  join = 'from optimer_jax.parallel import startup; startup.join(1)'
  found = run(['-c', join], address, '2', '1')
  assert (found.returncode, found.stderr) == (
    1,
    'optimer: the 2 processes did not all come together within 1 s: start the same command in '
    f'each, and let process 0 be where {address} is\n',
  )


def test_a_command_joins_after_it_has_read_gin(tmp_path):
  """And before JAX computes, which would be its error; the error it has is that of an empty run."""
  directory = f'--gin.DIRECTORY="{tmp_path}"'
  command = ['-m', 'optimer_jax', 'merge', '--gin_file=runs/quickstart_tiny.gin', directory]
  found = run(command, f'localhost:{free_port()}', '1', '0')
  assert found.returncode == 1
  assert found.stderr.splitlines()[-1].startswith(f'optimer merge: {tmp_path}'), found.stderr


def test_a_port_that_is_taken(monkeypatch, refused):
  with socket.create_server(('', 0)) as taken:
    address = f'localhost:{taken.getsockname()[1]}'
    for name, value in environment(address, '2', '0').items():
      monkeypatch.setenv(name, value)
    refused(startup.join, f'process 0 cannot listen at {address}', 'JAX_COORDINATOR_ADDRESS')


def test_who_has_computed_cannot_join(monkeypatch, refused):
  jax.devices()
  for name, value in environment('localhost:1', '2', '1').items():
    monkeypatch.setenv(name, value)
  refused(startup.join, 'the other processes cannot be joined: ', 'must be called before')
