"""The benchmark suite: ``lstm-fast bench``.

``cases`` says what is measured, ``rivals`` against what, ``runner`` how, ``limits`` how fast this machine could be at
best, ``training`` what it means for a model; ``report`` renders and compares recorded runs.
"""
