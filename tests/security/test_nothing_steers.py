"""Text of data, models and file names in a terminal: nothing in it moves, hides, colours, links or copies anything."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from lit_dpo.callbacks.texts import markdown_table, shown
from lit_dpo.cli import main
from lit_dpo.errors import printable

HOSTILE = (
    "\x1b[2J\x1b[31mred\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\ \x1b]52;c;ZXZpbA==\x07 \x9b31m \x9d52;c;a\x9c "
    "\x08\x08\r over \x7f \u202eevil\u202c \u2066a\u2069 \u061c \U000e0041\U000e0042 \x1bP$q\x1b\\ \x0e \x00 end"
)


def test_no_character_that_steers_is_left():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    for kept in (printable(every), shown(every, "utf-8").plain):
        left = {one for one in kept if unicodedata.category(one) == "Cc"}
        assert left == {"\t", "\n"}
        turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
        assert not [one for one in kept if unicodedata.bidirectional(one) in turning]


def test_a_terminal_shows_it_as_text(capsys):
    """In an emulator: the screen is what it was, nothing is coloured, no title, and the cursor is behind the text."""
    pyte = pytest.importorskip("pyte")
    screen = pyte.Screen(200, 5)
    stream = pyte.Stream(screen)
    stream.feed("before\r\n" + printable(HOSTILE).replace("\n", "\r\n"))
    assert screen.display[0].startswith("before")
    assert screen.display[1].rstrip().endswith("end")
    assert {cell.fg for row in screen.buffer.values() for cell in row.values()} == {"default"}
    assert screen.title == ""


def test_an_error_of_a_command_does_not_steer(tmp_path, capsys, monkeypatch):
    name = "\x1b]52;c;ZXZpbA==\x07\u202e.jsonl"
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path / name)])
    with pytest.raises(SystemExit):
        main([f"no{name}"])
    assert not set("\x1b\x07\u202e") & set(capsys.readouterr().err)


def test_a_table_for_a_logger_is_text_in_markdown_and_in_html():
    table = markdown_table(
        ["a"], [[HOSTILE + "<script>alert(1)</script> ![x](http://evil) **b** | `c` [d](javascript:e)"]]
    )
    row = table.splitlines()[-1]
    assert not set("<>[]()`*!") & set(row.replace("<br>", ""))
    assert row.count("|") == 2
    assert printable(row) == row
