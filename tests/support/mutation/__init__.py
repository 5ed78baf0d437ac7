"""Deliberately wrong rules, and small models on which each of them matters."""
