"""What `optimer inspect` writes, made up: for tests of the report."""

from pathlib import Path

import numpy as np

from optimer_jax.files import write_json


def write_vectors(folder: Path, datasets: tuple[str, ...], rng: np.random.Generator) -> None:
  """Writes geometry.json and trajectory.json."""
  size, layers = len(datasets), 18
  modules = 'embedding q_proj k_proj v_proj o_proj gate_proj up_proj down_proj norms'.split()
  named = lambda values: dict(zip(datasets, np.asarray(values).tolist(), strict=True))

  def pairs(low: float, high: float, own: float = 1.0) -> list[list[float]]:
    half = np.triu(rng.uniform(low, high, (size, size)), 1)
    return (half + half.T + own * np.eye(size)).tolist()

  inner = {
    name: {
      module: (0.5 + 0.3 * np.sin(np.arange(layers) / 4 + i + j) + rng.normal(0, 0.03, layers))
      for j, module in enumerate(modules[1:])
    }
    for i, name in enumerate(datasets)
  }
  several = size > 1
  sampled = [f'layers.{i}.{m}' for i in (0, 9, 17) for m in ('attn.q_proj', 'mlp.down_proj')]
  write_json(
    folder / 'geometry.json',
    {
      'datasets': list(datasets),
      'norm': named(rng.uniform(2, 4, size)),
      'relative_norm': named(rng.uniform(2e-3, 4e-3, size)),
      'cosine': pairs(-0.01, 0.11),
      'by_layer': {
        name: np.sqrt(sum(row**2 for row in rows.values())).tolist() for name, rows in inner.items()
      },
      'by_module': {
        name: {
          'embedding': rng.uniform(0.2, 1.4),
          **{module: float(np.linalg.norm(row)) for module, row in rows.items()},
        }
        for name, rows in inner.items()
      },
      'layer_module': {
        name: {module: row.tolist() for module, row in rows.items()} for name, rows in inner.items()
      },
      'cosine_by_layer': [pairs(-0.03, 0.15) for _ in range(layers)],
      'cosine_by_module': {module: pairs(-0.03, 0.15) for module in modules},
      'sign_agreement': pairs(0.49, 0.56),
      'sign_unanimous': 0.21 if several else None,
      'sign_elected': 0.74 if several else None,
      'effective_rank': {
        name: {
          leaf: {
            'effective': rng.uniform(40, 300),
            'stable': rng.uniform(3, 30),
            'bound': 1024 if leaf.endswith('q_proj') else 640,
          }
          for leaf in sampled
        }
        for name in datasets
      },
      'embedding_share': named(rng.uniform(0.05, 0.4, size)),
      'embedding_rows_touched': named(rng.uniform(0.1, 0.9, size)),
    },
  )
  ways = {}
  for i, name in enumerate(datasets):
    share = np.arange(1, 7) / 6
    along = share ** (0.7 + 0.1 * i)
    ways[name] = {
      'steps': (8 * np.arange(1, 7)).tolist(),
      'step_norm': rng.uniform(0.4, 0.7, 6).tolist(),
      'step_cosine': rng.uniform(0.5, 0.9, 5).tolist(),
      'norm': (3 * along).tolist(),
      'final_cosine': (0.75 + 0.25 * share).tolist(),
      'projection': along.tolist(),
      'straightness': rng.uniform(0.6, 0.95),
    }
  write_json(folder / 'trajectory.json', ways)
