"""The real Gemma 3 270M against transformers: 3 minutes, 8 GB of memory, and the domains' text."""

import shutil

import pytest

from benchmarks.parity import DOMAINS, real

pytestmark = pytest.mark.skipif(not shutil.which('apt-get'), reason='the texts need apt')


def test_logits_of_every_domain():
  found = real()
  assert tuple(found) == DOMAINS
  for name, row in found.items():
    assert row['max_abs'] <= 1e-3, name
    assert row['kl'] <= 1e-6, name
    assert row['agree'] > 0.999, name
