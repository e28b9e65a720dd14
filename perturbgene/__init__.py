"""BERT-style transformers on single-cell gene expression: a cell is a sentence.

Every verb is a function here: `import perturbgene as pg; pg.predict(adata, model="runs/mlm")`. The module behind a name
is imported when the name is used, which keeps `import perturbgene` and the help pages free of torch.
"""

import importlib
from typing import Any

from perturbgene.auto import register_when_imported
from perturbgene.errors import did_you_mean

__version__ = "0.1.0"

register_when_imported()

#: Function -> the module that has it, and the verb whose options it takes. `main` calls `run_VERB` of the same module.
VERBS = {
    "prepare": ("perturbgene.corpus.prepare", "prepare"),
    "check": ("perturbgene.inference.check", "check"),
    "mlm": ("perturbgene.training.train", "mlm"),
    "cls": ("perturbgene.training.train", "cls"),
    "evaluate": ("perturbgene.inference.evaluate", "evaluate"),
    "predict": ("perturbgene.inference.predict", "predict"),
    "predict_table": ("perturbgene.inference.predict", "predict"),
    "embed": ("perturbgene.embedding.cells", "embed"),
    "gene_embeddings": ("perturbgene.embedding.genes", "embed"),
    "gene_network": ("perturbgene.embedding.genes", "embed"),
    "gene_roles": ("perturbgene.embedding.genes", "embed"),
    "counterfactual": ("perturbgene.counterfactuals.counterfactual", "counterfactual"),
    "perturb": ("perturbgene.perturbation.perturb", "perturb"),
    "attribute": ("perturbgene.perturbation.attribute", "attribute"),
    "merge": ("perturbgene.functions", "merge"),
    "report": ("perturbgene.reports.report", "report"),
    "download": ("perturbgene.data_utils.download", "download"),
}
#: Anything else -> the module that has it.
_OTHERS = {
    "InputError": "perturbgene.errors",
    "Run": "perturbgene.inference.run",
    "load_run": "perturbgene.inference.run",
    "set_up_logging": "perturbgene.main",
    "GeneTokenizer": "perturbgene.data_utils.tokenization",
    "IterableAnnDataset": "perturbgene.data_utils.iterable_ann_dataset",
    "DataCollatorForPhenotypicMLM": "perturbgene.data_utils.data_collators",
    "collate_fn_wrapper": "perturbgene.data_utils.data_collators",
    "GeneBertConfig": "perturbgene.model",
    "GeneBertModel": "perturbgene.model",
    "GeneBertForPhenotypicMLM": "perturbgene.model",
    "GeneBertForClassification": "perturbgene.model",
    "PositionlessEmbeddings": "perturbgene.model",
}
__all__ = [*VERBS, *_OTHERS]


def __getattr__(name: str) -> Any:
    place = {"prepare_corpus": "prepare"}.get(name, name)  # its older name
    if place in VERBS:
        from perturbgene.functions import as_function

        module, verb = VERBS[place]
        value = as_function(getattr(importlib.import_module(module), place), verb)
    elif place in _OTHERS:
        value = getattr(importlib.import_module(_OTHERS[place]), place)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. {did_you_mean(name, __all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
