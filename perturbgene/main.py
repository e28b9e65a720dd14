"""The command line: reads the settings, calls the verb, turns a user's mistake into one clean line.

Owns exit codes, logging to the terminal and all printing; leaves every verb to its own module, imported when called.
"""

import importlib
import logging
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from perturbgene import __version__
from perturbgene.configs import BaseConfig, HelpRequested, overview, parse_args
from perturbgene.errors import InputError, RunFailedError, StoppedError
from perturbgene.heap import keep_freed_memory, return_large_pieces

VERB_FUNCTIONS = {
    "prepare": "perturbgene.corpus.prepare:run_prepare",
    "mlm": "perturbgene.training.train:run_mlm",
    "cls": "perturbgene.training.train:run_cls",
    "evaluate": "perturbgene.inference.predict:run_evaluate",
    "predict": "perturbgene.inference.predict:run_predict",
    "embed": "perturbgene.embedding.cells:run_embed",
    "counterfactual": "perturbgene.counterfactuals.counterfactual:run_counterfactual",
    "attribute": "perturbgene.perturbation.attribute:run_attribute",
    "perturb": "perturbgene.perturbation.perturb:run_perturb",
    "download": "perturbgene.data_utils.download:run_download",
}
TRAINING_VERBS = ("mlm", "cls")
#: Verbs that ask a model about any number of cells, whose memory must not grow with these.
ASKING_VERBS = ("evaluate", "predict", "embed", "counterfactual", "attribute", "perturb")
EXIT_USAGE = 2
EXIT_FAILED = 3
# As a shell reports a process that a signal has ended: 128 + SIGINT, 128 + SIGPIPE.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
# `--debug` alone is ours; before one of these words it is the field of TrainingArguments.
TRAINER_DEBUG_WORDS = ("underflow_overflow", "tpu_metrics_debug")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: Tokens after the program's name; those of this process by default.

    Returns:
        Exit code: 0 done, 2 the user's mistake, 3 the run cannot go on, 128 + n stopped by signal n with everything
        saved, 130 interrupted, 141 the reader of the output went away.
    """
    tokens, is_debugging = take_debug(sys.argv[1:] if argv is None else argv)
    try:
        return run(tokens)
    except (InputError, RunFailedError) as error:
        if is_debugging:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, InputError) else EXIT_FAILED
    except StoppedError as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        return EXIT_BROKEN_PIPE


def run(tokens: Sequence[str]) -> int:
    """Answer help and version, or parse the settings and call the verb."""
    if not tokens:
        print(overview(), file=sys.stderr)
        return EXIT_USAGE
    if tokens[0] == "--version":
        print(f"perturbgene {__version__}", flush=True)
        return 0
    try:
        config = parse_args(tokens)
    except HelpRequested as page:
        print(page, flush=True)
        return 0
    set_up_logging()
    if config.verb in TRAINING_VERBS:
        keep_freed_memory()
    if config.verb in ASKING_VERBS:
        return_large_pieces()
    outcome = verb_function(config.verb)(config)
    if isinstance(outcome, str | Path):
        print(outcome, flush=True)
    return 0


def part_together() -> None:
    """Let processes that `torchrun` started on the CPU end at the same time, with their connections closed.

    The first rank still writes when the others are done; ended before it, they would close connections under it. One
    that waits in vain, for as long as a collective may take, leaves alone.
    """
    distributed = sys.modules.get("torch.distributed")  # a verb that needs no torch has not imported it
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_backend() == "gloo":
        with suppress(RuntimeError):
            distributed.barrier()
        distributed.destroy_process_group()


def take_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Take our ``--debug`` out of the tokens.

    Example:
        >>> take_debug(["mlm", "--debug", "--seed", "1"])
        (['mlm', '--seed', '1'], True)
    """
    kept = [
        token
        for i, token in enumerate(argv)
        if token != "--debug" or (i + 1 < len(argv) and argv[i + 1] in TRAINER_DEBUG_WORDS)
    ]
    return kept, len(kept) < len(argv)


def verb_function(verb: str) -> Callable[[BaseConfig], object]:
    """Import the function of a verb; only now, so that help pages need no torch."""
    module_name, function_name = VERB_FUNCTIONS[verb].split(":")
    return getattr(importlib.import_module(module_name), function_name)


class FewOfAKind(logging.Filter):
    """Lets the first `most` messages of one wording about files pass, then says once that more are left out."""

    def __init__(self, most: int = 20) -> None:
        super().__init__()
        self.most, self.counts = most, Counter[tuple[str, str]]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide on one message; ten thousand files would otherwise say the same ten thousand times."""
        if not record.name.startswith("perturbgene.data_utils"):
            return True
        kind = (record.name, str(record.msg))
        self.counts[kind] += 1
        if self.counts[kind] == self.most + 1:
            record.msg = f"{record.getMessage()} (and so on: further messages of this wording are left out)"
            record.args = None
        return self.counts[kind] <= self.most + 1


def set_up_logging() -> None:
    """Send our messages to stderr from INFO on, those of libraries from WARNING on."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger().handlers[0].addFilter(FewOfAKind())
    logging.getLogger("perturbgene").setLevel(logging.INFO)
    logging.captureWarnings(True)
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)


def silence_stdout() -> None:
    """Point stdout to nowhere, so that Python's flush at exit does not complain about the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cli() -> None:
    """Console script: `main` with its exit code."""
    code = main()
    if code == 0:  # else the others may be waiting for this one elsewhere, and its end ends them
        part_together()
    sys.exit(code)


if __name__ == "__main__":
    cli()
