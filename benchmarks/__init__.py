"""What is measured: a script a subject, each against what a user would pick instead."""
