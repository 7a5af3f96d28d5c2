"""Questions whose right answers are known, by name, to measure with: nothing here is ever a reward.

questions.py     a question, a task, and the split into training and held-out questions
matchers.py      where a response's answer is, and whether it is right
packaged.py      capitals, civics, symbols: from packages of the package index
generated.py     arithmetic and the other data sets of reasoning-gym
hub.py           MMLU, TriviaQA, GSM8K, MATH-500, TruthfulQA: from a hub, through `datasets`
registry.py      all of them by name
"""
