"""The verb `embed`: hidden states of cells (`cells`), and mean embeddings of genes and their networks (`genes`)."""
