"""A matrix as the product of two thin ones: its truncated singular value decomposition."""

import math
from collections.abc import Iterator

import numpy as np

EXACT_SIDE = 2048  # a matrix with a side up to this is decomposed exactly, in about a second
OVERSAMPLE, POWER = 16, 2
_BLOCK = 2**22  # elements that are held in float32 or float64 at once


def factorize(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
  """The best B A of a rank for a matrix: a truncated singular value decomposition.

  Exact for a matrix with a side up to `EXACT_SIDE` and for a rank above a quarter of the smaller
  side; otherwise by subspace iteration from a random start, the same at every call (Halko,
  Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4).

  Args:
    matrix: [in, out], of any float dtype, finite.
    rank: r; factors of a smaller matrix are filled with zeros.

  Returns:
    A [r, in] and B [out, r], float32, with matrix = (B A).T + residual; and the Frobenius norm of
    that residual relative to the matrix's.
  """
  wide = matrix.shape[0] < matrix.shape[1]
  tall = matrix.T if wide else matrix  # m n
  m, n = tall.shape
  kept = min(rank, n)
  if n <= EXACT_SIDE or 4 * (kept + OVERSAMPLE) > n:
    basis = _exact_basis(tall, kept)
  else:
    basis = _random_basis(tall, kept)
  coefficients = np.empty((m, kept), np.float32)
  squares = left = 0.0
  for rows, block in float_blocks(tall):
    coefficients[rows] = block @ basis
    squares += sum_of_squares(block)
    left += sum_of_squares(block - coefficients[rows] @ basis.T)
  # Factors of one magnitude: a power of two moves from one to the other without rounding.
  size = np.linalg.norm(coefficients, axis=0)
  shift = np.rint(np.log2(np.where(size > 0, size, 1)) / 2).astype(int)
  factors = np.ldexp(coefficients, -shift), np.ldexp(basis, shift)
  padding = (0, 0), (0, rank - kept)
  a, b = (np.pad(x, padding) for x in (reversed(factors) if wide else factors))
  error = math.sqrt(left / squares) if squares else 0.0
  return np.ascontiguousarray(a.T), np.ascontiguousarray(b), error


def float_blocks(tall: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
  """Blocks of rows in float32."""
  step = max(1, _BLOCK // tall.shape[1])
  for start in range(0, len(tall), step):
    rows = slice(start, start + step)
    yield rows, tall[rows].astype(np.float32, copy=False)


def sum_of_squares(block: np.ndarray) -> float:
  """Summed in float64."""
  flat = block.astype(np.float64).ravel(order='K')  # a transposed block is not put in order
  return float(flat @ flat)


def _exact_basis(tall: np.ndarray, rank: int) -> np.ndarray:
  """The right singular vectors [n, r]: of float32 values, float64 squares lose nothing."""
  gram = np.zeros((tall.shape[1],) * 2)
  for _, block in float_blocks(tall):
    block = block.astype(np.float64)
    gram += block.T @ block
  return np.linalg.eigh(gram)[1][:, ::-1][:, :rank].astype(np.float32)


def _random_basis(tall: np.ndarray, rank: int) -> np.ndarray:
  m, n = tall.shape
  width = rank + OVERSAMPLE
  right = np.random.default_rng(0).standard_normal((n, width), np.float32)
  for i in range(POWER + 1):
    left = np.empty((m, width), np.float32)
    for rows, block in float_blocks(tall):
      left[rows] = block @ right
    left = np.linalg.qr(left)[0]
    right = sum(block.T @ left[rows] for rows, block in float_blocks(tall))
    if i < POWER:
      right = np.linalg.qr(right)[0]
  return np.linalg.svd(right, full_matrices=False)[0][:, :rank]
