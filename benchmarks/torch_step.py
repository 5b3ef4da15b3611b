"""The peer of `benchmarks.train_step`: training steps of transformers' Gemma 3, one at a time.

    python -P benchmarks/torch_step.py DIRECTORY sdpa|eager whole|checkpointed

Run by its path: what the package imports would count as the peer's memory.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Gemma3ForCausalLM
from transformers.utils.logging import disable_progress_bar


def main(directory: str, attention: str, keeps: str) -> None:
  """Takes a step for each line of standard input, and writes a line of JSON about it."""
  directory = Path(directory)
  settings = json.loads((directory / 'settings.json').read_text())
  tokens = torch.from_numpy(np.load(directory / 'tokens.npy').astype(np.int64))
  torch.set_num_threads(settings['threads'])
  disable_progress_bar()
  model = Gemma3ForCausalLM.from_pretrained(
    directory / 'model', dtype=torch.float32, attn_implementation=attention, use_cache=False
  )
  model.train()  # without dropout: Gemma 3 has none
  if keeps == 'checkpointed':
    model.gradient_checkpointing_enable()
  optimizer = torch.optim.AdamW(
    model.parameters(),
    betas=settings['betas'],
    weight_decay=settings['weight_decay'],
    fused=True,
  )
  for now, rate, _ in zip(tokens, settings['rates'], sys.stdin, strict=False):
    began = time.perf_counter()
    for group in optimizer.param_groups:
      group['lr'] = rate
    with torch.autocast('cpu', torch.bfloat16, enabled=settings['dtype'] == 'bfloat16'):
      loss = model(input_ids=now, labels=now).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings['clip'])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    print(json.dumps({'loss': loss.item(), 'seconds': seconds}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
