"""Rules that every package shares; imports no other package of the project."""
