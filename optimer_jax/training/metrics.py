"""Metrics as JSON lines and TensorBoard events."""

import json
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from optimer_jax.files import append_jsonl, read_jsonl, write_text

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
  """Appends to DIRECTORY/metrics.jsonl and an event file beside it.

  What an interrupted run wrote after the step that is resumed from is dropped, so that a step
  stands in the file once.
  """

  def __init__(self, directory: Path, resumed_step: int):
    self.path = directory / 'metrics.jsonl'
    rows = [row for row in read_jsonl(self.path) if row['step'] <= resumed_step]
    write_text(self.path, ''.join(json.dumps(row) + '\n' for row in rows))
    self.events = SummaryWriter(str(directory), purge_step=resumed_step + 1)

  def write(self, step: int, **values: float) -> None:
    append_jsonl(self.path, {'step': step, **values})
    for name, value in values.items():
      self.events.add_scalar(name, value, step)

  def close(self) -> None:
    self.events.close()


def model_flops_utilisation(flops_per_s: float) -> float | None:
  """Share of the devices' peak; None where the peak is not known (a CPU)."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return flops_per_s / (peak * jax.device_count()) if peak else None
