"""The typed contract of a run: what the YAML may say, and everything that is refused before anything is written."""
