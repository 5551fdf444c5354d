"""Rules that every package shares; imports no other package of the project."""

#: The project's version: pyproject.toml and `soundwave --version` read it here.
__version__ = "0.2.0"
