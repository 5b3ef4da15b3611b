"""What evaluation computes with, and what a prepared task is."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from optimer_jax.data.tokenizer import Tokenizer
from optimer_jax.evaluation.scores import Score
from optimer_jax.gemma3 import Model
from optimer_jax.merging.weighted_sum import Groups

# From parameters, K vectors and the groups of leaves that share weights to the score, and the
# gradient of its value with respect to merge weights at these parameters, float64 [G, K].
Gradient = Callable[[dict, Sequence[dict], Groups], tuple[Score, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model without its parameters: those of a candidate come with each call.

  Attributes:
    model: what to compute.
    tokenizer: from text to tokens and back.
    context: tokens of a prompt and its answer together, at most.
    batch_tokens: tokens scored at once.
    generate_rows: answers generated at once, a power of 2.
    mesh: splits batches over devices; default: one device.
    cache: where tokenised text is kept; default: ~/.cache/optimer_jax.
  """

  model: Model
  tokenizer: Tokenizer
  context: int = 4096
  batch_tokens: int = 4096
  generate_rows: int = 64
  mesh: Mesh | None = None
  cache: Path | None = None

  @property
  def shards(self) -> int:
    """How many devices share the rows of a batch."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp'] if self.mesh else 1


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A task's split, tokenised and planned once for all candidates.

  Attributes:
    name: of the task.
    digest: of everything that a score depends on but the parameters.
    count: examples.
    score: from parameters, and the part of the examples (`scores.Part`; all by default), to their
      score. What a part needs is planned and compiled once. ValueError for more parts than `count`.
    gradient: that of all examples with the gradient; None where the score has none.
  """

  name: str
  digest: str
  count: int
  score: Callable[..., Score]
  gradient: Gradient | None = None


class Task(Protocol):
  """What is scored: the dataclasses of `tasks`, `answers` and `harness`."""

  name: str

  def prepare(self, engine: Engine, split: str) -> Prepared:
    """Reads `split` ('dev' or 'test') once; UserError if the data are not as they must be."""
    ...
