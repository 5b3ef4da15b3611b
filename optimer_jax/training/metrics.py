"""Metrics as JSON lines and TensorBoard events."""

import json
from pathlib import Path

import jax

from optimer_jax.files import append_jsonl, read_jsonl, write_text
from optimer_jax.parallel.processes import primary

# Peak bfloat16 FLOP/s of one device, from the vendors' data sheets.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'NVIDIA H100 80GB HBM3': 989e12,
}


class MetricsWriter:
  """Appends to DIRECTORY/metrics.jsonl and an event file beside it; of several processes, one does.

  What an interrupted run wrote after the step that is resumed from is dropped, so that a step
  stands in the file once.
  """

  def __init__(self, directory: Path, resumed_step: int):
    self.path, self.events = directory / 'metrics.jsonl', None
    if primary():
      from tensorboardX import SummaryWriter  # It imports torch where that is installed: seconds.

      rows = [row for row in read_jsonl(self.path) if row['step'] <= resumed_step]
      write_text(self.path, ''.join(json.dumps(row) + '\n' for row in rows))
      self.events = SummaryWriter(str(directory), purge_step=resumed_step + 1)

  def write(self, step: int, **values: float) -> None:
    if self.events:
      append_jsonl(self.path, {'step': step, **values})
      for name, value in values.items():
        self.events.add_scalar(name, value, step)

  def looked(self, step: int) -> bool:
    """Whether something but the step's own loss was written of it."""
    return any(row['step'] == step and 'loss' not in row for row in read_jsonl(self.path))

  def close(self) -> None:
    if self.events:
      self.events.close()


def model_flops_utilisation(flops_per_s: float) -> float | None:
  """Share of the devices' peak; None where the peak is not known (a CPU)."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return flops_per_s / (peak * jax.device_count()) if peak else None
