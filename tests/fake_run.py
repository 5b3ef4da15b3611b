"""What a finished run leaves in its directory, made up in a moment, and how its page is read."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from fake_vectors import write_vectors

from optimer_jax.evaluation.scores import Score, compare
from optimer_jax.files import write_json, write_text
from optimer_jax.report.blocks import Text

DATASETS = ('code', 'ja', 'math', 'zh')
QUIZZES = ('gsm8k', 'mmlu')
LEVELS = {'code': 0.92, 'ja': 1.45, 'math': 0.71, 'zh': 1.83}


def fake_run(
  run: Path,
  datasets: tuple[str, ...] = DATASETS,
  trials: int = 24,
  seed: int = 0,
  quizzes: tuple[str, ...] = (),
) -> Path:
  """Writes what a finished run leaves: each domain's loss is quadratic in the merge weights.

  `quizzes` are tasks of accuracy beside the domains' text: an example is solved where its
  difficulty lies below the skill that the merge gives. The last one is scored on test alone.
  """
  rng = np.random.default_rng(seed)
  size = len(datasets)
  level = np.array([LEVELS.get(name, 1 + i / size) for i, name in enumerate(datasets)])
  best = rng.uniform(0.15, 0.6, size)
  own = np.eye(size) + 0.12 * rng.uniform(-0.2, 1, (size, size))
  start = np.einsum('ij,j->i', own, best)

  def away(weights: np.ndarray) -> np.ndarray:
    """How far each domain is from its own optimum: 1 for the base."""
    return ((own @ weights - start) / start) ** 2

  def loss(weights: np.ndarray) -> np.ndarray:
    """Bits per byte of each domain: 7% of its level gained at its own optimum."""
    return level * (1 - 0.07 + 0.07 * away(weights) + 0.004 * weights.sum() ** 2)

  def sample(count: int, source: np.random.Generator) -> dict:
    texts = {
      name: (source.integers(600, 1100, count), source.normal(1, 0.12, count)) for name in datasets
    }
    return texts | {name: (np.ones(4 * count), source.random(4 * count)) for name in quizzes}

  def score(
    weights: np.ndarray, examples: dict, noise: np.random.Generator, tasks: tuple[str, ...]
  ) -> dict:
    found = {}
    for name, value in zip(datasets, loss(weights), strict=True):
      sizes, hard = examples[name]
      bits = value * sizes * hard * noise.normal(1, 0.004, len(sizes))
      found[name] = Score(bits, np.asarray(sizes, float), 'bits/byte', 0, 4096)
    skill = 0.62 - 0.25 * float(np.mean(away(weights)))
    for i, name in enumerate(quizzes):
      sizes, hard = examples[name]
      solved = hard + noise.normal(0, 0.03, len(hard)) < skill
      found[name] = Score(solved.astype(float), sizes, 'accuracy', 3 * i, 4096)
    return {task: found[task] for task in tasks}

  def average(found: dict) -> float:
    losses = [found[task].loss for task in searched]
    return sum(losses) / len(losses)

  def written(found: dict) -> dict:
    return {
      'scores': {task: one.summary() for task, one in found.items()},
      'tasks': {task: f'd1{task}' for task in found},
    }

  def per_example(found: dict) -> dict:
    return {task: one.per_example() for task, one in found.items()}

  searched = (*datasets, *quizzes[:-1])
  named = lambda weights: dict(zip(datasets, map(float, weights), strict=True))
  write_json(
    run / 'base' / 'manifest.json',
    {
      'kind': 'base',
      'fingerprint': 'b3:6f1d0c4e9a7758e2',
      'model': {'name': 'gemma3-270m', 'vocabulary': 17408, 'layers': 18, 'rope': {'local': 1e4}},
      'versions': {'jax': '0.10.2', 'flax': '0.12.8', 'optimer_jax': '0.1.0'},
      'notes': ['Vocabulary trimmed to the 17,408 pieces that occur in the corpora <of 262,144>.'],
    },
  )
  write_text(run / 'operative.gin', "import optimer_jax\nsearch.study.trials = 24 # <&>'\n" * 20)
  for i, name in enumerate(datasets):
    for step in range(1, 49):
      value = (2.4 + 0.5 * i) * (1 - 0.1 * (1 - math.exp(-step / 15)) + rng.normal(0, 0.02))
      append = {'step': step, 'loss': value, 'tokens_per_s': 350.0, 'learning_rate': 4e-5}
      add_line(run / 'cpt' / name / 'metrics.jsonl', append)
      if step % 12 == 0 or step == 1:
        dev = level[i] * (1 - 0.06 * (1 - math.exp(-step / 18)))
        add_line(run / 'cpt' / name / 'metrics.jsonl', {'step': step, 'dev_bits_per_byte': dev})
  write_vectors(run / 'vectors', datasets, np.random.default_rng(seed + 3))

  dev = sample(32, np.random.default_rng(seed + 1))
  rows = []
  for i in range(trials):
    if i < 2:
      weights, sampler = np.full(size, (1 - i) / size), 'seed'
    else:
      spread = 0.5 if i < 8 else 0.12
      weights, sampler = np.clip(best + rng.normal(0, spread, size), 0, 1), 'vizier'
    if i == trials - 1:
      weights, sampler = best + rng.normal(0, 0.02, size), 'surrogate'
    found = score(weights, dev, rng, searched)
    rows.append(
      {
        'trial': i,
        'sampler': sampler,
        'weights': named(weights),
        **written(found),
        'objective': average(found),
        'seconds': 8.1,
        'flops': 1.2e12,
        'pool': 'b3:77aa',
        'time': '2026-01-02T03:04:05Z',
      }
    )
    add_line(run / 'studies' / 'mean' / 'trials.jsonl', rows[-1])
    row = {'trial': i, 'per_example': per_example(found)}
    add_line(run / 'studies' / 'mean' / 'examples.jsonl', row)
  found = np.array(list(rows[-1]['weights'].values()))
  write_json(
    run / 'studies' / 'mean' / 'best.json',
    {
      'objective': 'mean',
      'best_observed': min(rows, key=lambda row: row['objective']),
      'surrogate_optimum': {**rows[-1], 'predicted': rows[-1]['objective'] - 0.0011},
      'chosen': 'surrogate_optimum',
      'weights': named(found),
      'ratios': named(found / found.sum()),
      'evaluations': trials,
    },
  )

  test = sample(64, np.random.default_rng(seed + 2))
  candidates = {'base': np.zeros(size), 'average': np.full(size, 1 / size), 'optimer': found}
  # A short CPT run stops well before its own domain's optimum.
  candidates |= {f'cpt-{name}': np.eye(size)[i] * best[i] for i, name in enumerate(datasets)}
  candidates['exported'] = found
  scored = {}
  for i, (name, weights) in enumerate(candidates.items()):
    scored[name] = found = score(weights, test, rng, (*datasets, *quizzes))
    used = None if name == 'base' else named(weights)
    write_json(
      run / 'evaluations' / f'{name}.json',
      {
        'name': name,
        'split': 'test',
        'weights': used,
        **written(found),
        'mean': average(found),
        'per_example': per_example(found),
        'identity': {'weights': used},
      },
    )
    look = {'model': name, 'weights': used, 'tasks': written(found)['tasks']}
    add_line(
      run / 'evaluations' / 'test_looks.jsonl', look | {'time': f'2026-01-02T03:{10 + i}:00Z'}
    )

  def pair(a: str, b: str) -> dict:
    """The mean is over what was searched; the other tasks stand beside it."""
    kept = [{task: scored[name][task] for task in searched} for name in (a, b)]
    rest = [{task: scored[name][task] for task in quizzes[-1:]} for name in (a, b)]
    row = {'a': a, 'b': b, **compare(*kept)}
    return row | {'per_task': row['per_task'] | (compare(*rest)['per_task'] if quizzes else {})}

  others = ('base', *(f'cpt-{name}' for name in datasets), 'average')
  write_json(run / 'evaluations' / 'comparisons.json', [pair('optimer', other) for other in others])
  for stage, seconds, flops, tokens, peak in (
    ('data', 41.0, 0, 0, 0.9),
    ('import', 33.2, 0, 0, 2.1),
    *((f'train/{name}', 139.0 + i, 3.1e13, 24576, 5.6) for i, name in enumerate(datasets)),
    (f'train/{datasets[0]}', 66.5, 1.5e13, 12288, 5.7),
    ('extract', 12.1, 0, 0, 3.0),
    ('search/mean', 301.7, 2.9e13, 786432, 4.4),
    ('evaluate', 188.8, 2.2e13, 524288, 3.3),
    ('export', 9.7, 0, 0, 2.8),
  ):
    add_line(
      run / 'costs.jsonl',
      {'stage': stage, 'seconds': seconds, 'flops': flops, 'tokens': tokens, 'peak_rss_gb': peak},
    )
  return run


def add_line(path: Path, row: dict) -> None:
  # append_jsonl without its fsync, which a hundred lines a run would wait for.
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps(row) + '\n')


def words(sections: list) -> str:
  """The paragraphs of a page that has not been drawn."""
  return words_of(block for section in sections for block in section.blocks)


def words_of(blocks) -> str:
  return '\n'.join(block.text for block in blocks if isinstance(block, Text))


def rows(tree: ElementTree.Element, caption: str) -> dict[str, list[str]]:
  """The body of the table with this caption: row heading to the text of its cells."""
  for table in tree.iter('table'):
    found = table.find('caption')
    if found is not None and caption in found.text:
      break
  else:
    raise AssertionError(f'no table {caption}')
  return {
    row[0].text: [' | '.join(t.strip() for t in cell.itertext() if t.strip()) for cell in row[1:]]
    for row in table.find('tbody')
  }


def shown(value: float, digits: int = 4) -> str:
  return f'{value:.{digits}f}'.replace('-', '−')
