"""The one error of this package."""


class DataError(Exception):
    """Documents, shards, manifests or mixtures that cannot be used: what was found, the rule, the fix."""
