# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # OptiMer: train once per data set, then search for the mixture
#
# Which blend of several data sets makes a base model best? Here Gemma 3 is trained on each data set
# alone, what each run changed is kept as a *distribution vector*, and the weights of the vectors'
# sum are searched against held-out text: minutes of search in place of a training run per mixture.
#
# As it stands, this notebook does that with a tiny random model and four invented languages, on
# whatever machine it is on, in a few minutes. The forms change what it does. A cell that is run
# again goes on where it was, and what was done is not done again.
#
# To open it in Colab: <https://colab.research.google.com/>, then *GitHub* or *Upload*.

# %% [markdown]
# ## Installing
#
# Where `optimer_jax` is not installed, it comes from a git repository, with the versions of its
# dependencies that it was tested with. That takes a few minutes.

# %%
REPOSITORY = ''  # @param {"type": "string"}

import glob
import importlib.util
import os
import shutil
import subprocess
import sys


def attached() -> str:
  """The kind of machine, told before JAX is there: it needs other packages for each."""
  if glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'):
    return 'TPU'
  return 'GPU' if shutil.which('nvidia-smi') else 'CPU'


def run_command(*command: str) -> None:
  """Runs a command and shows what it says."""
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  ) as process:
    for line in process.stdout:
      print(line, end='')
  if process.returncode:
    raise SystemExit(f'{command[0]} failed: see above')


if importlib.util.find_spec('optimer_jax'):
  print('optimer_jax is installed.')
elif not REPOSITORY:
  raise SystemExit('Set REPOSITORY to the git address of optimer_jax: https://HOST/OWNER/NAME')
else:
  if not os.path.exists('optimer_jax_source'):
    run_command('git', 'clone', '--quiet', '--depth=1', REPOSITORY, 'optimer_jax_source')
  jax_for = {'TPU': 'jax[tpu]', 'GPU': 'jax[cuda12]', 'CPU': 'jax'}[attached()]
  pip = (sys.executable, '-m', 'pip', 'install', '--quiet')
  pinned = '--constraint=optimer_jax_source/constraints.txt'
  run_command(*pip, pinned, './optimer_jax_source[gemma270m]', jax_for)
  importlib.invalidate_caches()
  if 'numpy' in sys.modules:  # Colab loads packages beforehand, and may have others than these.
    raise SystemExit('Installed. Restart the session (in the menu Runtime), and run all cells.')

# %% [markdown]
# ## What to do
#
# - `MODEL`: `tiny` is random. `270m` is the real Gemma 3 270M, quantised to 4 bits, from a Python
#   package. `1b` comes from the Hugging Face hub: accept Gemma's terms on the model's page and log
#   in with `hf auth login`; it needs an accelerator of 16 GB, as a TPU v5e has.
# - `FOLDER`: a folder of your own text. Each subfolder is a data set: `train.jsonl` and `dev.jsonl`
#   with one `{"text": …}` a line. Left empty, four invented languages are used.
# - `OBJECTIVE`: what the search makes as low as it can, of the data sets' losses as shares of the
#   base's: their `mean`, or the `worst` of them.
# - `STEPS`: of training, on each data set. `TRIALS`: candidates that the search scores.
# - `DIRECTORY`: keeps all results. In a mounted Google Drive they outlive the session. Another
#   model, folder or number of steps needs another directory.

# %%
MODEL = 'tiny'  # @param ["tiny", "270m", "1b"]
FOLDER = ''  # @param {"type": "string"}
OBJECTIVE = 'mean'  # @param ["mean", "worst"]
STEPS = 60  # @param {"type": "integer"}
TRIALS = 10  # @param {"type": "integer"}
DIRECTORY = 'runs/colab'  # @param {"type": "string"}

# %%
import html

import jax
from IPython.display import HTML, Image, Markdown, display

from optimer_jax import configs, pipeline
from optimer_jax.evaluate import evaluate
from optimer_jax.parallel.startup import start
from optimer_jax.report.blocks import Picture
from optimer_jax.report.read import read_run
from optimer_jax.report.sections import build
from optimer_jax.report.style import png
from optimer_jax.run import Run

GIN_FILES = {
  'tiny': ['runs/quickstart_tiny.gin'],
  '270m': ['runs/quickstart.gin'],
  '1b': ['runs/folder.gin', 'models/gemma3_1b.gin'],
}


def described(objective: str, trials: int) -> Run:
  """The run of the forms above, with a study of this objective."""
  files = [*GIN_FILES[MODEL], 'data/folder.gin', *([] if FOLDER else ['data/synthetic.gin'])]
  bindings = {
    'DIRECTORY': DIRECTORY,
    'FOLDER': FOLDER,
    'STEPS': STEPS,
    'TRIALS': trials,
    'TrainConfig.warmup': STEPS // 10,
    'StudyConfig.name': objective,
    'Objective.kind': objective,
    'Objective.scale': 'base',
    'Run.dtype': 'float32' if jax.default_backend() == 'cpu' else 'bfloat16',
  }
  if MODEL == '1b':
    bindings |= {'BATCH': 4, 'LENGTH': 512, 'Run.trim_vocabulary': True}  # for 16 GB
  return configs.read_run(files, [f'{name} = {value!r}' for name, value in bindings.items()])


def show(*names: str) -> None:
  """The report's figures of these names, as far as the run has come."""
  for section in build(read_run(run.path)):
    for block in section.blocks:
      if isinstance(block, Picture) and block.name.startswith(names):
        display(Image(png(block.figure), width=720), Markdown(block.caption))


def percentages(shares: dict[str, float]) -> str:
  return ', '.join(f'{name} {share:.1%}' for name, share in shares.items())


# %%
run = described(OBJECTIVE, TRIALS)
start(run.cache_path)
print(f'JAX computes on {jax.device_count()} x {jax.devices()[0].device_kind}.')
if attached() != (platform := jax.default_backend().upper()):
  print(f'This machine has a {attached()}, but JAX takes its {platform}: is that what you want?')
print(f'{MODEL} on {", ".join(run.names)}: {STEPS} steps each, then {TRIALS} trials.')

# %% [markdown]
# ## Training
#
# The base is imported, and trained on each data set alone. Below: the loss on training text, and
# bits per byte on text that training does not see. Lower is better.

# %%
pipeline.import_base(run)
for name in run.names:
  pipeline.train_one(run, name)
show('training')

# %% [markdown]
# ## Distribution vectors
#
# A vector is a trained model minus the base. The closer to zero the cosine of two vectors is, the
# less they get into each other's way when they are added.

# %%
pipeline.extract_all(run)
show('cosine', 'norms', 'trajectory')

# %% [markdown]
# ## Search
#
# Vizier's Gaussian process bandit suggests weights; each candidate is the base plus the weighted
# sum of the vectors, scored on development text. No training is involved.

# %%
best = pipeline.search(run)
show('convergence', 'trials')

# %% [markdown]
# ## The weights, as a mixture
#
# Normalised to a sum of one, the weights are mixture ratios: how much of each data set one would
# train on together.

# %%
print(f'Mixture ratios: {percentages(best["ratios"])}')
show('weights')

# %% [markdown]
# ## Merging and testing
#
# The answer is written as a model of its own, exported in Hugging Face's format, and scored on test
# text that neither training nor the search has seen, beside the base, each trained model and the
# plain average of the vectors.

# %%
pipeline.merge(run)
exported = pipeline.export(run)
scores = evaluate(run)
for name, found in scores.items():
  print(f'{name:12}{found["mean"]:8.4f} bits per byte')
show('overview')

# %% [markdown]
# ## Another question of the same vectors
#
# What would be best for the other objective? The trials above have kept the score of every data
# set, so they answer at once, without a new evaluation. Two more trials then check the answer.

# %%
other = described({'mean': 'worst', 'worst': 'mean'}[OBJECTIVE], 2)
answer = pipeline.search(other)
first = answer['first_answer']
print(f'\nOf {first["trials"]} trials that were there, none of them new:')
print(f'  {other.study.objective.label}: {first["predicted"]:.4f} predicted')
print('  weights', ', '.join(f'{name} {w:.3f}' for name, w in first['weights'].items()))
print(f'After {answer["evaluations"]} more: {answer[answer["chosen"]]["objective"]:.4f} measured')
print('  weights', ', '.join(f'{name} {w:.3f}' for name, w in answer['weights'].items()))
print(f'  as a mixture: {percentages(answer["ratios"])}')

# %% [markdown]
# ## Everything on one page

# %%
page = html.escape(pipeline.report(run).read_text(encoding='utf-8'))
display(HTML(f'<div><iframe srcdoc="{page}" width="100%" height="700"></iframe></div>'))

# %% [markdown]
# ## Keeping the model
#
# The export goes to your Google Drive (on Colab), or to a private model on the Hugging Face hub
# (log in with `hf auth login` first). `HUB_NAME` is as in `you/name`. Gemma's terms of use go with
# what was made from Gemma.

# %%
EXPORT_TO = 'nowhere'  # @param ["nowhere", "drive", "hub"]
HUB_NAME = ''  # @param {"type": "string"}

if EXPORT_TO == 'drive':
  importlib.import_module('google.colab.drive').mount('/content/drive')
  place = f'/content/drive/MyDrive/optimer/{run.path.name}'
  shutil.copytree(exported, place, dirs_exist_ok=True)
elif EXPORT_TO == 'hub':
  import huggingface_hub

  huggingface_hub.create_repo(HUB_NAME, private=True, exist_ok=True)
  place = huggingface_hub.upload_folder(repo_id=HUB_NAME, folder_path=exported)
else:
  place = exported
print(f'The model is in {place}')
