"""The study of training on a verifier's likelihood and on controls: `python -m experiments.study` runs its grid.

cpu.yaml     the grid: settings of `cme.train`, tasks, rewards, seeds
grid.py      that file -> cells
cells.py     one cell: a training run in a process of its own, and what is kept of it
store.py     what is kept of all cells: files, and one compressed archive
report.py    the cells -> docs/results.md and its pictures
"""
