"""What benchmarks have measured: one line a run in ``NAME.jsonl``, for good, and tables of the last.

Owns those files, who writes them (``record.py``) and the parts of docs/benchmarks.md between its marks
(``tables.py``). Must not know how anything is measured: a benchmark prints one line of JSON, and that is a
run's ``figures``. Start with ``record.py``.
"""
