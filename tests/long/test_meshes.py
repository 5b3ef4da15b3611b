"""The meshes whose programs the suite does not compile."""

import pytest

from tests.test_parallel import cases, check_same, found_by_eight


@pytest.fixture(scope='module')
def results(tmp_path_factory) -> dict:
  return found_by_eight(tmp_path_factory.mktemp('parallel'), 'long')


@pytest.mark.parametrize(('kv_heads', 'scan', 'mesh'), cases('long'))
def test_every_mesh_computes_the_same(results, kv_heads, scan, mesh):
  check_same(results[f'{kv_heads} {scan} {mesh}'])
