"""The joint loss of the ranks of a process group of ``torch.distributed``: one loss over all their pixels, no server.

``group`` (a process group, and what its ranks exchange), ``header`` (what a rank tells the others before it sends
pixels), ``pixels`` (tensors as bytes, and back), ``joint`` (the steps of a call), ``absence`` (a rank whose data have
ended).
"""
