"""Joint steps: the requests of all ranks of a step are computed as one.

``table`` brings the ranks together. ``group`` holds the states of a step and of each of its ranks. ``kept`` keeps
answers for ranks that ask again. ``texts`` has what people are told.
"""
