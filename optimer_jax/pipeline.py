"""The whole path from one description: import, train, extract, search, merge, evaluate, export.

Each verb is a function of a `Run`. A stage whose result stands in the run directory, made with
the same settings, is not done again; one that was interrupted goes on where it was.
"""

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from optimer_jax.checkpoints import base as bases
from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.names import contracted_axes
from optimer_jax.data.mixtures import mixture
from optimer_jax.data.rows import packed_rows
from optimer_jax.data.tokenizer import Tokenizer, choose_kept, write_tiny_tokenizer
from optimer_jax.errors import UserError
from optimer_jax.evaluate import evaluate
from optimer_jax.files import read_json, write_json, write_text
from optimer_jax.merging.streamed import difference, merge_streamed
from optimer_jax.merging.weighted_sum import ALL
from optimer_jax.parallel.processes import alone, in_turn
from optimer_jax.parallel.startup import on_host
from optimer_jax.progress import say
from optimer_jax.report.page import write_report
from optimer_jax.report.style import png
from optimer_jax.report.vector_plots import vector_figures
from optimer_jax.run import (
  Run,
  best_of,
  engine_of,
  pool_of,
  prepare,
  stage,
  tasks_of,
  text_task,
  vector_fingerprints,
)
from optimer_jax.search.evaluation import evaluation
from optimer_jax.search.loop import run_study
from optimer_jax.search.samplers import check_sampler
from optimer_jax.search.study import Study
from optimer_jax.search.together import led
from optimer_jax.search.workers import work
from optimer_jax.training.train import TrainConfig, finish, settings_of, train
from optimer_jax.vectors import lora
from optimer_jax.vectors.extract import check_parent, extract, origin
from optimer_jax.vectors.geometry import geometry
from optimer_jax.vectors.pool import open_pool
from optimer_jax.vectors.trajectory import trajectory


def pipeline(run: Run) -> None:
  """Import, one CPT run for each data set, vectors, search, merge, test, export, report."""
  for study in (run.study, *(run.baselines.searches if run.baselines else ())):
    check_sampler(study.sampler)
  say(
    f'OptiMer on {", ".join(run.names)} in {run.directory}: import {run.base}, train once on '
    f'each of {len(run.names)} data sets, extract the vectors, search their weights in '
    f'{run.study.trials} evaluations, merge, test, export, report.'
  )
  if run.expect:
    say(run.expect)
  if there := sorted(
    str(p.parent.relative_to(run.path))
    for p in run.path.glob('*/**/manifest.json')
    if not p.parent.name.startswith('.')
  ):
    say(f'There already, and not done again: {", ".join(there)}.')
  import_base(run)
  for name in run.names:
    train_one(run, name)
  extract_all(run)
  search(run)
  merge(run)
  export(run)
  evaluate(run)
  if run.baselines:
    from optimer_jax.baselines import baselines  # It is made of the verbs below.

    baselines(run)
  report(run)


def import_base(run: Run) -> store.Manifest:
  """Reads the base model into RUN/base, with a trimmed vocabulary if the run asks for one."""
  _import_base(run)
  return store.read_manifest(run.path / 'base', 'base')


@alone
def _import_base(run: Run) -> None:
  path = run.path / 'base'
  read = (*run.datasets, *run.watched)
  settings = {'source': run.base, 'trim_vocabulary': run.trim_vocabulary}
  # Those of held-out text too: pieces that are left out are spelt in bytes, which a base has hardly
  # seen, and what training then gains is how to spell.
  splits = itertools.product(read, ('train', 'dev', 'test'))
  texts = {f'{data.name} {split}': getattr(data, split) for data, split in splits}
  if run.trim_vocabulary:
    settings['vocabulary_of'] = [*texts]
  if (path / 'manifest.json').exists():
    _same_settings(path, store.read_manifest(path, 'base').facts['settings'], settings)
    return
  with stage(run, 'import'), tempfile.TemporaryDirectory() as tokenizer_path:
    source = bases.open_source(run.base, run.cache_path)
    tokenizer_path = Path(tokenizer_path)
    if source.write_tokenizer:
      source.write_tokenizer(tokenizer_path)
    else:
      documents = (document.text for dataset in read for document in dataset.train.documents())
      write_tiny_tokenizer(tokenizer_path, documents, source.config.vocab_size)
    kept = None
    if run.trim_vocabulary:
      kept = choose_kept(Tokenizer.load(tokenizer_path), texts.values())
    manifest = bases.import_base(source, path, tokenizer_path, kept, settings, run.arrays_of(path))
  for note in manifest.facts['notes']:
    say(f'base: {note}')
  _keep_gin(run)


def train_one(run: Run, name: str) -> store.Manifest:
  """Trains the base on one data set into RUN/cpt/NAME."""
  return _train(run, run.path / 'cpt' / name, {name: 1.0}, run.training, {'dataset': name})


def train_mixture(
  run: Run, name: str, ratios: Mapping[str, float], training: TrainConfig, start: str | None = None
) -> store.Manifest:
  """Trains the base, or RUN/merged/START, on a mixture of the data sets into RUN/mixed/NAME."""
  made = {'ratios': ', '.join(f'{key} {ratio!r}' for key, ratio in ratios.items())}
  first = run.path / 'base'
  if start:
    first = run.path / 'merged' / start
    made['start'] = store.read_manifest(first, 'merged').fingerprint
  return _train(run, run.path / 'mixed' / name, ratios, training, made, first)


def _train(
  run: Run,
  path: Path,
  ratios: Mapping[str, float],
  training: TrainConfig,
  made: Mapping[str, str],
  first: Path | None = None,
) -> store.Manifest:
  """Trains into `path`; `made` says of what, and `first` where the parameters begin."""
  name, kind = path.name, path.parent.name
  used = {key: run.dataset(key) for key, ratio in ratios.items() if ratio > 0}
  base_manifest = import_base(run)
  identity = {'base': base_manifest.fingerprint, **made, 'length': run.length}
  settings = {**settings_of(training), **identity}
  if (path / 'manifest.json').exists():
    manifest = store.read_manifest(path, 'cpt')
    _same_settings(path, manifest.facts['settings'], settings)
    return manifest
  work = run.path / 'training' / (name if kind == 'cpt' else f'{kind}-{name}')
  with stage(run, f'{"train" if kind == "cpt" else kind}/{name}') as cost:
    engine = engine_of(run)
    model = engine.model
    rows = in_turn(
      lambda: {
        key: packed_rows(each.train, engine.tokenizer, run.length, run.cache_path / 'rows')
        for key, each in used.items()
      }
    )
    digest = '+'.join(each.digest for each in rows.values())
    dev = in_turn(lambda: [text_task(run, d, 'dev').prepare(engine, 'dev') for d in used.values()])

    def held_out(params: dict) -> dict[str, float]:
      return {'dev_bits_per_byte': statistics.fmean(task.score(params).value for task in dev)}

    def keep(step: int, leaves: dict) -> None:
      snapshot = run.path / 'snapshots' / name / str(step)
      store.save(
        snapshot,
        'cpt',
        model.config,
        leaves,
        parents={'base': base_manifest.fingerprint},
        facts={**made, 'settings': settings},
        arrays=run.arrays_of(snapshot),
      )

    leaves = train(
      training,
      model,
      lambda: store.values(store.open_leaves(first or run.path / 'base')[1]),
      mixture(rows, {key: ratios[key] for key in used}, training.seed),
      work,
      name=name,
      identity={**identity, 'data': digest},
      mesh=run.mesh,
      spent=cost,
      evaluate=held_out,
      keep=keep,
      arrays=run.arrays_of(work),
    )
    manifest = store.save(
      path,
      'cpt',
      model.config,
      leaves,
      parents={'base': base_manifest.fingerprint},
      facts={
        **made,
        'settings': settings,
        'data': digest,
        'tokens': training.steps * training.batch * run.length,
        'seed': training.seed,
        'gin': run.gin,
      },
      add_files=lambda new: write_text(
        new / 'metrics.jsonl', (work / 'metrics.jsonl').read_text(encoding='utf-8')
      ),
      arrays=run.arrays_of(path),
    )
    finish(work, training, run.arrays_of(work))
  return manifest


@alone
def extract_all(run: Run) -> None:
  """Writes RUN/vectors/NAME for each CPT model and each model of `Run.vectors`; inspects them."""
  extract_each(run)
  seen = run.path / 'vectors' / 'geometry.json'
  if not seen.exists() or read_json(seen).get('vectors') != vector_fingerprints(run):
    inspect(run)


def extract_each(run: Run) -> None:
  """`extract_all` without a look at them, for one process."""
  vectors, base = run.path / 'vectors', run.path / 'base'
  base_manifest = store.read_manifest(base, 'base')
  cpt = {name: run.path / 'cpt' / name for name in run.names}
  for path in cpt.values():
    store.read_manifest(path, 'cpt')
  for name, model in {**cpt, **run.vectors}.items():
    path = vectors / name
    made = {'origin': origin(model), 'dtype': run.vector_dtype}
    if (path / 'manifest.json').exists():
      old = store.read_manifest(path, 'vector')
      if made.items() <= old.facts.items() and old.parents['base'] == base_manifest.fingerprint:
        continue
    with stage(run, f'extract/{name}') as cost, on_host():
      cost['flops'] = base_manifest.model.num_params
      arrays = run.arrays_of(path)
      extract(base, model, path, name, run.vector_dtype, run.cache_path, arrays)


@alone
def inspect(run: Run) -> dict:
  """What the vectors look like and how straight training was, into RUN/vectors: JSON and PNG."""
  directory = run.path / 'vectors'
  with stage(run, 'inspect') as cost, on_host():
    pool = open_pool(run.path / 'base', run.vector_paths)
    pairs, size = len(pool.vectors) * (len(pool.vectors) + 1) // 2, pool.manifests['base'].model
    cost['flops'] = 2 * pairs * size.num_params
    found = geometry(pool.base, pool.vectors)
    ways = {name: _trajectory(run, name) for name in run.names}
    ways = {name: way for name, way in ways.items() if way}
    for name, figure in vector_figures(found, ways).items():
      (directory / f'{name}.png').write_bytes(png(figure))
    if ways:
      write_json(directory / 'trajectory.json', ways)
    else:
      (directory / 'trajectory.json').unlink(missing_ok=True)
    write_json(directory / 'geometry.json', {**found, 'vectors': vector_fingerprints(run)})
  return found


def _trajectory(run: Run, name: str) -> dict | None:
  """The way from the base through the kept checkpoints to the CPT model, if any were kept."""
  base = store.open_leaves(run.path / 'base', 'base')[1]
  end, last = store.open_leaves(run.path / 'cpt' / name, 'cpt')
  kept = [(step, store.open_leaves(path, 'cpt')[1]) for step, path in kept_of(run, name)]
  if not kept:
    return None
  return trajectory([(0, base), *kept, (end.facts['settings']['steps'], last)])


def kept_of(run: Run, name: str) -> list[tuple[int, Path]]:
  """The steps and checkpoints that the CPT run kept on its way; none of an earlier run."""
  settings = store.read_manifest(run.path / 'cpt' / name, 'cpt').facts['settings']
  paths = (run.path / 'snapshots' / name).glob('[0-9]*')
  return sorted(
    (int(path.name), path)
    for path in paths
    if store.read_manifest(path, 'cpt').facts['settings'] == settings
  )


def search(run: Run, worker: str = '', server: str | None = None) -> dict:
  """Searches the merge weights on the tasks' dev split; RUN/studies/NAME keeps every trial.

  With a name, as one of several workers around `optimer serve`.
  """
  studies, config, vectors = run.path / 'studies', run.study, [*run.vector_paths]
  linear = config.sampler == 'gradient' or config.groups != ALL
  run.merging.check_searchable(len(vectors), config.density, linear)
  with stage(run, f'search/{config.name}', worker) as cost:
    engine = engine_of(run)
    pool = pool_of(run, engine, gradients=config.sampler == 'gradient')
    tasks = prepare(tasks_of(run, 'dev'), engine, 'dev')
    study = Study(
      config,
      config.groups.weights(vectors, pool.model.config),
      {name: task.digest for name, task in tasks.items()},
      pool.fingerprint,
      run.merging.identity(searched=bool(config.density)),
    )
    evaluate = evaluation(study, pool, run.merging, tasks, run.length, cost)
    others = [path for path in studies.glob('*/trials.jsonl') if path.parent.name != config.name]

    def lead(evaluate: Callable) -> dict:
      def where_models_are(*args, **kwargs) -> dict:
        with jax.default_device(None):
          return evaluate(*args, **kwargs)

      with on_host():
        if worker:
          return work(studies / config.name, study, where_models_are, others, worker, server)
        return run_study(studies / config.name, study, where_models_are, others)

    return led(lead, evaluate)


@alone
def merge(run: Run, weights: Mapping[str, float] | None = None, name: str = 'optimer') -> Path:
  """Writes RUN/merged/NAME with the weights given, or those that the study chose.

  Leaves are merged one after another, large ones by rows: neither base nor vectors need fit into
  memory.
  """
  path, merging = run.path / 'merged' / name, run.merging
  if weights is None:
    best = best_of(run)
    weights, merging = best['weights'], merging.at(best.get('numbers', {}))
  paths = run.vector_paths
  names, groups = {vector: (vector,) for vector in paths}, run.study.groups
  if groups != ALL:
    names = groups.weights([*paths], store.read_manifest(run.path / 'base', 'base').model)
  if set(weights) == set(paths):  # One weight for all of a vector, whatever the study had.
    weights = {name: weights[vector] for vector, each in names.items() for name in each}
  if set(weights) != {name for each in names.values() for name in each}:
    raise UserError(f'give one weight for each of {", ".join(paths)}, not {dict(weights)}')
  vectors = vector_fingerprints(run)
  facts = {
    'weights': dict(weights),
    'vectors': vectors,
    'merging': dataclasses.asdict(merging),
  }
  if (path / 'manifest.json').exists():
    old = store.read_manifest(path, 'merged').facts
    if all(old.get(key) == value for key, value in facts.items()):
      return path
  with stage(run, f'merge/{name}') as cost, on_host():
    pool = open_pool(run.path / 'base', paths)
    base = pool.manifests['base']
    cost['flops'] = 2 * len(paths) * base.model.num_params  # of the sum, whatever the method
    plans = {
      group: (merging.kind, merging.numbers([weights[each[i]] for each in names.values()]))
      for i, group in enumerate(groups.names(base.model))
    }
    rows = merge_streamed(
      lambda leaf: plans[groups.of(leaf, base.model.num_layers)],
      pool.base,
      [*pool.vectors.values()],
      dtypes={leaf: entry['dtype'] for leaf, entry in base.leaves.items()},
      splits={leaf: contracted_axes(leaf) for leaf in pool.base},
      seed=merging.seed,
    )
    store.save(
      path,
      'merged',
      base.model,
      rows,
      parents={'base': base.fingerprint},
      facts={**facts, 'gin': run.gin},
      arrays=run.arrays_of(path),
    )
  return path


@alone
def export(run: Run, name: str = 'optimer') -> Path:
  """Writes RUN/merged/NAME in Hugging Face's layout to RUN/export/NAME."""
  out = run.path / 'export' / name
  manifest = store.read_manifest(run.path / 'merged' / name, 'merged')
  made = (out / 'README.md').read_text(encoding='utf-8') if (out / 'README.md').exists() else ''
  if f'{manifest.fingerprint}, written in {run.export_dtype or "the dtype of"}' in made:
    return out
  with stage(run, f'export/{name}'):
    bases.export(run.path / 'merged' / name, run.path / 'base', out, run.export_dtype)
  return out


@alone
def export_lora(run: Run, rank: int, name: str = 'optimer', vector: str | None = None) -> dict:
  """Writes what RUN/merged/NAME (or a vector) adds to the base as a LoRA adapter of a rank.

  RUN/export/NAME-lora-RANK; returns what its reconstruction.json says of the error.
  """
  base = run.path / 'base'
  manifest, root = store.open_leaves(base, 'base')
  if vector is None:
    merged_manifest, merged = store.open_leaves(run.path / 'merged' / name, 'merged')
    check_parent(merged_manifest, manifest.fingerprint, run.path / 'merged' / name, base)
    leaves = {leaf: difference(tensor, root[leaf]) for leaf, tensor in merged.items()}
  elif vector in run.vector_paths:
    leaves = open_pool(base, {vector: run.vector_paths[vector]}).vectors[vector]
  else:
    raise UserError(f'there is no vector {vector!r}: there are {", ".join(run.vector_paths)}')
  out = run.path / 'export' / f'{vector or name}-lora-{rank}'
  with stage(run, f'export/{out.name}'):
    facts = manifest.facts
    return lora.export_lora(leaves, out, rank, facts['source'], facts['prefix'])


@alone
def report(run: Run) -> Path:
  """Writes RUN/report/index.html from what the run directory holds."""
  if (run.path / 'base').exists():
    _keep_gin(run)
  page = write_report(run.path)
  say(f'report: {page}')
  return page


def _keep_gin(run: Run) -> None:
  if run.gin:
    write_text(run.path / 'operative.gin', run.gin)


def _same_settings(path: Path, old: Mapping, new: Mapping) -> None:
  changed = sorted(key for key in {**old, **new} if old.get(key) != new.get(key))
  if changed:
    raise UserError(
      f'{path} was made with {changed[0]} = {old.get(changed[0])}, not {new.get(changed[0])}: '
      'give the same settings, or delete it to make it again'
    )
