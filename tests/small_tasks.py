"""A small engine that remembers what was tokenised, and a random model for it."""

import json

import jax.numpy as jnp

from optimer_jax.data.tokenizer import Tokenizer, write_tiny_tokenizer
from optimer_jax.evaluation.engine import Engine
from optimer_jax.gemma3 import Gemma3Config, Model, from_leaves, init_leaves

TEXT = 'the cat sat on the mat and the answer is A. 日本の猫は \n\n Question: Answer: ' * 3
SEEN = []  # what was tokenised, call by call


class Listening(Tokenizer):
  def encode(self, texts):
    texts = list(texts)
    SEEN.append(texts)
    return super().encode(texts)


def listening_engine(config: Gemma3Config, directory) -> Engine:
  write_tiny_tokenizer(directory, [TEXT], config.vocab_size)
  found = Tokenizer.load(directory)
  tokenizer = Listening(found.pieces, found.kept, found.digest)
  return Engine(Model(config), tokenizer, context=1024, batch_tokens=1024, generate_rows=4)


def spread_params(config: Gemma3Config) -> dict:
  """Random ones, large enough that answers differ."""
  leaves = {n: jnp.asarray(a) * 8 for n, a in init_leaves(config, 0).items()}
  return from_leaves(Model(config), leaves)


def contexts(task, engine, split='test'):
  SEEN.clear()
  task.prepare(engine, split)
  return SEEN[0]


def write_rows(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  path.write_text(text, encoding='utf-8')
  return str(path)
