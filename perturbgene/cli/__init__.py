"""The command line: what can be said, and how it is read.

Each option is declared once, for the command line and the Python function. Read `verbs` first (one class per verb),
then `training` and `base` (what verbs share), `options` (what an option is, and its checks) and `parsing` (text and
YAML in, settings or a manual page out).
"""
