"""Runs Python programs that a model wrote, so that their tests can be the score of a task.

A program is one process that cannot make another, reach the network or write outside its scratch
directory. That holds for careless programs and for the usual accidents; it is no wall against an
attacker with a hole in the kernel. What holds, on Linux (x86_64 and aarch64), root or not:

  network    no socket can be made (seccomp), but for a pair of them within the process
  processes  fork, vfork, clone but for threads, and exec are refused, so nothing is left to run
             after the program is killed; it dies with the process that tests it, too
  others     other processes cannot be killed, traced or slowed by the calls made for that (a file's
             owner for SIGIO is not looked at); no capabilities, not even for root
  files      reading is not restricted. Writing: plain files right in the scratch directory (its
             working directory, HOME and TMPDIR) and /dev/null, where the kernel has Landlock with
             truncation (Linux 6.2); on older ones no file can be opened for writing at all.
             Nowhere can permissions, owners or times be changed
  limits     wall and CPU time, address space, files of 16 MB each and 64 MB together, 64 open
             files, no core. Threads are limited only by the address space of their stacks
  input      end of file; what it prints is thrown away
  library    the standard library alone, no site packages; hashes are seeded with 0, and nothing of
             the environment is passed on but LD_LIBRARY_PATH

A program passes when its last line was reached: the launcher, which runs it, then writes a secret
word to a pipe. Printing, exit of any kind, closing files or dying cannot stand in for that. A
program that searches the launcher's frames or memory can find the word, and one whose objects equal
everything passes any assertion: with both in one interpreter, nothing can prevent it.
"""

import contextlib
import ctypes
import functools
import inspect
import json
import math
import os
import platform
import secrets
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from optimer_jax.errors import UsageError, UserError

_FILE_MB, _SCRATCH_MB = 16, 64
_START_SECONDS = 60.0  # a starting interpreter takes .05 s; only a stalled machine takes long
_REPORT_BYTES = 1 << 16

# System calls that are refused, with their numbers on x86_64 and aarch64 (- where there is none).
# Those that need a capability are not here, for there are none.
_REFUSED = """
  socket 41 198  connect 42 203  bind 49 200  listen 50 201  accept 43 202  accept4 288 242
  fork 57 -  vfork 58 -  execve 59 221  execveat 322 281  unshare 272 97  setns 308 268
  tkill 200 130  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
  ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  kcmp 312 272
  migrate_pages 256 238  move_pages 279 239  bpf 321 280  perf_event_open 298 241
  userfaultfd 323 282  add_key 248 217  request_key 249 218  keyctl 250 219
  setpriority 141 140  ioprio_set 251 30  sched_setparam 142 118  sched_setscheduler 144 119
  sched_setattr 314 274  sched_setaffinity 203 122
  memfd_create 319 279  shmget 29 194  msgget 68 186  semget 64 190  mq_open 240 180
  chmod 90 -  fchmod 91 52  fchmodat 268 53  chown 92 -  fchown 93 55  lchown 94 -  fchownat 260 54
  setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7
  removexattr 197 14  lremovexattr 198 15  fremovexattr 199 16
  utime 132 -  utimes 235 -  futimesat 261 -  utimensat 280 88
"""
_WRITES = """
  creat 85 -  truncate 76 45  unlink 87 -  unlinkat 263 35  rmdir 84 -  mkdir 83 -  mkdirat 258 34
  rename 82 -  renameat 264 38  renameat2 316 276  link 86 -  linkat 265 37
  symlink 88 -  symlinkat 266 36  mknod 133 -  mknodat 259 33
"""
_JUDGED = """
  clone 56 220  kill 62 129  tgkill 234 131  prlimit64 302 261  socketpair 53 199
  open 2 -  openat 257 56
"""
# From here on the numbers are the same on every machine. io_uring, pidfds, clone3, openat2 and all
# that later kernels add are said not to exist, and the C library then uses the older calls.
_FIRST_NEW = 424

_MACHINES = {'x86_64': (0, 0xC000003E), 'aarch64': (1, 0xC00000B7)}  # column, audit architecture


class Outcome(NamedTuple):
  passed: bool
  reason: str  # one line: 'passed', 'failed: AssertionError (line 3: assert f(1) == 2)', …


def run_tests(program: str, seconds: float = 10.0, memory_mb: int = 1024) -> Outcome:
  """Runs one program, its tests included, in a process of its own; safe to call from many threads.

  Args:
    program: Python source. Its `__name__` is 'program', so that what stands under
      `if __name__ == '__main__'` is not run, as in the HumanEval evaluation.
    seconds: wall time from the moment that the program itself starts.
    memory_mb: its address space in MiB, of which the interpreter takes about 30.

  Returns:
    passed, if the last line was reached, and why or why not: 'passed', 'failed: …' (an exception),
    'timed out', 'out of memory', 'exited early with status N', 'killed by signal N (NAME)',
    'wrote more than 64 MB', 'wrote to the report'.

  Raises:
    UserError: the network cannot be denied here, or the interpreter does not start.
    UsageError: seconds or memory_mb leave no room for a program.
  """
  if not (0 < seconds < math.inf and memory_mb >= 64):
    raise UsageError(
      f'a program cannot be tested in {seconds} s and {memory_mb} MB: give it more than 0 s and at '
      'least 64 MB'
    )
  machine = platform.machine()
  if sys.platform != 'linux' or machine not in _MACHINES:
    raise UserError(
      f'model-written programs are not run on {sys.platform} {machine}, where the network cannot '
      'be denied to them: score tasks of code on Linux on x86_64 or aarch64'
    )
  # Nothing but files can be in the directory, and they are the program's own: removal is simple.
  with tempfile.TemporaryDirectory(prefix='program-', ignore_cleanup_errors=True) as scratch:
    return _run(program, seconds, memory_mb, os.path.realpath(scratch), machine)


def _run(program: str, seconds: float, memory_mb: int, scratch: str, machine: str) -> Outcome:
  # The environment is wholly ours, so it may be read (no -I or -E): the hash seed comes with it.
  environment = {
    'HOME': scratch,
    'TMPDIR': scratch,
    'PATH': '/usr/bin:/bin',
    'LC_ALL': 'C.UTF-8',
    'PYTHONUTF8': '1',
    'PYTHONIOENCODING': 'utf-8:backslashreplace',
    'PYTHONHASHSEED': '0',
  }
  if 'LD_LIBRARY_PATH' in os.environ:  # some interpreters do not start without it
    environment['LD_LIBRARY_PATH'] = os.environ['LD_LIBRARY_PATH']
  process = subprocess.Popen(
    [sys.executable, '-s', '-S', '-P', '-B', '-c', _LAUNCHER],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,  # the interpreter's own complaints, and then the launcher's report
    cwd=scratch,
    env=environment,
    start_new_session=True,
  )
  try:
    token = secrets.token_hex(16)
    order = {
      'parent': os.getpid(),
      'token': token,
      'program': program,
      'cpu_seconds': math.ceil(seconds) + 2,
      'memory': memory_mb << 20,
      'file': _FILE_MB << 20,
      'scratch': scratch if _landlock() >= 3 else '',
      'filter': _filter(machine, process.pid, writable=_landlock() >= 3).hex(),
    }
    with contextlib.suppress(BrokenPipeError):
      process.stdin.write(json.dumps(order).encode() + b'\n')
      process.stdin.flush()
    report = bytearray()
    started, text = _await(process, report, f'{token} ready', _START_SECONDS, scratch)
    if not started:
      raise UserError(
        f'model-written programs cannot be confined on this machine ({text}): score tasks of code '
        'on another one'
      )
    finished, text = _await(process, report, f'{token} done ', seconds, scratch)
    return Outcome(finished and text == 'passed', text)
  finally:
    process.kill()
    process.wait()
    with contextlib.suppress(BrokenPipeError):
      process.stdin.close()
    process.stderr.close()


def _await(process, report: bytearray, mark: str, seconds: float, scratch: str) -> tuple[bool, str]:
  """(True, the rest of the line that begins with `mark`), or (False, what came instead).

  report: what has been read and not used yet; this line and those before it are taken out.
  """
  poller = select.poll()
  poller.register(process.stderr, select.POLLIN)
  pause = 100  # ms, to look at the directory and at a process whose pipe another one holds open
  end = time.monotonic() + seconds
  while True:
    while b'\n' in report:
      line, _, rest = report.partition(b'\n')
      report[:] = rest
      if line.startswith(mark.encode()):
        return True, _one_line(line[len(mark) :])
    # Asked before reading: all that an ended process wrote is then in the pipe.
    status = process.poll()
    left = max(0, math.ceil(1000 * (end - time.monotonic())))
    for handle, _ in poller.poll(0 if status is not None else min(pause, left)):
      new = os.read(handle, _REPORT_BYTES)
      report += new
      if not new:  # it is ending, or has closed its files and goes on
        poller.unregister(handle)
        pause = 2
    if b'\n' in report:
      continue
    if status is not None:
      return False, _ending(status, report)
    if time.monotonic() >= end:
      return False, 'timed out'
    if len(report) > _REPORT_BYTES:
      return False, 'wrote to the report'
    if _bytes_in(scratch) > _SCRATCH_MB << 20:
      return False, f'wrote more than {_SCRATCH_MB} MB'


def _ending(status: int, report: bytes) -> str:
  if status < 0:
    if -status == signal.SIGXCPU:
      return 'timed out'
    with contextlib.suppress(ValueError):  # a signal without a name
      return f'killed by signal {-status} ({signal.Signals(-status).name})'
    return f'killed by signal {-status}'
  # Before the program starts the pipe holds what the interpreter or the launcher complained of.
  said = _one_line(report.strip().rpartition(b'\n')[2])
  return f'exited early with status {status}' + (f': {said}' if said and status else '')


def _one_line(text: bytes) -> str:
  """At most 300 printable characters."""
  words = ' '.join(text.decode('utf-8', 'replace').split())
  return ''.join(c if c.isprintable() else '\ufffd' for c in words)[:300]


def _bytes_in(scratch: str) -> int:
  total = 0
  for entry in os.scandir(scratch):
    with contextlib.suppress(FileNotFoundError):
      total += 4096 + entry.stat(follow_symlinks=False).st_size
  return total


@functools.cache
def _landlock() -> int:
  """The version of the kernel's Landlock interface; 0 or less if it has none."""
  create_ruleset, version = 444, 1
  return ctypes.CDLL(None).syscall(create_ruleset, None, ctypes.c_size_t(0), version)


def _numbers(table: str, machine: str) -> dict[str, int]:
  """The system calls of a table that the machine has."""
  words = table.split()
  names, numbers = words[::3], words[1 + _MACHINES[machine][0] :: 3]
  return {name: int(n) for name, n in zip(names, numbers, strict=True) if n != '-'}


def _filter(machine: str, pid: int, writable: bool) -> bytes:
  """The classic BPF program that judges each system call of the process `pid`.

  writable: Landlock judges what may be written; without it nothing may.
  Layout of what it reads (struct seccomp_data): the number at 0, the architecture at 4, and from 16
  on six arguments of 8 bytes, whose low halves are enough here (both machines are little-endian).
  """
  load, equal, at_least, mask, give = 0x20, 0x15, 0x35, 0x54, 0x06
  kill, allow, error = 0x80000000, 0x7FFF0000, 0x00050000
  refuse, unknown = error | 1, error | 38  # EPERM, ENOSYS

  def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack('<HBBI', code, if_true, if_false, value)

  def only(*conditions: tuple[int, int, list[int]]) -> bytes:
    """Allows a call if each (argument, mask, values) has argument & mask among the values."""
    body = b''
    for argument, bits, values in conditions:
      body += step(load, 16 + 8 * argument) + step(mask, bits)
      for left in range(len(values), 0, -1):
        body += step(equal, values[-left], if_true=left)
      body += step(give, refuse)
    return body + step(give, allow)

  bits = 0xFFFFFFFF
  thread, unix, stream = 0x10000, 1, 1
  judged = {
    'clone': only((0, thread, [thread])),
    'kill': only((0, bits, [pid])),
    'tgkill': only((0, bits, [pid])),
    'prlimit64': only((0, bits, [0, pid])),
    # asyncio wakes its loop through such a pair. A pair of datagram sockets could send elsewhere.
    'socketpair': only((0, bits, [unix]), (1, 0xF, [stream])),
  }
  refused = _numbers(_REFUSED, machine)
  if not writable:
    refused |= _numbers(_WRITES, machine)
    writing = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
    judged |= {'open': only((1, writing, [0])), 'openat': only((2, writing, [0]))}
  program = step(load, 4) + step(equal, _MACHINES[machine][1], if_true=1) + step(give, kill)
  program += step(load, 0) + step(at_least, _FIRST_NEW, if_false=1) + step(give, unknown)
  for number in refused.values():
    program += step(equal, number, if_false=1) + step(give, refuse)
  for name, number in _numbers(_JUDGED, machine).items():
    if name in judged:
      body = judged[name]
      program += step(equal, number, if_false=len(body) // 8) + body
  return program + step(give, allow)


def _launch():
  """Runs in the new interpreter, which is given this source: confines itself, runs the program.

  No thread has been started and nothing of the package is there, so that all limits and filters are
  the process's own from its first thread on, and no code runs between a fork and an exec.
  """
  import ctypes
  import json
  import os
  import resource
  import signal
  import site
  import struct
  import sys
  import types

  with open(0, 'rb', closefd=False) as orders:
    order = json.loads(orders.readline())

  libc = ctypes.CDLL(None, use_errno=True)
  libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
  libc.syscall.argtypes = [ctypes.c_long] * 5
  libc.syscall.restype = ctypes.c_long

  def must(result, what):
    if result < 0:
      raise OSError(ctypes.get_errno(), f'{what}: {os.strerror(ctypes.get_errno())}')
    return result

  for limit, value in (
    (resource.RLIMIT_CPU, order['cpu_seconds']),
    (resource.RLIMIT_AS, order['memory']),
    (resource.RLIMIT_FSIZE, order['file']),
    (resource.RLIMIT_NOFILE, 64),
    (resource.RLIMIT_CORE, 0),
  ):
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    # The CPU's soft limit comes first, for its signal says why; a program may ignore that one.
    spare = limit == resource.RLIMIT_CPU and value > 1
    resource.setrlimit(limit, (value - spare, value))

  no_capability = (ctypes.c_uint32 * 6)()
  must(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), no_capability), 'dropping capabilities')
  death_signal, no_new_privileges, seccomp, filter_mode = 1, 38, 22, 2
  must(libc.prctl(death_signal, signal.SIGKILL, 0, 0, 0), 'tying to the parent')
  if os.getppid() != order['parent']:  # it died before that
    os._exit(1)
  must(libc.prctl(no_new_privileges, 1, 0, 0, 0), 'giving up privileges')

  if order['scratch']:
    create_ruleset, add_rule, restrict_self, beneath = 444, 445, 446, 1
    write_file, remove_file, make_file, truncate = 1 << 1, 1 << 5, 1 << 8, 1 << 14
    every_write = write_file | 0x7FF0  # and bits 4 to 14: removing and making of any kind, truncate
    handled = ctypes.create_string_buffer(struct.pack('Q', every_write), 8)
    ruleset = must(libc.syscall(create_ruleset, ctypes.addressof(handled), 8, 0, 0), 'Landlock')
    for path, allowed in (
      (order['scratch'], write_file | remove_file | make_file | truncate),
      ('/dev/null', write_file | truncate),
    ):
      place = os.open(path, os.O_PATH)
      rule = ctypes.create_string_buffer(struct.pack('=Qi', allowed, place), 12)
      must(libc.syscall(add_rule, ruleset, beneath, ctypes.addressof(rule), 0), 'Landlock')
      os.close(place)
    must(libc.syscall(restrict_self, ruleset, 0, 0, 0), 'Landlock')
    os.close(ruleset)

  report, null = os.dup(2), os.open('/dev/null', os.O_RDWR)
  steps = bytes.fromhex(order['filter'])
  code = ctypes.create_string_buffer(steps, len(steps))
  length = len(steps) // 8
  program = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', length, ctypes.addressof(code)))
  must(libc.prctl(seccomp, filter_mode, ctypes.addressof(program), 0, 0), 'the seccomp filter')
  # Seen, not believed: an emulator may accept a filter and not apply it.
  if libc.socket(2, 1, 0) >= 0:
    raise OSError('the seccomp filter is not applied')
  os.dup2(null, 0)
  os.dup2(null, 2)
  os.close(null)

  token, text = order['token'], order['program']
  # What is needed at the end is at hand before: the program may have changed any module, or left
  # no memory to write a word in.
  write, leave = os.write, os._exit
  passed, no_memory = (f'\n{token} done {x}\n'.encode() for x in ('passed', 'out of memory'))

  def described(error):
    if isinstance(error, SystemExit):
      return f'exited early with status {error.code or 0}'
    said, place, trace = str(error)[:1000], '', error.__traceback__
    while trace:
      if trace.tb_frame.f_code.co_filename == 'program.py':
        line = trace.tb_lineno
        place = f' (line {line}: {"".join(text.splitlines()[line - 1 : line]).strip()[:200]})'
      trace = trace.tb_next
    return f'failed: {type(error).__name__}{": " if said else ""}{said}{place}'

  site.setquit()  # exit and quit, which some programs call
  module = types.ModuleType('program')
  sys.modules['program'] = module
  sys.argv = ['program.py']
  write(report, f'\n{token} ready\n'.encode())
  try:
    exec(compile(text, 'program.py', 'exec', dont_inherit=True), module.__dict__)
    write(report, passed)
    leave(0)  # not by way of the interpreter's end, where threads and exit handlers may wait
  except MemoryError:
    write(report, no_memory)
    leave(0)
  except BaseException as error:
    try:
      said = ' '.join(described(error).split())
    except BaseException:  # an exception whose text raises another
      said = 'failed: an exception'
    write(report, f'\n{token} done {said}\n'.encode('utf-8', 'replace'))
    leave(0)


_LAUNCHER = inspect.getsource(_launch) + '\n_launch()\n'
