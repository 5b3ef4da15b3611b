"""A run: one directory, everything that its results depend on, and what its stages begin with."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import jax
from jax.sharding import Mesh

from optimer_jax.checkpoints import base as bases
from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.places import check_place
from optimer_jax.data.datasets import Dataset
from optimer_jax.data.sources import default_cache
from optimer_jax.data.tokenizer import Tokenizer
from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation.engine import Engine, Prepared, Task
from optimer_jax.evaluation.tasks import BitsPerByte
from optimer_jax.files import read_json
from optimer_jax.gemma3 import Gemma3Config, Model
from optimer_jax.gemma3.transformer import check_choices
from optimer_jax.merging.candidates import MergeConfig
from optimer_jax.parallel.processes import in_turn, primary
from optimer_jax.parallel.sharding import MeshConfig, make_mesh
from optimer_jax.parallel.startup import release_memory
from optimer_jax.report import costs
from optimer_jax.search.study import StudyConfig
from optimer_jax.training.train import TrainConfig
from optimer_jax.vectors.pool import Pool, load_pool


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """How much of the data sets' held-out text is scored, and how much is computed at once.

  Attributes:
    text: score bits per byte of each data set's own text, beside what `Run.tasks` names.
    dev_rows, test_rows: windows of `Run.length` tokens, one of a document, of each data set.
    seed: of the choice of windows.
    context, batch_tokens, generate_rows: of the `Engine`.
  """

  text: bool = True
  dev_rows: int = 64
  test_rows: int = 64
  seed: int = 0
  context: int = 4096
  batch_tokens: int = 4096
  generate_rows: int = 64


@dataclasses.dataclass(frozen=True)
class Baselines:
  """What OptiMer is measured against, from the same base, text and number of tokens.

  A mixture is trained for as many steps as all CPT runs together.

  Attributes:
    mixtures: ratios that are tried beside uniform ones, spread over the simplex.
    methods: merges in which all vectors have one weight, tuned on development text over
      `coefficients` and, where the method has one, `densities`.
    coefficients, densities: the values that are tried.
    studies: more searches of the same vectors.
    checkpoints: a search of the vectors and of those of the checkpoints that training kept.
    with_mixture: a search of the vectors and of the uniform mixture's.
    retrain: train on the weights that the run's study chose as ratios, too.
    heal_steps: of training on after the merge, with its weights as ratios, at the learning rate of
      training and at a quarter of it; 0: none. A uniform mixture with as many steps more is trained
      as well.
  """

  mixtures: int = 4
  methods: tuple[str, ...] = ('task_arithmetic', 'ties', 'dare_linear')
  coefficients: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4)
  densities: tuple[float, ...] = (0.3, 0.7)
  studies: tuple[StudyConfig, ...] = ()
  checkpoints: StudyConfig | None = None
  with_mixture: StudyConfig | None = None
  retrain: bool = True
  heal_steps: int = 0

  @property
  def searches(self) -> tuple[StudyConfig, ...]:
    """All of them, in the order in which they are done."""
    more = self.checkpoints, self.with_mixture
    return *self.studies, *(study for study in more if study)


@dataclasses.dataclass(frozen=True)
class Run:
  """One run directory and everything that its results depend on."""

  directory: str
  base: str  # what `checkpoints.base.open_source` takes
  datasets: tuple[Dataset, ...]
  watched: tuple[Dataset, ...] = ()  # scored, not trained on: for what may be forgotten
  length: int = 1024  # tokens of a row, T
  trim_vocabulary: bool = False  # keep only the tokens of the data sets' text
  dtype: str = 'float32'  # of activations and matrix products; bfloat16 on accelerators
  scan: bool | None = None  # scan over layers; default: everywhere but on CPU
  attention: str = 'auto'  # splash (fused, slow but on TPU) or plain; auto: splash on TPU
  remat: str = 'layer'  # kept for a layer's gradient: its input; dots: products too; none: all
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  evaluation: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  tasks: tuple[Task, ...] = ()  # scored beside the data sets' text: on dev by the search, on test
  test_tasks: tuple[Task, ...] = ()  # scored on test alone
  study: StudyConfig = dataclasses.field(default_factory=StudyConfig)
  merging: MergeConfig = dataclasses.field(default_factory=MergeConfig)
  baselines: Baselines | None = None  # what else `pipeline` trains and tunes, to compare with
  pool: str = 'auto'  # device, scan or host: where vectors and candidates are (`vectors.room`)
  vectors: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> model to extract
  vector_dtype: str = 'float32'
  export_dtype: str | None = None  # default: that of the base
  arrays: str = ''  # where leaves and training states are: gs://… or a folder; default: beside them
  cache: str | None = None  # downloads and packed rows; default: ~/.cache/optimer_jax
  expect: str = ''  # what the pipeline says at its start of time and memory
  gin: str = ''  # the operative gin, kept with the results

  def __post_init__(self):
    check_choices(self)
    if self.arrays:
      check_place(self.arrays, 'Run.arrays')
      if Path(self.arrays).resolve() == self.path.resolve():
        raise UsageError('Run.arrays is the run directory: leave it empty')
    for name in self.vectors:
      if name in self.names or name == 'base':
        raise UsageError(f'Run.vectors: the name {name!r} is taken: give the vector another one')
    for key in ('tasks', 'test_tasks'):
      if not isinstance(getattr(self, key), tuple):
        raise UsageError(f'Run.{key} is one task: write a tuple, as in (%gsm8k,)')
    text = [each.name for each in (*self.datasets, *self.watched) if self.evaluation.text]
    names = [*text, *(task.name for task in (*self.tasks, *self.test_tasks))]
    if twice := [name for name in names if names.count(name) > 1]:
      raise UsageError(f'two tasks are called {twice[0]!r}: give one of them another name')

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

  def arrays_of(self, path: Path) -> str:
    """Where the arrays of RUN/… are to be; '' is beside its other files."""
    if not self.arrays:
      return ''
    return f'{self.arrays.rstrip("/")}/{quote(path.relative_to(self.path).as_posix())}'

  def dataset(self, name: str) -> Dataset:
    for dataset in self.datasets:
      if dataset.name == name:
        return dataset
    raise UserError(f'the run has no data set {name!r}; it has {", ".join(self.names)}')


@contextlib.contextmanager
def stage(run: Run, name: str, worker: str = '') -> Iterator[dict]:
  """Accounts for a stage, in process 0, and starts it without the last one's memory."""
  release_memory()
  if not primary():
    yield {}
    return
  with costs.account(run.path, name, worker) as cost:
    yield cost


def model_of(run: Run, config: Gemma3Config | None = None) -> Model:
  """What the run computes with; default: the base's architecture."""
  config = config or store.read_manifest(run.path / 'base', 'base').model
  scan = jax.default_backend() != 'cpu' if run.scan is None else run.scan
  return Model(config, dtype=run.dtype, scan=scan, attention=run.attention, remat=run.remat)


def mesh_of(run: Run) -> Mesh | None:
  """The devices of all processes as `Run.mesh` arranges them; None if there is one."""
  mesh = make_mesh(run.mesh)
  return mesh if mesh.size > 1 else None


def pool_of(run: Run, engine: Engine, gradients: bool = False) -> Pool:
  """The base and all vectors, where `Run.pool` or what there is room for says.

  Gradients, if they are wanted, are taken of vectors in the devices' memory only.
  """
  possible = [place for place in run.merging.places if not gradients or place != 'host']
  base, vectors = run.path / 'base', run.vector_paths
  return load_pool(base, vectors, engine.model, engine.mesh, run.pool, possible)


def tokenizer_of(run: Run) -> Tokenizer:
  """The base's, with the vocabulary that the base keeps."""
  base = run.path / 'base'
  store.sound_file(base, 'tokenizer.json')
  return Tokenizer.load(base, bases.kept_vocabulary(base))


def engine_of(
  run: Run, config: Gemma3Config | None = None, tokenizer: Tokenizer | None = None
) -> Engine:
  """What models are scored with; default: the base's architecture and tokenizer."""
  return Engine(
    model_of(run, config),
    tokenizer or tokenizer_of(run),
    run.evaluation.context,
    run.evaluation.batch_tokens,
    run.evaluation.generate_rows,
    mesh_of(run),
    run.cache_path,
  )


def text_task(run: Run, dataset: Dataset, split: str) -> BitsPerByte:
  """Bits per byte of a data set's held-out text."""
  rows = run.evaluation.dev_rows if split == 'dev' else run.evaluation.test_rows
  seed = run.evaluation.seed
  return BitsPerByte(dataset.name, dataset.dev, dataset.test, run.length, rows, seed)


def tasks_of(run: Run, split: str) -> tuple[Task, ...]:
  """What models are scored on: by the search on 'dev', in the end on 'test'.

  UsageError if there is nothing.
  """
  scored = (*run.datasets, *run.watched) if run.evaluation.text else ()
  text = [text_task(run, each, split) for each in scored]
  tasks = (*text, *run.tasks, *(run.test_tasks if split == 'test' else ()))
  if not tasks:
    raise UsageError('there is nothing to score: bind Run.tasks, or set EvalConfig.text = True')
  return tasks


def prepare(tasks: tuple[Task, ...], engine: Engine, split: str) -> dict[str, Prepared]:
  """The tasks by name, read and planned for any number of candidates."""
  return in_turn(lambda: {task.name: task.prepare(engine, split) for task in tasks})


def counted(run: Run, tasks: tuple[Task, ...]) -> list[str]:
  """The names of the tasks that a mean is over: those that the study's objective counts."""
  weights = run.study.objective.weights
  return [t.name for t in tasks if t not in run.test_tasks and weights.get(t.name, 1.0) > 0]


def best_of(run: Run) -> dict:
  """The study's answer: best.json."""
  return read_json(run.path / 'studies' / run.study.name / 'best.json')


def vector_fingerprints(run: Run) -> dict[str, str]:
  paths = run.vector_paths
  return {name: store.read_manifest(path, 'vector').fingerprint for name, path in paths.items()}


def planned(run: Run) -> dict:
  """What a plan of any stage depends on: settings of `planning.stages.Case`."""
  return {key: getattr(run, key) for key in ('length', 'mesh', 'training', 'dtype', 'remat')}
