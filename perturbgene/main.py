"""The command line: read the settings, call the verb, turn a user's mistake into one clean line.

Owns exit codes, logging to the terminal, settings of C libraries (memory, threads) and all printing; the module of a
verb is imported when it is called. Of several processes that `torchrun` starts, only the first prints and logs.
"""

import importlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from perturbgene import VERBS, __version__
from perturbgene.configs import BaseConfig, HelpRequested, overview, parse_args
from perturbgene.errors import (
    EXIT_FAILED,
    FilesRefusedError,
    InputError,
    RunFailedError,
    StoppedError,
    original_text,
    system_error,
)
from perturbgene.faq import pointer
from perturbgene.files import open_file_limit
from perturbgene.heap import keep_freed_memory, return_large_pieces

TRAINING_VERBS = ("mlm", "cls")
#: Verbs that ask a model about any number of cells; their memory must not grow with this number.
ASKING_VERBS = ("evaluate", "predict", "embed", "counterfactual", "attribute", "perturb")
EXIT_USAGE = 2
# As a shell reports a process that a signal has ended: 128 + SIGINT, 128 + SIGPIPE.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
# `--debug` alone is ours; before one of these words it is the field of TrainingArguments.
TRAINER_DEBUG_WORDS = ("underflow_overflow", "tpu_metrics_debug")
MOST_LOGS_OF_A_KIND = 20
#: More descriptors than any verb needs, and fewer than macOS allows.
MOST_DESCRIPTORS = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, that of this process by default.

    Returns:
        Exit code: 0 done, 2 the user's mistake, 3 the machine's fault (a full disk, no memory, a killed process) or a
        run that cannot continue, 128 + n stopped by signal n with everything saved, 130 interrupted, 141 the reader of
        the output went away.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # half of a character, of a damaged file, cannot be printed as it is
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    pairs = zip(words, [*words[1:], ""], strict=False)
    tokens = [word for word, next_word in pairs if word != "--debug" or next_word in TRAINER_DEBUG_WORDS]
    try:
        return run(tokens)
    except StoppedError as stop:
        if str(stop) and is_first_process():
            print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        report("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return EXIT_BROKEN_PIPE
    except Exception as error:
        code, line = explain(error, verb=tokens[0] if tokens else "")
        if isinstance(error, FilesRefusedError) and is_first_process():
            print(error.report, flush=True)
        if len(tokens) < len(words):
            traceback.print_exc()
        report(f"error: {line}{pointer(line)}")
        return code


def explain(error: Exception, *, verb: str) -> tuple[int, str]:
    """Return the exit code and the line for an error of the user or of the machine; raise any other, which is ours."""
    failure = system_error(error)
    if isinstance(error, RunFailedError):
        return EXIT_FAILED, original_text(error)
    if isinstance(error, InputError):  # one that says which output it was may come from a full disk
        is_machine = isinstance(error.__cause__, OSError) and isinstance(failure, RunFailedError)
        return EXIT_FAILED if is_machine else EXIT_USAGE, original_text(error)
    if isinstance(failure, InputError):
        return EXIT_USAGE, str(failure)
    if failure is None:
        raise error
    again = "continue with --resume_from_checkpoint" if verb in TRAINING_VERBS else "run the same command again"
    return EXIT_FAILED, f"{verb} stopped: {failure}, then {again}."


def is_first_process() -> bool:
    """Return whether this process may print; `torchrun` numbers its processes in RANK."""
    return os.environ.get("RANK", "0") == "0"


def report(line: str) -> None:
    """Print a line to stderr; other processes than the first name themselves, in case only they have failed."""
    prefix = "" if is_first_process() else f"process {os.environ['RANK']}: "
    print(f"{prefix}{line}", file=sys.stderr)


def run(tokens: Sequence[str]) -> int:
    """Answer help and version, or parse the settings and call the verb."""
    # Before torch is imported: threads that wait for each other spin for a moment and then sleep. By default they spin
    # 60 times as long, and beside other work two threads took up to 50 times as long as one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    if not tokens:
        print(overview(), file=sys.stderr)
        return EXIT_USAGE
    if tokens[0] == "--version":
        print(f"perturbgene {__version__}", flush=True)
        return 0
    try:
        config = parse_args(tokens)
        config.check_machine()
    except HelpRequested as page:
        print(page, flush=True)
        return 0
    except InputError:
        if is_first_process():  # every process has the same command line
            raise
        return EXIT_USAGE
    set_up_logging()
    open_file_limit(most=MOST_DESCRIPTORS)
    if config.verb == "merge":
        config = verb_function("merge")(config)  # the command that was divided, which finds its pieces now
    if config.verb in TRAINING_VERBS:
        keep_freed_memory()
    if config.verb in ASKING_VERBS:
        return_large_pieces()
    outcome = verb_function(config.verb)(config)
    if isinstance(outcome, str | Path) and is_first_process():
        print(outcome, flush=True)
    is_part = getattr(config, "part", None) is not None  # the report comes with the merge
    if getattr(config, "report", False) and not is_part and is_first_process():
        write_report(config)
    return 0


def write_report(config: BaseConfig) -> None:
    """Write the page about what a verb has just written; the verb has done its work even if that fails."""
    kind = "corpus" if config.verb == "prepare" else "report"  # the former loads no model
    try:
        print(importlib.import_module(f"perturbgene.reports.{kind}").report_of(config), flush=True)
    except Exception as error:
        failure = error if isinstance(error, InputError) else system_error(error)
        if failure is None:
            raise
        logging.getLogger(__name__).warning("no report is written: %s", failure)


def verb_function(verb: str) -> Callable[[BaseConfig], Any]:
    """Import `run_VERB` from the verb's module; only now, so that help pages need no torch."""
    return getattr(importlib.import_module(VERBS[verb][0]), f"run_{verb}")


class FewOfAKind(logging.Filter):
    """Shows only the first messages of one wording about files, since a corpus may have ten thousand files.

    The same message comes once: a verb opens the cells again for every baseline.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.shown = Counter[str](), set[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide on one message; the last one that is shown says that more follow."""
        if record.name.startswith("perturbgene.data_utils"):
            if (text := record.getMessage()) in self.shown:
                return False
            self.counts[str(record.msg)] += 1
            if self.counts[str(record.msg)] <= MOST_LOGS_OF_A_KIND:
                self.shown.add(text)
        count = self.counts[str(record.msg)]
        if count == MOST_LOGS_OF_A_KIND:
            record.msg, record.args = f"{record.getMessage()} (further messages of this kind are left out)", None
        return count <= MOST_LOGS_OF_A_KIND


def set_up_logging(stream: TextIO | None = None) -> None:
    """Send our messages to stderr or a stream from INFO on, and of other libraries only warnings one can act on.

    In a notebook, `pg.set_up_logging(sys.stdout)` shows what the commands say; without it, only warnings are seen.
    """
    is_first = is_first_process()
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=stream or sys.stderr)
        logging.getLogger().handlers[0].addFilter(FewOfAKind())
    logging.getLogger("perturbgene").setLevel(logging.INFO if is_first else logging.ERROR)
    logging.captureWarnings(True)
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning) if is_first else (Warning,):
        warnings.simplefilter("ignore", category)
    # Bars of single files ("Loading weights", "Writing model shards"): transformers asks huggingface_hub.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # "The following layers were not sharded", about a way of sharding that we do not use.
    logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)


class LastingOutput(io.FileIO):
    """A file descriptor to which writing never fails: when its reader is gone (ssh, tee), what follows goes nowhere."""

    def write(self, data: Any) -> int:
        """Write bytes; returns how many were taken."""
        try:
            return super().write(data)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def outlive_stderr() -> None:
    """Let messages be lost rather than end a run, whose checkpoints and results do not depend on them."""
    with suppress(OSError, AttributeError, io.UnsupportedOperation):  # it was closed from the beginning
        raw = LastingOutput(sys.stderr.fileno(), "w", closefd=False)
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(raw), sys.stderr.encoding, "backslashreplace", line_buffering=True
        )


def cli() -> None:
    """Run `main` as the console script and exit with its code.

    Processes that `torchrun` started on the CPU end at the same time, with their connections closed: the first still
    writes when the others are done, and uses connections that would close if they ended first. After an error they may
    be waiting elsewhere for this process, and its end ends them.
    """
    outlive_stderr()
    code = main()
    distributed: Any = sys.modules.get("torch.distributed")  # a verb that needs no torch has not imported it
    is_one_of_many = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if code == 0 and is_one_of_many and distributed.get_backend() == "gloo":
        with suppress(RuntimeError):  # the partners did not arrive before the timeout
            distributed.barrier()
        distributed.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    cli()
