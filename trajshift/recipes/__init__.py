"""Recipes: a run in one YAML file, and how it becomes tasks and a trainer. Reading one needs no torch."""
