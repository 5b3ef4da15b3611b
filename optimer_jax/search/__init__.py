"""The search for merge weights: objectives, the trial ledger, samplers and studies."""
