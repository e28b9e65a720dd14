"""transformers' Auto classes: `AutoModel.from_pretrained(run)` works after `import perturbgene`.

Owns the registration of our classes at the moment when transformers' Auto classes are imported; the classes themselves
are in `model` and `data_utils`.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELS, TOKENIZERS = "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"


def register_tokenizer() -> None:
    """Register the tokenizer for the models' configuration."""
    from transformers import AutoTokenizer

    from perturbgene.data_utils.tokenization import GeneTokenizer
    from perturbgene.model.config import GeneBertConfig

    AutoTokenizer.register(GeneBertConfig, GeneTokenizer, exist_ok=True)


class After(MetaPathFinder):
    """Calls a function as soon as a module has been imported, at once if it is there already."""

    def __init__(self, module: str, call: Callable[[], object]) -> None:
        self.module, self.call = module, call
        if module in sys.modules:
            call()
        else:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the other finders find the module, and add the call to its execution."""
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                self.call()

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register our classes when transformers' Auto classes are imported."""
    After(MODELS, lambda: importlib.import_module("perturbgene.model"))  # they register themselves
    After(TOKENIZERS, register_tokenizer)
