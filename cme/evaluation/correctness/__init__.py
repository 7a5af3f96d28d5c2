"""`cme eval correctness`: does a verifier's likelihood tell right answers from wrong, and do its controls.

options.py       what the command line says
data.py          questions to be answered, or responses that are right or wrong
source.py, file.py   where they come from: a task, or the rows of a file
sampling.py      a generator's responses, kept on disk
scores.py        the scores of the verifier and of the controls, kept on disk
signals.py       scores -> signals with one direction: higher means more likely right
metrics.py       what a signal says: AUROC, pairs, best of N, selective accuracy
calibration.py   a signal as a probability
result.py        all numbers of a run
report.py, picture.py   for a person
run.py, cli.py   all of it
"""
