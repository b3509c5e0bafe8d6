"""SIGTERM and Ctrl-C: the first signal ends at the next opportunity, the second at once; no partial files remain."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from dcae_fast import interruption
from dcae_fast.files import written_atomically
from dcae_fast.interruption import Interrupted, Interruption, sigterm_interrupts


@pytest.mark.parametrize("signum", interruption.SIGNALS)
def test_the_first_signal_is_stored(signum, capfd):
    before = signal.getsignal(signum)
    with Interruption("saving") as asked:
        assert asked.signum == 0
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)  # torchrun forwards the signal at the same time
        assert asked.signum == signum
    assert capfd.readouterr().err == "\nsaving\n" and signal.getsignal(signum) == before


def test_the_second_signal_ends_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "SAME_REQUEST", 0.0)
    with pytest.raises(Interrupted) as caught, Interruption():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.signum == signal.SIGINT


def test_sigterm_leaves_no_partial_files(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(Interrupted) as caught, sigterm_interrupts(), written_atomically(tmp_path / "result") as part:
        part.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.signum == signal.SIGTERM and not list(tmp_path.iterdir())


def test_other_threads_change_nothing():
    handlers = []

    def work():
        with Interruption(), sigterm_interrupts():
            handlers.extend(map(signal.getsignal, interruption.SIGNALS))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == list(map(signal.getsignal, interruption.SIGNALS))


def test_the_exit_status_of_ctrl_c_within_an_exec(tmp_path):
    """Without the workaround in `main`, `python -m` would send itself the signal."""
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from dcae_fast import cli\n"
        "cli.parse = lambda commands, argv: lambda: exec('raise KeyboardInterrupt')\n"
        "sys.exit(cli.main([]))\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-m", "program"], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"dcae-fast: interrupted\n")
