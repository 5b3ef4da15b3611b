"""A run of every stage on two invented languages, in seconds."""

import dataclasses

from optimer_jax.data.datasets import synthetic
from optimer_jax.run import EvalConfig, Run
from optimer_jax.search.study import StudyConfig
from optimer_jax.training.train import TrainConfig


def make_run(directory, **changes) -> Run:
  run = Run(
    directory=str(directory),
    base='random:tiny',
    datasets=(synthetic('north'), synthetic('east')),
    length=64,
    trim_vocabulary=True,
    scan=True,
    training=TrainConfig(
      steps=6,
      batch=4,
      learning_rate=3e-3,
      warmup=2,
      evaluate_every=3,
      save_every=2,
      keep_every=2,
    ),
    evaluation=EvalConfig(dev_rows=6, test_rows=6, batch_tokens=512),
    study=StudyConfig(trials=4),
    vector_dtype='bfloat16',
    export_dtype='bfloat16',
    cache=str(directory.parent / 'cache'),
    gin='# as bound',
  )
  return dataclasses.replace(run, **changes)
