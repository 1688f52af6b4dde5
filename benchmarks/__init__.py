"""One script a subject, each against what a user would pick instead."""
