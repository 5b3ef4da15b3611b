"""The weighted sum beside a memory copy, and merges of files beside mergekit's.

    python -m benchmarks.merge [--quick] [--peer PYTHON]

First the kernel: candidates of about 67M and 268M parameters from K = 4 and 8 vectors, float32,
bfloat16 and int8, each written into the last one's memory. Bytes are those of base, vectors and
candidate. A warm memcpy of as many bytes (2 GB at most), read and written, runs in turns with it,
and for comparison two of half the size on two threads. `gb_per_s`, `copy_gb_per_s` and
`ratio_to_copy` (to the one memcpy) of the last line are those of the float32 or bfloat16 row with
the lowest ratio.

Then files to files: four random models of the 270M's shapes near a base, bfloat16, merged by
task_arithmetic and by ties (density 0.3) as one mergekit file says, by `optimer merge` and by
mergekit in turns (mergekit from this environment, or from that of --peer; null without). CPU
seconds and peak memory are those of the whole process. What was written is read again and held
against its digests. Needs 4 GB of disk. --quick takes 67M parameters and the tiny shapes.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from optimer_jax.checkpoints.huggingface import open_huggingface, write_huggingface
from optimer_jax.checkpoints.leaves import digest
from optimer_jax.checkpoints.names import external_name, to_torch, torch_shape
from optimer_jax.checkpoints.quantized import Quantized
from optimer_jax.files import read_json
from optimer_jax.gemma3 import SIZES, init_leaves, leaf_shapes
from optimer_jax.gemma3.config import to_hf
from optimer_jax.merging.weighted_sum import weighted_sum

REPEATS = 9
MERGES = {
  'task_arithmetic': {'weight': 0.3},
  'ties': {'weight': 0.3, 'density': 0.3},
}


def kernel(parameters: int, k: int, dtype: str) -> dict[str, float]:
  """Bandwidth of the weighted sum and of a copy of as many bytes, GB/s, medians of turns."""
  rng = np.random.default_rng(0)
  width = 4096
  rows = parameters // width // 16

  def tree(kind):
    leaves = (rng.standard_normal((rows, width), np.float32) for _ in range(16))
    if kind == 'int8':
      scale = jnp.full((1, width), 1e-3, jnp.float32)
      return {
        i: Quantized(jnp.asarray((x * 30).astype(np.int8)), scale) for i, x in enumerate(leaves)
      }
    return {i: jnp.asarray(x).astype(kind) for i, x in enumerate(leaves)}

  float_dtype = 'float32' if dtype == 'int8' else dtype
  base, out = tree(float_dtype), tree(float_dtype)
  vectors = tuple(tree(dtype) for _ in range(k))
  size = sum(x.nbytes for x in jax.tree.leaves((base, out, vectors)))
  weights = jnp.linspace(0.1, 0.5, k)
  copied = min(size, 2**31)
  source = np.ones(copied // 2, np.uint8)
  target = np.ones_like(source)
  out = jax.block_until_ready(weighted_sum(out, base, vectors, weights))
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    middle = len(source) // 2
    parts = [(target[:middle], source[:middle]), (target[middle:], source[middle:])]
    times = {'sum': [], 'one': [], 'two': []}
    for _ in range(REPEATS):
      began = time.perf_counter()
      out = jax.block_until_ready(weighted_sum(out, base, vectors, weights))
      times['sum'].append(time.perf_counter() - began)
      began = time.perf_counter()
      np.copyto(target, source)
      times['one'].append(time.perf_counter() - began)
      began = time.perf_counter()
      list(pool.map(lambda part: np.copyto(*part), parts))
      times['two'].append(time.perf_counter() - began)
  rate = {
    name: (size if name == 'sum' else copied) / statistics.median(values) / 1e9
    for name, values in times.items()
  }
  return {
    'gb_per_s': rate['sum'],
    'copy_gb_per_s': rate['one'],
    'ratio_to_copy': rate['sum'] / rate['one'],
    'two_copies': rate['two'],
  }


def write_models(directory: Path, size: str) -> None:
  """A random base and four models near it, bfloat16, in Hugging Face's layout."""
  config = SIZES[size]
  names = {leaf: f'model.{external_name(leaf, 0)}' for leaf in leaf_shapes(config)}
  tensors = {
    names[leaf]: (torch_shape(leaf, shape), 'bfloat16')
    for leaf, shape in leaf_shapes(config).items()
  }
  base = init_leaves(config, 0)

  def rows(seed):
    rng = np.random.default_rng(seed)
    for leaf, value in base.items():
      noise = rng.standard_normal(value.shape, np.float32) * np.float32(1e-3 if seed else 0)
      yield names[leaf], to_torch(leaf, value + noise)

  for seed in range(5):
    path = directory / (f'model{seed}' if seed else 'base')
    path.mkdir()
    write_huggingface(path, to_hf(config, 'bfloat16'), tensors, rows(seed))


def describe(directory: Path, method: str) -> Path:
  """A mergekit file."""
  file = directory / f'{method}.yml'
  models = [
    {'model': str(directory / f'model{i}'), 'parameters': MERGES[method]} for i in range(1, 5)
  ]
  content = {
    'merge_method': method,
    'base_model': str(directory / 'base'),
    'models': models,
    'dtype': 'float32',
    'out_dtype': 'bfloat16',
  }
  file.write_text(json.dumps(content))  # JSON is YAML
  return file


# A process counts its parent's memory at its start as its own: a small one stands between.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:], stdout=open(sys.argv[1], 'w'), stderr=subprocess.STDOUT)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def measured(command: list[str], log: Path) -> tuple[float, float]:
  """CPU seconds and peak memory (GB) of a process and its threads.

  Raises:
    RuntimeError: it failed; what it printed is named.
  """
  environment = {**os.environ, 'HF_HUB_OFFLINE': '1', 'JAX_PLATFORMS': 'cpu'}
  printed = subprocess.run(
    [sys.executable, '-c', MEASURE, str(log), *command],
    env=environment,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  code, cpu, kilobytes = printed.split()
  if int(code):
    raise RuntimeError(f'{" ".join(command)} failed: {log.read_text()[-2000:]}')
  return float(cpu), int(kilobytes) * 1024 / 1e9


def check_digests(directory: Path) -> int:
  """Reads a merged checkpoint again; how many tensors have the digests noted when written.

  Raises:
    RuntimeError: a tensor has another digest; it is named.
  """
  expected = read_json(directory / 'digests.json')
  source = open_huggingface(directory)
  for leaf, tensor in source.stored.items():
    name = source.prefix + external_name(leaf, 0)
    if digest(tensor.read()) != expected.pop(name):
      raise RuntimeError(f'{directory}: {name} has another digest')
  if expected:
    raise RuntimeError(f'{directory} lacks {", ".join(expected)}')
  return len(source.stored)


def same(ours: Path, theirs: Path) -> float:
  """Share of elements that both have alike."""
  a, b = open_huggingface(ours), open_huggingface(theirs)
  equal = total = 0
  for leaf, tensor in a.stored.items():
    x, y = tensor.read(), b.stored[leaf].read()
    equal += int(np.count_nonzero(x == y))
    total += x.size
  return equal / total


def files(size: str, peer: str | None) -> dict:
  """Merges of files: CPU seconds and peak memory of both."""
  ours = [sys.executable, '-m', 'optimer_jax', 'merge', '--mergekit']
  theirs = [peer, '-c', 'from mergekit.scripts.run_yaml import main; main()'] if peer else None
  found = {'mergekit_cpu_s': {} if peer else None, 'ours_cpu_s': {}, 'peak_rss_gb': {}}
  with tempfile.TemporaryDirectory() as place:
    place = Path(place)
    write_models(place, size)
    for method in MERGES:
      file = describe(place, method)
      # Once for the page cache and for compiled programs, as a second merge would find them.
      measured([*ours, str(file), '--out', str(place / 'ours')], place / 'log')
      if peer:
        out = str(place / 'theirs')
        cpu, rss = measured([*theirs, str(file), out, '--quiet'], place / 'log')
        found['mergekit_cpu_s'][method] = cpu
        found['peak_rss_gb'][f'mergekit {method}'] = rss
      cpu, rss = measured([*ours, str(file), '--out', str(place / 'ours')], place / 'log')
      found['ours_cpu_s'][method], found['peak_rss_gb'][method] = cpu, rss
      count = check_digests(place / 'ours')
      alike = (
        f', {same(place / "ours", place / "theirs"):.4%} of elements as mergekit' if peer else ''
      )
      print(f'{method}: {cpu:.1f} CPU s, {rss:.2f} GB, {count} digests verified{alike}', flush=True)
  return found


def main(arguments: list[str]) -> int:
  """Prints the tables and the JSON object; returns the exit status."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.merge')
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--peer', metavar='PYTHON', help='an interpreter that has mergekit')
  options = parser.parse_args(arguments)
  rows = []
  print(
    f'{"parameters":>10}{"K":>3}  {"vectors":10}{"GB/s":>8}{"copy":>8}{"ratio":>8}{"2 copies":>10}'
  )
  for parameters in (2**26,) if options.quick else (2**26, 2**28):
    for k in (4, 8):
      for dtype in ('float32', 'bfloat16', 'int8'):
        row = kernel(parameters, k, dtype)
        two = row.pop('two_copies')
        values = ''.join(f'{value:8.2f}' for value in row.values())
        print(f'{parameters:10}{k:3}  {dtype:10}{values}{two:10.2f}', flush=True)
        rows += [row] if dtype != 'int8' else []
  peer = options.peer or (sys.executable if importlib.util.find_spec('mergekit') else None)
  merged = files('tiny' if options.quick else '270m', peer)
  print(json.dumps({**min(rows, key=lambda row: row['ratio_to_copy']), **merged}))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
