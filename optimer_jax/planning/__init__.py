"""Will it fit, and how fast can it be at best: programs compiled for TPU slices without a TPU."""
