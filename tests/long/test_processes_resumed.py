"""What one process saved when it was stopped, two go on with."""

from tests.test_processes import ONE, TWO, by_one, check_stopped_and_resumed

__all__ = ['by_one']  # the fixture


def test_stopped_by_sigterm_and_resumed_by_two(by_one, tmp_path):
  check_stopped_and_resumed(by_one, tmp_path, ONE, TWO)
