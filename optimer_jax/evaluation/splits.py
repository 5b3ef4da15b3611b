"""How a task's examples are divided: the search sees dev, the result test, prompts show shots.

No example is in two of them.
"""

import dataclasses
import hashlib
import unicodedata
from collections.abc import Callable, Iterable
from typing import NamedTuple

from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation.examples import Example, Examples
from optimer_jax.progress import say


@dataclasses.dataclass(frozen=True)
class Splits:
  """What a task is scored on in the search and in the result, and what its prompts show.

  Attributes:
    test: for the result.
    dev: for the search. None, or the same set as `test`, divides that set by the hash of each
      example's content: the first `dev_count` are dev, the next `test_count` test. Neither the
      order of the rows nor anything but their content matters to who lands where. Appended rows
      push at most as many others from dev to test, and none from test to dev.
    shots: worked examples, the first ones in the file's order; None, or the same set as one of the
      others, takes the first of dev, which are then not scored.
    dev_count: None for all of `dev`, or half of a set that is divided.
    test_count: None for all, or all the rest.
    seed: of the hash; another one divides otherwise.
    drop_overlap: leave out of dev and shots what test has too, instead of refusing the sets.
  """

  test: Examples
  dev: Examples | None = None
  shots: Examples | None = None
  dev_count: int | None = None
  test_count: int | None = None
  seed: int = 0
  drop_overlap: bool = False

  def __post_init__(self):
    for name in ('dev_count', 'test_count'):
      count = getattr(self, name)
      if count is not None and (not isinstance(count, int) or count < 1):
        raise UsageError(f'Splits.{name} is {count!r}: give a number of 1 or more, or None')


class Drawn(NamedTuple):
  examples: list[Example]  # to be scored, in the order of their hashes
  shots: dict[str | None, list[Example]]  # of each subject

  def shots_for(self, example: Example) -> list[Example]:
    return self.shots.get(example.subject, [])


def draw(splits: Splits, split: str, shots: int, content: Callable[[Example], str]) -> Drawn:
  """The examples of `split` ('dev' or 'test'), and `shots` worked ones for each subject.

  Args:
    splits: the sets.
    split: 'dev' or 'test'.
    shots: how many; of every subject where examples have one.
    content: the text that makes an example the one it is. Two that differ only in case, width of
      characters or white space are the same; the second of one set is left out.

  Raises:
    UserError: a split is empty, dev or shots and test share an example, or there are too few shots.
  """
  if split not in ('dev', 'test'):
    raise UsageError(f'there is no split {split!r}: there are dev and test')

  def keyed(examples: Examples) -> dict[str, Example]:
    return _unique(examples, content, splits.seed)

  test = keyed(splits.test)
  if splits.dev is None or splits.dev.is_same_set(splits.test):
    everything, order = test, sorted(test)
    count = len(order) // 2 if splits.dev_count is None else splits.dev_count
    dev, test = order[:count], order[count:]
  else:
    given = keyed(splits.dev)
    shared = sorted(given.keys() & test.keys())
    if shared and not splits.drop_overlap:
      raise _overlap(f'dev ({splits.dev})', splits, [test[key] for key in shared])
    everything = given | test
    dev, test = sorted(given.keys() - test.keys())[: splits.dev_count], sorted(test)
  test = test[: splits.test_count]

  shown: dict[str | None, list[Example]] = {}
  own = splits.shots is None or any(
    other is not None and splits.shots.is_same_set(other) for other in (splits.dev, splits.test)
  )
  if shots and own:
    chosen = _first_of_each(((key, everything[key]) for key in dev), shots, shown)
    dev = [key for key in dev if key not in chosen]
  elif shots:
    scored = {*dev, *test}
    pool = keyed(splits.shots)
    if splits.drop_overlap:
      pool = {key: example for key, example in pool.items() if key not in scored}
    shared = _first_of_each(pool.items(), shots, shown) & scored
    if shared:
      raise _overlap(f'the shots ({splits.shots})', splits, [everything[key] for key in shared])
  examples = [everything[key] for key in (dev if split == 'dev' else test)]
  if not examples:
    raise UserError(
      f'{splits.test if split == "test" else splits.dev or splits.test}: no example is left for '
      f'{split} of {len(everything)}: lower Splits.dev_count or shots, or give a larger set'
    )
  if shots:
    _check_shots(examples, shown, shots, splits.shots or splits.dev or splits.test)
  return Drawn(examples, shown)


def _unique(examples: Examples, content: Callable[[Example], str], seed: int) -> dict[str, Example]:
  """The examples by the hash of their content, the first of those that share one."""
  rows, found = examples.rows(), {}
  for row in rows:
    text = ' '.join(unicodedata.normalize('NFKC', content(row)).casefold().split())
    found.setdefault(hashlib.sha256(f'{seed}\n{text}'.encode()).hexdigest(), row)
  if twice := len(rows) - len(found):
    say(f'{examples}: {twice} of {len(rows)} examples are repeats of others, and are left out')
  return found


def _first_of_each(
  pool: Iterable[tuple[str, Example]], count: int, shown: dict[str | None, list[Example]]
) -> set[str]:
  """Fills `shown` with the first `count` of each subject; their hashes."""
  chosen = set()
  for key, example in pool:
    there = shown.setdefault(example.subject, [])
    if len(there) < count:
      there.append(example)
      chosen.add(key)
  return chosen


def _check_shots(
  examples: list[Example], shown: dict[str | None, list[Example]], shots: int, place: Examples
) -> None:
  for example in examples:
    found = len(shown.get(example.subject, []))
    if found < shots:
      of = f' of the subject "{example.subject}"' if example.subject else ''
      raise UserError(
        f'{place} has {found} examples{of} to show, and {shots} shots are asked for: lower shots, '
        'or give Splits.shots a set that has them'
      )


def _overlap(what: str, splits: Splits, shared: list[Example]) -> UserError:
  return UserError(
    f'{what} and what is scored ({splits.test}) share {len(shared)} examples, the first at '
    f'{shared[0].where}: give sets that share none, or leave them out with '
    'Splits.drop_overlap = True'
  )
