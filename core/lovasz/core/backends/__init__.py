"""The ways to compute a batch, one folder each, with the same file names where they do the same thing.

Each folder's ``compute`` module has one function, ``compute(plan, ...) -> Computed``; ``lovasz.core.dispatch`` alone
decides which of them a batch takes.
"""
