"""What a run looks like to a person: one page, drawn from recorded files.

It computes nothing that a run has not recorded, and asks nothing of a network.
"""
