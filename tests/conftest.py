"""What holds for all tests."""

from hypothesis import settings

# No example fails because a machine is slow.
settings.register_profile("pagetide", deadline=None)
settings.load_profile("pagetide")
