"""Property-based tests draw the same examples in every run, wait for slow machines, and leave no files behind."""

from hypothesis import settings

settings.register_profile("esper", deadline=None, database=None, derandomize=True)
settings.load_profile("esper")
