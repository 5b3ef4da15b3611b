"""`optimer VERB`: the verbs of one run, described by gin files and bindings."""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator

from optimer_jax import __version__
from optimer_jax.errors import Preempted, UsageError, UserError
from optimer_jax.progress import say

VERBS = {
  'pipeline': """The whole path: import, train, extract, search, merge, export, evaluate, report.

Reads the gin file's base model and data sets. Writes everything into the run directory. Costs the
sum of the verbs below; started again, it goes on where it was.""",
  'import': """Reads the base model into RUN/base.

Reads a Hugging Face directory or hub id, a GGUF file or a package that carries one. Writes named
leaves with digests, config.json and the tokenizer. Costs minutes at most, and one copy of the model
in memory and on disk.""",
  'train': """Continual pre-training of the base on each data set (or --dataset NAME), alone.

Reads RUN/base and the training text. Writes RUN/cpt/NAME, and metrics and states to
RUN/training/NAME while it runs. Costs steps x batch x length tokens for each data set, which is
where the time goes; it saves its state on the way and resumes from it.""",
  'extract': """Takes each CPT model's distribution vector: trained minus base.

Reads RUN/base and RUN/cpt, and the models named in Run.vectors: fine-tunes of the same base in
Hugging Face's layout, PEFT LoRA adapters. Writes RUN/vectors/NAME, as float32, bfloat16 or int8
(Run.vector_dtype), and the pool's geometry. Costs seconds, and the memory of a few blocks of
rows.""",
  'inspect': """What the vectors look like: norms, angles, signs, ranks, straightness of training.

Reads RUN/base, RUN/vectors and the checkpoints that training kept (TrainConfig.keep_every). Writes
RUN/vectors/geometry.json, trajectory.json and pictures, and prints norms and cosines. Costs seconds
for a small model, and the memory of a few blocks of rows.""",
  'search': """Searches the merge weights with Vizier's GP bandit.

Reads RUN/base, RUN/vectors and the development text. Writes RUN/studies/NAME: every trial in
trials.jsonl, the answer in best.json. Costs one evaluation of the development rows a trial;
evaluated trials are never evaluated again. With --worker NAME, is one of any number of workers that
share the run directory and the trials of an optimer serve; a worker that died goes on under its
name, or another takes its trial over.""",
  'serve': """Hands out a study's trials to workers (optimer search --worker NAME).

Reads the gin file that the workers have, too. Writes RUN/studies/NAME/study.db and, with where it
listens, server.json; runs until it is interrupted, and goes on where it was when it is started
again. Whoever reaches its port can write to the study: --host is for networks that are trusted.
Costs a second a suggestion.""",
  'merge': """Writes base + sum of w x vector as a model, or merges by another method.

Reads RUN/base, RUN/vectors and the study's answer, or --weights ja=0.3,zh=0.2, and --method and
--density (other numbers: --gin.MergeConfig.NAME=VALUE). Writes RUN/merged/NAME.
With --mergekit FILE --out DIR instead of a gin file, merges Hugging Face checkpoints as a mergekit
YAML file says, into DIR. Costs seconds a billion parameters, and the memory of a few blocks of
rows: models may be larger than it.""",
  'export': """Writes a merged model as a Hugging Face checkpoint, or as a LoRA adapter.

Reads RUN/merged/NAME and RUN/base. Writes RUN/export/NAME: safetensors, config.json, tokenizer and
a model card. With --lora RANK, writes what it adds to the base (or --vector NAME, a vector) as a
PEFT adapter to RUN/export/NAME-lora-RANK, and what the rank loses to reconstruction.json. Costs
seconds (a LoRA: minutes for large models) and the size of the model.""",
  'evaluate': """Scores models on the tasks' test split, which training and search have not seen.

Reads the test text and tasks, and base, CPT models, their average, OptiMer and its export; or the
models given with --model: those names (base, cpt-ja, average, optimer, exported), weights of the
vectors (ja=0.5 or ja=0.3,zh=0.2), an artifact (cpt/ja, merged/mine, or its path), or a Hugging Face
directory or hub id, a GGUF. --tasks adds tasks: NAME of gin/tasks/NAME.gin, or of one of
lm-evaluation-harness (--gin.HarnessTask.include="'DIR'" for task files of your own). Without a gin
file, scores one model of others, given with --model, in runs/MODEL. Writes RUN/evaluations: scores,
each example's score, how often test was looked at; what was scored before is not scored again.
--compare A B scores both and tests their difference in pairs. Costs one evaluation of the test data
for each model.""",
  'baselines': """Trains, tunes and searches what Run.baselines says OptiMer is compared with.

Reads the finished run. Writes RUN/mixed (models of data mixtures), RUN/tuned (what was tried of
other merges), RUN/merged, RUN/studies, RUN/evaluations and RUN/baselines.json. Costs as much as all
CPT runs together for each mixture, and an evaluation of the development rows for each candidate;
what stands there is not done again.""",
  'plan': """Whether a model fits TPU slices, and how fast it can be there at best; needs no TPU.

Reads no run: the model is one of Gemma 3's sizes, and a gin file, if given, says mesh, batch,
length, training settings and dtype. Compiles each stage for each slice with libtpu (the extra
`tpu`) and prints HBM a chip and bounds from the chips' peaks, which no program exceeds and a real
one does not reach. 2xv5e:16x16 are two slices, with `data` between them. --find-smallest tries
slice after slice, smallest first. --shardings compiles nothing: it prints how the mesh splits each
parameter, and why it does not. Writes nothing. Costs seconds for small models and minutes for 27B,
a stage and slice, and up to 3 GB of memory.""",
  'report': """Draws what the run directory holds as one HTML page.

Writes RUN/report/index.html and the pictures beside it. Costs seconds.""",
}

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: to be started again


def main(arguments: list[str] | None = None) -> None:
  """Runs a verb and exits: 0 done, 1 failed, 2 usage, 75 stopped by SIGTERM and saved."""
  arguments = sys.argv[1:] if arguments is None else arguments
  options, extra = _parser().parse_known_args(arguments)
  bindings = list(options.gin_bindings)
  try:
    for argument in extra:
      if not argument.startswith('--gin.') or '=' not in argument:
        raise UsageError(f'{argument} is not an option of optimer {options.verb}: see --help')
      bindings.append(argument.removeprefix('--gin.'))
    with _stoppable(options.verb):
      _run(options, bindings)
  except UserError as error:
    if options.debug:
      raise
    print(f'optimer {options.verb}: {error}', file=sys.stderr)
    sys.exit(2 if isinstance(error, UsageError) else 1)
  except Preempted as error:
    say(f'optimer {options.verb}: {error}; the same command goes on from here')
    sys.exit(STOPPED)
  except KeyboardInterrupt:
    print(f'optimer {options.verb}: stopped; the same command goes on from here', file=sys.stderr)
    sys.exit(1)
  except Exception as error:
    if options.debug:
      raise
    text = str(error).strip().splitlines()
    print(
      f'optimer {options.verb}: {type(error).__name__}: {text[0] if text else "no message"} '
      '(--debug shows where)',
      file=sys.stderr,
    )
    sys.exit(1)


@contextlib.contextmanager
def _stoppable(verb: str) -> Iterator[None]:
  """Inside, SIGTERM ends the process at once with STOPPED.

  The first process of a container would ignore it otherwise. Training, which saves its state first,
  has a handler of its own.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(*_):
    os.write(2, f'optimer {verb}: stopped; the same command goes on from here\n'.encode())
    os._exit(STOPPED)

  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='optimer',
    description='OptiMer: train once per data set, then search the weights of the vectors.',
  )
  parser.add_argument('--version', action='version', version=__version__)
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
  for verb, text in VERBS.items():
    sub = verbs.add_parser(
      verb,
      help=text.splitlines()[0],
      description=text,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      epilog='A gin file is found by its name, as in runs/quickstart.gin, from any folder.\n'
      'Any binding can be given as --gin.NAME=VALUE, as in --gin.TrainConfig.steps=100.',
    )
    sub.add_argument(
      '--gin_file', action='append', default=[], metavar='FILE', help='may be repeated'
    )
    sub.add_argument(
      '--gin_bindings', action='append', default=[], metavar="'A.b = …'", help='may be repeated'
    )
    sub.add_argument('--debug', action='store_true', help='show a traceback when it fails')
    if verb == 'evaluate':
      sub.add_argument('--model', action='append', default=[], metavar='M', help='may be repeated')
      sub.add_argument('--tasks', default='', metavar='NAME,…', help='score these too')
      sub.add_argument('--compare', nargs=2, metavar=('A', 'B'), help='two models, in pairs')
    if verb == 'train':
      sub.add_argument('--dataset', metavar='NAME', help='train on this data set only')
    if verb == 'merge':
      sub.add_argument('--weights', metavar='NAME=W,…', help="default: the study's answer")
      sub.add_argument('--method', metavar='M', help='ties, dare_linear …; default: as in gin')
      sub.add_argument('--density', type=float, metavar='D', help='share of each vector to keep')
      sub.add_argument(
        '--mergekit', metavar='FILE', help='a mergekit YAML file, without a gin file'
      )
      sub.add_argument('--out', metavar='DIR', help='with --mergekit: the directory to write')
    if verb == 'search':
      sub.add_argument('--worker', default='', metavar='NAME', help='work with others')
      sub.add_argument('--server', metavar='HOST:PORT', help='default: as in server.json')
    if verb == 'serve':
      sub.add_argument('--host', default='127.0.0.1', help='where to listen, as workers call it')
      sub.add_argument('--port', type=int, metavar='N', help='default: as before, or any')
    if verb == 'plan':
      sub.add_argument('--model', required=True, metavar='SIZE', help='as in 27b')
      sub.add_argument(
        '--topology',
        action='append',
        default=[],
        metavar='SLICE',
        help='as in v5e:16x16 or 2xv5e:16x16; repeats',
      )
      sub.add_argument(
        '--stage', action='append', default=[], help='train, extract, merge, evaluate; default: all'
      )
      sub.add_argument('--batch', type=int, metavar='B', help='rows over the whole slice')
      sub.add_argument('--length', type=int, metavar='T', help='tokens of a row')
      sub.add_argument('--mesh', metavar='AXIS=N,…', help='as in fsdp=-1,tensor=4')
      sub.add_argument('--vectors', type=int, metavar='K', help='of merge and evaluate')
      sub.add_argument('--pool', metavar='PLACE', help='of the vectors: device, scan or host')
      sub.add_argument(
        '--find-smallest', action='store_true', help='--topology is then a kind of chip, as in v5e'
      )
      sub.add_argument(
        '--shardings', action='store_true', help='print how the mesh splits each parameter'
      )
    if verb in ('merge', 'export'):
      sub.add_argument('--name', default='optimer', help='of the merged model')
    if verb == 'export':
      sub.add_argument('--lora', type=int, metavar='RANK', help='write a LoRA adapter of this rank')
      sub.add_argument('--vector', metavar='NAME', help='with --lora: of this vector')
  return parser


def _run(options: argparse.Namespace, bindings: list[str]) -> None:
  # Imported late: --help and usage errors need no accelerator.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  if options.verb == 'merge' and options.mergekit:
    _merge_files(options, bindings)
    return
  if options.verb == 'evaluate':
    _evaluate(options, bindings)
    return
  if options.verb == 'plan':
    _plan(options, bindings)
    return
  if not options.gin_file:
    raise UsageError('give a run with --gin_file, as in --gin_file=runs/quickstart.gin')
  from optimer_jax import baselines, configs, pipeline
  from optimer_jax.parallel.startup import start
  from optimer_jax.search.serve import serve

  run = configs.read_run(options.gin_file, bindings)
  start(run.cache_path)
  verb = options.verb
  if verb == 'train':
    for name in [options.dataset] if options.dataset else run.names:
      pipeline.train_one(run, name)
  elif verb == 'search':
    if options.server and not options.worker:
      raise UsageError('--server goes with --worker NAME')
    pipeline.search(run, options.worker, options.server)
  elif verb == 'serve':
    serve(run.path / 'studies' / run.study.name, run.study, options.host, options.port)
  elif verb == 'inspect':
    _print_geometry(pipeline.inspect(run))
  elif verb == 'merge':
    changed = {key: getattr(options, key) for key in ('method', 'density')}
    changed = {key: value for key, value in changed.items() if value is not None}
    if options.out or (changed and not options.weights):
      raise UsageError('--out goes with --mergekit, and --method and --density with --weights')
    run = dataclasses.replace(run, merging=dataclasses.replace(run.merging, **changed))
    print(pipeline.merge(run, _weights(options.weights), options.name))
  elif verb == 'export' and options.lora is not None:
    _print_lora(pipeline.export_lora(run, options.lora, options.name, options.vector))
  elif verb == 'export':
    if options.vector:
      raise UsageError('a vector is exported as a LoRA: add --lora RANK')
    print(pipeline.export(run, options.name))
  else:
    {
      'pipeline': pipeline.pipeline,
      'import': pipeline.import_base,
      'extract': pipeline.extract_all,
      'baselines': baselines.baselines,
      'report': pipeline.report,
    }[verb](run)


def _merge_files(options: argparse.Namespace, bindings: list[str]) -> None:
  from optimer_jax.data.sources import default_cache
  from optimer_jax.merging.huggingface import merge_checkpoints
  from optimer_jax.merging.mergekit_yaml import read_mergekit
  from optimer_jax.parallel.startup import start

  others = [getattr(options, name) for name in ('gin_file', 'weights', 'method', 'density')]
  if not options.out or any([*others, bindings]):
    raise UsageError('--mergekit takes --out DIR, and nothing else but --debug')
  start(default_cache())
  merge_checkpoints(read_mergekit(options.mergekit), options.out, default_cache())
  print(options.out)


def _evaluate(options: argparse.Namespace, bindings: list[str]) -> None:
  from optimer_jax import configs
  from optimer_jax.evaluate import compare, evaluate, looks, name_of
  from optimer_jax.parallel.startup import start
  from optimer_jax.run import counted, tasks_of

  models = [*options.model, *(m for m in options.compare or () if m not in options.model)]
  tasks = [name for name in options.tasks.split(',') if name]
  if not options.gin_file:
    if len(models) != 1:
      raise UsageError('give a run with --gin_file, or the one --model to score without a run')
    alone = {'directory': f'runs/{name_of(models[0])}', 'base': models[0], 'datasets': ()}
    bindings = [*(f'run.Run.{key} = {value!r}' for key, value in alone.items()), *bindings]
  run = configs.read_run(options.gin_file, bindings, tasks)
  start(run.cache_path)
  _print_scores(evaluate(run, models), looks(run))
  if options.compare:
    searched = counted(run, tasks_of(run, 'test'))
    _print_comparison(compare(run, *map(name_of, options.compare), searched))
  print(run.path / 'evaluations')


def _plan(options: argparse.Namespace, bindings: list[str]) -> None:
  from optimer_jax.parallel.sharding import MeshConfig
  from optimer_jax.planning import topologies

  topologies.prepare()
  settings = {}
  if options.gin_file:
    from optimer_jax import configs
    from optimer_jax.run import planned

    run = configs.read_run(options.gin_file, bindings)
    settings = {**planned(run), 'batch': run.training.batch}
  elif bindings:
    raise UsageError('bindings change what a gin file says: give one with --gin_file')
  if options.mesh:
    try:
      sizes = {axis: int(n) for axis, n in (part.split('=') for part in options.mesh.split(','))}
      settings['mesh'] = MeshConfig(**{'data': 1, **sizes})
    except (ValueError, TypeError):
      raise UsageError(
        f'--mesh {options.mesh!r} cannot be read: write it as in data=1,fsdp=-1,tensor=4'
      ) from None
  if options.shardings:
    from optimer_jax.planning.placement import print_placements

    if 'mesh' not in settings or options.find_smallest:
      raise UsageError('--shardings goes with a mesh, as in --mesh=fsdp=-1,tensor=4, and a slice')
    print_placements(
      options.model, settings['mesh'], [topologies.topology(name) for name in options.topology]
    )
    return
  from optimer_jax.planning.plan import print_plans

  for key in ('batch', 'length', 'vectors', 'pool'):
    if getattr(options, key) is not None:
      settings[key] = getattr(options, key)
  print_plans(options.model, options.stage, options.topology, options.find_smallest, **settings)


def _weights(text: str | None) -> dict[str, float] | None:
  if text is None:
    return None
  try:
    return {name: float(w) for name, w in (part.split('=') for part in text.split(','))}
  except ValueError:
    raise UsageError(f'--weights {text!r} cannot be read: write it as in ja=0.3,zh=0.2') from None


def _print_geometry(found: dict) -> None:
  names = found['datasets']
  head = ''.join(f'{f"cos {name}":>12}' for name in names)
  print(f'{"":12}{"norm":>10}{"relative":>10}{"embedding":>10}{head}')
  for name, row in zip(names, found['cosine'], strict=True):
    cosines = ''.join(f'{value:12.3f}' for value in row)
    norms = f'{found["norm"][name]:10.3f}{found["relative_norm"][name]:10.5f}'
    print(f'{name:12}{norms}{found["embedding_share"][name]:10.1%}{cosines}')
  if found['sign_unanimous'] is not None:
    print(
      f'all nonzero signs agree in {found["sign_unanimous"]:.1%} of the elements; '
      f'{found["sign_elected"]:.1%} of the magnitude has the sign of the sum'
    )


def _print_lora(found: dict) -> None:
  print(f'{"lost, relative to the norm":28}{"norm":>10}{"error":>10}')
  for module, row in found['modules'].items():
    print(f'{module:28}{row["norm"]:10.4f}{row["error"]:10.4f}')
  print(f'{"what has factors":38}{found["error_of_adapted"]:10.4f}')
  print(f'{"everything":38}{found["error"]:10.4f}')


def _print_scores(results: dict, looks: dict[str, int]) -> None:
  from optimer_jax.evaluation.scores import shown

  first = next(iter(results.values()))
  width = max(map(len, results)) + 2
  for task, score in first['scores'].items():
    models = f'{looks[task]} model{"s" * (looks[task] > 1)}'
    print(f'{task}: {score["count"]} test examples, which {models} were scored on so far')
    for name, found in results.items():
      if summary := found['scores'].get(task):
        cut = f', {summary["truncated"]} prompts truncated' if summary['truncated'] else ''
        print(f'  {name:{width}}{shown(summary)}{cut}')
  if len(first['scores']) > 1:
    print('mean loss (bits per byte, 1 - accuracy) over the tasks that are searched')
    for name, found in results.items():
      mean = 'not finite' if found['mean'] is None else f'{found["mean"]:.4f}'
      print(f'  {name:{width}}{mean}')


def _print_comparison(found: dict) -> None:
  print(f'{found["a"]} - {found["b"]}, losses: below 0, {found["a"]} is better')
  for task, row in [*found['per_task'].items(), ('mean', found)]:
    print(f'  {task:20}{row["difference"]:+.4f} ± {row["stderr"]:.4f}  p = {row["p"]:.4f}')
