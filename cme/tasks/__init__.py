"""Questions whose right answers are known, by name, to measure with: nothing here is ever a reward.

questions.py     a question, an answer in a response, and the split into training and held-out questions
numbers.py       the number that a text gives
choices.py       the option that a response chooses
matchers.py      extraction of the answer from a response, and its judgement; tasks
expressions.py   the matcher of LaTeX, which is math-verify
capitals.py      the capitals of the world, mended by capitals.toml
packaged.py      civics and chemical symbols, from packages of the package index
generated.py     arithmetic and the other data sets of reasoning-gym
registry.py      tasks and matchers by name

Other benchmarks come as the sample files of lm-evaluation-harness (`cme.files.lm_eval`).
"""
