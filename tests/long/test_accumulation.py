"""Accumulation with a piece for each row; the suite takes two rows at once."""

from tests.test_training import test_accumulation_changes_nothing as of_pieces


def test_a_piece_for_each_row_changes_nothing(small, tmp_path):
  of_pieces(small, 4, tmp_path)
