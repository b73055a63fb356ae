"""Settings of every test: no deadlines, because other people's work on the machine is not a failure."""

import hypothesis

hypothesis.settings.register_profile("phidias", deadline=None, derandomize=True)
hypothesis.settings.load_profile("phidias")
