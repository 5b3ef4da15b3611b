"""`optimer VERB`: the verbs of one run, described by gin files and bindings."""

import argparse
import os
import sys

from optimer_jax import __version__
from optimer_jax.errors import UsageError, UserError

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

Reads RUN/base and RUN/cpt. Writes RUN/vectors/NAME and the pool's geometry. Costs seconds.""",
  'inspect': """Norms of the vectors by layer and module, and the cosines between them.

Reads RUN/base and RUN/vectors. Writes RUN/vectors/geometry.json and prints it as a table.
Costs seconds.""",
  'search': """Searches the merge weights with Vizier's GP bandit.

Reads RUN/base, RUN/vectors and the development text. Writes RUN/studies/NAME: every trial in
trials.jsonl, the answer in best.json. Costs one evaluation of the development rows a trial;
evaluated trials are never evaluated again.""",
  'merge': """Writes base + sum of w x vector as a model.

Reads RUN/base, RUN/vectors and the study's answer, or --weights ja=0.3,zh=0.2. Writes
RUN/merged/NAME. Costs seconds.""",
  'export': """Writes a merged model as a Hugging Face checkpoint.

Reads RUN/merged/NAME and RUN/base. Writes RUN/export/NAME: safetensors, config.json, tokenizer and
a model card. Costs seconds and the size of the model.""",
  'evaluate': """Bits per byte of base, CPT models, their average, OptiMer and its export.

Reads the test text, which neither training nor search has seen. Writes RUN/evaluations. Costs one
evaluation of the test rows for each model.""",
  'report': """Draws what the run directory holds as one HTML page.

Writes RUN/report/index.html and the pictures beside it. Costs seconds.""",
}


def main(arguments: list[str] | None = None) -> None:
  """Runs a verb and exits: 0 done, 1 failed, 2 usage."""
  arguments = sys.argv[1:] if arguments is None else arguments
  options, extra = _parser().parse_known_args(arguments)
  bindings = list(options.gin_bindings)
  try:
    for argument in extra:
      if not argument.startswith('--gin.') or '=' not in argument:
        raise UsageError(f'{argument} is not an option of optimer {options.verb}: see --help')
      bindings.append(argument.removeprefix('--gin.'))
    _run(options, bindings)
  except UserError as error:
    if options.debug:
      raise
    print(f'optimer {options.verb}: {error}', file=sys.stderr)
    sys.exit(2 if isinstance(error, UsageError) else 1)
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
      '--gin_file', action='append', required=True, metavar='FILE', help='may be repeated'
    )
    sub.add_argument(
      '--gin_bindings', action='append', default=[], metavar="'A.b = …'", help='may be repeated'
    )
    sub.add_argument('--debug', action='store_true', help='show a traceback when it fails')
    if verb == 'train':
      sub.add_argument('--dataset', metavar='NAME', help='train on this data set only')
    if verb == 'merge':
      sub.add_argument('--weights', metavar='NAME=W,…', help="default: the study's answer")
    if verb in ('merge', 'export'):
      sub.add_argument('--name', default='optimer', help='of the merged model')
  return parser


def _run(options: argparse.Namespace, bindings: list[str]) -> None:
  # Imported late: --help and usage errors need no accelerator.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  from optimer_jax import configs, pipeline
  from optimer_jax.parallel.startup import start

  run = configs.read_run(options.gin_file, bindings)
  start(run.cache_path)
  verb = options.verb
  if verb == 'train':
    for name in [options.dataset] if options.dataset else run.names:
      pipeline.train_one(run, name)
  elif verb == 'inspect':
    _print_geometry(pipeline.inspect(run))
  elif verb == 'merge':
    print(pipeline.merge(run, _weights(options.weights), options.name))
  elif verb == 'export':
    print(pipeline.export(run, options.name))
  elif verb == 'evaluate':
    _print_scores(pipeline.evaluate(run), run.names)
  else:
    {
      'pipeline': pipeline.pipeline,
      'import': pipeline.import_base,
      'extract': pipeline.extract_all,
      'search': pipeline.search,
      'report': pipeline.report,
    }[verb](run)


def _weights(text: str | None) -> dict[str, float] | None:
  if text is None:
    return None
  try:
    return {name: float(w) for name, w in (part.split('=') for part in text.split(','))}
  except ValueError:
    raise UsageError(f'--weights {text!r} cannot be read: write it as in ja=0.3,zh=0.2') from None


def _print_geometry(found: dict) -> None:
  names = found['datasets']
  print(f'{"":12}{"norm":>10}{"relative":>10}' + ''.join(f'{f"cos {n}":>12}' for n in names))
  for name, row in zip(names, found['cosine'], strict=True):
    cosines = ''.join(f'{value:12.3f}' for value in row)
    print(f'{name:12}{found["norm"][name]:10.3f}{found["relative_norm"][name]:10.5f}{cosines}')


def _print_scores(results: dict, names: tuple[str, ...]) -> None:
  print(f'{"bits per byte":16}' + ''.join(f'{name:>10}' for name in (*names, 'mean')))
  for name, found in results.items():
    if name != 'comparisons':
      values = [found['scores'][task]['value'] for task in names] + [found['mean']]
      print(f'{name:16}' + ''.join(f'{value:10.4f}' for value in values))
