"""Programs that a model wrote: what they may do, and what counts as having passed."""

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil
import pytest

from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation import sandbox
from optimer_jax.evaluation.sandbox import Outcome, run_tests

pytestmark = pytest.mark.skipif(
  sys.platform != 'linux' or os.uname().machine not in ('x86_64', 'aarch64'),
  reason='programs are not run here',
)
scratch_is_writable = pytest.mark.skipif(
  sys.platform == 'linux' and sandbox._landlock() < 3, reason='the kernel has no such Landlock'
)

# Every way to start a process that Python and the C library know, one a line.
STARTS = """
os.fork()
os.forkpty()
os.system('true') and 1 / 0
os.posix_spawn('/bin/true', ['true'], {})
os.execv('/bin/true', ['true'])
subprocess.run(['/bin/true'])
subprocess.Popen(['/bin/sleep', '60'], start_new_session=True)
multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None, use_errno=True).fork() < 0 and 1 / 0
ctypes.CDLL(None, use_errno=True).vfork() < 0 and 1 / 0
"""


@pytest.fixture
def living(tmp_path, monkeypatch):
  """Lists the processes that live in scratch directories of this test."""
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  monkeypatch.setenv('TMPDIR', str(tmp_path))

  def find() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
      try:
        if process.cwd().startswith(f'{tmp_path}/program-'):
          found.append(process)
      except psutil.Error:
        continue
    return found

  return find


def wait_for(condition) -> bool:
  end = time.monotonic() + 30
  while not condition() and time.monotonic() < end:
    time.sleep(0.02)
  return bool(condition())


@pytest.mark.parametrize(
  ('program', 'reason'),
  [
    ('def f(x):\n  return x + 1\nassert f(1) == 2', 'passed'),
    ('', 'passed'),
    ("挨拶 = 'こんにちは ☃'\nassert len(挨拶) == 7\nprint(挨拶, '\\ud800')", 'passed'),
    ('import sys\nassert sys.stdin.read() == ""', 'passed'),
    ('import sys\nassert sys.getdefaultencoding() == "utf-8" and sys.path', 'passed'),
    ('x = 1\nassert x == 2', 'failed: AssertionError (line 2: assert x == 2)'),
    (
      'assert 0, "two\\nlines"',
      'failed: AssertionError: two lines (line 1: assert 0, "two\\nlines")',
    ),
    ('def f():\n  return [][0]\n\nf()', 'failed: IndexError: list index out of range (line 2: '),
    ('def f(:', 'failed: SyntaxError: '),
    ('x = "\0"', 'failed: '),
    ('\ud800', 'failed: UnicodeEncodeError: '),
    ('input()', 'failed: EOFError: '),
    ('def f(): f()\nf()', 'failed: RecursionError: '),
    ('exit()', 'exited early with status 0'),
    ('import sys\nsys.exit(3)', 'exited early with status 3'),
    ('raise KeyboardInterrupt', 'failed: KeyboardInterrupt '),
    ('class E(Exception):\n  def __str__(self): raise self\nraise E', 'failed: an exception'),
    ('import os\nos.kill(os.getpid(), 9)', 'killed by signal 9 (SIGKILL)'),
    ('import ctypes\nctypes.string_at(0)', 'killed by signal 11 (SIGSEGV)'),
    ('import numpy', 'failed: ModuleNotFoundError: '),
    ('if __name__ == "__main__":\n  raise ValueError', 'passed'),
    ('import asyncio\nasyncio.run(asyncio.sleep(0))', 'passed'),
    (
      'from dataclasses import dataclass\nimport pickle\n@dataclass\nclass A:\n  x: int\n'
      'assert pickle.loads(pickle.dumps(A(3))) == A(3)',
      'passed',
    ),
    (
      'from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool:\n'
      '  assert list(pool.map(abs, range(-8, 0))) == list(range(8, 0, -1))',
      'passed',
    ),
  ],
)
def test_the_reason_says_how_a_program_ended(program, reason):
  outcome = run_tests(program)
  assert outcome.passed == (reason == 'passed')
  assert outcome.reason.startswith(reason)
  assert len(outcome.reason.splitlines()) == 1


@pytest.mark.parametrize(
  'program',
  [
    'import sys\nsys.exit(0)\nassert False',
    'exit()\nassert False',
    'raise SystemExit\nassert False',
    'import os\nos._exit(0)\nassert False',
    'import os, atexit\natexit.register(os._exit, 0)\nassert False',
    'print("passed")\nimport os\nos._exit(0)',
    'import os\nos.closerange(0, 64)\nos._exit(0)',
    'import os\nos.closerange(0, 64)\nassert False',
    'import os, sys\nos.write = sys.exit = lambda *_: 0\nos._exit(0)',
    'import builtins\nbuiltins.AssertionError = builtins.BaseException = str\nassert False',
    # Whatever is open is told that it passed.
    'import os\nfor fd in range(64):\n  try:\n    os.write(fd, b"\\ndone passed\\n passed\\n")\n'
    '  except OSError:\n    pass\nos._exit(0)',
  ],
)
def test_success_needs_the_last_line(program):
  outcome = run_tests(program)
  assert not outcome.passed and outcome.reason != 'passed'


def test_time_is_limited(living):
  loops = (
    'while True: pass',
    'import time\ntime.sleep(60)',
    'import os\nos.closerange(0, 64)\nwhile True: pass',
    'import signal\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass',
    'import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n'
    'time.sleep(60)',
  )
  for program in loops:
    assert run_tests(program, seconds=0.3) == Outcome(False, 'timed out')
  assert not living()
  # A thread that goes on after the last line does not keep a program from passing.
  program = 'import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()'
  assert run_tests(program) == Outcome(True, 'passed')
  with pytest.raises(UsageError, match='0 s'):
    run_tests('', seconds=0)


def test_cpu_time_is_limited_by_the_kernel():
  program = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
assert soft == 3 and hard == 4, (soft, hard)
"""
  assert run_tests(program, seconds=2.0).reason == 'passed'
  # The signal of that limit, sent early.
  program = 'import os, signal\nos.kill(os.getpid(), signal.SIGXCPU)'
  assert run_tests(program) == Outcome(False, 'timed out')


@pytest.mark.parametrize(
  'program',
  [
    'x = bytearray(10**10)',
    'x = [0] * 10**10',
    'x = []\nwhile True: x.append([0] * 100)',
    'x = []\nwhile True: x.append(object())',
    'import mmap\ntry:\n  mmap.mmap(-1, 10**10)\nexcept OSError:\n  raise MemoryError',
  ],
)
def test_memory_is_limited(program):
  assert run_tests(program, memory_mb=96) == Outcome(False, 'out of memory')


def test_memory_outside_the_address_space_is_refused():
  program = """
import os
from multiprocessing import shared_memory
for take in (lambda: os.memfd_create('x'), lambda: shared_memory.SharedMemory(create=True, size=9)):
  try:
    take()
  except OSError:
    continue
  raise ValueError
"""
  assert run_tests(program).reason == 'passed'
  with pytest.raises(UsageError, match='63 MB'):
    run_tests('', memory_mb=63)


def test_output_of_any_size_costs_nothing(tmp_path, living):
  before = psutil.Process().memory_info().rss
  program = """
import sys
for _ in range(300):
  print('x' * 1_000_000)
  print('x' * 1_000_000, file=sys.stderr)
"""
  assert run_tests(program, seconds=30.0).passed
  assert psutil.Process().memory_info().rss - before < 100e6
  # The one open pipe is read up to a bound.
  program = 'import os\nwhile True: os.write(3, b"x" * 65536)'
  assert run_tests(program).reason == 'wrote to the report'
  assert not list(tmp_path.iterdir())


def test_no_process_can_be_started(living):
  for line in STARTS.split('\n'):
    program = f"""
import ctypes, multiprocessing, os, subprocess, time
try:
  {line or 'raise PermissionError'}
except (OSError, ZeroDivisionError):
  pass
else:
  raise ValueError('it started')
"""
    assert run_tests(program) == Outcome(True, 'passed'), line
    assert not living(), line
  # What is refused in Python is refused below it: the system calls themselves.
  calls = {'x86_64': (56, 57, 58, 435), 'aarch64': (220, 435)}[os.uname().machine]
  program = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for call in {calls}:
  started = libc.syscall(call, 17, 0, 0, 0, 0)
  if started == 0:
    os.setsid()
    while True: pass
  assert started < 0, call
"""
  assert run_tests(program) == Outcome(True, 'passed')
  assert not living()


def test_a_bomb_of_processes_or_threads_goes_off_alone(living):
  program = 'import os\nwhile True:\n  try:\n    os.fork()\n  except OSError:\n    pass'
  before = len(psutil.pids())
  with ThreadPoolExecutor(1) as pool:
    outcome = pool.submit(run_tests, program, 0.5)
    assert wait_for(living)  # the search does find them
    while not outcome.done():
      assert len(living()) <= 1
  assert outcome.result() == Outcome(False, 'timed out')
  assert not living() and len(psutil.pids()) < before + 50
  program = """
import threading, time
threads = 0
try:
  while True:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    threads += 1
except RuntimeError:
  assert 4 <= threads <= 200, threads
"""
  assert run_tests(program, memory_mb=256).reason == 'passed'


def test_programs_die_with_the_process_that_tests_them(living):
  code = "from optimer_jax.evaluation.sandbox import run_tests\nrun_tests('while True: pass', 60.0)"
  parent = subprocess.Popen([sys.executable, '-c', code])
  # One that has used time of its own is past its start.
  assert wait_for(lambda: any(p.cpu_times().user > 0.3 for p in living()))
  parent.kill()
  parent.wait()
  assert wait_for(lambda: not living())


def test_nothing_arrives_over_the_network():
  tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
  local = socket.socket(socket.AF_UNIX)
  number = {'x86_64': 41, 'aarch64': 198}[os.uname().machine]
  with tcp, udp, local:
    tcp.bind(('127.0.0.1', 0))
    udp.bind(('127.0.0.1', 0))
    local.bind(f'\0sandbox-{os.getpid()}')
    tcp.listen()
    local.listen()
    for each in tcp, udp, local:
      each.setblocking(False)
    program = f"""
import ctypes, socket, urllib.request
tries = [
  lambda: socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}), 5),
  lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {udp.getsockname()[1]})),
  lambda: socket.socket(socket.AF_UNIX).connect('\\0sandbox-{os.getpid()}'),
]
reached = 0
for each in tries:
  try:
    each()
    reached += 1
  except PermissionError:
    pass
libc = ctypes.CDLL(None, use_errno=True)
for domain in 1, 2, 10, 16, 17:
  for kind in 1, 2, 3:
    reached += libc.syscall({number}, domain, kind, 0) >= 0
reached += libc.syscall(425, 1, ctypes.create_string_buffer(200)) >= 0 or ctypes.get_errno() != 38
for kind in socket.SOCK_DGRAM, socket.SOCK_SEQPACKET:
  try:
    socket.socketpair(type=kind)
    reached += 1
  except PermissionError:
    pass
assert reached == 0, reached
"""
    assert run_tests(program) == Outcome(True, 'passed')
    for each in tcp, local:
      with pytest.raises(BlockingIOError):
        each.accept()
    with pytest.raises(BlockingIOError):
      udp.recv(9)
    # The same program, unconfined, does arrive.
    subprocess.run([sys.executable, '-c', program], stderr=subprocess.DEVNULL)
    tcp.accept()[0].close()
    local.accept()[0].close()
    assert udp.recv(9) == b'x'


def outside_program(path: Path) -> str:
  return f"""
import errno, os
path = {str(path)!r}
tries = [
  lambda: open(path, 'w'),
  lambda: open(path, 'a'),
  lambda: open(path, 'r+'),
  lambda: open(path + '.new', 'w'),
  lambda: os.open(path, os.O_RDONLY | os.O_TRUNC),
  lambda: os.truncate(path, 0),
  lambda: os.unlink(path),
  lambda: os.rename(path, path + '.new'),
  lambda: os.rename(path, 'here'),
  lambda: os.link(path, path + '.new'),
  lambda: os.link(path, 'here'),
  lambda: os.symlink(path, 'here'),
  lambda: os.symlink(path, path + '.new'),
  lambda: os.mkdir(path + '.new'),
  lambda: os.mkdir('here'),
  lambda: os.mkfifo(path + '.new'),
  lambda: os.rmdir(os.path.dirname(path) + '/empty'),
  lambda: os.chmod(path, 0),
  lambda: os.chown(path, os.getuid(), os.getgid()),
  lambda: os.utime(path, (0, 0)),
  lambda: os.setxattr(path, 'user.x', b'x'),
  lambda: open('/dev/shm/sandbox-' + str(os.getpid()), 'w'),
]
done = []
for number, each in enumerate(tries):
  try:
    each()
    done.append(number)
  except OSError as error:  # Landlock's answer to a move between directories is EXDEV
    if error.errno not in (errno.EPERM, errno.EACCES, errno.EXDEV):
      done.append(error)
assert not done, done
assert open(path).read() == 'kept'
"""


@pytest.mark.parametrize('landlock', [True, False])
def test_nothing_outside_is_changed(tmp_path, monkeypatch, landlock):
  if not landlock:
    monkeypatch.setattr(sandbox, '_landlock', lambda: 0)
  (tmp_path / 'empty').mkdir()
  outside = tmp_path / 'outside'
  outside.write_text('kept')
  state = outside.stat()
  assert run_tests(outside_program(outside)) == Outcome(True, 'passed')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'outside']
  assert outside.read_text() == 'kept'
  assert (outside.stat().st_mode, outside.stat().st_mtime) == (state.st_mode, state.st_mtime)


@scratch_is_writable
def test_the_scratch_directory_is_fresh_and_bounded(tmp_path, living):
  program = """
import os, tempfile
assert os.listdir() == [] and os.environ['HOME'] == os.getcwd() == tempfile.gettempdir()
with open('a', 'w') as file:
  file.write('x')
os.rename('a', 'b')
with tempfile.NamedTemporaryFile() as file:
  file.write(b'x')
os.remove('b')
open('left', 'w').close()
open(os.devnull, 'w').write('x')
"""
  assert run_tests(program) == run_tests(program) == Outcome(True, 'passed')
  assert run_tests("open('a', 'wb').write(bytes(17 << 20))").reason.startswith('failed: OSError')
  program = 'n = 0\nwhile True:\n  n += 1\n  open(str(n), "wb").write(bytes(1 << 20))'
  assert run_tests(program) == Outcome(False, 'wrote more than 64 MB')
  assert not list(tmp_path.iterdir())


def test_without_landlock_no_file_is_written(monkeypatch):
  monkeypatch.setattr(sandbox, '_landlock', lambda: 0)
  for path in 'here', '/dev/null':
    assert run_tests(f"open('{path}', 'w')").reason.startswith('failed: PermissionError')
  assert run_tests('import os\nassert open(os.__file__).read()').passed


def test_other_processes_are_out_of_reach():
  child = subprocess.Popen(['/bin/sleep', '60'])
  program = f"""
import ctypes, os, resource, signal
parent, other = os.getppid(), {child.pid}
tries = [
  lambda: os.kill(parent, 0),
  lambda: os.kill(other, signal.SIGKILL),
  lambda: os.killpg(os.getpgid(other), 0),
  lambda: os.kill(-1, 0),
  lambda: signal.pidfd_send_signal(os.pidfd_open(other), signal.SIGKILL),
  lambda: resource.prlimit(other, resource.RLIMIT_NOFILE),
  lambda: os.setpriority(os.PRIO_PROCESS, other, 5),
  lambda: os.sched_setaffinity(other, os.sched_getaffinity(0)),
  lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
  lambda: os.setuid(12345),
]
libc = ctypes.CDLL(None, use_errno=True)
done = [n for n in (16, 0x4206) if libc.ptrace(n, other, 0, 0) >= 0]
done += ['unshare'] * (libc.unshare(0x10000000) >= 0)
for number, each in enumerate(tries):
  try:
    each()
    done.append(number)
  except (OSError, ValueError):
    pass
assert not done, done
"""
  try:
    assert run_tests(program) == Outcome(True, 'passed')
    assert child.poll() is None
  finally:
    child.kill()
    assert child.wait() == -signal.SIGKILL


def test_nothing_of_the_parent_is_passed_on(tmp_path, monkeypatch):
  monkeypatch.setenv('SOME_TOKEN', 'secret')
  (tmp_path / 'open').write_text('secret')
  with open(tmp_path / 'open') as file:
    os.set_inheritable(file.fileno(), True)
    program = """
import os, sys
assert 'secret' not in str(os.environ) + str(sys.orig_argv)
places = [f'/proc/self/fd/{n}' for n in range(64)]
open_files = [os.readlink(place).split(':')[0] for place in places if os.path.lexists(place)]
assert open_files == ['/dev/null'] * 3 + ['pipe'], open_files
assert hash('a') == {hash_}
assert not [p for p in sys.path if 'site-packages' in p]
"""
    seeded = subprocess.run(
      [sys.executable, '-c', "print(hash('a'))"],
      env={'PYTHONHASHSEED': '0'},
      capture_output=True,
      check=True,
    )
    program = program.replace('{hash_}', seeded.stdout.decode().strip())
    assert run_tests(program) == Outcome(True, 'passed')


def test_many_threads_of_a_process_that_runs_jax():
  assert jax.jit(lambda x: x @ x)(jnp.ones((64, 64)))[0, 0] == 64
  ends = ('assert True', 'assert False', 'import os\nos._exit(0)', 'x = [0] * 10**10')
  starts = ('passed', 'failed: AssertionError', 'exited early', 'out of memory')
  with ThreadPoolExecutor(8) as pool:
    outcomes = list(pool.map(run_tests, ends * 16))
  assert all(o.reason.startswith(s) for o, s in zip(outcomes, starts * 16, strict=True))
  assert [o.passed for o in outcomes] == [True, False, False, False] * 16


def test_nothing_runs_where_it_cannot_be_confined(monkeypatch):
  monkeypatch.setattr(sys, 'executable', '/bin/false')
  with pytest.raises(UserError, match=r'cannot be confined on this machine \(exited early'):
    run_tests('assert True')
  monkeypatch.setattr('platform.machine', lambda: 'riscv64')
  with pytest.raises(UserError, match='riscv64, where the network cannot be denied'):
    run_tests('assert True')


def judge(program: bytes, number: int, architecture: int, arguments=()) -> int:
  """What the kernel would answer: the instructions of classic BPF that the filter uses."""
  arguments = [*arguments, *[0] * (6 - len(arguments))]
  data = struct.pack('<iIQ6Q', number, architecture, 0, *arguments)
  steps = list(struct.iter_unpack('<HBBI', program))
  place = value = 0
  while True:
    code, if_true, if_false, k = steps[place]
    place += 1
    if code == 0x20:
      value = struct.unpack_from('<I', data, k)[0]
    elif code == 0x54:
      value &= k
    elif code == 0x06:
      return k
    else:
      place += if_true if {0x15: value == k, 0x35: value >= k}[code] else if_false


@pytest.mark.parametrize(
  ('machine', 'architecture', 'calls'),
  [
    ('x86_64', 0xC000003E, {'read': 0, 'socket': 41, 'clone': 56, 'kill': 62, 'openat': 257}),
    ('aarch64', 0xC00000B7, {'read': 63, 'socket': 198, 'clone': 220, 'kill': 129, 'openat': 56}),
  ],
)
def test_the_filter_of_both_machines(machine, architecture, calls):
  allow, refuse, unknown, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
  for writable in True, False:
    program = sandbox._filter(machine, 77, writable)
    ask = lambda name, *arguments, program=program: judge(
      program, calls[name], architecture, arguments
    )
    assert ask('read') == allow
    assert ask('socket', 2, 1) == refuse
    assert ask('clone', 0x3D0F00) == allow and ask('clone', 17) == refuse
    assert ask('kill', 77, 9) == allow and ask('kill', 76, 9) == ask('kill', 2**64 - 1) == refuse
    assert ask('openat', 3, 0, os.O_RDONLY | os.O_CLOEXEC) == allow
    for flags in os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC:
      assert ask('openat', 3, 0, flags) == (allow if writable else refuse)
    for number in 425, 435, 1000, 0x40000000 + calls['socket']:
      assert judge(program, number, architecture) == unknown
    assert judge(program, calls['read'], 0x40000003) == kill


def test_the_numbers_are_the_kernels():
  headers = {
    'x86_64': Path('/usr/include/x86_64-linux-gnu/asm/unistd_64.h'),
    'aarch64': Path('/usr/include/asm-generic/unistd.h'),
  }
  for machine, header in headers.items():
    if not header.exists():
      pytest.skip('the kernel headers are not installed')
    defined = re.findall(r'#define __NR(?:3264)?_(\w+)\s+(\d+)', header.read_text())
    known = {name: int(number) for name, number in defined}
    for table in sandbox._REFUSED, sandbox._WRITES, sandbox._JUDGED:
      ours = sandbox._numbers(table, machine)
      assert ours == {name: known[name] for name in table.split()[::3] if name in known}
