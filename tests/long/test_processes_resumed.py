"""What processes saved when they were stopped, other numbers of them go on with."""

import numpy as np
import pytest

from optimer_jax.checkpoints import store
from tests.test_processes import CONFIG, ONE, TWO, losses, trained


@pytest.fixture(scope='module')
def by_one(tmp_path_factory):
  directory = tmp_path_factory.mktemp('one')
  assert trained(directory, ONE) == [0]
  return directory


@pytest.mark.parametrize(('first', 'then'), [(TWO, ONE), (ONE, TWO)], ids=['by one', 'by two'])
def test_stopped_by_sigterm_and_resumed(by_one, tmp_path, first, then):
  """The same losses, on other meshes and numbers of processes before and after the stop."""
  assert trained(tmp_path, first, stop_at=3) == [75] * first[0]
  said = {(tmp_path / f'{i}.log').read_text().splitlines()[-1] for i in range(first[0])}
  (said,) = said  # All stopped at the same step.
  (saved,) = (path.name for path in (tmp_path / 'run/state').iterdir() if path.name.isdigit())
  assert said == f'random was told to stop and is saved at step {saved}'
  assert 3 < int(saved) < CONFIG.steps
  assert trained(tmp_path, then) == [0] * then[0]
  np.testing.assert_allclose(losses(tmp_path), losses(by_one), rtol=1e-5)
  _, found = store.load(tmp_path / 'cpt')
  for name, expected in store.load(by_one / 'cpt')[1].items():
    # AdamW divides by the gradient's size: noise of a tiny gradient moves a whole step.
    assert np.quantile(np.abs(found[name] - expected), 0.99) < 1e-4, name
