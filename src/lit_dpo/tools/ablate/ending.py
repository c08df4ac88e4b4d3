"""What is made of all runs: tables, the page, and what the terminal shows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rich.console import Console

from lit_dpo.tools.ablate.records import Layout, Result
from lit_dpo.tools.measures.summary import summarise
from lit_dpo.tools.measures.writing import table, write
from lit_dpo.tools.reports.ablation import page
from lit_dpo.writing import written_whole

log = logging.getLogger(__name__)


def finish(layout: Layout, results: Sequence[Result]) -> None:
    """Summarise the runs in files, on a page and in the terminal.

    Raises:
        TrainingError: if the disk refuses.
    """
    import pyarrow.parquet as pq

    done = [result for result in results if result.status == "done"]
    failed = [result for result in results if result.status == "failed"]
    if done:
        pairs = {result.name: pq.read_table(layout.run(result.name) / "pairs.parquet") for result in done}
        summary = summarise(results, pairs)
        write(layout, summary, pairs)
        with written_whole(layout.root / "report.html") as temporary:
            temporary.write_text(page(summary), encoding="utf-8", newline="\n")
        Console().print(table(summary))
    for result in failed:
        log.warning("%s failed: %s (%s)", result.name, result.error, layout.run(result.name) / "log.txt")
    if done:
        log.info("report    %s", layout.root / "report.html")
        log.info("tables    %s, and pairs, runs, arms, comparisons next to it", layout.root / "report.md")
        log.info("curves    tensorboard --logdir %s", layout.root)
        log.info("adapters  %s", layout.run(done[0].name) / "adapter")
