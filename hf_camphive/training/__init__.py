"""Images, accuracy and gradient descent.

Opens datasets, measures accuracy, finetunes. May import `core` and `network`, never `pruning`. Start with
`data/loaders.py` and `finetuning.py`.
"""
