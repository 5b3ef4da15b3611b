"""Continual pre-training: from a base's leaves to a CPT model's, resumable at any step.

Axes: B rows of a global batch, T tokens of a row, A pieces of a batch (gradient accumulation).
"""

import contextlib
import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from optimer_jax.checkpoints.leaves import digest, orbax_context
from optimer_jax.data.mixtures import global_batch
from optimer_jax.errors import UserError
from optimer_jax.files import no_room, read_json, write_json
from optimer_jax.gemma3 import (
  Model,
  abstract_params,
  from_leaves,
  logical_axes,
  to_leaves,
  token_nats,
)
from optimer_jax.parallel.sharding import MeshConfig, batch_sharding, make_mesh, shardings
from optimer_jax.progress import progress, say
from optimer_jax.training.metrics import MetricsWriter, model_flops_utilisation


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One continual pre-training run."""

  steps: int = 1000
  batch: int = 64  # B
  accumulate: int = 1  # A; divides B
  learning_rate: float = 2e-5  # at the end of the warmup
  warmup: int = 50  # steps from 0 up to the learning rate
  final_learning_rate: float = 0.0  # share of it that the cosine ends at
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.0
  clip: float = 1.0  # global norm of the gradient
  seed: int = 0
  evaluate_every: int = 100
  save_every: int = 100
  keep_every: int = 0  # keep the parameters, to see how straight the way was; 0 keeps none


def settings_of(config: TrainConfig) -> dict:
  """What the result depends on."""
  return {key: v for key, v in dataclasses.asdict(config).items() if key != 'keep_every'}


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """AdamW after clipping, with linear warmup and cosine decay."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip),
    optax.adamw(schedule(config), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
  )


def schedule(config: TrainConfig) -> optax.Schedule:
  """Step to learning rate."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup,
    decay_steps=config.steps,
    end_value=config.learning_rate * config.final_learning_rate,
  )


@functools.partial(jax.jit, static_argnames=('model', 'config'), donate_argnames='state')
def train_step(
  model: Model, config: TrainConfig, state: dict, batch: Mapping[str, jax.Array]
) -> tuple[dict, dict]:
  """One optimizer step.

  Args:
    model, config: static.
    state: `params` and `optimizer`, float32; donated.
    batch: `tokens`, `positions`, `segment_ids`, int32 [B, T].

  Returns:
    The new state, and scalars: `loss` (nats per target token), `targets`, `grad_norm` before
    clipping, `update_norm`.
  """

  def loss(params, piece):
    nats, mask = token_nats(
      model, params, piece['tokens'], piece['positions'], piece['segment_ids']
    )
    return nats.sum(), mask.sum()

  gradient = jax.value_and_grad(loss, has_aux=True)
  if config.accumulate == 1:
    (nats, targets), grads = gradient(state['params'], batch)
  else:
    pieces = jax.tree.map(lambda a: a.reshape(config.accumulate, -1, *a.shape[1:]), dict(batch))

    def add(total, piece):
      return jax.tree.map(jnp.add, total, gradient(state['params'], piece)), None

    zero = ((0.0, 0), jax.tree.map(jnp.zeros_like, state['params']))
    ((nats, targets), grads), _ = jax.lax.scan(add, zero, pieces)
  # Pieces may hold different numbers of targets: the mean is taken over the whole batch.
  grads = jax.tree.map(lambda g: g / targets, grads)
  updates, opt_state = optimizer(config).update(grads, state['optimizer'], state['params'])
  metrics = {
    'loss': nats / targets,
    'targets': targets,
    'grad_norm': optax.tree.norm(grads),
    'update_norm': optax.tree.norm(updates),
  }
  return {
    'params': optax.apply_updates(state['params'], updates),
    'optimizer': opt_state,
  }, metrics


def train(
  config: TrainConfig,
  model: Model,
  read_base: Callable[[], Mapping[str, np.ndarray]],
  dataset: grain.MapDataset,
  directory: Path,
  *,
  name: str,
  identity: Mapping[str, str],
  mesh: MeshConfig,
  evaluate: Callable[[dict], Mapping[str, float]] | None = None,
  keep: Callable[[int, dict[str, jax.Array]], None] | None = None,
) -> tuple[dict[str, jax.Array], dict]:
  """Trains to the last step, from the last saved state if there is one.

  Args:
    config: the run.
    model: what to compute.
    read_base: gives the base's leaves, trained as float32 masters; called only where no state is
      saved yet, and what it gives is not kept.
    dataset: rows, as `data.mixtures.mixture` gives them.
    directory: holds state/, metrics.jsonl and event files; its state is deleted by `finish`.
    name: the data set's name, for people.
    identity: what the result depends on beside `config` (fingerprints of base and data); a
      directory begun with another identity is refused.
    mesh: devices to use.
    evaluate: held-out scores of parameters, every `evaluate_every` steps and at the end.
    keep: what to do with the step and the leaves every `keep_every` steps before the last; a run
      that is resumed may come to a step again, with the same leaves.

  Returns:
    The trained leaves, and what was spent in this call: steps, tokens, seconds.

  Raises:
    UserError: another run's directory, a warmup longer than the run, a batch that the mesh or A
      does not divide, a loss that is not finite (the step and the batch are named), a damaged
      state.
  """
  if not 0 <= config.warmup < config.steps:
    raise UserError(f'{config.warmup} warmup steps do not fit into {config.steps} steps')
  if config.batch % config.accumulate:
    raise UserError(f'batch {config.batch} does not divide into {config.accumulate} pieces')
  _check_identity(directory, {**settings_of(config), **identity})
  devices = make_mesh(mesh)
  rows_at_once = config.batch // config.accumulate
  if rows_at_once % (devices.shape['data'] * devices.shape['fsdp']):
    raise UserError(
      f'{rows_at_once} rows cannot be split over data={devices.shape["data"]} x '
      f'fsdp={devices.shape["fsdp"]} devices: change batch, accumulate or the mesh'
    )
  with jax.set_mesh(devices), orbax_context():
    saves = ocp.training.Checkpointer(
      (directory / 'state').absolute(),
      preservation_policy=ocp.training.preservation_policies.LatestN(1),
      cleanup_tmp_directories=True,
    )
    # Closing waits for a save that is under way, also when the run stops by an error.
    with contextlib.closing(saves):
      state, start = _restore_or_start(config, model, read_base, saves, devices, directory)
      if start:
        say(f'{name}: resumed at step {start}')
      with contextlib.closing(MetricsWriter(directory, start)) as writer:
        state, spent = _loop(
          config,
          model,
          state,
          start,
          dataset,
          saves,
          writer,
          evaluate,
          keep,
          devices,
          name,
          directory,
        )
  return to_leaves(model.config, state['params']), spent


def _loop(
  config, model, state, start, dataset, saves, writer, evaluate, keep, devices, name, directory
):
  length = dataset[0]['tokens'].shape[-1]
  flops_per_step = 3 * model.config.flops_per_token(length) * config.batch * length
  rows = batch_sharding(devices)
  rate = schedule(config)
  began = last = time.monotonic()
  tokens, waiting = 0, None

  def settle():
    """Waits for the last queued step, checks its loss and writes it down."""
    nonlocal last, tokens, waiting
    if waiting is None:
      return
    step, metrics = waiting
    values = {key: float(value) for key, value in metrics.items()}
    now = time.monotonic()
    if not math.isfinite(values['loss']) or not math.isfinite(values['grad_norm']):
      raise UserError(
        f'{name}: the loss is {values["loss"]} and the gradient {values["grad_norm"]} at step '
        f'{step} (batch {step - 1} of seed {config.seed}): lower the learning rate or look at '
        'that batch'
      )
    tokens += int(values['targets'])
    extra = {}
    if (mfu := model_flops_utilisation(flops_per_step / (now - last))) is not None:
      extra['mfu'] = mfu
    writer.write(
      step,
      loss=values['loss'],
      tokens_per_s=values['targets'] / (now - last),
      grad_norm=values['grad_norm'],
      update_norm=values['update_norm'],
      learning_rate=float(rate(step - 1)),
      **extra,
    )
    last, waiting = now, None

  steps = range(start + 1, config.steps + 1)
  for step in progress(steps, config.steps, f'train {name}', 'steps', initial=start):
    batch = global_batch(dataset, step - 1, config.batch, jax.process_index(), jax.process_count())
    batch = {
      key: jax.make_array_from_process_local_data(rows, value) for key, value in batch.items()
    }
    state, metrics = train_step(model, config, state, batch)
    settle()  # the step before, while this one runs
    waiting = step, metrics
    if evaluate and (step % config.evaluate_every == 0 or step == config.steps):
      settle()
      writer.write(step, **evaluate(state['params']))
      last = time.monotonic()
    if keep and config.keep_every and step % config.keep_every == 0 and step < config.steps:
      settle()
      keep(step, to_leaves(model.config, state['params']))
      last = time.monotonic()
    if step % config.save_every == 0 or step == config.steps:
      settle()
      _save(saves, step, state, directory)
  settle()
  return state, {
    'steps': config.steps - start,
    'tokens': tokens,
    'flops': flops_per_step * (config.steps - start),
    'seconds': time.monotonic() - began,
  }


def finish(directory: Path) -> None:
  """Deletes the saved state of a run whose result is stored."""
  shutil.rmtree(directory / 'state', ignore_errors=True)


def _check_identity(directory: Path, identity: Mapping) -> None:
  path = directory / 'run.json'
  if not path.exists():
    write_json(path, dict(identity))
    return
  old = read_json(path)
  changed = sorted(key for key in old | dict(identity) if old.get(key) != identity.get(key))
  if changed:
    key = changed[0]
    raise UserError(
      f'{directory} was begun with {key} = {old.get(key)}, not {identity.get(key)}: '
      'give the same settings, or delete it to start again'
    )


def _restore_or_start(config, model, read_base, saves, devices, directory):
  if saves.latest is None:
    placement = shardings(logical_axes(model), abstract_params(model), devices)
    params = from_leaves(model, {k: np.asarray(v, np.float32) for k, v in read_base().items()})
    # Donated later: the device's copy must not share the caller's memory.
    params = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=placement)(params)
    opt_state = jax.jit(optimizer(config).init)(params)
    return {'params': params, 'optimizer': opt_state}, 0
  abstract = abstract_state(config, model, devices)
  step = saves.latest.step
  try:
    state = saves.load(step, abstract)
    expected = saves.metadata(step).custom_metadata['digests']
  except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
    raise UserError(
      f'{directory}/state cannot be read at step {step} ({type(error).__name__}): '
      f'delete {directory} to train again'
    ) from error
  if _digests(state) != expected:
    raise UserError(
      f'{directory}/state is damaged at step {step}: delete {directory} to train again'
    )
  return state, step


def abstract_state(config: TrainConfig, model: Model, devices: Mesh) -> dict:
  """What `train_step` takes, as `jax.ShapeDtypeStruct`s placed on the mesh `devices`.

  Moments are placed as the parameters that they belong to, counters everywhere.
  """
  params = abstract_params(model)
  placement = shardings(logical_axes(model), params, devices)
  whole = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
  structure = jax.tree.structure(placement)

  def is_params(node):
    return jax.tree.structure(node) == structure

  def put(node):
    target = placement if is_params(node) else jax.tree.map(lambda _: whole, node)
    return jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), node, target
    )

  state = jax.eval_shape(lambda p: {'params': p, 'optimizer': optimizer(config).init(p)}, params)
  return jax.tree.map(put, state, is_leaf=is_params)


def _save(saves, step: int, state: dict, directory: Path) -> None:
  """Saves in the background, on accelerators; the values' digests go with them.

  On CPU a save reads the state's own memory, which the next step could then not reuse: a second
  state would be held for as long as the save takes.
  """
  with no_room(directory):
    saves.save_async(step, state, custom_metadata={'digests': _digests(state)})
    if jax.default_backend() == 'cpu':
      saves.wait()


def _digests(state: dict) -> dict[str, str]:
  return {
    jax.tree_util.keystr(path): digest(np.asarray(leaf))
    for path, leaf in jax.tree.leaves_with_path(state)
  }
