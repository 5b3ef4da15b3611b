"""The whole path from one description: import, train, extract, search, merge, evaluate, export.

Each verb is a function of a `Run`. A stage whose result stands in the run directory, made with
the same settings, is not done again; one that was interrupted goes on where it was.
"""

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from optimer_jax.checkpoints import base as bases
from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.names import contracted_axes
from optimer_jax.data.datasets import Dataset
from optimer_jax.data.mixtures import mixture
from optimer_jax.data.rows import Rows, packed_rows, window_rows
from optimer_jax.data.sources import default_cache
from optimer_jax.data.tokenizer import Tokenizer, choose_kept, write_tiny_tokenizer
from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation import bits_per_byte
from optimer_jax.files import read_json, write_json, write_text
from optimer_jax.gemma3 import Model, from_leaves
from optimer_jax.merging.candidates import MergeConfig, candidates
from optimer_jax.merging.streamed import difference, merge_streamed
from optimer_jax.parallel.sharding import MeshConfig
from optimer_jax.parallel.startup import release_memory
from optimer_jax.progress import say
from optimer_jax.report import costs
from optimer_jax.report.page import write_report
from optimer_jax.report.style import png
from optimer_jax.report.vector_plots import vector_figures
from optimer_jax.search.study import StudyConfig, run_study
from optimer_jax.training.train import TrainConfig, finish, settings_of, train
from optimer_jax.vectors import lora
from optimer_jax.vectors.extract import check_parent, extract, origin
from optimer_jax.vectors.geometry import geometry
from optimer_jax.vectors.pool import load_pool, open_pool
from optimer_jax.vectors.trajectory import trajectory


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Bits per byte on held-out rows, one window of one document each."""

  dev_rows: int = 64  # of each data set, for the search
  test_rows: int = 64  # of each data set, for the result
  batch: int = 8  # rows at once
  seed: int = 0  # of the choice of rows


@dataclasses.dataclass(frozen=True)
class Run:
  """One run directory and everything that its results depend on."""

  directory: str
  base: str  # what `checkpoints.base.open_source` takes
  datasets: tuple[Dataset, ...]
  length: int = 1024  # tokens of a row, T
  trim_vocabulary: int = 0  # keep tokens seen this often in the training text; 0 keeps them all
  dtype: str = 'float32'  # of activations and matrix products; bfloat16 on accelerators
  scan: bool | None = None  # scan over layers; default: everywhere but on CPU
  remat: bool = True  # compute a layer again for its gradient, to save memory
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  evaluation: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  study: StudyConfig = dataclasses.field(default_factory=StudyConfig)
  merging: MergeConfig = dataclasses.field(default_factory=MergeConfig)
  vectors: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> model to extract
  vector_dtype: str = 'float32'
  export_dtype: str | None = None  # default: that of the base
  cache: str | None = None  # downloads and packed rows; default: ~/.cache/optimer_jax
  expect: str = ''  # what the pipeline says at its start of time and memory
  gin: str = ''  # the operative gin, kept with the results

  def __post_init__(self):
    for name in self.vectors:
      if name in self.names or name == 'base':
        raise UsageError(f'Run.vectors: the name {name!r} is taken: give the vector another one')

  @property
  def path(self) -> Path:
    return Path(self.directory)

  @property
  def names(self) -> tuple[str, ...]:
    """Of the data sets."""
    return tuple(dataset.name for dataset in self.datasets)

  @property
  def vector_paths(self) -> dict[str, Path]:
    """The pool: the vectors of the data sets, and of models that were trained elsewhere."""
    return {name: self.path / 'vectors' / name for name in (*self.names, *self.vectors)}

  @property
  def cache_path(self) -> Path:
    return Path(self.cache) if self.cache else default_cache()

  def dataset(self, name: str) -> Dataset:
    for dataset in self.datasets:
      if dataset.name == name:
        return dataset
    raise UserError(f'the run has no data set {name!r}; it has {", ".join(self.names)}')


def pipeline(run: Run) -> None:
  """Import, one CPT run for each data set, vectors, search, merge, test, export, report."""
  say(
    f'OptiMer on {", ".join(run.names)} in {run.directory}: import {run.base}, train once on '
    f'each of {len(run.names)} data sets, extract the vectors, search their weights in '
    f'{run.study.trials} evaluations, merge, test, export, report.'
  )
  if run.expect:
    say(run.expect)
  if there := sorted(
    str(p.parent.relative_to(run.path)) for p in run.path.glob('*/**/manifest.json')
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
  report(run)


def import_base(run: Run) -> store.Manifest:
  """Reads the base model into RUN/base, with a trimmed vocabulary if the run asks for one."""
  path = run.path / 'base'
  settings = {'source': run.base, 'trim_vocabulary': run.trim_vocabulary}
  if run.trim_vocabulary:
    settings['vocabulary_of'] = list(run.names)
  if (path / 'manifest.json').exists():
    manifest = store.read_manifest(path, 'base')
    _same_settings(path, manifest.facts['settings'], settings)
    return manifest
  with _stage(run, 'import'), tempfile.TemporaryDirectory() as tokenizer_path:
    source = bases.open_source(run.base, run.cache_path)
    tokenizer_path = Path(tokenizer_path)
    texts = [dataset.train for dataset in run.datasets]
    if source.write_tokenizer:
      source.write_tokenizer(tokenizer_path)
    else:
      documents = (document.text for text in texts for document in text.documents())
      write_tiny_tokenizer(tokenizer_path, documents, source.config.vocab_size)
    kept = None
    if run.trim_vocabulary:
      kept = choose_kept(Tokenizer.load(tokenizer_path), texts, run.trim_vocabulary)
    manifest = bases.import_base(source, path, tokenizer_path, kept, settings)
  for note in manifest.facts['notes']:
    say(f'base: {note}')
  _keep_gin(run)
  return manifest


def train_one(run: Run, name: str) -> store.Manifest:
  """Trains the base on one data set into RUN/cpt/NAME."""
  dataset = run.dataset(name)
  path, work = run.path / 'cpt' / name, run.path / 'training' / name
  base_manifest = import_base(run)
  identity = {'base': base_manifest.fingerprint, 'dataset': name, 'length': run.length}
  settings = {**settings_of(run.training), **identity}
  if (path / 'manifest.json').exists():
    manifest = store.read_manifest(path, 'cpt')
    _same_settings(path, manifest.facts['settings'], settings)
    return manifest
  with _stage(run, f'train/{name}') as cost:
    model, tokenizer = _model(run), _tokenizer(run)
    rows = packed_rows(dataset.train, tokenizer, run.length, _rows_cache(run))
    dev = _held_out(run, tokenizer, dataset, 'dev')

    def held_out(params: dict) -> dict[str, float]:
      found = bits_per_byte.score(model, params, dev, run.evaluation.batch)
      return {'dev_bits_per_byte': found.value}

    def keep(step: int, leaves: dict) -> None:
      parents, facts = {'base': base_manifest.fingerprint}, {'dataset': name, 'settings': settings}
      snapshot = run.path / 'snapshots' / name / str(step)
      store.save(snapshot, 'cpt', model.config, leaves, parents=parents, facts=facts)

    leaves, spent = train(
      run.training,
      model,
      lambda: store.load(run.path / 'base', 'base')[1],
      mixture({name: rows}, {name: 1.0}, run.training.seed),
      work,
      name=name,
      identity={**identity, 'data': rows.digest},
      mesh=run.mesh,
      evaluate=held_out,
      keep=keep,
    )
    cost.update({key: spent[key] for key in ('flops', 'tokens')})
    manifest = store.save(
      path,
      'cpt',
      model.config,
      leaves,
      parents={'base': base_manifest.fingerprint},
      facts={
        'dataset': name,
        'settings': settings,
        'data': rows.digest,
        'tokens': run.training.steps * run.training.batch * run.length,
        'seed': run.training.seed,
        'gin': run.gin,
      },
      add_files=lambda new: write_text(
        new / 'metrics.jsonl', (work / 'metrics.jsonl').read_text(encoding='utf-8')
      ),
    )
    finish(work)
  return manifest


def extract_all(run: Run) -> None:
  """Writes RUN/vectors/NAME for each CPT model and each model of `Run.vectors`; inspects them."""
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
    with _stage(run, f'extract/{name}'):
      extract(base, model, path, name, run.vector_dtype, run.cache_path)
  seen = vectors / 'geometry.json'
  if not seen.exists() or read_json(seen).get('vectors') != _vector_fingerprints(run):
    inspect(run)


def inspect(run: Run) -> dict:
  """What the vectors look like and how straight training was, into RUN/vectors: JSON and PNG."""
  directory = run.path / 'vectors'
  with _stage(run, 'inspect'):
    pool = open_pool(run.path / 'base', run.vector_paths)
    found = geometry(pool.base, pool.vectors)
    ways = {name: _trajectory(run, name) for name in run.names}
    ways = {name: way for name, way in ways.items() if way}
    for name, figure in vector_figures(found, ways).items():
      (directory / f'{name}.png').write_bytes(png(figure))
    if ways:
      write_json(directory / 'trajectory.json', ways)
    else:
      (directory / 'trajectory.json').unlink(missing_ok=True)
    write_json(directory / 'geometry.json', {**found, 'vectors': _vector_fingerprints(run)})
  return found


def _trajectory(run: Run, name: str) -> dict | None:
  """The way from the base through the kept checkpoints to the CPT model, if any were kept."""
  base = store.open_leaves(run.path / 'base', 'base')[1]
  end, last = store.open_leaves(run.path / 'cpt' / name, 'cpt')
  kept = []
  for path in (run.path / 'snapshots' / name).glob('[0-9]*'):
    manifest, leaves = store.open_leaves(path, 'cpt')
    if manifest.facts['settings'] == end.facts['settings']:  # not of an earlier run
      kept.append((int(path.name), leaves))
  if not kept:
    return None
  kept.sort(key=lambda each: each[0])
  return trajectory([(0, base), *kept, (end.facts['settings']['steps'], last)])


def search(run: Run) -> dict:
  """Searches the merge weights on the dev rows; RUN/studies/NAME keeps every trial."""
  directory, names = run.path / 'studies' / run.study.name, [*run.vector_paths]
  run.merging.check_searchable(len(names), run.study.density)
  with _stage(run, f'search/{run.study.name}') as cost:
    pool = load_pool(run.path / 'base', run.vector_paths, _model(run))
    tokenizer = _tokenizer(run)
    rows = {d.name: _held_out(run, tokenizer, d, 'dev') for d in run.datasets}
    candidate, spent = candidates(pool, run.merging), {'flops': 0.0, 'tokens': 0}

    def evaluate(point: Mapping[str, float]) -> dict:
      began = time.monotonic()
      found = _score_all(run, candidate(point), rows)
      flops = _flops(run, rows)
      spent['flops'] += flops
      spent['tokens'] += sum(r.tokens.size for r in rows.values())
      return {
        'scores': {name: s.summary() for name, s in found.items()},
        'seconds': time.monotonic() - began,
        'flops': flops,
      }

    tasks = {name: r.digest for name, r in rows.items()}
    method = run.merging.identity(searched=bool(run.study.density))
    best = run_study(directory, names, evaluate, run.study, pool.fingerprint, tasks, method)
    cost.update(spent)
  return best


def merge(run: Run, weights: Mapping[str, float] | None = None, name: str = 'optimer') -> Path:
  """Writes RUN/merged/NAME with the weights given, or those that the study chose.

  Leaves are merged one after another, large ones by rows: neither base nor vectors need fit into
  memory.
  """
  path, merging = run.path / 'merged' / name, run.merging
  if weights is None:
    best = read_json(run.path / 'studies' / run.study.name / 'best.json')
    weights, merging = best['weights'], merging.at(best.get('numbers', {}))
  paths = run.vector_paths
  if set(weights) != set(paths):
    raise UserError(f'give one weight for each of {", ".join(paths)}, not {dict(weights)}')
  vectors = _vector_fingerprints(run)
  facts = {
    'weights': dict(weights),
    'vectors': vectors,
    'merging': dataclasses.asdict(merging),
  }
  if (path / 'manifest.json').exists():
    old = store.read_manifest(path, 'merged').facts
    if all(old.get(key) == value for key, value in facts.items()):
      return path
  with _stage(run, f'merge/{name}'):
    pool = open_pool(run.path / 'base', paths)
    plan = merging.kind, merging.numbers([weights[each] for each in pool.vectors])
    base = pool.manifests['base']
    rows = merge_streamed(
      lambda leaf: plan,
      pool.base,
      [*pool.vectors.values()],
      dtypes={leaf: entry['dtype'] for leaf, entry in base.leaves.items()},
      splits={leaf: contracted_axes(leaf) for leaf in pool.base},
      seed=merging.seed,
    )
    parents = {'base': base.fingerprint}
    store.save(path, 'merged', base.model, rows, parents=parents, facts={**facts, 'gin': run.gin})
  return path


def export(run: Run, name: str = 'optimer') -> Path:
  """Writes RUN/merged/NAME in Hugging Face's layout to RUN/export/NAME."""
  out = run.path / 'export' / name
  manifest = store.read_manifest(run.path / 'merged' / name, 'merged')
  made = (out / 'README.md').read_text(encoding='utf-8') if (out / 'README.md').exists() else ''
  if f'{manifest.fingerprint}, written in {run.export_dtype or "the dtype of"}' in made:
    return out
  with _stage(run, f'export/{name}'):
    bases.export(run.path / 'merged' / name, run.path / 'base', out, run.export_dtype)
  return out


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
  with _stage(run, f'export/{out.name}'):
    facts = manifest.facts
    return lora.export_lora(leaves, out, rank, facts['source'], facts['prefix'])


def evaluate(run: Run) -> dict[str, dict]:
  """Scores base, CPT models, their average, OptiMer and its export on the test rows.

  RUN/evaluations/NAME.json keeps the score of every example, comparisons.json the paired
  differences.
  """
  directory = run.path / 'evaluations'
  tokenizer = _tokenizer(run)
  rows = {d.name: _held_out(run, tokenizer, d, 'test') for d in run.datasets}
  best = read_json(run.path / 'studies' / run.study.name / 'best.json')
  names = [*run.vector_paths]
  points = {
    'base': dict.fromkeys(names, 0.0),
    **{f'cpt-{n}': {m: float(m == n) for m in names} for n in names},
    'average': dict.fromkeys(names, 1 / len(names)),
  }
  identity = {
    'vectors': _vector_fingerprints(run),
    'rows': {n: r.digest for n, r in rows.items()},
    'export_dtype': run.export_dtype,
  }
  pool = functools.cache(lambda: load_pool(run.path / 'base', run.vector_paths, _model(run)))
  candidate = functools.cache(lambda: candidates(pool()))  # made when it is first needed
  for name, w in points.items():
    _evaluate_once(run, rows, name, w, identity, lambda w=w: candidate()(w))
  candidate.cache_clear()
  merging = run.merging.at(best.get('numbers', {}))
  found = {**identity, 'merging': dataclasses.asdict(merging)}
  chosen = best['weights']
  _evaluate_once(run, rows, 'optimer', chosen, found, lambda: candidates(pool(), merging)(chosen))
  pool.cache_clear()  # so that the pool and the export are not held together
  _evaluate_once(run, rows, 'exported', chosen, found, lambda: _exported(run))
  results = {path.stem: read_json(path) for path in directory.glob('*.json')}
  scores = {
    name: {
      task: bits_per_byte.Score(np.asarray(x['nats']), np.asarray(x['bytes']))
      for task, x in found['per_example'].items()
    }
    for name, found in results.items()
    if name != 'comparisons'
  }
  comparisons = [
    {'a': 'optimer', 'b': other, **bits_per_byte.compare(scores['optimer'], scores[other])}
    for other in ('average', 'base', *(f'cpt-{n}' for n in names), 'exported')
  ]
  write_json(directory / 'comparisons.json', comparisons)
  return results


def report(run: Run) -> Path:
  """Writes RUN/report/index.html from what the run directory holds."""
  if (run.path / 'base').exists():
    _keep_gin(run)
  page = write_report(run.path)
  say(f'report: {page}')
  return page


def _evaluate_once(
  run: Run,
  rows: Mapping[str, Rows],
  name: str,
  weights: Mapping[str, float],
  identity: Mapping,
  params: Callable[[], dict],
) -> None:
  path = run.path / 'evaluations' / f'{name}.json'
  identity = {**identity, 'weights': dict(weights)}
  if path.exists() and read_json(path).get('identity') == identity:
    return
  with _stage(run, f'evaluate/{name}') as cost:
    found = _score_all(run, params(), rows)
    cost.update(flops=_flops(run, rows), tokens=sum(r.tokens.size for r in rows.values()))
  values = [score.value for score in found.values()]
  write_json(
    path,
    {
      'name': name,
      'split': 'test',
      'weights': dict(weights),
      'scores': {task: score.summary() for task, score in found.items()},
      'mean': sum(values) / len(values),
      'per_example': {
        task: {'nats': score.nats.tolist(), 'bytes': score.bytes.tolist()}
        for task, score in found.items()
      },
      'flops': cost['flops'],
      'identity': identity,
    },
  )


def _exported(run: Run) -> dict:
  """The exported checkpoint, read again in the dtype that it was written in."""
  source = bases.open_source(str(run.path / 'export' / 'optimer'), run.cache_path)
  config, leaves = bases.read_leaves(source, bases.kept_vocabulary(run.path / 'base'))
  model = dataclasses.replace(_model(run), config=config)
  return jax.tree.map(jnp.asarray, from_leaves(model, leaves))


@contextlib.contextmanager
def _stage(run: Run, name: str) -> Iterator[dict]:
  """Accounts for a stage, and starts it without the memory that the last one left behind."""
  release_memory()
  with costs.account(run.path, name) as cost:
    yield cost


def _model(run: Run) -> Model:
  config = store.read_manifest(run.path / 'base', 'base').model
  scan = jax.default_backend() != 'cpu' if run.scan is None else run.scan
  return Model(config, dtype=run.dtype, scan=scan, remat=run.remat)


def _tokenizer(run: Run) -> Tokenizer:
  base = run.path / 'base'
  store.sound_file(base, 'tokenizer.json')
  return Tokenizer.load(base, bases.kept_vocabulary(base))


def _held_out(run: Run, tokenizer: Tokenizer, dataset: Dataset, split: str) -> Rows:
  count = run.evaluation.dev_rows if split == 'dev' else run.evaluation.test_rows
  return window_rows(
    getattr(dataset, split),
    tokenizer,
    run.length,
    count,
    run.evaluation.seed,
    _rows_cache(run),
  )


def _rows_cache(run: Run) -> Path:
  return run.cache_path / 'rows'


def _vector_fingerprints(run: Run) -> dict[str, str]:
  paths = run.vector_paths
  return {name: store.read_manifest(path, 'vector').fingerprint for name, path in paths.items()}


def _score_all(run: Run, params: dict, rows: Mapping[str, Rows]) -> dict[str, bits_per_byte.Score]:
  model = _model(run)
  return {
    name: bits_per_byte.score(model, params, r, run.evaluation.batch) for name, r in rows.items()
  }


def _flops(run: Run, rows: Mapping[str, Rows]) -> float:
  config = _model(run).config
  return sum(r.tokens.size * config.flops_per_token(run.length) for r in rows.values())


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
