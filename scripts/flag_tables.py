"""Tables of docs/flags.md, from the parsers themselves: scripts/flag_tables.py prints them, with --write it puts them there."""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SCRIPTS = ("train", "sample", "sample_ddp", "evaluate", "encode_latents", "export", "measure_loss", "reconstruct_ema")
SCRIPTS += ("sweep", "app", "experiments/ladder")


def parser_of(script):
    """That of a script's flags; script: its path, without the ending."""
    return importlib.import_module(script.replace("/", ".")).make_parser()


def subparsers(parser):
    """{subcommand: parser}, or {"": parser} where there are none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {"": parser}


def words(default):
    """As they are typed."""
    return " ".join(map(str, default)) if isinstance(default, list) else default


def default_of(action):
    if action.required:
        return "required"
    if action.default is None or action.default is False or action.default is argparse.SUPPRESS:
        return ""
    if action.default == [None]:
        return ""
    return f"`{words(action.default)}`"


def table(script):
    """Markdown rows of one script; a flag of one subcommand alone, or with a default of its own there, says so."""
    parsers = subparsers(parser_of(script))
    rows = {}
    for mode, parser in parsers.items():
        for action in parser._actions:
            if action.option_strings and "--help" not in action.option_strings:
                key = (" ".join(f"`{flag}`" for flag in action.option_strings), default_of(action), action.help)
                rows.setdefault(key, []).append(mode)
    lines = [f"<details><summary><code>{script}.py</code></summary>", "", "| flag | default | meaning |", "|---|---|---|"]
    for (flags, default, meaning), modes in rows.items():
        only = f" ({modes[0]})" if len(modes) < len(parsers) else ""
        lines.append(f"| {flags}{only} | {default} | {meaning.replace('|', ', ')} |")
    return "\n".join([*lines, "", "</details>"])


def tables():
    return "\n".join(table(script) for script in SCRIPTS)


def write(path):
    """Put the tables in the place of those in a file."""
    text = path.read_text()
    first, last = text.index("<details><summary><code>train.py"), text.rindex("</details>") + len("</details>")
    path.write_text(text[:first] + tables() + text[last:])


if __name__ == "__main__":
    if "--write" in sys.argv:
        write(Path(__file__).resolve().parent.parent / "docs" / "flags.md")
    else:
        print(tables())
