"""Hydra YAML: every value of a run, and nothing but values. docs/configuration.md is the guide."""
