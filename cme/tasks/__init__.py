"""Questions whose right answers are known, by name, to measure with: nothing here is ever a reward.

questions.py     a question, a task, and the split into training and held-out questions
numbers.py       the number that a text gives
choices.py       the option that a response chooses
matchers.py      where a response's answer is, and whether it is right
expressions.py   the same for LaTeX
packaged.py      capitals, civics, symbols: from packages of the package index
generated.py     arithmetic and the other data sets of reasoning-gym
hub.py           MMLU, TriviaQA, GSM8K, MATH-500, TruthfulQA: from a hub, through `datasets`
registry.py      tasks and matchers by name
"""
