"""BERT-style transformers on single-cell gene expression: a cell is a sentence.

Every verb is a function here, imported when used: `import perturbgene as pg; pg.predict(adata, model="runs/mlm")`.
"""

from perturbgene.lazy import lazily

__version__ = "0.1.0"

_PLACES = {
    "InputError": "perturbgene.errors:InputError",
    "load_run": "perturbgene.runs:load_run",
    "prepare_corpus": "perturbgene.prepare:prepare",  # `perturbgene.prepare` is the module itself
    "predict": "perturbgene.inference:predict",
    "predict_table": "perturbgene.inference:predict_table",
    "evaluate": "perturbgene.inference:evaluate",
    "embed": "perturbgene.embedding:embed",
    "gene_embeddings": "perturbgene.embedding:gene_embeddings",
    "gene_network": "perturbgene.embedding:gene_network",
    "counterfactual": "perturbgene.counterfactual:counterfactual",
    "perturb": "perturbgene.perturbation:perturb",
    "attribute": "perturbgene.attribution:attribute",
}
__all__ = [*_PLACES]
__getattr__ = lazily(_PLACES)
