"""The inside of the toolkit: what the stages at the top level are built from.

The stages see all rooms; a room sees no stage and no settings, and other rooms only downwards (docs/ARCHITECTURE.md).
"""
