"""Task kinds against plain computations, and the text of their prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_tasks import SEEN, Listening, contexts, listening_engine, spread_params, write_rows

from optimer_jax.data.sources import Jsonl
from optimer_jax.errors import UsageError, UserError
from optimer_jax.evaluation.answers import CodeGeneration, Generation, extracted, normalised
from optimer_jax.evaluation.examples import Example, Examples
from optimer_jax.evaluation.generation import Prompt, Sampling, generate_texts
from optimer_jax.evaluation.prompts import Template, continuations
from optimer_jax.evaluation.splits import Splits
from optimer_jax.evaluation.tasks import BitsPerByte, MultipleChoice
from optimer_jax.gemma3 import forward


@pytest.fixture(scope='module')
def engine(small, tmp_path_factory):
  return listening_engine(small, tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def params(small):
  return spread_params(small)


def held(tmp_path, rows, name='a', **settings):
  """A task's data: the rows as test, another one as dev."""
  other = {**rows[0], 'q': 'of dev'}
  return Splits(
    Examples(write_rows(tmp_path / f'{name}.jsonl', rows)),
    Examples(write_rows(tmp_path / f'{name}-dev.jsonl', [other])),
    **settings,
  )


def log_likelihood(engine, params, context, continuation):
  """By one plain forward of both texts, cut where the context's own tokens end."""
  encode = super(Listening, engine.tokenizer).encode
  before, whole = encode([context.rstrip(), context + continuation])
  ids = np.concatenate([[engine.tokenizer.bos], before, whole[len(before) :]])
  # What follows a token does not change its logits, so that one length does for all.
  padded = jnp.asarray(np.pad(ids, (0, 96 - len(ids)))[None])
  logits = jax.jit(forward, static_argnums=0)(engine.model, params, padded)
  logp = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)), np.float64)
  return sum(logp[t - 1, ids[t]] for t in range(len(before) + 1, len(ids)))


ROWS = [
  {'q': 'the cat', 'choices': ['mat', 'a longer answer', '猫'], 'label': 0},
  {'q': 'the mat', 'choices': ['cat sat', 'the', 'A', 'and the answer'], 'label': 3},
  {'q': '日本の', 'choices': ['猫は', 'on'], 'label': 1},
  {'q': 'sat on the', 'choices': ['mat', 'cat and the cat'], 'label': 1},
  {'q': 'answer', 'choices': ['is', 'is A. is A.', 'the cat sat on'], 'label': 2},
]


@pytest.mark.parametrize('kind', ['sum', 'length', 'calibrated'])
def test_choices_are_those_of_a_plain_forward(engine, params, tmp_path, kind):
  task = MultipleChoice(
    'x', held(tmp_path, ROWS), 'Question: {q}\nAnswer: ', choice='{text}', score=kind
  )
  prepared = task.prepare(engine, 'test')
  score = prepared.score(params)
  expected = {}
  for row in ROWS:
    compared = []
    for text in row['choices']:
      found = log_likelihood(engine, params, f'Question: {row["q"]}\nAnswer: ', text)
      if kind == 'length':
        found /= len(text.encode())
      elif kind == 'calibrated':
        found -= log_likelihood(engine, params, 'Answer:', text)
      compared.append(found)
    expected[row['q']] = float(np.argmax(compared) == row['label'])
  asked = [text.split('Question: ')[1].split('\n')[0] for text in contexts(task, engine)]
  assert asked != [row['q'] for row in ROWS]  # in the order of their hashes
  assert score.values.tolist() == [expected[q] for q in asked]
  assert 0 < score.value < 1
  assert (score.unit, score.truncated, prepared.count) == ('accuracy', 0, 5)
  assert score.sizes.tolist() == [1.0] * 5 and score.tokens > 0


def test_the_three_ways_of_scoring_differ(engine, params, tmp_path):
  found = set()
  for kind in ('sum', 'length', 'calibrated'):
    task = MultipleChoice('x', held(tmp_path, ROWS), '{q}', score=kind)
    prepared = task.prepare(engine, 'test')
    found.add(prepared.digest)
    assert task.prepare(engine, 'test').digest == prepared.digest
  assert len(found) == 3


def test_a_model_that_is_not_finite_has_no_accuracy(engine, params, tmp_path):
  task = MultipleChoice('x', held(tmp_path, ROWS), '{q}')
  broken = jax.tree.map(lambda a: a * np.nan, params)
  assert np.isnan(task.prepare(engine, 'test').score(broken).value)


def test_pairs_are_cut_as_lm_eval_cuts_them(engine):
  encode = engine.tokenizer.encode
  pairs = [('the cat', ' sat'), ('the cat ', 'sat'), ('', 'the'), ('th', 'e cat'), (' \n', 'x')]
  for (context, continuation), found in zip(
    pairs, continuations(engine.tokenizer, pairs), strict=True
  ):
    before, whole = encode([context.rstrip(), context + continuation])
    assert found.context[0] == engine.tokenizer.bos
    if len(whole) > len(before):
      assert found.context[1:].tolist() == before.tolist()
      assert found.target.tolist() == whole[len(before) :].tolist()
    assert len(found.target) >= 1
  same = continuations(engine.tokenizer, pairs[:2])
  assert same[0].context is same[1].context
  assert same[0].target.tolist() == same[1].target.tolist()
  # 'the' is one piece: the continuation adds no token, and its target is still one.
  (joined,) = continuations(engine.tokenizer, [('th', 'e')])
  (whole,) = encode(['the'])
  assert len(encode(['th'])[0]) >= len(whole)
  assert joined.target.tolist() == whole[-1:].tolist()
  assert joined.context.tolist() == [engine.tokenizer.bos, *whole[:-1]]


# Prompts.


def test_choice_prompts_as_they_are_written(engine, tmp_path):
  rows = [
    {'q': ' why? ', 'choices': ['x', 'y'], 'label': 'B', 'subject': 'high_art'},
    {'q': 'how {A}?', 'choices': ['u', 'v'], 'label': 'A', 'subject': 'law'},
  ]
  shots = [
    {'q': 'one', 'choices': ['k', 'l'], 'label': 'A', 'subject': 'law'},
    {'q': 'two', 'choices': ['m', 'n'], 'label': 'B', 'subject': 'high_art'},
    {'q': 'three', 'choices': ['o', 'p'], 'label': 'B', 'subject': 'law'},
  ]
  data = held(tmp_path, rows, shots=Examples(write_rows(tmp_path / 's.jsonl', shots)))
  task = MultipleChoice(
    'x',
    data,
    'Q: {q:strip}\n{choices}\n{{{B}}}:',
    choice=' {letter}',
    label_is='letter',
    instruction='About {subject}.',
    shots=1,
    separator='\n--\n',
  )
  assert sorted(contexts(task, engine)) == [
    'About high art.\n--\nQ: two\nA. m\nB. n\n{n}: B\n--\nQ: why?\nA. x\nB. y\n{y}:',
    'About law.\n--\nQ: one\nA. k\nB. l\n{l}: A\n--\nQ: how {A}?\nA. u\nB. v\n{v}:',
  ]
  assert sorted(text[-2:] for text in SEEN[1]) == [' A', ' A', ' B', ' B']


def test_generation_prompts_as_they_are_written(engine, tmp_path):
  rows = [{'q': '{braces}', 'tests': ['a', 'b'], 'n': 3, 'answer': '7'}]
  shots = [{**rows[0], 'q': q, 'n': n, 'answer': str(n * n)} for q, n in (('one', 1), ('two', 2))]
  data = held(tmp_path, rows, shots=Examples(write_rows(tmp_path / 's.jsonl', shots)))
  task = Generation(
    'x', data, '{q}/{n}/{tests}:', shot='{q}/{n}: {answer}', shots=2, instruction='Do {n}.'
  )
  assert contexts(task, engine) == ['Do 3.\n\none/1: 1\n\ntwo/2: 4\n\n{braces}/3/a\nb:']


@pytest.mark.parametrize(
  'text', ['{', 'a } b', '{}', '{ }', '{q!r}', '{q:>3}', '{q:{n}}', '{q', 'x {{q}']
)
def test_malformed_templates(text):
  with pytest.raises(UsageError, match=r'Generation\.prompt (is malformed|has )'):
    Generation('x', Splits(Examples('a.jsonl')), text)


def test_templates_say_what_is_missing():
  template = Template('{question} {a b}', 'Kind.prompt')
  assert template.fill({'question': 1.5, 'a b': ['x', 'y']}, 'here') == '1.5 x\ny'
  with pytest.raises(
    UserError, match=r'a:3 has no key "question", which Kind\.prompt .*: did you mean "qestion"'
  ):
    template.fill({'qestion': 'x'}, 'a:3')
  for value, message in ((None, 'is empty'), ({}, 'is a dict'), (True, 'is a bool'), ([1], 'list')):
    with pytest.raises(UserError, match=f'a:3, key "question",.*{message}'):
      template.fill({'question': value}, 'a:3')


# Labels.


@pytest.mark.parametrize(
  ('label', 'settings', 'index'),
  [
    (0, {}, 0),
    ('2', {}, 2),
    (1, {'first': 1}, 0),
    ('3', {'first': 1}, 2),
    ('B', {'label_is': 'letter'}, 1),
    (' C ', {'label_is': 'letter'}, 2),
    ('10', {'label_is': 'text'}, 1),
    (10, {'label_is': 'text'}, 1),
    (3, {}, None),
    (-1, {}, None),
    (0, {'first': 1}, None),
    ('B', {}, None),
    (1.0, {}, None),
    (True, {}, None),
    ('D', {'label_is': 'letter'}, None),
    ('11', {'label_is': 'text'}, None),
    (None, {}, None),
  ],
)
def test_labels(engine, tmp_path, label, settings, index):
  row = {'q': 'x', 'choices': ['9', '10', ' 3'], 'label': label}
  task = MultipleChoice('x', held(tmp_path, [row]), '{q}', **settings)
  (example,) = task.data.test.rows()
  if index is not None:
    assert task._right(example) == index
    return
  with pytest.raises(UserError, match=r'a\.jsonl:1, key "label", is (.*not one of|empty)'):
    task.prepare(engine, 'test')


def test_labels_of_the_set_itself():
  task = MultipleChoice('x', Splits(Examples('a.jsonl')), '{q}', label_is='letter')
  row = {'choices': {'text': ['x', 'y', 'z'], 'label': ['1', '2', '3']}, 'label': '3'}
  assert task._right(Example(row, 'here')) == 2


@pytest.mark.parametrize(
  ('choices', 'message'),
  [
    ('abc', 'is not a list of 2 to 26 options'),
    (['a'], 'is not a list of 2 to 26 options'),
    (['a', None], 'an option that is no text'),
    (['a', ' '], 'an empty option'),
  ],
)
def test_wrong_options(engine, tmp_path, choices, message):
  row = {'q': 'x', 'choices': choices, 'label': 0}
  task = MultipleChoice('x', held(tmp_path, [row]), '{q}', choice='{text}')
  with pytest.raises(UserError, match=f'a.jsonl:1.*{message}'):
    task.prepare(engine, 'test')


def test_options_of_one_example_in_another_order_are_the_same_example(engine, tmp_path):
  row, turned = ({'q': 'x', 'choices': c, 'label': 0} for c in (['a', 'b'], ['b', 'a']))
  data = Splits(
    Examples(write_rows(tmp_path / 'a.jsonl', [row])),
    Examples(write_rows(tmp_path / 'b.jsonl', [turned])),
  )
  with pytest.raises(UserError, match='share 1 examples'):
    MultipleChoice('x', data, '{q}\n{choices}').prepare(engine, 'test')


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'score': 'mean'}, r'MultipleChoice\.score is .mean.: it is one of sum, length, calibrated'),
    ({'label_is': 'number'}, 'label_is'),
    ({'choice': '{'}, r'MultipleChoice\.choice is malformed'),
  ],
)
def test_wrong_settings_of_choices(settings, message):
  with pytest.raises(UsageError, match=message):
    MultipleChoice('x', Splits(Examples('a.jsonl')), '{q}', **settings)


def test_truncated_examples_are_counted_once(engine, params, tmp_path):
  rows = [*ROWS, {'q': 'the cat sat ' * 60, 'choices': ['a', 'b', 'c'], 'label': 0}]
  task = MultipleChoice('x', held(tmp_path, rows), '{q}')
  short = dataclasses.replace(engine, context=32)
  assert task.prepare(short, 'test').score(params).truncated == 1
  task = Generation('x', held(tmp_path, rows), '{q}', target='label', max_new=6)
  assert task.prepare(short, 'test').score(params).truncated == 1
  assert task.prepare(engine, 'test').digest != task.prepare(short, 'test').digest


# Written answers.


@pytest.mark.parametrize(
  ('answer', 'plain'),
  [
    ('1,000.00', '1000'),
    ('$18', '18'),
    (' 18. ', '18'),
    ('18.50', '18.5'),
    ('.5', '0.5'),
    ('-0', '0'),
    ('-003.0', '-3'),
    ('+7', '7'),
    ('１８', '18'),
    ('- 5', '-5'),
    ('1e999999999', '1e999999999'),
    ('nan', 'nan'),
    ('1_000', '1_000'),
    ('1.2.3', '1.2.3'),
    ('.', '.'),
    ('', ''),
    ('12345678901234567890123456789012345.10', '12345678901234567890123456789012345.1'),
  ],
)
def test_numbers(answer, plain):
  assert normalised(answer, number=True) == plain


def test_texts_are_compared_as_they_are():
  assert normalised(' 1,000. ') == '1,000.'
  assert normalised('Ja', ignore_case=True) == normalised('jA', ignore_case=True)
  assert normalised('Ja') != normalised('ja')


def test_extraction():
  text = 'so 3 + 4 = 7\n#### 7.\nthen 8'
  assert extracted('', text) == text
  assert extracted(r'[0-9]+', text) == '3'
  assert extracted(r'[0-9]+', text, 'last') == '8'
  assert extracted(r'#### *([0-9.]+)', text) == '7.'
  assert extracted(r'(x)|([0-9])', text, 'last') == '8'
  assert extracted('nothing', text) is None


def test_right_answers():
  task = Generation(
    'x', Splits(Examples('a.jsonl')), '{q}', extract=r'#### *([-$0-9.,]+)', number=True
  )
  for text, right in (
    ('#### 1,000', True),
    ('a\n#### $1000.00.', True),
    ('1000', False),
    ('#### 100', False),
    ('#### 7 #### 1000', False),
  ):
    assert task.is_right(text, '1000') == right


def test_generation_is_scored_by_what_is_written(engine, params, tmp_path):
  prompts = ['the cat', 'on the mat', '日本']
  bos = [engine.tokenizer.bos]
  tokens = [np.array([*bos, *ids], np.int32) for ids in engine.tokenizer.encode(prompts)]
  sampling = Sampling(temperature=1.0, seed=3)
  for settings in ({}, {'sampling': sampling}):
    rows = [{'q': prompt, 'answer': 'never'} for prompt in prompts]
    written = generate_texts(
      engine, params, [Prompt(t, 6, ('zzz',)) for t in tokens], *settings.values()
    )
    rows[1]['answer'] = f'#### {written[1].text}'
    task = Generation(
      'x',
      held(tmp_path, rows),
      '{q}',
      max_new=6,
      stops=('zzz',),
      target_extract='(?s)(?:#### )?(.*)',
      **settings,
    )
    asked = contexts(task, engine)
    score = task.prepare(engine, 'test').score(params)
    if not settings:
      assert score.values.tolist() == [float(text == prompts[1]) for text in asked]
      assert score.tokens == sum(map(len, tokens)) + sum(len(w.tokens) for w in written)
    assert score.unit == 'accuracy' and score.truncated == 0


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'take': 'middle'}, r'Generation\.take is .middle.'),
    ({'extract': '('}, r'Generation\.extract is no regular expression'),
    ({'shots': 2}, r'Generation\.shots is 2: give Generation\.shot'),
    ({'stops': '\n'}, r'Generation\.stops'),
    ({'stops': ('',)}, r'Generation\.stops'),
  ],
)
def test_wrong_settings_of_generation(settings, message):
  with pytest.raises(UsageError, match=message):
    Generation('x', Splits(Examples('a.jsonl')), '{q}', **settings)


def test_targets_without_an_answer(engine, tmp_path):
  data = held(tmp_path, [{'q': 'x', 'answer': 'no number'}])
  with pytest.raises(UserError, match=r'a\.jsonl:1, key "answer", holds no answer'):
    Generation('x', data, '{q}', target_extract='[0-9]+').prepare(engine, 'test')
  with pytest.raises(UserError, match=r'a\.jsonl:1 has no key "anwser": did you mean "answer"'):
    Generation('x', data, '{q}', target='anwser').prepare(engine, 'test')


def test_programs_run_only_if_asked_for(engine, params, tmp_path):
  rows = [
    {'q': 'the cat', 'check': 'assert True'},
    {'q': 'the mat', 'check': 'assert False'},
    {'q': 'on the', 'check': 'while True: pass'},
  ]
  settings = {'program': '# {completion}\n{check}\n', 'stops': ('\n', '\r'), 'max_new': 3}
  data = held(tmp_path, rows)
  with pytest.raises(UsageError, match=r'runs programs .*allow_execution = True'):
    CodeGeneration('x', data, '{q}', **settings)
  task = CodeGeneration('x', data, '{q}', **settings, seconds=1.0, allow_execution=True)
  asked = contexts(task, engine)
  score = task.prepare(engine, 'test').score(params)
  assert dict(zip(asked, score.values, strict=True)) == {'the cat': 1, 'the mat': 0, 'on the': 0}
  with pytest.raises(UserError, match=r'no key "chek", which CodeGeneration\.program'):
    CodeGeneration('x', data, '{q}', '{chek}', allow_execution=True).prepare(engine, 'test')


# Texts.


def test_bits_per_byte(engine, params, tmp_path, monkeypatch):
  monkeypatch.setenv('OPTIMER_CACHE', str(tmp_path / 'cache'))
  texts = ['the cat sat on the mat and the cat', '日本の猫は', 'answer is A.']
  dev = Jsonl(write_rows(tmp_path / 'dev.jsonl', [{'text': 'the mat'}]))
  test = Jsonl(write_rows(tmp_path / 'test.jsonl', [{'text': text} for text in texts]))
  task = BitsPerByte('x', dev, test, length=64)
  prepared = task.prepare(engine, 'test')
  score = prepared.score(params)
  bits = {len(t.encode()): -log_likelihood(engine, params, '', t) / np.log(2) for t in texts}
  for size, value in zip(score.sizes, score.values, strict=True):
    assert value == pytest.approx(bits[size], rel=1e-5)
  assert score.unit == 'bits/byte' and prepared.count == 3
  assert task.prepare(engine, 'dev').count == 1
  assert task.prepare(engine, 'test').digest == prepared.digest
  assert task.prepare(engine, 'dev').digest != prepared.digest
  with pytest.raises(UsageError, match='longer than the context'):
    BitsPerByte('x', dev, test, length=2000).prepare(engine, 'test')
  with pytest.raises(UsageError, match="no split 'valid'"):
    task.prepare(engine, 'valid')
  write_rows(tmp_path / 'dev.jsonl', [{'text': 'the mat'}, {'text': texts[1]}])
  with pytest.raises(UserError, match=r'share 1 documents, the first at .*test\.jsonl:2'):
    task.prepare(engine, 'dev')


def test_the_digest_follows_the_content(engine, tmp_path):
  def digests(rows, **settings):
    data = held(tmp_path, rows)
    return (
      MultipleChoice('x', data, '{q}', **settings).prepare(engine, 'test').digest,
      Generation('x', data, '{q}', target='label').prepare(engine, 'test').digest,
    )

  before = digests(ROWS)
  assert digests(ROWS[::-1]) == before
  changed = [{**ROWS[0], 'label': 1}, *ROWS[1:]]
  assert all(a != b for a, b in zip(digests(changed), before, strict=True))
  assert all(a != b for a, b in zip(digests(ROWS[1:]), before, strict=True))
  assert digests(ROWS, choice='{text}')[0] != before[0]
