"""Settings of every test: no deadlines, because other people's work on the machine is not a failure; and the longest files
first, so that two workers end together."""

import hypothesis

hypothesis.settings.register_profile("phidias", deadline=None, derandomize=True)
hypothesis.settings.load_profile("phidias")

LONGEST = (
    "tests/chaos/test_chaos.py",
    "tests/training/test_ranks.py",
    "tests/endtoend/test_run.py",
    "tests/slurm/test_faults.py",
    "tests/slurm/test_graph.py",
    "tests/slurm/test_train.py",
    "tests/slurm/test_data_array.py",
)


def pytest_collection_modifyitems(items):
    """Workers take whole files, in the order of the collection."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(LONGEST)))
