"""The README's section "A cluster" has the commands that the test of the cluster types, and no others."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def readme_commands() -> set[str]:
    """But for the setting of a variable, which every command of the test has."""
    section = (ROOT / "README.md").read_text().partition("## A cluster\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.S)
    lines = [re.sub(r"\s+# .*", "", line) for block in blocks for line in block.splitlines()]
    return {line for line in lines if not line.startswith("export ")}


def typed_commands() -> set[str]:
    """The words in every `user("…")` and `user.start("…")`."""
    tree = ast.parse((ROOT / "tests" / "cluster" / "test_ray_up.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) in ("user", "user.start")}


def test_the_readme_says_what_is_typed():
    assert typed_commands() == readme_commands()
