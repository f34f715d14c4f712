"""How the programs of `python -m benchmarks` are found."""

import importlib

import pytest

from benchmarks.__main__ import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_program_is_there(name, capsys):
    pytest.importorskip("triton" if name in ("tune", "host") else "torch")
    module, meaning = COMMANDS[name]
    assert callable(importlib.import_module(f"benchmarks.{module}").run)
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: python -m benchmarks {name}" in printed
    assert meaning in " ".join(printed.split())


def test_unknown_programs_are_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["plot"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("'plot'", *COMMANDS))


def test_no_program_shows_the_help(capsys):
    assert main([]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(f"{name} {meaning}" in error for name, (_, meaning) in COMMANDS.items())
