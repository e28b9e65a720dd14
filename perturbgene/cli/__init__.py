"""The command line: what can be said, and how it is read.

Options are declared once, for the command line and the Python functions. Read `verbs` first, then `training` (what mlm
and cls share); the other files read text and YAML into those dataclasses.
"""
