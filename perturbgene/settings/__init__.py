"""Settings of every verb, from a field's declaration to its flag, its YAML key and its line on the manual page."""
