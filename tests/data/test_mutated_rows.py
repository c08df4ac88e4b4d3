"""600 broken rows for each reader: each is read as it says, or refused with file, row and field; nothing dies."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from layout_table import FOLDER
from mutations import mutated

import ranks
from lit_dpo import PreferenceDataModule
from lit_dpo.data.comparisons import Comparing
from lit_dpo.data.encoding import _spread, read_checked
from lit_dpo.data.formats import PreferenceFormat, Skipped
from lit_dpo.data.formats.recognition import recognise, unread
from lit_dpo.data.sources import Unread, load_rows
from lit_dpo.data.truncation import Dropped
from lit_dpo.errors import DataError

LAYOUTS = sorted(path.stem for path in FOLDER.glob("*.jsonl"))
ROWS = 600


def made(name: str, count: int) -> tuple[PreferenceFormat, list[str]]:
    """The format of a layout, and lines of broken rows of it."""
    rows = [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]
    rng = random.Random(name)
    return recognise(name, rows), [mutated(rng, rng.choice(rows)) for _ in range(count)]


def said(line: str) -> dict | None:
    """What a line says, by Python alone; None if that is no object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_row_is_read_or_refused(name: str, tmp_path: Path) -> None:
    format, lines = made(name, ROWS)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (source,) = load_rows(str(path), None, keep_bad=True)
    assert len(source.rows) == ROWS
    for line, row in zip(lines, source.rows.each(), strict=True):
        if isinstance(row, Unread):
            assert row.reason
        else:
            there = {key: value for key, value in row.items() if value is not None}
            wanted = {key: value for key, value in (said(line) or {}).items() if value is not None and key}
            assert repr(there) == repr({key: wanted[key] for key in there})
            assert len(there) == len(wanted)
    spread = _spread(source, format)
    results = [read_checked(row, format, Comparing()) for row in spread.rows.each()]
    bad = [one.reason for one in results if isinstance(one, Dropped) and one.fatal]
    assert 0 < len(bad) < len(results)
    for reason in bad:
        assert "cannot read it" not in reason  # an error that nobody has thought of
        assert any(word in reason for word in ("`", "no JSON", "completions", "ranks", "levels", "surrogate", "digits"))


def test_what_is_left_is_encoded(tmp_path: Path, tools_folder: str) -> None:
    """All layouts, through the whole way: bad rows are those that the readers refuse, or that no template renders."""
    for name in LAYOUTS[::4]:
        format, lines = made(name, 60)
        path = tmp_path / f"{name}.jsonl"
        path.write_text((FOLDER / f"{name}.jsonl").read_text() + "".join(f"{line}\n" for line in lines), "utf-8")
        options = {"tokenizer": tools_folder, "format": format, "max_length": None, "on_bad_row": "drop"}
        there = load_rows(str(path), None, keep_bad=True)[0].rows.column_names
        options["ignore_columns"] = unread(format, there)  # such as a `system` that was put in
        module = PreferenceDataModule(train=str(path), **options)
        module.setup("fit")
        table = module._table("train")
        assert table.size + table.dropped.total() == table.total
        for row in table.rows:
            assert not isinstance(format.read(table.sources[0].rows[int(row)]), Skipped)


def test_broken_cells(tmp_path: Path) -> None:
    """Cells of `.csv` as they are, or one line that says why not."""
    rng = random.Random(0)
    cells = [["q", "a, b", 'c "d"'], ["multi\nline", "é", "None"], ["", "x", "y"]]
    right = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in cells]
    for number in range(100):
        lines = [rng.choice(right) for _ in range(20)]
        for place in rng.sample(range(20), 8):
            line = lines[place]
            at = rng.randrange(len(line))
            lines[place] = line[:at] + rng.choice(["", '"', ",", "\n", "\x00", "\r", "é", ";", '""']) + line[at + 1 :]
        path = tmp_path / f"{number}.csv"
        path.write_text("prompt,chosen,rejected\n" + "".join(lines), encoding="utf-8", newline="")
        rows: Iterable[Any] = ()
        try:
            rows = load_rows(str(path), None, keep_bad=True)[0].rows.each()
        except DataError as error:
            assert f"`{path}` cannot be read: line " in str(error)  # noqa: PT017 - it may be refused
        for row in rows:
            assert isinstance(row, Unread) or (len(row) == 3 and all(isinstance(cell, str) for cell in row.values()))


def _deep(cache, paths):
    """How many rows each file has, or that it is refused."""
    datasets.config.HF_DATASETS_CACHE = cache
    found = []
    for path in paths:
        try:
            found.append(str(len(load_rows(str(path), None, keep_bad=True)[0].head(9))))
        except DataError:
            found.append("refused")
    return found


def test_deep_rows_do_not_end_the_process(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    files = []
    for levels in (150, 10_000):
        for number, text in enumerate(("[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels)):
            deep = good[:-1] + ', "unused": ' + text + "}"
            nested = (
                (".jsonl", f"{good}\n{deep}\n{good}\n"),
                (".json", f"[{good},{deep},{good}]"),
                (".json.json", f'{{"data": [{good},{deep},{good}]}}'),
            )
            alone = (  # brackets, whatever is nested in the others
                (".csv", f'prompt,chosen,rejected\na,b,c\n"{"[" * levels}",x,y\n'),
                ("open.jsonl", f'{good}\n{{"prompt": {"[" * levels}\n{good}\n'),
                ("open.json", f"[{good}, {'[' * levels}"),
            )
            for suffix, content in (*nested, *(alone if number == 0 else ())):
                path = tmp_path / f"{levels}-{number}{suffix}"
                path.write_text(content)
                files.append(path)
    (counts,) = ranks.run(_deep, 1, tmp_path / "cache", files, folder=tmp_path / "log", seconds=300)
    found = dict(zip([file.name for file in files], counts, strict=True))
    for name, count in found.items():
        shallow, kind = name.startswith("150-"), name.partition("-")[2][1:]
        wanted = {"open.json": "refused", "open.jsonl": "2", ".csv": "2"}.get(kind, "3" if shallow else "2")
        assert count == wanted, name
