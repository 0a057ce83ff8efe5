"""Strategies that choose one engine for a request, or the moment at which it may begin.

Owns one file for each. They import :mod:`...authoring` alone. Start at data_parallel.py.
"""
