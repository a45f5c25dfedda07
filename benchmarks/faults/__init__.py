"""The long forms of the attacks in ``tests/faults``: minutes of load on a real server, with a table and a plot."""
