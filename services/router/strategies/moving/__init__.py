"""Strategies that bring KV that is there to where it is wanted.

Owns one file for each. They import :mod:`...authoring` alone. Start at migrate.py.
"""
