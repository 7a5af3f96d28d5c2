"""Questions whose right answers are known, by name, to measure with: nothing here is ever a reward.

questions.py     a question, a task, and the split into training and held-out questions
numbers.py       the number that a text gives
matchers.py      where a response's answer is, and whether it is right; tasks
expressions.py   the matcher of LaTeX, which is math-verify
capitals.py, civics.py, symbols.py    from packages of the package index
generated.py     arithmetic and the other data sets of reasoning-gym
registry.py      tasks and matchers by name

Other benchmarks come as the sample files of lm-evaluation-harness (`cme.files.lm_eval`).
"""
