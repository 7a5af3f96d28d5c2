"""`cme score`: a file of prompts and responses in, the same file with their scores out.

options.py   what the command line says
rows.py      a row -> what of it is to be scored
columns.py   scores -> the columns that are added
fingerprint.py   what tells one verifier from another of the same name
partial.py   finished chunks on disk, so that a run can be interrupted
write.py     the input's rows and the added columns -> the output
run.py       all of it
progress.py, summary.py   what is said meanwhile and at the end
"""
