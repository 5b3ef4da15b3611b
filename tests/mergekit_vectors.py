"""What mergekit gives for small tensors, kept in mergekit_vectors.npz for tests/test_methods.py.

`python -m tests.mergekit_vectors`, from the repository's root in an environment with mergekit 0.1.5
and numpy (jax is not needed), merges through `mergekit.merge_methods.api.merge_tensors` in float32
and writes the file anew; `--check` compares instead.

torch's sort on the CPU leaves equal magnitudes in an order that depends on the processor. Here it
is asked for a stable one, so that the kept numbers are those of every machine.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name('mergekit_vectors.npz')
DRAWS = 400  # of each random merge

# Name of the case: method, its parameters, inputs, how many models.
CASES = {
  'linear': ('linear', {'weight': [0.3, 0.5, 0.9]}, 'wide', 3),
  'linear_sum': ('linear', {'weight': [0.3, 0.5, 0.9], 'normalize': False}, 'wide', 3),
  'task_arithmetic': ('task_arithmetic', {'weight': [0.3, 0.7, -0.2]}, 'wide', 3),
  'task_arithmetic_normalized': (
    'task_arithmetic',
    {'weight': [0.3, 0.7, 0.2], 'normalize': True, 'lambda': 0.7},
    'wide',
    3,
  ),
  'task_arithmetic_cancelling': (
    'task_arithmetic',
    {'weight': [0.5, -0.5], 'normalize': True},
    'wide',
    2,
  ),
  'ties': ('ties', {'weight': [0.3, 0.7, 0.4], 'density': 0.3}, 'wide', 3),
  'ties_sum': (
    'ties',
    {'weight': [0.3, 0.7, 0.4], 'density': [0.2, 0.55, 1.0], 'normalize': False, 'lambda': 1.5},
    'wide',
    3,
  ),
  'ties_rescaled': (
    'ties',
    {'weight': [0.3, 0.7, 0.4], 'density': [0.2, 0.0, 0.001], 'rescale': True},
    'wide',
    3,
  ),
  'ties_negative': ('ties', {'weight': [0.3, -0.7, 0.4], 'density': 0.5}, 'wide', 3),
  'ties_norm': ('ties', {'weight': [0.3, 0.7, 0.4], 'density': 0.29}, 'norm', 3),
  'breadcrumbs': ('breadcrumbs', {'weight': [0.3, 0.7], 'density': 0.6, 'gamma': 0.05}, 'wide', 2),
  'breadcrumbs_dense': ('breadcrumbs', {'weight': [0.3, 0.7], 'density': [0.995, 1.0]}, 'wide', 2),
  'breadcrumbs_ties': (
    'breadcrumbs_ties',
    {'weight': [0.3, 0.7, 0.5], 'density': [0.4, 0.9, 0.0], 'gamma': [0.01, 0.3, 0.2]},
    'wide',
    3,
  ),
  'breadcrumbs_rescaled': (
    'breadcrumbs',
    {'weight': [0.3, 0.7], 'density': 0.4, 'rescale': True, 'normalize': True},
    'wide',
    2,
  ),
  'model_stock_2': ('model_stock', {}, 'wide', 2),
  'model_stock_4': ('model_stock', {}, 'alike', 4),
  'sce': ('sce', {}, 'alike', 3),
  'sce_selected': ('sce', {'select_topk': 0.3}, 'alike', 3),
  'sce_pair': ('sce', {'select_topk': 0.15}, 'wide', 2),
  'sce_tiny': ('sce', {'select_topk': 0.5}, 'tiny', 3),
  'slerp': ('slerp', {'t': 0.3}, 'wide', 1),
  'slerp_straight': ('slerp', {'t': 0.8}, 'tiny', 1),
  'multislerp': ('multislerp', {'weight': [0.3, 0.7, 0.5]}, 'alike', 3),
  'multislerp_sum': (
    'multislerp',
    {'weight': [0.3, 0.7], 'normalize_weights': False},
    'wide',
    2,
  ),
  'multislerp_1': ('multislerp', {'weight': [0.3]}, 'wide', 1),
  # Files in bfloat16: deltas of few distinct magnitudes, so equals stand at every cut.
  'bf16_linear': ('linear', {'weight': [0.3, 0.5, 0.9]}, 'bfloat16', 3),
  'bf16_task_arithmetic': ('task_arithmetic', {'weight': [0.3, 0.7, -0.2]}, 'bfloat16', 3),
  'bf16_ties': ('ties', {'weight': [0.4, 0.4, 0.4], 'density': [0.1, 0.3, 0.5]}, 'bfloat16', 3),
  'bf16_breadcrumbs': (
    'breadcrumbs',
    {'weight': [0.4, 0.4], 'density': 0.3, 'gamma': 0.1},
    'bfloat16',
    2,
  ),
  'bf16_breadcrumbs_ties': (
    'breadcrumbs_ties',
    {'weight': [0.3, 0.3, 0.3], 'density': [0.1, 0.5, 0.8], 'gamma': 0.05},
    'bfloat16',
    3,
  ),
  'bf16_sce': ('sce', {'select_topk': 0.4}, 'bfloat16', 3),
  'bf16_model_stock': ('model_stock', {}, 'bfloat16', 2),
}
RANDOM = {
  'dare_ties': ('dare_ties', {'weight': [0.6, 0.5], 'density': [0.3, 0.8]}, 'small', 2),
  'della': ('della', {'weight': [0.6, 0.5], 'density': 0.5, 'epsilon': 0.4}, 'small', 2),
  'della_1': (
    'della_linear',
    {'weight': [1.0], 'density': 0.5, 'epsilon': 0.4, 'rescale': False},
    'small',
    1,
  ),
  'della_norm': (
    'della_linear',
    {'weight': [1.0], 'density': 0.4, 'rescale': False},
    'small_norm',
    1,
  ),
}


def inputs() -> dict[str, np.ndarray]:
  """Base and models of each kind of inputs: float32 [1 + K, ...]."""
  draw = np.random.default_rng(2603)

  def group(shape, k, size, shared=0.0):
    base = draw.standard_normal(shape)
    common = draw.standard_normal(shape)
    deltas = [shared * common + draw.standard_normal(shape) for _ in range(k)]
    return np.stack([base, *(base + size * delta for delta in deltas)]).astype(np.float32)

  fine = group((24, 40), 3, 0.02)
  return {
    'wide': group((24, 40), 3, 0.5),
    'alike': group((24, 40), 4, 0.3, shared=0.7),
    'tiny': group((24, 40), 3, 1e-4),
    'norm': group((50,), 3, 0.1),
    'small': group((6, 10), 2, 0.4),
    'small_norm': group((12,), 1, 0.4),
    'bfloat16': _rounded(fine),
  }


def _rounded(x: np.ndarray) -> np.ndarray:
  """To the nearest bfloat16, even at half."""
  bits = x.view(np.uint32)
  bits = bits + 0x7FFF + ((bits >> 16) & 1)
  return (bits & np.uint32(0xFFFF0000)).view(np.float32)


@contextlib.contextmanager
def _stable_sort():
  import torch

  sort, argsort, topk = torch.sort, torch.argsort, torch.topk
  torch.sort = lambda x, dim=-1, descending=False: sort(
    x, dim=dim, descending=descending, stable=True
  )
  torch.argsort = lambda x, dim=-1, descending=False: argsort(
    x, dim=dim, descending=descending, stable=True
  )
  torch.topk = lambda x, k, largest: [y[:k] for y in sort(x, descending=largest, stable=True)]
  # della sorts through the method of a tensor as well.
  method, torch.Tensor.argsort = torch.Tensor.argsort, torch.argsort
  try:
    yield
  finally:
    torch.sort, torch.argsort, torch.topk = sort, argsort, topk
    torch.Tensor.argsort = method


def merged(case, tensors: np.ndarray) -> np.ndarray:
  """One merge, by mergekit."""
  import torch
  from mergekit.merge_methods.api import merge_tensors

  method, parameters, _, k = case
  models = [torch.from_numpy(x.copy()) for x in tensors[: k + 1]]
  plain = method == 'linear'  # its base is not one of its models
  out = merge_tensors(
    models[1:] if plain else models,
    method,
    parameters=parameters,
    base_index=None if plain else 0,
    dtype=torch.float32,
  )
  return out.numpy()


def compute() -> dict[str, np.ndarray]:
  """Everything that is kept."""
  import torch

  tensors = inputs()
  kept = {f'in/{name}': value for name, value in tensors.items()}
  with _stable_sort():
    for name, case in CASES.items():
      kept[f'out/{name}'] = merged(case, tensors[case[2]])
    for name, case in RANDOM.items():
      torch.manual_seed(17)
      base = tensors[case[2]][0]
      outs = np.stack([merged(case, tensors[case[2]]) for _ in range(DRAWS)]).astype(np.float64)
      kept[f'mean/{name}'] = outs.mean(0)
      kept[f'deviation/{name}'] = outs.std(0)
      kept[f'moved/{name}'] = (outs != base).mean(0)
  return kept


def check() -> None:
  """Raises an AssertionError if mergekit no longer gives what is kept."""
  kept, now = np.load(FILE), compute()
  assert sorted(kept) == sorted(now)
  for name, value in now.items():
    # Sums are taken in as many parts as there are processors.
    np.testing.assert_allclose(value, kept[name], rtol=1e-6, atol=1e-6, err_msg=name)


if __name__ == '__main__':
  if sys.argv[1:] == ['--check']:
    check()
    print(f'{FILE.name}: as mergekit gives it')
  else:
    np.savez_compressed(FILE, **compute())
    print(f'{FILE.name}: {FILE.stat().st_size} bytes, {len(CASES) + len(RANDOM)} cases')
