import io
import json
import logging
import warnings

import pytest
from rich.logging import RichHandler

from megarpt.log import setup_logging, terminal

pytestmark = pytest.mark.usefixtures("logging_as_before")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_name_time_level_and_module():
    out = io.StringIO()
    setup_logging(stream=out)
    logging.getLogger("megarpt.train").info("step %d", 3)
    logging.getLogger("megarpt.train").debug("hidden")
    line = out.getvalue()
    assert line.endswith(" INFO megarpt.train: step 3\n") and "hidden" not in line


def test_other_ranks_only_warn_and_say_who_they_are():
    out = io.StringIO()
    setup_logging(stream=out, rank=3, world_size=4)
    logging.getLogger("megarpt.train").info("hidden")
    logging.getLogger("megarpt.train").warning("seen")
    assert "hidden" not in out.getvalue() and "WARNING [rank 3] megarpt.train: seen" in out.getvalue()


def test_verbose_shows_debug_of_this_package_only():
    out = io.StringIO()
    setup_logging(stream=out, verbose=True)
    logging.getLogger("megarpt.data").debug("ours")
    logging.getLogger("elsewhere").debug("theirs")
    assert "ours" in out.getvalue() and "theirs" not in out.getvalue()


def test_json_lines_carry_the_traceback():
    out = io.StringIO()
    setup_logging(stream=out, log_format="json", rank=0)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("megarpt").exception("it failed: %s", "é")
    entry = json.loads(out.getvalue())
    assert entry["message"] == "it failed: é" and entry["level"] == "ERROR" and entry["rank"] == 0
    assert "ValueError: boom" in entry["exception"] and entry["time"].endswith("+00:00")


def test_setting_up_twice_does_not_double_lines():
    first, second = io.StringIO(), io.StringIO()
    setup_logging(stream=first)
    setup_logging(stream=second)
    logging.getLogger("megarpt").info("once")
    assert first.getvalue() == "" and second.getvalue().count("once") == 1


def test_rich_on_a_terminal_and_the_console_can_be_shared():
    setup_logging(stream=io.StringIO())
    assert terminal() is None
    out = Terminal()
    setup_logging(stream=out)
    console = terminal()
    assert console is not None and console.file is out
    assert any(isinstance(handler, RichHandler) for handler in logging.getLogger().handlers)
    logging.getLogger("megarpt").info("hello")
    assert "hello" in out.getvalue()


def test_only_the_known_library_warnings_are_silenced():
    out = io.StringIO()
    setup_logging(stream=out)
    text = "Apex is not installed. Falling back to Torch Norm"
    warnings.warn_explicit(text, UserWarning, "backends.py", 1, module="megatron.core.models.backends")
    assert out.getvalue() == ""
    warnings.warn_explicit(text, UserWarning, "other.py", 1, module="somewhere.else")
    warnings.warn_explicit("something new", UserWarning, "backends.py", 2, module="megatron.core.models.backends")
    assert "other.py:1" in out.getvalue() and "something new" in out.getvalue()
