"""Command line: run a verb, print its answer or why there is none, and return the exit status."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from typing import Any

from vimoe import process
from vimoe.errors import ConfigError, FolderError, Stopped, VimoeError, nearest
from vimoe.files import printable
from vimoe.parallel import launcher
from vimoe.run_folder import SCHEMA
from vimoe.stopping import interrupting
from vimoe.verbs import SHARED, VERBS

_MACHINE_ERRORS = {  # errors of disks, permissions and file names, which are no bugs: reported in one line
    getattr(errno, name, 0)
    for name in ("EACCES", "EPERM", "ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EIO", "ENAMETOOLONG", "ESTALE", "EMFILE")
}


def main(argv: list[str] | None = None) -> int:
    """Run `vimoe VERB ...` and return the exit status: 0, or 2 after a mistake of the user."""
    argv = sys.argv[1:] if argv is None else argv
    as_json = "--json" in argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that it cannot encode should not end the command
        sys.stdout.reconfigure(errors="backslashreplace")
    with interrupting() as stop:
        try:
            if argv[:1] and argv[0] in SHARED and (status := launcher.starts(argv)) is not None:
                return status
            answer = _answer(argv, as_json)
            if process.writes():
                print(answer, flush=True)
        except BrokenPipeError:  # the reader has closed the pipe, such as head
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115,PTH123  Python flushes it at exit
            return 141  # 128 + SIGPIPE, which Windows has not
        except Stopped as stopped:
            _say(str(stopped))
            return stopped.status
        except KeyboardInterrupt as interrupt:
            _say("interrupted")
            return 128 + (stop.signal or next(iter(interrupt.args), signal.SIGINT))
        except Exception as error:
            if stop.signal:  # a library took the interrupt for an error of its own
                _say("interrupted")
                return 128 + stop.signal
            _say(_reason(error), as_json)
            return 2
    return 0


def _say(message: str, as_json: bool = False) -> None:
    """Print why the command ends; of several processes, one does."""
    if not process.speaks():
        return
    if as_json:
        with suppress(OSError):  # standard output itself may be full
            print(json.dumps({"error": message}), flush=True)
    print(f"vimoe: {message}", file=sys.stderr)


def _reason(error: Exception) -> str:
    """Return the line for a mistake of the user, a machine that is full, or another process; else raise the error."""
    if isinstance(error, VimoeError):
        return _one_line(error)
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
        return _one_line(_machine_error(error))
    if process.others_ended(error):
        return "another process of the job has ended, or is not heard of: expected all; start the job again"
    raise error


def _machine_error(error: OSError) -> FolderError:
    """Return an error of a disk, permission or file name as a one-line FolderError with a remedy."""
    where = error.filename if error.filename is not None else "a file or folder"
    remedies = {errno.ENAMETOOLONG: "choose a shorter name", errno.ENOSPC: "make room", errno.EDQUOT: "make room"}
    remedy = remedies.get(error.errno or 0, "make room, or mend permissions")
    return FolderError(f"{where} cannot be used ({error.strerror or error}); {remedy}")


def _one_line(error: Exception) -> str:
    """Return the message of an error; of a data worker's traceback, the last line."""
    message = str(error)
    if "Traceback (most recent call last)" in message:
        message = [line for line in message.split("\n") if line.strip()][-1]
        message = message.partition("Error: ")[2] if message.startswith("vimoe.errors.") else message
    return printable(message)  # file names may contain line ends


def _answer(argv: list[str], as_json: bool) -> str:
    """Run the verb and return the text to print."""
    if not argv or argv[0] in ("-h", "--help"):
        return _overview()
    if argv[0] == "--version":
        from vimoe import __version__

        return __version__
    if argv[0] not in VERBS:
        raise ConfigError(f"unknown verb {argv[0]!r}: {nearest(argv[0], VERBS)}")
    if argv[0] not in SHARED and process.launched() > 1:
        raise ConfigError(
            f"vimoe {argv[0]} in {process.launched()} processes: expected 1, since only {', '.join(SHARED)} share "
            f"their work; start it without a launcher"
        )
    _log_to_stderr()
    text, values = VERBS[argv[0]](argv[1:])
    return json.dumps({"schema": SCHEMA, "command": argv[0], **values}) if as_json else text


def _overview() -> str:
    lines = ["usage: vimoe VERB [--config FILE.yaml] [--section.option value ...] [--json]", ""]
    lines += [f"  {name:<10}{(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", "See vimoe VERB --help for the options of a verb."])


class _Stderr(logging.StreamHandler):
    """Handler that looks up sys.stderr at each message: a progress bar that redirects it stays intact."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _value: Any) -> None:
        pass


def _log_to_stderr() -> None:
    if not sys.stderr.isatty():  # no progress bar is shown, so the log has the progress
        logging.getLogger("vimoe").setLevel(logging.INFO)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, handlers=[_Stderr()])
    logging.getLogger("huggingface_hub").propagate = False  # it prints its own lines
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"


if __name__ == "__main__":
    sys.exit(main())
