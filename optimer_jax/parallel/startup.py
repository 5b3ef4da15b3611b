"""What a process sets before its first computation."""

import contextlib
import ctypes
import gc
import logging
import os
import re
import socket
import sys
import threading
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jax._src import cloud_tpu_init

from optimer_jax import progress
from optimer_jax.errors import UserError
from optimer_jax.parallel.processes import primary

VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def start(cache: Path) -> None:
  """Joins the run's other processes, keeps compiled programs in `cache`, and libraries quiet.

  Process 0 alone prints from then on.
  """
  jax.config.update('jax_compilation_cache_dir', str(cache / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)
  logging.getLogger('absl').setLevel(logging.ERROR)
  warnings.filterwarnings('ignore', category=DeprecationWarning)
  # When one read fails, Orbax drops its others, which then complain one by one.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  sys.unraisablehook = _unraisable
  quiet_libtpu()
  join()
  if not progress.speaks:
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


def join(patience_s: int = 300) -> None:
  """Makes this process one of several that run the same program, where `others` says so.

  Process 0 speaks. JAX must not have computed before. If the others are not there in time, that is
  said in a sentence, and the process exits with 1: XLA, which waits for them, can only be aborted.

  Raises:
    UserError: as in `others`, or they cannot be joined.
  """
  found = others(os.environ, _tpu())
  if found is None:
    return
  if found.get('process_id') == 0:
    _check_free(found['coordinator_address'])
  waiting = threading.Timer(patience_s, _give_up, [found, patience_s])
  waiting.daemon = True
  waiting.start()
  try:
    jax.distributed.initialize(**found, initialization_timeout=2 * patience_s + 60)
  except Exception as error:
    reason = (str(error).strip() or repr(error)).splitlines()[0].split('. ')[0]
    raise UserError(f'the other processes cannot be joined: {reason}') from error
  finally:
    waiting.cancel()
  progress.speaks = primary()


def _check_free(address: str) -> None:
  """XLA can crash where process 0 cannot listen."""
  try:
    socket.create_server(('', int(address.rsplit(':', 1)[1]))).close()
  except (OSError, OverflowError) as error:
    raise UserError(
      f'process 0 cannot listen at {address} ({error}): give all processes another '
      'JAX_COORDINATOR_ADDRESS'
    ) from error


def _give_up(asked: dict, patience_s: int) -> None:
  who, do = 'hosts of this TPU', 'on each, or, for one host without its TPU, set JAX_PLATFORMS=cpu'
  if asked:
    who = f'{asked["num_processes"]} processes'
    do = f'in each, and let process 0 be where {asked["coordinator_address"]} is'
  print(
    f'optimer: the {who} did not all come together within {patience_s} s: start the same command '
    f'{do}',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def machine_metadata(name: str) -> str:
  """An attribute of this virtual machine of Google Cloud; '' if it has none, or is no such one."""
  address = os.environ.get('GCE_METADATA_IP', '169.254.169.254')
  request = urllib.request.Request(
    f'http://{address}/computeMetadata/v1/instance/attributes/{name}',
    headers={'Metadata-Flavor': 'Google'},
  )
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with direct.open(request, timeout=2) as answer:
      return answer.read().decode()
  except OSError:
    return ''


def others(
  environ: Mapping[str, str], tpu: bool, metadata: Callable[[str], str] = machine_metadata
) -> dict | None:
  """What `jax.distributed.initialize` shall be called with; None for a process on its own.

  `VARIABLES` say it all. Without them, where a TPU has several hosts or slices, JAX finds the rest
  by itself: on GKE in the environment, on TPU virtual machines from their metadata. Where GKE's
  environment names several hosts, and there is no TPU (its library is missing, say), the processes
  are joined all the same: alone, all of them would write the same files.

  Args:
    environ: the environment.
    tpu: whether a TPU is attached, and shall be used.
    metadata: gives an attribute of this machine by its name, as `machine_metadata` does.

  Raises:
    UserError: one of `VARIABLES` is missing or malformed.
  """
  given = {name: environ[name] for name in VARIABLES if environ.get(name)}
  if not given and not tpu:
    return _hosts_of_gke(environ)
  if not given:
    return {} if _several_hosts(environ, metadata) else None
  if missing := [name for name in VARIABLES if name not in given]:
    raise UserError(
      f'{" and ".join(given)} without {" and ".join(missing)}: the processes of one run need all '
      'three set, and a process on its own none'
    )
  address, count, number = given.values()
  if not re.fullmatch(r'.+:\d+', address):
    raise UserError(
      f'JAX_COORDINATOR_ADDRESS is {address!r}: it must be host:port, where process 0 can listen'
    )
  if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
    raise UserError(
      f'JAX_PROCESS_ID is {number!r} and JAX_NUM_PROCESSES is {count!r}: the processes must be '
      'numbered from 0, up to below their number'
    )
  return {
    'coordinator_address': address,
    'num_processes': int(count),
    'process_id': int(number),
    'cluster_detection_method': 'deactivate',
  }


def _hosts_of_gke(environ: Mapping[str, str]) -> dict | None:
  """As JAX reads GKE's variables; None for one host, or if JAX_PLATFORMS says what to use."""
  hosts = environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
  slices = int(environ.get('MEGASCALE_NUM_SLICES') or 1)
  number, slice_id = environ.get('TPU_WORKER_ID'), int(environ.get('MEGASCALE_SLICE_ID') or 0)
  if environ.get('JAX_PLATFORMS') or number is None or len(hosts) * slices == 1:
    return None
  first = (environ.get('MEGASCALE_COORDINATOR_ADDRESS') or hosts[0]).split(':')[0]
  return {
    'coordinator_address': f'{first}:{environ.get("JAX_COORDINATOR_PORT") or 8482}',
    'num_processes': len(hosts) * slices,
    'process_id': int(number) + slice_id * len(hosts),
    'cluster_detection_method': 'deactivate',
  }


def _several_hosts(environ: Mapping[str, str], metadata: Callable[[str], str]) -> bool:
  """Whether a TPU has several hosts or slices.

  The machine is asked only where the environment says nothing (it does on GKE and on Colab), as a
  TPU need not have that network.
  """
  hosts = environ.get('TPU_PROCESS_ADDRESSES', environ.get('TPU_WORKER_HOSTNAMES'))
  slices = environ.get('MEGASCALE_NUM_SLICES')
  if hosts is None and 'TPU_SKIP_MDS_QUERY' not in environ:
    hosts = metadata('worker-network-endpoints')
    found = re.search(r'MEGASCALE_NUM_SLICES\W+(\d+)', metadata('tpu-env') if hosts else '')
    slices = slices or (found and found[1])
  return ',' in (hosts or '') or (slices or '1') != '1'


def _tpu() -> bool:
  """Whether JAX found a TPU attached, and JAX_PLATFORMS does not say to leave it alone."""
  return cloud_tpu_init.running_in_cloud_tpu_vm and 'tpu' in (jax.config.jax_platforms or 'tpu')


def quiet_libtpu(attached: bool = False) -> None:
  """Where no TPU is attached, libtpu, if it is installed, shall not ask the network and complain.

  Args:
    attached: also where one is, which is then not asked for.
  """
  if cloud_tpu_init.running_in_cloud_tpu_vm and not attached:
    return
  for key, value in {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_LOG_DIR': 'disabled',
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
  }.items():
    os.environ.setdefault(key, value)


def on_host() -> contextlib.AbstractContextManager:
  """Inside, JAX computes on the CPU.

  An accelerator is slow at small programs in sequence. What comes from files and goes back to files
  takes one longer to compile, for each shape, than the host to do.
  """
  try:
    return jax.default_device(jax.local_devices(backend='cpu')[0])
  except RuntimeError:  # JAX_PLATFORMS leaves it out.
    return contextlib.nullcontext()


def release_memory() -> None:
  """Gives freed memory back to the system.

  The C library keeps blocks below 32 MB, which a model of many layers consists of, on top of
  whatever the next stage needs.
  """
  gc.collect()
  with contextlib.suppress(AttributeError):  # another C library than glibc
    ctypes.CDLL(None).malloc_trim(0)


def _unraisable(found) -> None:
  if str(found.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(found)
