"""The backends, one folder each. Files that do the same thing have the same name in each folder.

Each folder has a ``compute`` module with a function ``compute(plan, batch, ...) -> Computed``. Only
``lovasz.core.dispatch`` decides which backend computes a batch.
"""
