"""What README.md, CONTRIBUTING.md and docs/ show runs, prints what they say, and leads where they say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ("contract", "masks", "backends", "integrations", "traps", "context_parallel", "estimates")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in DOCS))
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LONGEST_EXAMPLE = 10  # lines of code in the first one


def code_in(text: str) -> str:
    """The fenced blocks and the code spans of a document: where commands are."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join(blocks + spans)


def anchors_of(text: str) -> set[str]:
    """The anchors that the headings of a document get."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_is_a_short_example_of_use():
    lines = [line for line in EXAMPLES[0].splitlines() if line.strip()]
    assert "flash_attention(" in EXAMPLES[0]
    assert len(lines) <= LONGEST_EXAMPLE


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_prints_what_its_comments_say(code, tmp_path):
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    promised = re.findall(r"^print\(.*\)  # (.+)$", code, re.MULTILINE)
    assert promised
    printed = run.stdout.splitlines()
    assert [line for line in printed if line in promised] == promised, printed


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [target for rule in re.findall(r"^([\w%. -]+):(?!=)", makefile, re.MULTILINE) for target in rule.split()]
    patterns = [re.escape(target).replace("%", ".+") for target in targets]
    named = set(re.findall(r"\bmake ([\w.-]+)", code_in((ROOT / document).read_text(encoding="utf-8"))))
    assert {"demo", "test"} <= named or document.startswith("docs/")
    assert [name for name in named if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_to_run_exist(document):
    named = set(re.findall(r"\bpython -m ([\w.]+)", code_in((ROOT / document).read_text(encoding="utf-8"))))
    assert "flash_attend" in named or document != "README.md"
    for name in named:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.submodule_search_locations is None or importlib.util.find_spec(f"{name}.__main__"), name


def test_files_named_exist():
    """Documents that name files which are gone mislead: every path in a code span is a file or folder here."""
    text = "\n".join((ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS)
    paths = {
        span for span in re.findall(r"`([\w./-]*/[\w./-]*)`", text) if span.split("/")[0] not in ("build", ".venv")
    }
    modules = set(re.findall(r"`([\w-]+\.(?:py|md|toml))`", text))
    assert paths
    assert modules
    assert [path for path in paths if not (ROOT / path).exists()] == []
    folders = [ROOT, *(ROOT / name for name in ("flash_attend", "kernels", "benchmarks", "docs"))]
    assert [name for name in modules if not any((folder / name).exists() for folder in folders)] == []
