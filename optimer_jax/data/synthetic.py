"""Text in four invented languages, for a quickstart without downloads and for tests.

Each has its own letters, its own words and its own habits of which word follows which, so that a
model trained on one is measurably better at that one. Only `random.Random.random` is used, the one
generator whose sequence Python promises to keep.
"""

import random
from collections.abc import Iterator

# Consonants and vowels of each language.
LANGUAGES = {
  'north': ('bdgklmnrstv', 'aeiou'),
  'east': ('βγδζκλμνπρστφχ', 'αεηιουω'),
  'south': ('бвгджзклмнпрстфх', 'аеиоуыя'),
  'west': ('אבגדהזחטכלמנס', 'ועיפ'),
}
DOCUMENTS = {'train': 220, 'dev': 48, 'test': 48}
SENTENCES = 14
WORDS = 160
FOLLOWERS = 4


def texts(language: str, split: str, seed: int) -> Iterator[str]:
  """The documents of one split: about 200 kB of train text, 45 kB each of dev and test."""
  words, followers = _language(language, seed)
  for number in range(DOCUMENTS[split]):
    draw = random.Random(f'{seed}/{language}/{split}/{number}').random
    sentences = []
    for _ in range(SENTENCES):
      word = int(draw() * WORDS)
      sentence = [words[word]]
      for _ in range(5 + int(draw() * 8)):
        # Mostly a habitual follower, the first of them most often; now and then any word.
        habitual = draw() < 0.9
        word = followers[word][int(draw() ** 2 * FOLLOWERS)] if habitual else int(draw() * WORDS)
        sentence.append(words[word])
      sentences.append(' '.join(sentence) + '.')
    yield '\n'.join([' '.join(sentences[:7]), ' '.join(sentences[7:])])


def _language(language: str, seed: int) -> tuple[list[str], list[list[int]]]:
  draw = random.Random(f'{seed}/{language}').random
  consonants, vowels = LANGUAGES[language]
  pick = lambda letters: letters[int(draw() * len(letters))]
  words = []
  while len(words) < WORDS:
    word = ''.join(pick(consonants) + pick(vowels) for _ in range(1 + int(draw() * 3)))
    if word not in words:
      words.append(word)
  return words, [[int(draw() * WORDS) for _ in range(FOLLOWERS)] for _ in words]
