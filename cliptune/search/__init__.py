"""Images found by a text or another image: a kept index of features, and a page to ask it.

The index is exact up to a size, then approximate with its recall said.
"""
