"""The run directory: paths, the frozen config, events, metrics, exit classes and the lock. What happened is read from here."""
