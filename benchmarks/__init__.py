"""Our kernels (`python -m benchmarks`) and our engine (pytest-benchmark suites) against eager and peers."""
