"""`lit-dpo completion`: a script for bash or zsh that completes commands, options and shipped files.

It is text, without a program behind it: a Tab answers at once, where starting Python and Lightning takes seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lit_dpo.commands import COMMANDS, FIRST, TOOLS
from lit_dpo.shipped import files, folder

_BASH = """\
# bash: put this line into ~/.bashrc
#   source <(lit-dpo completion bash)
_lit_dpo() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word"))
    return
  fi
  case "$command $before" in
{values}
    *" configs") COMPREPLY=($(compgen -W "show copy" -- "$word")); return ;;
    "configs show") COMPREPLY=($(compgen -W "{names}" -- "$word")); return ;;
    *" completion") COMPREPLY=($(compgen -W "bash zsh" -- "$word")); return ;;
  esac
  case "$command" in
    {lightning})
      if [[ "$word" == -* ]]; then
        COMPREPLY=($(compgen -W "{options}" -- "$word"))
        return
      fi ;;
  esac
  COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _lit_dpo lit-dpo
"""
_ZSH = "# zsh: put this line into ~/.zshrc, after compinit\n#   source <(lit-dpo completion zsh)\n"


def main(args: Sequence[str]) -> None:
    """Run `lit-dpo completion`.

    Args:
        args: the command line after `completion`.
    """
    parser = argparse.ArgumentParser(
        prog="lit-dpo completion",
        description="Print a script that completes commands and options: source <(lit-dpo completion bash)",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(script(parser.parse_args(args).shell), end="")


def script(shell: str) -> str:
    """Write the script; zsh reads bash's, through a function of its own that comes with it."""
    options = {option for option, *_ in FIRST} | {
        f"--{name}" for name in ("config", "print_config", "help", "plan", "model.help", "data.help", "model.loss.help")
    }
    values = "\n".join(
        f'    *" {option}") COMPREPLY=($(compgen -W "{" ".join(choices)}" -- "$word")); return ;;'
        for option, choices in _choices().items()
    )
    text = _BASH.format(
        commands=" ".join([*COMMANDS, *TOOLS]),
        names=" ".join(str(file.relative_to(folder()).with_suffix("")) for file in files()),
        lightning="|".join(COMMANDS),
        options=" ".join(sorted(options)),
        values=values,
    )
    if shell == "bash":
        return text
    return f"{_ZSH}autoload -U +X bashcompinit && bashcompinit\n{text.partition('completion bash)')[2].lstrip()}"


def _choices() -> dict[str, list[str]]:
    """Say what may stand after an option; a loss is named by its fragment, which says more than its class."""
    where = {"--model.loss": "losses", "--model.reference": "references"}
    found = {
        option: [f"configs/{kind}/{one.name}" for one in files() if one.parent.name == kind]
        for option, kind in where.items()
    }
    found["--model.policy.quantization"] = ["nf4", "int8", "none"]
    found["--model.lr_scheduler"] = ["linear", "cosine", "constant", "wsd"]
    found["--trainer.precision"] = ["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
    return found
