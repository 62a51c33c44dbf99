"""Architectures by name. The only rooms that know what a model looks like are this and ``training/``."""
