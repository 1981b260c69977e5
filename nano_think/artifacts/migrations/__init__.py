"""One file a step: `from_N.py` turns a model of schema N into one of schema N + 1, see `artifacts.schema`."""
