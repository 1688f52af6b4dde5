"""A checkpoint in the forms that other libraries load.

Each form is loaded by its library in a process of its own and compared before it is announced.
"""
