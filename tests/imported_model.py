"""A small model as transformers saves it, and as an artifact."""

from pathlib import Path

import numpy as np

from optimer_jax.checkpoints import store
from optimer_jax.checkpoints.base import import_base, open_source
from optimer_jax.gemma3 import Gemma3Config

VOCABULARY = 96
CONFIG = Gemma3Config(
  2, 32, 64, 4, 1, 16, window=6, query_scalar=24.0, rope_scale=8.0, vocab_size=VOCABULARY
)


def save_hf(path: Path, theirs) -> Path:
  """What transformers saves of its model, and stand-ins for the tokenizer's files."""
  theirs.save_pretrained(path)
  (path / 'tokenizer.json').write_text('{"a": "tokenizer"}')
  (path / 'tokenizer.model').write_bytes(b'\0\1\2')
  return path


def bring_in(hf: Path, path: Path, kept: np.ndarray | None = None) -> store.Manifest:
  source = open_source(str(hf), path)
  tokenizer = path.parent / 'tokenizer'
  tokenizer.mkdir(exist_ok=True)
  source.write_tokenizer(tokenizer)
  return import_base(source, path, tokenizer, kept)


def assert_same_leaves(found: dict, expected: dict):
  assert list(found) == list(expected)
  for name, leaf in expected.items():
    np.testing.assert_array_equal(found[name], leaf, strict=True, err_msg=name)
