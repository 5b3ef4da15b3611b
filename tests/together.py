"""Several processes that run one program, as the hosts of a slice do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

DEVICES = '--xla_force_host_platform_device_count'


def start(arguments: list, directory: Path, processes: int, devices: int) -> list[subprocess.Popen]:
  """Starts `python ARGUMENTS` in each of the processes, with so many CPU devices each.

  What process i says is in directory/i.log.
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  flags = [f for f in os.environ.get('XLA_FLAGS', '').split() if not f.startswith(DEVICES)]
  flags.append(f'{DEVICES}={devices}')
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(flags)}
  paths = [os.getcwd(), str(Path(__file__).parent), env.get('PYTHONPATH')]
  env['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
  found = []
  for i in range(processes):
    joins = {
      'JAX_COORDINATOR_ADDRESS': address,
      'JAX_NUM_PROCESSES': str(processes),
      'JAX_PROCESS_ID': str(i),
    }
    with open(directory / f'{i}.log', 'w') as log:
      found.append(
        subprocess.Popen(
          [sys.executable, *map(str, arguments)],
          env=env | joins if processes > 1 else env,
          stdout=log,
          stderr=subprocess.STDOUT,
        )
      )
  return found


def finish(
  started: list[subprocess.Popen], directory: Path, timeout: float = 240, expected: int = 0
) -> list[int]:
  """Waits for all; their exit codes. What they said is shown if one is not `expected`."""
  try:
    codes = [process.wait(timeout) for process in started]
  finally:
    for process in started:
      process.kill()
  if any(code != expected for code in codes):
    for i in range(len(codes)):
      print(f'--- process {i}', (directory / f'{i}.log').read_text()[-4000:])
  return codes
