"""The verb `report`: one HTML page per question, which opens offline.

Read in this order: `report` (which page is made of what), `corpus` (corpora), `answers` (evaluations and predictions),
`labels` (what these say of a phenotype), `statistics` (the numbers), `effects` (knock-outs and counterfactuals),
`trust` (how far to believe them), `expression` (their cells), `networks` (of genes), `layout` (the map of cells),
`page` (HTML, and the data of the script), and the templates, style and script in `assets`: `page.html.jinja` is the
frame that each page fills.
"""
