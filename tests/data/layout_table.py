"""What each file of `layouts` says, written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_dpo.data.formats import Preference, Skipped

FOLDER = Path(__file__).parent / "layouts"
ROLES = {"system": "S", "user": "U", "assistant": "A", "tool": "O"}

SUMS, ICE, FIRE = ("U: 2 + 2?", "4", "5"), ("U: Ice is?", "cold", "warm"), ("U: Fire is?", "hot", "wet")
ICE_LATER = ("U: Hi | A: Hello! | U: Ice is?", "cold", "warm")
POST = "SUBREDDIT: r/math\n\nTITLE: Sums\n\nPOST: I add 2 and 2.\n\nTL;DR:"
LABELLED = [("U: 2 + 2?", ["4", "5"], [1, 2]), ("U: Ice is?", ["warm", "cold"], [2, 1])]
TIE = ("U: Fire is?", ["hot", "warm"], [1, 1])

# by the name of the file: what the command line would say, and what each of its rows says. Messages are `ROLE: text`,
# tools `T: name`, completions of the assistant alone their text. Pairs are (prompt, chosen, rejected), rankings
# (prompt, completions, ranks or scores or comparisons), rows that prefer nothing their reason.
EXPECTED: dict[str, tuple[str, list[Any]]] = {
    "explicit_text": (
        "Triples",
        [
            ("Q: 2 + 2?\nA:", " 4", " 5"),
            ("Q: Capital of France?\nA:", " Paris", " Lyon"),
            ("Q: Ice is?\nA:", " cold", " warm"),
        ],
    ),
    "explicit_conversations": (
        "Triples",
        [
            ("S: Be brief. | U: 2 + 2?", "4", "It is five."),
            ("U: Hi | A: Hello! | U: 2 + 2?", "4", "5"),
            ICE,
        ],
    ),
    "question_and_sides": (
        "Triples --data.format.prompt question",
        [("2 + 2?", " 4", " 5"), ("Ice is?", " cold", " warm"), ("Fire is?", " hot", " wet")],
    ),
    "implicit_prompt": (
        "ImplicitPrompt",
        [SUMS, ICE_LATER, ("U: Hi", "A: Hello! | U: Bye | A: Goodbye", "A: What? | U: Bye | A: No")],
    ),
    "ultrafeedback_binarized": ("ImplicitPrompt", [SUMS, ICE, FIRE]),
    "prompt_beside_answers": ("ImplicitPrompt", [SUMS, ICE, FIRE]),
    "typed_parts": (
        "ImplicitPrompt --data.format.chosen chosen_messages --data.format.rejected rejected_messages",
        [(f"S: Be brief. | {prompt}", *sides) for prompt, *sides in (SUMS, ICE, FIRE)],
    ),
    "transcripts": (
        "Transcripts",
        [
            SUMS,
            ICE_LATER,
            ("U: Hi", "A: Hello! | U: Bye | A: Goodbye", "A: What? | U: Never mind | A: Good"),
            "a completion is empty",
            ("U: Hi", "Hello!\n\nCan I help?", "What?"),
        ],
    ),
    "sharegpt_objects": (
        "ShareGPT",
        [SUMS, ("S: Be brief. | U: Hi | A: Hello! | U: Ice is?", "cold", "warm"), FIRE],
    ),
    "sharegpt_lists": ("ShareGPT", [("S: Be brief. | U: 2 + 2?", "4", "5"), ICE, FIRE]),
    "sharegpt_tools": (
        "ShareGPT",
        [
            ("T: add | U: 2 + 2?", "I add.", "5"),
            ("T: add | U: 2 + 2? | A: add({'a': 2}) | O: {\"sum\": 4}", "4", "5"),
            ICE,
        ],
    ),
    "when2call_pairs": (
        "ShareGPT --data.format.conversations messages --data.format.chosen chosen_response"
        " --data.format.rejected rejected_response",
        [("T: add | U: 2 + 2?", "I add.", "5"), ICE, FIRE],
    ),
    "when2call_choices": (
        "OneRight",
        [
            ("T: add | U: 2 + 2?", ["I cannot.", "4", "Which 2?", "<add>"], [(3, 0), (3, 1), (3, 2)]),
            ("U: Ice is?", ["I cannot.", "cold", "Which ice?"], [(1, 0), (1, 2)]),
            ("U: Fire is?", ["I cannot.", "wet"], [(0, 1)]),
        ],
    ),
    "alpaca": ("Alpaca", [("U: Add.\n2, 2", "4", "5"), ICE, FIRE]),
    "alpaca_history": (
        "Alpaca",
        [("S: Be brief. | U: 2 + 2? | A: 4 | U: And 3 + 3?", "6", "7"), ICE, FIRE],
    ),
    "alpaca_outputs": (
        "AlpacaOutputs",
        [
            ("U: Add.\n2, 2", ["4", "5"], [1, 2]),
            ("U: Ice is?", ["cold", "cool", "warm"], [1, 2, 3]),
            ("U: Fire is?", ["hot", "wet"], [1, 2]),
        ],
    ),
    "orca": (
        "Orca",
        [("S: Be brief. | U: 2 + 2?", "4", "It is five."), ICE, ("S: Be kind. | U: Fire is?", "hot", "wet")],
    ),
    "orca_input": (
        "Orca --data.format.question input",
        [("S: Be brief. | U: 2 + 2?", "4", "It is five."), ICE, ("S: Be kind. | U: Fire is?", "hot", "wet")],
    ),
    "stack_exchange": ("StackExchange", [SUMS, ("U: 2 + 2?", "4", "fish"), ICE]),
    "stack_exchange_scores": (
        "RankedObjects --data.format.prompt question --data.format.completions answers --data.format.text text"
        " --data.format.rank null --data.format.score pm_score",
        [
            ("U: 2 + 2?", ["4", "5", "fish"], [5, 0, 0]),
            ("U: Ice is?", ["warm", "cold"], [-1, 3]),
            TIE,
        ],
    ),
    "shp": (
        "SHP",
        [
            ("U: 2 + 2?", ["5", "4"], [2, 1]),
            ("U: Ice is?", ["cold", "warm"], [1, 2]),
            ("U: Fire is?", ["wet", "hot"], [2, 1]),
        ],
    ),
    "safe_rlhf": (
        "SafeRLHF",
        [*LABELLED, ("U: Fire is?", ["hot", "wet"], [1, 2])],
    ),
    "helpsteer2": (
        "SignedPairs",
        [
            ("U: 2 + 2?", ["4", "5"], [3, 0]),
            ("U: Ice is?", ["warm", "cold"], [0, 2]),
            ("U: Fire is?", ["hot", "warm"], [0, 0]),
            ("U: Hi | A: Hello! | U: 2 + 2?", ["5", "4"], [0, 1]),
        ],
    ),
    "helpsteer3": (
        "SignedPairs --data.format.prompt context --data.format.first response1 --data.format.second response2"
        " --data.format.preference overall_preference",
        [
            ("U: 2 + 2?", ["4", "5"], [2, 0]),
            ("U: Hi | A: Hello! | U: Ice is?", ["warm", "cold"], [0, 1]),
            ("U: Fire is?", ["hot", "warm"], [0, 0]),
        ],
    ),
    "openai": ("OpenAIPreferences", [SUMS, ICE, FIRE]),
    "nemo": (
        "RankedObjects",
        [
            ("U: 2 + 2?", ["4", "5"], [0, 1]),
            ("U: Hi | A: Hello! | U: Ice is?", ["cold", "cool", "warm"], [0, 1, 2]),
            ("U: Fire is?", ["hot", "wet"], [0, 1]),
        ],
    ),
    "nectar": (
        "RankedObjects --data.format.prompt prompt --data.format.completions answers --data.format.text answer",
        [
            ("U: 2 + 2?", ["4", "fish", "5"], [1, 3, 2]),
            ("U: Hi | A: Hello! | U: Ice is?", ["warm", "cold"], [2, 1]),
            ("U: Fire is?", ["hot", "wet"], [1, 2]),
        ],
    ),
    "ultrafeedback": (
        "RankedObjects --data.format.prompt instruction --data.format.text response --data.format.rank null"
        " --data.format.score overall_score",
        [
            ("U: 2 + 2?", ["4", "5", "4, I think", "fish"], [9, 2, 7.5, 1]),
            ("U: Ice is?", ["cold", "cool", "warm", "hot"], [8, 8, 2, 1]),
            ("U: Fire is?", ["hot", "warm", "red", "big"], [5, 5, 5, 5]),
        ],
    ),
    "webgpt": (
        "WebGPT",
        [
            ("U: 2 + 2?", ["4", "5"], [1, -1]),
            ("U: Ice is?", ["warm", "cold"], [-0.5, 0.5]),
            ("U: Fire is?", ["hot", "warm"], [0, 0]),
        ],
    ),
    "summaries": (
        "SummaryComparisons",
        [
            (POST, [" 4 comes out.", " 5 comes out."], [1, 2]),
            (POST, [" Fish.", " Someone adds."], [2, 1]),
            ("Ice is cold, they say.\n\nTL;DR:", [" Ice is cold.", " Ice is warm."], [1, 2]),
        ],
    ),
    "arena": (
        "Arena",
        [
            *LABELLED,
            TIE,
            "both completions are said to be bad",
            ("U: Hi", ["A: What? | U: Bye | A: No", "A: Hello! | U: Bye | A: Goodbye"], [2, 1]),
        ],
    ),
    "arena_columns": (
        "ArenaColumns",
        [*LABELLED, TIE, ("U: Hi", ["A: What? | U: Bye | A: No", "A: Hello! | U: Bye | A: Goodbye"], [2, 1])],
    ),
    "labelled": ("LabelledPairs", [("U: Add.\n2, 2", ["4", "5"], [1, 2]), LABELLED[1], TIE]),
    "labelled_shares": ("LabelledPairs", [*LABELLED, TIE]),
    "labelled_annotators": ("LabelledPairs", [*LABELLED, TIE]),
    "labelled_names": (
        "LabelledPairs --data.format.prompt prompt --data.format.first response_a --data.format.second response_b"
        " --data.format.label winner",
        [*LABELLED, TIE],
    ),
    "trees": (
        "Trees",
        [
            ("U: Hi", ["Hello!", "What?"], [0, 1]),
            ("U: Hi | A: Hello! | U: Ice is?", ["warm", "cold"], [1, 0]),
            ("U: Hi | A: What? | U: Fire is?", ["hot", "wet", "red"], [0, 2, 1]),
            ("U: 2 + 2?", ["4", "5"], [0, 1]),
            "no two answers are ranked",
        ],
    ),
    "rankings": (
        "Rankings",
        [
            ("2 + 2?", [" 4", " 5", " fish"], [2, 0.5, 0]),
            ("Ice is?", [" warm", " cold"], [0, 1]),
            ("Fire is?", [" hot", " warm"], [1, 1]),
        ],
    ),
}


def written(part: Any, template: Any = ()) -> str:
    """Messages as `EXPECTED` has them."""
    if isinstance(part, str):
        return part
    said = [f"T: {one['function']['name']}" for one in dict(template).get("tools", ())]
    for one in part:
        calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in one.get("tool_calls", ())]
        said.append(f"{ROLES[one['role']]}: {one['content'] or ', '.join(calls)}")
    return said[0][3:] if len(said) == 1 and part[0]["role"] == "assistant" else " | ".join(said)


def said(row: Any) -> Any:
    """What a row says as `EXPECTED` has it."""
    if isinstance(row, Skipped):
        return row.reason
    prompt = written(row.prompt, row.template)
    if isinstance(row, Preference):
        return prompt, written(row.chosen), written(row.rejected)
    worth = next(one for one in (row.scores, row.ranks, row.comparisons) if one is not None)
    return prompt, [written(one) for one in row.completions], worth


def rendered(text: str, start: bool) -> str:
    """What the tests' chat template makes of messages as `EXPECTED` has them."""
    names = {"S": "system", "T": "system", "U": "user", "A": "assistant"}
    turns = [f"<|{names[one[0]]}|>{one[3:]}<|end|>\n" for one in text.split(" | ")]
    return "".join(turns) + "<|assistant|>" * start
