"""Continual pre-training: from a base's leaves to a CPT model's, resumable at any step.

Axes: B rows of a global batch, T tokens of a row, A pieces of a batch (gradient accumulation).
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from optimer_jax.checkpoints import places
from optimer_jax.data.mixtures import global_batch
from optimer_jax.errors import Preempted, UserError
from optimer_jax.files import read_json, write_json
from optimer_jax.gemma3 import Model, to_leaves, token_nats
from optimer_jax.parallel.processes import meet, once, preemption, primary
from optimer_jax.parallel.sharding import MeshConfig, batch_sharding, make_mesh
from optimer_jax.parallel.startup import release_memory
from optimer_jax.progress import progress, say
from optimer_jax.training import state as states
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
  first_moment: str = 'float32'  # as it is stored; bfloat16 saves a sixth of the state
  clip: float = 1.0  # global norm of the gradient
  seed: int = 0
  evaluate_every: int = 100
  save_every: int = 100  # a state, until the next one is saved
  save_minutes: float = 0.0  # one also when it was saved so long ago; 0: by steps alone
  keep_states_every: int = 0  # states that stay, also when the run is done; 0 keeps none
  keep_every: int = 0  # keep the parameters, to see how straight the way was; 0 keeps none


_NO_MATTER = ('save_minutes', 'keep_states_every', 'keep_every')  # for the result


def settings_of(config: TrainConfig) -> dict:
  """What the result depends on."""
  found = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NO_MATTER}
  if config.first_moment == 'float32':
    del found['first_moment']  # Runs that were begun without the setting go on.
  return found


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """AdamW's direction; clipping before it and the learning rate after it are `train_step`'s.

  The second moment stays float32: its digits decide the length of a step.
  """
  return optax.chain(
    optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=config.first_moment),
    optax.add_decayed_weights(config.weight_decay),
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
  # Pieces may hold different numbers of targets: the mean is taken over the whole batch. Mean, clip
  # and learning rate are single factors, so that no other copies of all parameters are made.
  norm = optax.tree.norm(grads) / targets
  factor = jnp.minimum(1.0, config.clip / norm) / targets
  grads = jax.tree.map(lambda g: g * factor, grads)
  direction, rate = optimizer(config), schedule(config)(state['optimizer'][0].count)
  updates, opt_state = direction.update(grads, state['optimizer'], state['params'])
  metrics = {
    'loss': nats / targets,
    'targets': targets,
    'grad_norm': norm,
    'update_norm': rate * optax.tree.norm(updates),
  }
  params = jax.tree.map(lambda p, u: p - rate * u, state['params'], updates)
  new = {'params': params, 'optimizer': opt_state}
  return states.placed(direction, model, new), metrics


def train(
  config: TrainConfig,
  model: Model,
  read_base: Callable[[], states.Leaves],
  dataset: grain.MapDataset,
  directory: Path,
  *,
  name: str,
  identity: Mapping[str, str],
  mesh: MeshConfig,
  spent: dict,
  evaluate: Callable[[dict], Mapping[str, float]] | None = None,
  keep: Callable[[int, dict[str, jax.Array]], None] | None = None,
  arrays: str = '',
) -> dict[str, jax.Array]:
  """Trains to the last step, from the last saved state if there is one.

  Several processes train together, on the devices of all: each calls this with the same arguments
  and makes the rows that its own devices need. SIGTERM to any of them has all save the same step.

  Args:
    config: the run.
    model: what to compute.
    read_base: gives the base's leaves, trained as float32 masters; called only where no state is
      saved yet, and what it gives is not kept.
    dataset: rows, as `data.mixtures.mixture` gives them.
    directory: holds state/, metrics.jsonl and event files; its state is deleted by `finish`.
    arrays: holds state/ instead; a folder or gs://….
    name: the data set's name, for people.
    identity: what the result depends on beside `config` (fingerprints of base and data); a
      directory begun with another identity is refused.
    mesh: devices to use.
    spent: 'flops' and 'tokens' are counted up in it, of the steps that this call makes.
    evaluate: held-out scores of parameters, every `evaluate_every` steps and at the end.
    keep: what to do with the step and the leaves every `keep_every` steps before the last; a run
      that is resumed may come to a step again, with the same leaves.

  Returns:
    The trained leaves.

  Raises:
    UserError: another run's directory, a warmup longer than the run, a batch that the mesh or A
      does not divide, a loss that is not finite (the step and the batch are named), a damaged
      state.
    Preempted: SIGTERM came, and the state is saved.
  """
  if not 0 <= config.warmup < config.steps:
    raise UserError(f'{config.warmup} warmup steps do not fit into {config.steps} steps')
  if config.batch % config.accumulate:
    raise UserError(f'batch {config.batch} does not divide into {config.accumulate} pieces')
  identity = {**settings_of(config), **identity}
  once(lambda: _begin(directory, identity))
  devices = make_mesh(mesh)
  rows_at_once = config.batch // config.accumulate
  if rows_at_once % (devices.shape['data'] * devices.shape['fsdp']):
    raise UserError(
      f'{rows_at_once} rows cannot be split over data={devices.shape["data"]} x '
      f'fsdp={devices.shape["fsdp"]} devices: change batch, accumulate or the mesh'
    )
  place, every = _states(directory, arrays), config.keep_states_every
  spent |= {'flops': 0.0, 'tokens': 0}
  with jax.set_mesh(devices), states.saved(place, every) as saves:
    start, adamw = 0, optimizer(config)
    if saves.latest is None:
      state = states.first_state(adamw, model, devices, read_base())
    else:
      abstract = states.abstract_state(adamw, model, devices)
      state, start = states.restore(saves, abstract, identity)
      say(f'{name}: resumed at step {start}')
    with contextlib.closing(MetricsWriter(directory, start)) as writer, preemption() as preempted:
      state = _loop(
        config,
        model,
        state,
        start,
        dataset,
        functools.partial(states.save, saves, identity),
        writer,
        evaluate,
        keep,
        batch_sharding(devices),
        name,
        preempted,
        spent,
      )
  return to_leaves(model.config, state['params'])


def compiled_step(model: Model, config: TrainConfig, state: dict, batch: dict) -> Callable:
  """`train_step` for these shapes, without the memory that compiling it took."""
  found = train_step.lower(model, config, state, batch).compile()
  release_memory()
  return found


def _loop(
  config, model, state, start, dataset, save, writer, evaluate, keep, rows, name, preempted, spent
):
  length = dataset[0]['tokens'].shape[-1]
  flops_per_step = 3 * model.config.flops_per_token(length) * config.batch * length
  rates = np.asarray(schedule(config)(np.arange(config.steps)))  # a step's would wait in its queue
  last = saved = time.monotonic()
  waiting = None

  def settle():
    """Waits for the last queued step, checks its loss and writes it down."""
    nonlocal last, waiting
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
    spent['flops'] += flops_per_step
    spent['tokens'] += int(values['targets'])
    extra = {}
    if (mfu := model_flops_utilisation(flops_per_step / (now - last))) is not None:
      extra['mfu'] = mfu
    writer.write(
      step,
      loss=values['loss'],
      tokens_per_s=values['targets'] / (now - last),
      grad_norm=values['grad_norm'],
      update_norm=values['update_norm'],
      learning_rate=float(rates[step - 1]),
      **extra,
    )
    last, waiting = now, None

  def look(step: int) -> None:
    """What is made of a step's parameters beside the next step."""
    nonlocal last
    if keep and config.keep_every and step % config.keep_every == 0 and step < config.steps:
      settle()
      keep(step, to_leaves(model.config, state['params']))
    if evaluate and (step % config.evaluate_every == 0 or step == config.steps):
      settle()
      writer.write(step, **evaluate(state['params']))
    last = time.monotonic()

  def due(step: int) -> bool:
    if step == config.steps or step % config.save_every == 0:
      return True
    if config.keep_states_every and step % config.keep_states_every == 0:
      return True
    # Clocks differ: one of the processes decides.
    minutes = config.save_minutes
    return bool(minutes) and once(lambda: time.monotonic() - saved > 60 * minutes)

  if start and once(lambda: not writer.looked(start)):
    look(start)  # The run was stopped after saving it, and before this.
  steps = range(start + 1, config.steps + 1)
  if steps:  # Compiled ahead: a step that were another program would be an error.
    batch = batch_of(dataset, start, config.batch, rows)
    one_step = compiled_step(model, config, state, batch)
    meet()
  for step in progress(steps, config.steps, f'train {name}', 'steps', initial=start):
    batch = batch_of(dataset, step - 1, config.batch, rows)
    state, metrics = one_step(state, batch)
    settle()  # the step before, while this one runs
    waiting = step, metrics
    stop = preempted(step) and step < config.steps
    if due(step) or stop:
      settle()
      save(step, state)
      saved = time.monotonic()
    if stop:
      raise Preempted(f'{name} was told to stop and is saved at step {step}')
    look(step)
  settle()
  return state


def batch_of(
  dataset: grain.MapDataset, step: int, batch: int, rows: NamedSharding
) -> dict[str, jax.Array]:
  """The global batch [B, T] of a step, of which this process makes the rows of its devices."""
  shape = batch, *dataset[0]['tokens'].shape
  own = [index[0].indices(batch) for index in rows.addressable_devices_indices_map(shape).values()]
  first, last = min(start for start, *_ in own), max(stop for _, stop, _ in own)
  found = global_batch(dataset, step, batch, first, last)

  def put(values):
    def of(index):
      start, stop, _ = index[0].indices(batch)
      return values[start - first : stop - first]

    return jax.make_array_from_callback(shape, rows, of)

  return {key: put(values) for key, values in found.items()}


def finish(directory: Path, config: TrainConfig, arrays: str = '') -> None:
  """Deletes the saved state of a run whose result is stored, but for those that were to stay."""
  every, place = config.keep_states_every, _states(directory, arrays)
  if not primary():
    return
  there = places.folders(place)
  stay = {name for name in there if every and name.isdigit() and int(name) % every == 0}
  for left in [f'{place}/{name}' for name in there - stay] if stay else [place]:
    places.delete(left)


def _states(directory: Path, arrays: str) -> str:
  return f'{arrays or directory}/state'


def _begin(directory: Path, identity: Mapping) -> None:
  path = directory / 'run.json'
  if path.exists():
    states.check_identity(directory, read_json(path), identity)
  else:
    write_json(path, dict(identity))
