"""`cme score`: a file of prompts and responses in, the same file with their scores out.

options.py   the command line
columns.py   scores -> the columns that are added
write.py     the input's rows and the added columns -> the output
summary.py   progress, and the counts and means at the end
job.py       the input, scored chunk by chunk
run.py       one run: from the options to the output
"""
