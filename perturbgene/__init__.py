"""BERT-style transformers on single-cell gene expression: a cell is a sentence.

Every verb is a function here, imported when used: `import perturbgene as pg; pg.predict(adata, model="runs/mlm")`.
"""

from perturbgene.lazy import lazily

__version__ = "0.1.0"

_PLACES = {
    "InputError": "perturbgene.errors:InputError",
    "load_run": "perturbgene.inference.run:load_run",
    "prepare_corpus": "perturbgene.corpus.prepare:prepare",  # `perturbgene.corpus.prepare` is the module itself
    "predict": "perturbgene.inference.predict:predict",
    "predict_table": "perturbgene.inference.predict:predict_table",
    "evaluate": "perturbgene.inference.predict:evaluate",
    "embed": "perturbgene.embedding.cells:embed",
    "gene_embeddings": "perturbgene.embedding.genes:gene_embeddings",
    "gene_network": "perturbgene.embedding.genes:gene_network",
    "gene_roles": "perturbgene.embedding.genes:gene_roles",
    "counterfactual": "perturbgene.counterfactuals.counterfactual:counterfactual",
    "perturb": "perturbgene.perturbation.perturb:perturb",
    "attribute": "perturbgene.perturbation.attribute:attribute",
}
__all__ = [*_PLACES]
__getattr__ = lazily(_PLACES)
