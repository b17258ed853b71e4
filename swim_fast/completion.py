"""Shell completion of `swim-fast`: jobs, flags and choices, as text that the shell reads once.

Made of the parser, so it needs no dependency, and pressing Tab starts no Python (argcomplete would, for half a second).
"""

import argparse

Tree = dict[str, list[str]]

_BASH = """\
_swim_fast() {{
    local at="" word words="" index
    for ((index = 1; index < COMP_CWORD; index++)); do
        word="${{COMP_WORDS[index]}}"
        case "${{at:+$at }}$word" in {paths}) at="${{at:+$at }}$word" ;; esac
    done
    case "$at" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o bashdefault -o default -F _swim_fast swim-fast
"""
_FISH = """\
function __swim_fast_at
    string join ' ' -- (commandline -opc)[2..]
end
"""


def collect_words(parser: argparse.ArgumentParser, path: str = "") -> Tree:
    """Return, for every path of jobs such as "data check" ("" at the top), the words that may follow it."""
    tree: Tree = {path: []}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            tree[path] += action.choices
            for name, child in action.choices.items():
                tree |= collect_words(child, f"{path} {name}".strip())
        elif action.help != argparse.SUPPRESS:
            tree[path] += [flag for flag in action.option_strings if flag.startswith("--")]
            if not action.option_strings and str(action.metavar).startswith("{"):
                tree[path] += action.metavar.strip("{}").split(",")
    return tree


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that teaches a shell, "bash", "zsh" or "fish", the words of a parser."""
    tree = collect_words(parser)
    if shell == "fish":
        return _FISH + "".join(f"{line}\n" for path, words in tree.items() for line in _fish_lines(path, words))
    paths = "|".join(f'"{path}"' for path in tree if path)
    cases = "\n".join(f'        "{path}") words="{" ".join(words)}" ;;' for path, words in tree.items())
    zsh = "autoload -Uz bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return zsh + _BASH.format(paths=paths, cases=cases)


def _fish_lines(path: str, words: list[str]) -> list[str]:
    flags = [word for word in words if word.startswith("--")]
    lines = []
    if len(words) > len(flags):
        others = " ".join(word for word in words if word not in flags)
        lines.append(f"complete -c swim-fast -f -n 'test (__swim_fast_at) = \"{path}\"' -a '{others}'")
    condition = f'string match -q -- "{path}*" (__swim_fast_at)' if path else 'test (__swim_fast_at) = ""'
    return lines + [f"complete -c swim-fast -n '{condition}' -l {flag[2:]}" for flag in flags]
