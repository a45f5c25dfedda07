"""Joint steps: the requests of all ranks of a step are computed as one.

``table`` brings the ranks together; the others are its parts, under its lock. Of a step: ``group`` (its states and
those of its ranks, and their room), ``matching`` (whether a rank fits the others), ``ahead`` (room for ranks that have
not come), ``waiting`` (the steps that wait, and how they end), ``aborted`` (a rank cannot take part), ``kept`` (answers
for ranks that ask again). Of a run: ``attendance`` (which ranks have come and left), ``out_of_step`` (ranks that wait
at different steps), ``regrouping`` (ranks that are asked to call again, with several servers). ``texts`` has what
people are told.
"""
