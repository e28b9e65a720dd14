"""The verb `report`: one HTML page per question, which opens offline.

Read in this order: `report` (from a run or predictions to a page), `labels` (what the page says of a phenotype),
`statistics` (the numbers), `layout` (the map of cells), `page` (HTML, and the data of the script), and the template,
style and script in `assets`.
"""
