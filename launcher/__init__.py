"""Decides and submits: config, plan, run directory, jobs, report. Never imports torch, so every verb answers at once."""
