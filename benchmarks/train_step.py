"""Training steps beside transformers on torch, at the shape of Gemma 3 270M.

    python -m benchmarks.train_step [--batch B] [--length T] [--rounds R] [--remat KIND]
        [--dtype DTYPE] [--quick]

One random model on both sides, with all 262,144 rows of the embedding, parameters in float32, and
activations and products in DTYPE: float32, or bfloat16 (the peer's by autocast). The same rows of
random tokens, the same loss over the same targets, clipping, AdamW and learning rates; as many
threads, huge pages. Ours is `compiled_step` as training runs it, its state donated; KIND is what
layers keep for their gradients, `Model.remat`. The peer is `Gemma3ForCausalLM` with torch's fused
AdamW, and sdpa or eager attention, with or without gradient checkpointing: whichever was fastest in
a trial; `peers_gb` has the memory of all four. B x T are the quickstart's 4 x 256 unless given:
what two cores train on at a time.

Each side is a process, so that its peak memory is its own, and they take steps in turns: one waits
while the other computes. Rates are B x T over the median seconds of a step; the first, in which
ours compiles, does not count. `round_ratios` has the ratio of each pair, `loss_difference` the
largest relative difference of the losses of a step. Prints as the last line one JSON object. Needs
the extra test, Linux, 14 GB of memory, 1.1 GB of disk and 5 minutes on two cores. --quick takes the
tiny shapes.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks import print_found
from optimer_jax.checkpoints.huggingface import write_huggingface
from optimer_jax.checkpoints.names import external_name, to_torch, torch_shape
from optimer_jax.data.sources import default_cache
from optimer_jax.errors import UserError
from optimer_jax.files import write_json
from optimer_jax.gemma3 import (
  SIZES,
  Model,
  init_leaves,
  leaf_shapes,
)
from optimer_jax.gemma3.config import to_hf
from optimer_jax.gemma3.transformer import REMAT
from optimer_jax.parallel.sharding import MeshConfig, batch_sharding, make_mesh
from optimer_jax.parallel.startup import start
from optimer_jax.training.state import first_state
from optimer_jax.training.train import TrainConfig, compiled_step, optimizer, schedule

OURS = ('-m', 'benchmarks.train_step', '--serve')
PEER = ('-P', str(Path(__file__).with_name('torch_step.py')))
WAYS = tuple(itertools.product(('sdpa', 'eager'), ('whole', 'checkpointed')))  # of the peer
TRIAL = 2  # steps of each way, of which the last counts


def write_work(directory: Path, model: Model, config: TrainConfig, length: int) -> None:
  """What both sides read: the model in Hugging Face's layout, the rows and the settings."""
  gemma = model.config
  names = {leaf: f'model.{external_name(leaf, 0)}' for leaf in leaf_shapes(gemma)}
  tensors = {
    names[leaf]: (torch_shape(leaf, shape), 'float32') for leaf, shape in leaf_shapes(gemma).items()
  }
  leaves = init_leaves(gemma, config.seed)
  (directory / 'model').mkdir()
  write_huggingface(
    directory / 'model',
    to_hf(gemma, 'float32'),
    tensors,
    ((names[leaf], to_torch(leaf, value)) for leaf, value in leaves.items()),
  )
  shape = config.steps, config.batch, length
  tokens = np.random.default_rng(0).integers(0, gemma.vocab_size, shape, np.int32)
  np.save(directory / 'tokens.npy', tokens)
  rate = schedule(config)
  write_json(
    directory / 'settings.json',
    {
      'betas': [config.b1, config.b2],
      'clip': config.clip,
      'weight_decay': config.weight_decay,
      'rates': [float(rate(step)) for step in range(config.steps)],
      'dtype': model.dtype,
      'threads': len(os.sched_getaffinity(0)),
    },
  )


def setting(options: argparse.Namespace) -> tuple[Model, TrainConfig]:
  """What to train, and how: without warmup, that all steps be steps."""
  config = SIZES['tiny' if options.quick else '270m']
  model = Model(config, dtype=options.dtype, remat=options.remat)
  return model, TrainConfig(steps=options.rounds + 1, batch=options.batch, warmup=0)


def serve(directory: Path, model: Model, config: TrainConfig) -> None:
  """Takes a step for each line of standard input, and writes one, as the peer does."""
  start(default_cache())
  tokens = np.load(directory / 'tokens.npy')
  devices = make_mesh(MeshConfig())
  rows = batch_sharding(devices)
  with jax.set_mesh(devices):
    leaves = init_leaves(model.config, config.seed)
    one_by_one = ((name, leaves.pop(name)) for name in [*leaves])
    state, step = first_state(optimizer(config), model, devices, one_by_one), None
    for now, _ in zip(tokens, sys.stdin, strict=False):
      began = time.perf_counter()
      positions = np.broadcast_to(np.arange(now.shape[1], dtype=np.int32), now.shape)
      batch = {'tokens': now, 'positions': positions, 'segment_ids': np.ones_like(now)}
      batch = {key: jax.make_array_from_process_local_data(rows, a) for key, a in batch.items()}
      step = step or compiled_step(model, config, state, batch)
      state, metrics = jax.block_until_ready(step(state, batch))
      seconds = time.perf_counter() - began
      print(json.dumps({'loss': float(metrics['loss']), 'seconds': seconds}), flush=True)


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[Callable[[], dict]]:
  """A side's process, until the block ends: what is called for a step, see `step`."""
  environment = {
    'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
    'HF_HUB_OFFLINE': '1',
    'JAX_PLATFORMS': 'cpu',
    # Threads of torch that wait by spinning would take the cores from whoever is next.
    'OMP_WAIT_POLICY': 'passive',
  }
  pipe = subprocess.PIPE
  with (
    log.open('w') as said,
    subprocess.Popen(
      [sys.executable, *command],
      env=os.environ | environment,
      stdin=pipe,
      stdout=pipe,
      stderr=said,
      text=True,
    ) as process,
  ):
    try:
      yield functools.partial(step, process, log)
    finally:
      process.kill()


def step(process: subprocess.Popen, log: Path) -> dict[str, float]:
  """The `loss`, `seconds` and, so far, `peak_gb` of a step of a side.

  Raises:
    UserError: its process has ended; the last that it said is quoted.
  """
  with contextlib.suppress(BrokenPipeError):
    process.stdin.write('step\n')
    process.stdin.flush()
  line = process.stdout.readline()
  if not line:
    *_, said = ['nothing', *log.read_text().strip().splitlines()]
    raise UserError(f'{" ".join(process.args[1:])} ended and said at last: {said}')
  status = Path(f'/proc/{process.pid}/status').read_text()
  peak = int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) * 1024 / 1e9
  return json.loads(line) | {'peak_gb': peak}


def tried(peer: list[str], log: Path) -> dict[tuple[str, ...], dict[str, float]]:
  """The peer's second step in each way."""
  found = {}
  for way in WAYS:
    with started([*peer, *way], log) as take:
      *_, found[way] = (take() for _ in range(TRIAL))
    seconds, peak = (found[way][key] for key in ('seconds', 'peak_gb'))
    print(f'peer, {", ".join(way)}: {seconds:.2f} s, {peak:.2f} GB', flush=True)
  return found


def compare(place: Path, arguments: list[str], tokens: int, rounds: int) -> dict:
  """Takes steps on both sides in turns, prints them, and returns the last line."""
  log, peer = place / 'peer.log', [*PEER, str(place)]
  trial = tried(peer, log)
  way = min(trial, key=lambda way: trial[way]['seconds'])
  found = {'ours': [], 'peer': []}
  ours = started([*OURS, str(place), *arguments], place / 'ours.log')
  with ours as mine, started([*peer, *way], log) as theirs:
    for number in range(rounds + 1):
      for name, take in (('ours', mine), ('peer', theirs)):
        found[name].append(take())
      a, b = (each[-1] for each in found.values())
      print(
        f'{"round " + str(number) if number else "warm up"}: {a["seconds"]:.2f} s and '
        f'{b["seconds"]:.2f} s, {b["seconds"] / a["seconds"]:.2f} times as fast; losses '
        f'{a["loss"]:.6f} and {b["loss"]:.6f}',
        flush=True,
      )
  rate = {
    name: tokens / statistics.median(each['seconds'] for each in steps[1:])
    for name, steps in found.items()
  }
  pairs = [*zip(*found.values(), strict=True)]
  memory = {name: steps[-1]['peak_gb'] for name, steps in found.items()}
  return {
    'tokens_per_s': rate['ours'],
    'peer_tokens_per_s': rate['peer'],
    'ratio': rate['ours'] / rate['peer'],
    'peak_rss_gb': memory['ours'],
    'peer_peak_rss_gb': memory['peer'],
    'memory_ratio': memory['ours'] / memory['peer'],
    'round_ratios': [round(b['seconds'] / a['seconds'], 3) for a, b in pairs[1:]],
    'losses': [round(a['loss'], 6) for a, _ in pairs],
    'loss_difference': max(abs(a['loss'] / b['loss'] - 1) for a, b in pairs),
    'peer': ', '.join(way),
    'peers_gb': {', '.join(each): step['peak_gb'] for each, step in trial.items()},
  }


def measure(options: argparse.Namespace, arguments: list[str]) -> dict:
  """Writes what both sides read, and compares them."""
  model, config = setting(options)
  with tempfile.TemporaryDirectory() as place:
    place = Path(place)
    write_work(place, model, config, options.length)
    print(f'{options.batch} rows of {options.length} tokens a step', flush=True)
    return compare(place, arguments, options.batch * options.length, options.rounds)


def main(arguments: list[str]) -> int:
  """Prints the table and the JSON object; returns the exit status."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.train_step')
  parser.add_argument('--batch', type=int, default=4, metavar='B')
  parser.add_argument('--length', type=int, default=256, metavar='T')
  parser.add_argument('--rounds', type=int, default=8, metavar='R')
  parser.add_argument('--remat', choices=tuple(REMAT), default='dots')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--serve', type=Path, help=argparse.SUPPRESS)  # one side's own process
  options = parser.parse_args(arguments)
  if options.serve:
    serve(options.serve, *setting(options))
    return 0
  return print_found(lambda: measure(options, arguments))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
