"""Strategies that compute a prompt on one engine and decode on another, in whole or in part.

Owns one file for each. They import :mod:`...authoring` and each other. Start at disaggregated.py.
"""
