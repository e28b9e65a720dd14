"""BERT-style transformers on single-cell gene expression: a cell is a sentence.

Every verb is a function here: `import perturbgene as pg; pg.predict(adata, model="runs/mlm")`. The module behind a name
is imported when the name is used, which keeps `import perturbgene` and the help pages free of torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "InputError": "perturbgene.errors:InputError",
    "load_run": "perturbgene.inference.run:load_run",
    "prepare": "perturbgene.corpus.prepare:prepare",
    "predict": "perturbgene.inference.predict:predict",
    "predict_table": "perturbgene.inference.predict:predict_table",
    "evaluate": "perturbgene.inference.evaluate:evaluate",
    "embed": "perturbgene.embedding.cells:embed",
    "gene_embeddings": "perturbgene.embedding.genes:gene_embeddings",
    "gene_network": "perturbgene.embedding.genes:gene_network",
    "gene_roles": "perturbgene.embedding.genes:gene_roles",
    "counterfactual": "perturbgene.counterfactuals.counterfactual:counterfactual",
    "perturb": "perturbgene.perturbation.perturb:perturb",
    "attribute": "perturbgene.perturbation.attribute:attribute",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
