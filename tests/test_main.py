"""The command line: exit codes, clean errors, help without torch, and memory that is kept or returned."""

import errno
import io
import logging
import os
import re
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

import perturbgene as pg
from perturbgene import VERBS, __version__
from perturbgene.configs import CONFIGS, parse_args
from perturbgene.errors import original_text
from perturbgene.main import (
    MOST_LOGS_OF_A_KIND,
    FewOfAKind,
    main,
    verb_function,
    write_report,
)

DOWNLOAD = ["download", "https://host/a.h5ad"]


@pytest.fixture
def verb(tmp_path, monkeypatch):
    """Let `download` run a function whose body the test writes."""

    def install(body: str) -> list[str]:
        (tmp_path / "verb_under_test.py").write_text(f"def run_download(config):\n    {body}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "verb_under_test", raising=False)
        monkeypatch.setitem(VERBS, "download", ("verb_under_test", "download"))
        return DOWNLOAD

    return install


def in_new_process(*tokens: str, code: str = "") -> subprocess.CompletedProcess:
    program = ["-c", code] if code else ["-m", "perturbgene.main"]
    return subprocess.run([sys.executable, *program, *tokens], capture_output=True, text=True, timeout=60)


def test_processes_started_together_close_their_connections_before_they_end(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import atexit, sys, torch.distributed as dist, perturbgene.main as ours\n"
        "dist.init_process_group('gloo')\n"
        "atexit.register(lambda: print('open' if dist.is_initialized() else 'closed'))\n"
        "sys.argv[1:] = ['--version']\n"
        "ours.cli()"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("closed"), done.stdout.count("open")) == (2, 0)


NONSENSE = [
    "mlmm",
    "--seed 1",
    "mlm",
    "mlm --corpus c",
    "mlm --corpus c --output_dir r --unknown 1",
    "mlm --corpus c --output_dir r --seed",
    "mlm --corpus c --output_dir r --seed x",
    "mlm --corpus c --output_dir r --seed=1.5",
    "mlm --corpus c --output_dir r stray",
    "mlm --corpus c --output_dir r -x",
    "mlm --corpus c --output_dir r ---",
    "mlm --corpus c --output_dir r --=1",
    "mlm --corpus c --output_dir r --warmup_ratio 0.1",
    "mlm --corpus c --output_dir r --evaluation_strategy steps",
    "mlm --corpus c --output_dir r --gene_mask_prob -0.1",
    "mlm --corpus c --output_dir r --bin_edges 2 1",
    "mlm --corpus c --output_dir r --bin_edges",
    "mlm --corpus c --output_dir r --bin_edges ,",
    "mlm --corpus c --output_dir r --config nowhere.yaml",
    "mlm --corpus c --output_dir r --report_to paper",
    "mlm --corpus c --output_dir r --fsdp_config {1",
    "mlm --corpus c --train_data_paths a --output_dir r",
    "cls --corpus c --output_dir r",
    "cls --corpus c --output_dir r --phenotype_category a --gene_mask_prob 0.1",
    "prepare --output c",
    "prepare a.h5ad",
    "prepare a.h5ad --output c --eval_fraction 2",
    "evaluate",
    "evaluate run more",
    "predict run in.h5ad",
    "predict run in.h5ad --output in.h5ad",
    "download",
    "download nothing",
    "download https://host/a.h5ad --retries -1",
    "--debug predict",
]


MISSING = [
    "mlm --corpus nowhere --output_dir r",
    "predict nowhere in.h5ad --output o.h5ad",
    "evaluate nowhere",
    "prepare nowhere.h5ad --output c",
    "mlm --corpus c --output_dir r --pretrained_model_path ./nowhere",
]


@pytest.mark.parametrize("line", NONSENSE)
def test_nonsense_ends_with_code_2_and_one_line(line, capsys):
    assert main([token for token in line.split() if token != "--debug"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_a_mistake_leaves_no_traceback_in_the_terminal():
    done = in_new_process("evaluate", "--batch_size", "0", "run")
    assert (done.returncode, done.stdout) == (2, "")
    message = "batch_size is 0, but it must be in [1, inf). Change --batch_size."
    assert done.stderr == f"error: {message} [docs/faq.md#but-it-must-be-in]\n"


def test_debug_shows_the_traceback(capsys):
    assert main(["evaluate", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_nothing_given_shows_the_verbs_and_fails(capsys):
    assert main([]) == 2
    assert "Usage" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"perturbgene {__version__}\n"


@pytest.mark.parametrize("tokens", [["-h"], *([verb, "-h"] for verb in CONFIGS)], ids=lambda tokens: tokens[0])
def test_help_goes_to_stdout_and_succeeds(tokens, capsys):
    assert main(tokens) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_waiting_threads_soon_sleep_unless_the_user_decides(given, spins, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, given.get(name, ""))
        if name not in given:
            monkeypatch.delenv(name)
    assert main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys, perturbgene.main as m; m.main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'anndata', 'numpy'} & set(sys.modules)))"
    )
    assert in_new_process("mlm", "-h", code=code).stdout.endswith("\n[]\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert in_new_process("mlm", "-h").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # the processor's time, whatever else it has to do
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m perturbgene.main mlm -h | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_messages_that_nobody_reads_change_no_exit_code():
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "perturbgene.main", "predict", "nowhere", "in.h5ad", "--output", "o.h5ad"]
    done = subprocess.run(words, stderr=writing, stdout=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_verb_gets_its_settings_and_ends_with_0(verb, tmp_path):
    tokens = verb(f"open({str(tmp_path / 'seen')!r}, 'w').write(config.sources[0])")
    assert main(tokens) == 0
    assert (tmp_path / "seen").read_text() == "https://host/a.h5ad"


def test_a_mistake_found_by_a_verb_is_one_line(verb, capsys):
    assert main(verb("from perturbgene.errors import InputError; raise InputError('a\\nb')")) == 2
    assert capsys.readouterr().err == "error: a b\n"


def test_an_interrupt_ends_with_130(verb, capsys):
    assert main(verb("raise KeyboardInterrupt")) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_our_own_faults_keep_their_traceback(verb):
    with pytest.raises(ZeroDivisionError, match="division"):
        main(verb("1 / 0"))


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 8 bytes."
IN_WORKER = "Caught {0} in DataLoader worker process 1.\\nTraceback:\\n  File a\\n{0}: {1}\\n"
MANY = IN_WORKER.format("OSError", "[Errno 24] Too many")
SHARED = "unable to resize file </torch_7_8_9> to the right size: No space left on device (28)"
BAD = IN_WORKER.format("InputError", "bad cell")


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise OSError(28, 'No space left on device', 'o.h5ad')", 3, "No space left on device: o.h5ad. Make room"),
        ("raise OSError(24, 'Too many open files', 'a.h5ad')", 3, "Too many open files: a.h5ad. Allow more"),
        ("raise Exception('I/O error: No space left (os error 28)')", 3, "No space left on device. Make room"),
        ('raise OSError("Can\'t close file (file write failed: errno = 28, error message = ...")', 3, "No space left"),
        (f"raise RuntimeError({SHARED!r})", 3, "No space left on device (28). Allow more shared memory (--shm-size"),
        ("raise MemoryError", 3, "memory ran out. Free memory"),
        (f"raise RuntimeError({ALLOCATOR!r})", 3, "allocate memory: 8 bytes. Free memory"),
        (f"raise OSError('{MANY}')", 3, "Too many open files. Allow more"),
        ("raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')", 3, "(pid 7) is killed"),
        ("open('/nowhere/else')", 2, "/nowhere/else cannot be used (No such file or directory)"),
    ],
)
def test_an_error_of_the_machine_is_one_line_and_code_3(body, code, line, verb, capsys):
    assert main(verb(body)) == code
    error = capsys.readouterr().err
    assert line in error and error.startswith("error: ") and error.count("\n") == 1
    if code == 3:
        assert error.startswith("error: download stopped: ")
        assert re.search(r", then run the same command again\. \[docs/faq\.md#[a-z-]+\]\n$", error)


def test_an_output_on_a_full_disk_is_the_machines_fault(verb, capsys):
    body = (
        "from perturbgene.errors import InputError; error = InputError('o cannot be written'); "
        "error.__cause__ = OSError(28, 'No space left on device'); raise error"
    )
    assert (main(verb(body)), capsys.readouterr().err) == (3, "error: o cannot be written\n")


def test_a_page_that_the_machine_cannot_write_is_a_warning_and_our_own_faults_are_none(monkeypatch, caplog):
    config = parse_args(["prepare", "cells.h5ad", "--output", "corpus", "--phenotypes", "cell_type"])
    for error in (OSError(errno.ENOSPC, "No space left on device"), ZeroDivisionError("ours")):
        monkeypatch.setattr("perturbgene.reports.corpus.report_of", Mock(side_effect=error))
        with pytest.raises(ZeroDivisionError) if isinstance(error, ZeroDivisionError) else nullcontext():
            write_report(config)
    assert caplog.text.count("no report is written: ") == 1


def test_a_mistake_that_a_loader_worker_finds_is_one_line_without_its_traceback(verb, capsys):
    body = f"from perturbgene.errors import InputError; raise InputError('{BAD}')"
    assert (main(verb(body)), capsys.readouterr().err) == (2, "error: bad cell\n")


def test_an_exit_code_of_a_verb_is_kept(verb):
    with pytest.raises(SystemExit, match="143"):
        main(verb("raise SystemExit(143)"))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_function_of_a_verb_exists(name):
    assert callable(verb_function(name))


def test_ten_thousand_files_do_not_say_the_same_ten_thousand_times() -> None:
    few = FewOfAKind()
    records = [
        logging.LogRecord("perturbgene.data_utils.shards", logging.INFO, "", 0, "%s has no sex", (number,), None)
        for number in range(10_000)
    ]
    shown = [record.getMessage() for record in records if few.filter(record)]
    assert len(shown) == MOST_LOGS_OF_A_KIND
    assert shown[0] == "0 has no sex"
    assert shown[-1] == f"{MOST_LOGS_OF_A_KIND - 1} has no sex (further messages of this kind are left out)"


def test_the_same_message_about_a_file_comes_once_and_of_other_things_each_time() -> None:
    few = FewOfAKind()
    for name, expected in (("perturbgene.data_utils.shards", [True, False]), ("perturbgene.training", [True, True])):
        record = logging.LogRecord(name, logging.INFO, "", 0, "%s lacks %d", ("a.h5ad", 4), None)
        assert [few.filter(record), few.filter(record)] == expected


@pytest.mark.parametrize("line", [f"{verb} --nonsense 1" for verb in CONFIGS] + MISSING)
def test_a_mistake_is_answered_before_torch_is_imported(line: str) -> None:
    code = (
        "import sys, perturbgene.main as m; code = m.main(sys.argv[1:]); "
        "print(code, sorted({'torch', 'transformers', 'anndata', 'numpy'} & set(sys.modules)))"
    )
    assert in_new_process(*line.split(), code=code).stdout == "2 []\n"


def test_of_several_processes_only_the_first_prints(verb, capsys, monkeypatch) -> None:
    tokens = verb("import logging; logging.getLogger('perturbgene').warning('log'); return 'done'")
    monkeypatch.setenv("RANK", "1")
    assert (main(tokens), main(["predict"]), tuple(capsys.readouterr())) == (0, 2, ("", ""))
    monkeypatch.setenv("RANK", "0")
    assert (main(tokens), capsys.readouterr().out) == (0, "done\n")


def test_an_error_of_another_process_names_it(verb, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(verb("from perturbgene.errors import InputError; raise InputError('a')")) == 2
    assert capsys.readouterr().err == "process 1: error: a\n"


def test_messages_go_to_the_stream_that_a_notebook_names(monkeypatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    pg.set_up_logging(stream)
    logging.getLogger("perturbgene.inference").info("as the commands say it")
    assert stream.getvalue() == "as the commands say it\n"


def test_bars_and_idle_warnings_of_transformers_are_off() -> None:
    code = (
        "import perturbgene.main as ours; ours.set_up_logging(); from transformers.utils import logging as theirs; "
        "from transformers.distributed import tensor_parallel; tensor_parallel.logger.warning('not sharded'); "
        "print(theirs.is_progress_bar_enabled())"
    )
    done = in_new_process(code=code)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_blanks_in_a_message_stay_and_lines_are_joined() -> None:
    assert original_text(ValueError("'T  cell' and\n  'T cell' \n\n are two")) == "'T  cell' and 'T cell' are two"
