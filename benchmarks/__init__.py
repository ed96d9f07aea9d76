"""One runner for all ops: `python -m benchmarks.run --help`."""
