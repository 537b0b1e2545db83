"""Benchmarks of every verb and of the whole engine, under pytest-benchmark, and the report on them.

Installed as `inferneo_benchmarks`; `inferneo bench` and `make bench` run them, docs/profiling.md explains them.
"""
