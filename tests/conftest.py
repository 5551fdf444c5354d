"""For all tests."""

pytest_plugins = ["tests.ci_skips"]
