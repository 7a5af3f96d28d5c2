"""pytest-benchmark suites: our kernels and our engine against eager computation and against peers."""
