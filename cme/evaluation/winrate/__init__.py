"""`cme eval winrate`: whose responses does a judge prefer, of two models or three.

inputs -> responses (read, or generated) -> calls of the judge, both orders of each pair -> verdicts -> numbers.
"""
